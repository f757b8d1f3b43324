"""Training: the same step as inference, with gradients."""

from thl_engine.train.loop import Evaluation, evaluate, train
from thl_engine.train.options import TrainOptions

__all__ = ["Evaluation", "TrainOptions", "evaluate", "train"]
