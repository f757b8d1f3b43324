"""Training: the same step as inference, with gradients."""

from thl_engine.train.loop import evaluate, train
from thl_engine.train.options import TrainOptions
from thl_engine.train.run import Evaluation

__all__ = ["Evaluation", "TrainOptions", "evaluate", "train"]
