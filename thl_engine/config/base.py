"""What all configurations have in common: frozen dataclasses with the field names of the published projects."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from thl_engine.errors import ConfigError

LARGEST_CYCLES = 64  # of hierarchical reasoning; bounds the length of a walk, which lists every revisit
LARGEST = 1 << 31  # no size field of a real model comes near; keeps products of a few sizes within 64 bits


class Config:
    """Base of the architectures' configurations. Unknown fields and values that cannot work are refused.

    signature: fields that tell the architecture where no model_type is given. ignored: published fields that change
    nothing at inference, accepted so that published files load unchanged.
    """

    model_type: ClassVar[str]
    signature: ClassVar[frozenset[str]]
    ignored: ClassVar[frozenset[str]] = frozenset()
    vocab_size: int

    @classmethod
    def published(cls, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields of a published config.json as this dataclass has them. Raises ConfigError, which begins with
        `where`."""
        return dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        values = asdict(self)  # type: ignore[call-overload]  # every configuration is a dataclass
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"model_type": self.model_type, **lists}


def check_seed(seed: object, most: int = (1 << 63) - 1) -> None:
    """Raises ConfigError for what seeds no random numbers."""
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    require(whole and 0 <= seed <= most, "seed", seed, f"a whole number from 0 to {most}")  # type: ignore[operator]


def require(holds: bool, name: str, value: Any, needed: str) -> None:
    """Raises ConfigError that says what a field is and must be, unless it holds."""
    if not holds:
        found = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name} is {found}; it must be {needed}")
