"""Runs big hierarchical models within a small memory budget by paging int8 weights on a schedule known in advance."""

from thl_engine.engine import Engine, Piece
from thl_engine.errors import BudgetError, CheckpointError, ConfigError, EngineError, TokenizerError

__version__ = "0.1.0"
__all__ = ["BudgetError", "CheckpointError", "ConfigError", "Engine", "EngineError", "Piece", "TokenizerError",
           "__version__"]
