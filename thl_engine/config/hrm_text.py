"""Configuration of HRM-Text as transformers publishes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thl_engine.config.base import LARGEST_CYCLES, Config, require, require_counts
from thl_engine.config.published import hrm_text_fields


@dataclass(frozen=True)
class HRMTextConfig(Config):
    """Two stacks of transformer blocks that a token passes again and again (HRM-Text, transformers 5.24.0).

    The defaults are the sizes of `sapientinc/HRM-Text-1B`: those of transformers' configuration, but for vocabulary and
    context, which the model card gives as 65,536 and 4,096.
    """

    model_type: ClassVar[str] = "hrm_text"
    signature: ClassVar[frozenset[str]] = frozenset({"H_cycles", "L_cycles"})
    ignored: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    training: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    layers: ClassVar[tuple[str, ...]] = ("num_layers_per_stack",)

    vocab_size: int = 65536
    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_layers_per_stack: int = 16
    num_attention_heads: int = 12
    head_dim: int = 128
    H_cycles: int = 2
    L_cycles: int = 3
    L_bp_cycles: tuple[int, ...] = (2,)  # of training: L passes of each H cycle, the last ones, that gradients reach
    embedding_scale: float | None = None
    initializer_range: float = 0.02
    prefix_lm: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def published(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return hrm_text_fields(values, where)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_counts(self, "num_layers_per_stack")
        for name in ("H_cycles", "L_cycles"):
            value = getattr(self, name)
            require(1 <= value <= LARGEST_CYCLES, name, value, f"from 1 to {LARGEST_CYCLES}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even: the rotary embedding pairs features")
        # Longer lists than there are cycles are kept as they are: `--mode` may ask for fewer cycles.
        require(all(count >= 0 for count in self.L_bp_cycles), "L_bp_cycles", self.L_bp_cycles, "numbers of 0 or more")
        require(self.initializer_range > 0.0, "initializer_range", self.initializer_range, "more than 0")
        require(self.rms_norm_eps >= 0.0, "rms_norm_eps", self.rms_norm_eps, "0 or more")
        require(self.rope_theta > 0.0, "rope_theta", self.rope_theta, "more than 0")

    @property
    def scale(self) -> float:
        """What embedded tokens are multiplied by: `embedding_scale`, or 1 / initializer_range where there is none."""
        return 1.0 / self.initializer_range if self.embedding_scale is None else self.embedding_scale
