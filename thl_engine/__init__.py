"""Runs language models larger than your memory by paging weights through a budget, on a schedule known in advance."""

from typing import TYPE_CHECKING, Any

from thl_engine.errors import BudgetError, CheckpointError, ConfigError, DeviceError, EngineError, TokenizerError

if TYPE_CHECKING:
    from thl_engine.engine.engine import Engine
    from thl_engine.engine.generation import Piece

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineError",
    "Piece",
    "TokenizerError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # The engine brings torch with it, seconds that `thl --help` and a mistyped option should not take.
    if name in ("Engine", "Piece"):
        from thl_engine.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
