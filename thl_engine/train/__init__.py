"""Training: the same step as inference, with gradients."""

from typing import TYPE_CHECKING, Any

from thl_engine.train.options import TrainOptions

if TYPE_CHECKING:
    from thl_engine.train.loop import evaluate, train
    from thl_engine.train.resume import Evaluation

__all__ = ["Evaluation", "TrainOptions", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    # The options are plain data, which `thl train --help` shows; what trains brings torch with it.
    if name in ("evaluate", "train"):
        from thl_engine.train import loop

        return getattr(loop, name)
    if name == "Evaluation":
        from thl_engine.train.resume import Evaluation

        return Evaluation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
