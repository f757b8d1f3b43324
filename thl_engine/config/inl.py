"""Configuration of INL."""

from dataclasses import dataclass
from typing import ClassVar

from thl_engine.config.base import Config, require, require_counts


@dataclass(frozen=True)
class INLConfig(Config):
    """Attention plus integrator dynamics (INL-LLM V2 2.0.0). The defaults are the published small size."""

    model_type: ClassVar[str] = "inl"
    signature: ClassVar[frozenset[str]] = frozenset({"d_model", "num_iterations_per_layer"})
    training: ClassVar[frozenset[str]] = frozenset({"dropout", "use_gradient_checkpointing"})
    ignored: ClassVar[frozenset[str]] = training | {"excitation_sparsity"}  # which the published model does not use
    layers: ClassVar[tuple[str, ...]] = ("num_layers",)

    vocab_size: int = 50000
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    num_iterations_per_layer: int = 5
    feedforward_dim: int | None = None
    max_seq_len: int = 2048
    use_lowrank_embeddings: bool = True
    lowrank_ratio: float = 0.125
    use_shared_controllers: bool = True
    use_adaptive_stopping: bool = True
    adaptive_convergence_threshold: float = 0.001
    hierarchical_group_size: int = 64

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_heads", "max_seq_len", "hierarchical_group_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_counts(self, "num_layers", "num_iterations_per_layer")
        inner = self.feedforward_dim
        require(inner is None or inner >= 1, "feedforward_dim", inner, "null (four times d_model) or at least 1")
        require(
            self.d_model % self.num_heads == 0, "d_model", self.d_model, f"a multiple of num_heads ({self.num_heads})"
        )
        require(0.0 <= self.lowrank_ratio <= 1.0, "lowrank_ratio", self.lowrank_ratio, "between 0 and 1")
        require(
            self.adaptive_convergence_threshold >= 0.0,
            "adaptive_convergence_threshold",
            self.adaptive_convergence_threshold,
            "0 (never stop early) or more",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.d_model // self.num_heads

    @property
    def inner_size(self) -> int:
        """Inner features of the feed-forward parts."""
        return 4 * self.d_model if self.feedforward_dim is None else self.feedforward_dim

    @property
    def embedding_rank(self) -> int:
        """Features of a low-rank embedding row."""
        return max(64, int(self.d_model * self.lowrank_ratio))
