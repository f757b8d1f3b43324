"""Configuration of HIM."""

from dataclasses import dataclass
from typing import ClassVar

from thl_engine.config.base import Config, require, require_counts

HIM_POSITIONS = 512  # rows of the published position table, whatever max_seq_len is


@dataclass(frozen=True)
class HIMConfig(Config):
    """An encoder with shared memory that answers many positions at once (HIM). Defaults: the 7M model."""

    model_type: ClassVar[str] = "him"
    signature: ClassVar[frozenset[str]] = frozenset({"mem_slots", "reasoning_tokens"})
    ignored: ClassVar[frozenset[str]] = frozenset({"dropout"})
    training: ClassVar[frozenset[str]] = ignored
    layers: ClassVar[tuple[str, ...]] = ("num_encoder_layers",)

    vocab_size: int = 32000
    embed_dim: int = 160
    num_heads: int = 8
    num_kv_heads: int = 2
    num_encoder_layers: int = 10
    dim_feedforward: int = 320
    max_answer_len: int = 64
    mem_slots: int = 16
    mem_rank: int = 16
    reasoning_tokens: int = 64
    max_seq_len: int = HIM_POSITIONS

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_heads",
            "num_kv_heads",
            "dim_feedforward",
            "max_answer_len",
            "mem_slots",
            "mem_rank",
            "reasoning_tokens",
            "max_seq_len",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_counts(self, "num_encoder_layers")
        require(
            self.embed_dim >= 64 and self.embed_dim % 2 == 0,
            "embed_dim",
            self.embed_dim,
            "even and at least 64, the features that reasoning reads",
        )
        require(
            self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"a multiple of num_heads ({self.num_heads})",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        require(self.mem_rank <= self.embed_dim, "mem_rank", self.mem_rank, f"at most embed_dim ({self.embed_dim})")
        require(
            self.max_seq_len <= HIM_POSITIONS,
            "max_seq_len",
            self.max_seq_len,
            f"at most {HIM_POSITIONS}, the positions that the model has",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.embed_dim // self.num_heads
