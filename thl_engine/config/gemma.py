"""What the configurations of Gemma-3n and Gemma 4 have in common: windows, and keys and values that layers share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from thl_engine.config.base import Config, require, require_counts

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class GemmaConfig(Config, ABC):
    """The fields that both have, and what is asked of a layer."""

    layers: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_size: tuple[int, ...]
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float  # of the layers with full attention
    rope_local_base_freq: float  # of those with a sliding window
    sliding_window: int
    layer_types: tuple[str, ...]
    num_kv_shared_layers: int
    final_logit_softcapping: float | None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "vocab_size_per_layer_input",
            "hidden_size",
            "num_attention_heads",
            "max_position_embeddings",
            "sliding_window",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_counts(self, "num_hidden_layers")
        self.require_layers("intermediate_size", "layer_types")
        require(min(self.intermediate_size) >= 1, "intermediate_size", self.intermediate_size, "entries of at least 1")
        require(
            set(self.layer_types) <= {SLIDING, FULL},
            "layer_types",
            self.layer_types,
            f"entries of {SLIDING!r} or {FULL!r}",
        )
        require(self.rms_norm_eps >= 0.0, "rms_norm_eps", self.rms_norm_eps, "0 or more")
        for name in ("rope_theta", "rope_local_base_freq"):
            require(getattr(self, name) > 0.0, name, getattr(self, name), "more than 0")
        cap = self.final_logit_softcapping
        require(cap is None or cap > 0.0, "final_logit_softcapping", cap, "null (no capping) or more than 0")
        own = self.own_layers
        require(
            0 <= self.num_kv_shared_layers and own >= 1 and set(self.layer_types[own:]) <= set(self.layer_types[:own]),
            "num_kv_shared_layers",
            self.num_kv_shared_layers,
            "0 or more, with a layer of each shared type before the shared layers",
        )

    def require_layers(self, *names: str) -> None:
        """Raises ConfigError unless those fields have an entry for each layer."""
        for name in names:
            values = vars(self)[name]
            require(
                len(values) == self.num_hidden_layers,
                name,
                values,
                f"{self.num_hidden_layers} entries (num_hidden_layers)",
            )

    @property
    def own_layers(self) -> int:
        """Layers, the first ones, that have keys and values of their own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def kv_source(self, i: int) -> int:
        """The layer whose keys and values layer `i` reads: itself, or the last one of its type that has its own."""
        own = self.own_layers
        return i if i < own else next(j for j in reversed(range(own)) if self.layer_types[j] == self.layer_types[i])

    def window(self, i: int) -> int | None:
        """Positions that layer `i` sees, None for all."""
        return self.sliding_window if self.layer_types[i] == SLIDING else None

    @abstractmethod
    def heads(self, i: int) -> tuple[int, int]:
        """Of layer `i`: the key/value heads, and the features of a head."""

    def rotation(self, i: int) -> tuple[float, float]:
        """Of layer `i`: the base of the rotary frequencies, and the share of a head's features that is rotated."""
        return (self.rope_theta if self.layer_types[i] == FULL else self.rope_local_base_freq), 1.0

    def keys_are_values(self, i: int) -> bool:
        """Whether layer `i` projects its keys and values with one matrix."""
        return False
