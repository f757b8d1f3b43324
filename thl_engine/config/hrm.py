"""Configuration of HRM-text."""

from dataclasses import dataclass
from typing import ClassVar

from thl_engine.config.base import LARGEST, Config, require, require_counts


@dataclass(frozen=True)
class HRMConfig(Config):
    """Two recurrent transformer modules with adaptive halting (HRM-text). `expansion` sets the inner width."""

    model_type: ClassVar[str] = "hrm"
    signature: ClassVar[frozenset[str]] = frozenset({"L_layers", "H_layers", "hidden_size"})
    # The published model reads none of these; the last three say what a checkpoint is to be grown to.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"max_seq_len", "halt_exploration_prob", "forward_dtype", "new_vocab_size", "new_L_layers", "new_H_layers"}
    )
    training: ClassVar[frozenset[str]] = frozenset({"halt_exploration_prob"})

    layers: ClassVar[tuple[str, ...]] = ("L_layers", "H_layers")

    vocab_size: int = 100
    hidden_size: int = 256
    num_heads: int = 8
    L_layers: int = 3
    H_layers: int = 3
    expansion: float = 2.5
    halt_max_steps: int = 16

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_counts(self, "L_layers", "H_layers", "halt_max_steps")
        require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_heads ({self.num_heads})",
        )
        require(
            self.head_dim % 2 == 0,
            "hidden_size",
            self.hidden_size,
            f"an even number of features for each of num_heads ({self.num_heads}), not {self.head_dim}: the "
            "rotary embedding pairs them",
        )
        require(
            self.expansion > 0 and 1 <= self.expansion * self.hidden_size * 2 / 3 < LARGEST,
            "expansion",
            self.expansion,
            f"large enough for one inner feature of hidden_size ({self.hidden_size}) and no larger than any real model",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_size(self) -> int:
        """Inner features of the feed-forward parts: two thirds of `expansion`, rounded up to a multiple of 256."""
        return 256 * -(-int(self.expansion * self.hidden_size * 2 / 3) // 256)
