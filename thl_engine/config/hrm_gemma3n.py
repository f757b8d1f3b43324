"""Configuration of HRM-Gemma: a Gemma-3n, and the reasoning on top of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thl_engine.config.base import LARGEST_CYCLES, require
from thl_engine.config.gemma3n import Gemma3nConfig
from thl_engine.config.published import hrm_gemma3n_fields


@dataclass(frozen=True)
class ReasoningConfig:
    """What HRM-Gemma adds to its base: two low-rank adapters, and two recurrent states of each position.

    L_size, H_size: features of the states. cycles, L_steps: H updates of a token, and L updates of each cycle, at
    most. L_threshold: L updates end early where the state's change has a smaller Euclidean norm. L_rank, L_alpha: the
    adapter of q, k and v; H_rank, H_alpha: that of gate, up and down.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()

    L_size: int = 2048
    H_size: int = 4096
    cycles: int = 4
    L_steps: int = 8
    L_threshold: float = 0.01
    L_rank: int = 32
    L_alpha: float = 16.0
    H_rank: int = 64
    H_alpha: float = 32.0

    def __post_init__(self) -> None:
        for name in ("L_size", "H_size", "L_rank", "H_rank"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("cycles", "L_steps"):
            require(
                1 <= getattr(self, name) <= LARGEST_CYCLES, name, getattr(self, name), f"from 1 to {LARGEST_CYCLES}"
            )
        require(self.L_threshold >= 0.0, "L_threshold", self.L_threshold, "0 (never stop early) or more")
        for name in ("L_alpha", "H_alpha"):
            require(getattr(self, name) > 0.0, name, getattr(self, name), "more than 0")


@dataclass(frozen=True)
class HRMGemma3nConfig(Gemma3nConfig):
    """HRM's reasoning as adapters on Gemma-3n: the base's fields, and `hrm`."""

    model_type: ClassVar[str] = "hrm_gemma3n"
    signature: ClassVar[frozenset[str]] = Gemma3nConfig.signature | {"hrm"}
    ignored: ClassVar[frozenset[str]] = Gemma3nConfig.ignored | {"base_model"}  # where a folder's base lies

    hrm: ReasoningConfig = field(default_factory=ReasoningConfig)

    @classmethod
    def published(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return hrm_gemma3n_fields(values, where)
