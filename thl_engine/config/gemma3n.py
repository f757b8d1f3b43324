"""Configuration of Gemma-3n's text decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thl_engine.config.base import require
from thl_engine.config.gemma import FULL, SLIDING, GemmaConfig
from thl_engine.config.published import gemma3n_fields


@dataclass(frozen=True)
class Gemma3nConfig(GemmaConfig):
    """The text decoder of Gemma-3n (Transformers 5.23.0). The defaults are the published E4B size."""

    model_type: ClassVar[str] = "gemma3n"
    signature: ClassVar[frozenset[str]] = frozenset({"altup_num_inputs", "laurel_rank"})
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"altup_coef_clip", "altup_lr_multiplier", "attention_dropout", "initializer_range", "query_pre_attn_scalar"}
    )
    training: ClassVar[frozenset[str]] = frozenset({"altup_coef_clip", "altup_lr_multiplier", "attention_dropout"})

    vocab_size: int = 262400
    vocab_size_per_layer_input: int = 262144
    hidden_size: int = 2048
    hidden_size_per_layer_input: int = 256
    intermediate_size: tuple[int, ...] = (16384,) * 35
    num_hidden_layers: int = 35
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 256
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6  # of the layers with full attention
    rope_local_base_freq: float = 1e4  # of those with a sliding window
    sliding_window: int = 512
    layer_types: tuple[str, ...] = ((SLIDING,) * 4 + (FULL,)) * 7
    num_kv_shared_layers: int = 15
    final_logit_softcapping: float | None = 30.0
    altup_num_inputs: int = 4
    altup_active_idx: int = 0
    altup_correct_scale: bool = True
    laurel_rank: int = 64
    activation_sparsity_pattern: tuple[float, ...] = (0.95,) * 10 + (0.0,) * 25

    @classmethod
    def published(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return gemma3n_fields(values, where)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "hidden_size_per_layer_input",
            "num_key_value_heads",
            "head_dim",
            "altup_num_inputs",
            "laurel_rank",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: the rotary embedding pairs features")
        self.require_layers("activation_sparsity_pattern")
        require(
            all(0.0 <= share < 1.0 for share in self.activation_sparsity_pattern),
            "activation_sparsity_pattern",
            self.activation_sparsity_pattern,
            "entries of at least 0 and less than 1",
        )
        require(self.altup_num_inputs <= 64, "altup_num_inputs", self.altup_num_inputs, "at most 64")
        require(
            0 <= self.altup_active_idx < self.altup_num_inputs,
            "altup_active_idx",
            self.altup_active_idx,
            f"one of the altup_num_inputs ({self.altup_num_inputs}) inputs, counted from 0",
        )

    def heads(self, i: int) -> tuple[int, int]:
        return self.num_key_value_heads, self.head_dim
