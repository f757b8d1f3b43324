"""Configuration of THL."""

from dataclasses import dataclass
from typing import ClassVar

from thl_engine.config.base import Config, require, require_counts


@dataclass(frozen=True)
class THLConfig(Config):
    """Hierarchical recurrent tiers with a slot memory (THL 0.2.0). Sizes are counts of features unless noted."""

    model_type: ClassVar[str] = "thl"
    signature: ClassVar[frozenset[str]] = frozenset({"tier_dims", "tier_timescales"})
    # Published fields that change nothing at inference; accepted so that published files load unchanged.
    ignored: ClassVar[frozenset[str]] = frozenset({"router_load_balance_lambda", "write_rate", "hidden_dim", "device"})
    training: ClassVar[frozenset[str]] = frozenset({"router_load_balance_lambda"})
    layers: ClassVar[tuple[str, ...]] = ("num_tiers",)

    vocab_size: int = 50257
    embedding_dim: int = 768
    num_tiers: int = 3
    tier_dims: tuple[int, ...] = (768, 768, 768)
    tier_timescales: tuple[int, ...] = (1, 8, 64)
    local_window: int = 64
    memory_slots: int = 1024
    memory_dim: int = 768
    query_dim: int = 64
    value_dim: int = 768
    num_heads: int = 4
    head_dim: int = 64
    read_topk: int = 4
    load_penalty: float = 0.1
    read_ema_decay: float = 0.99
    read_slot_capacity: int | None = None
    write_slots: int = 1
    memory_decay: float = 0.9995
    write_clip_max: float = 1.0
    write_ema_decay: float = 0.99
    novelty_beta: float = 8.0
    novelty_theta: float = 0.3
    stale_weight: float = 1.0
    underuse_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "embedding_dim",
            "memory_slots",
            "memory_dim",
            "query_dim",
            "value_dim",
            "num_heads",
            "head_dim",
            "read_topk",
            "write_slots",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_counts(self, "num_tiers")
        require(self.local_window >= 0, "local_window", self.local_window, "0 or more")
        for name in ("tier_dims", "tier_timescales"):
            values = getattr(self, name)
            require(len(values) == self.num_tiers, name, values, f"{self.num_tiers} entries (num_tiers)")
            require(min(values) >= 1, name, values, "entries of at least 1")
        require(self.tier_timescales[0] == 1, "tier_timescales", self.tier_timescales, "1 for the first tier")
        require(
            self.value_dim % self.num_heads == 0,
            "value_dim",
            self.value_dim,
            f"a multiple of num_heads ({self.num_heads})",
        )
        for name in ("read_topk", "write_slots"):
            require(
                getattr(self, name) <= self.memory_slots,
                name,
                getattr(self, name),
                f"at most memory_slots ({self.memory_slots})",
            )
        capacity = self.read_slot_capacity
        require(capacity is None or capacity >= 1, "read_slot_capacity", capacity, "null or at least 1")
        for name in ("read_ema_decay", "write_ema_decay", "memory_decay"):
            require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "between 0 and 1")

    @property
    def state_dim(self) -> int:
        """Features of all tiers together, the width that the output head reads."""
        return sum(self.tier_dims)
