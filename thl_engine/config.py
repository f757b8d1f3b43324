"""One frozen dataclass per architecture, with the field names of the published projects.

A configuration travels with its checkpoint. Unknown fields and values that cannot work are refused with the
field's name; nothing is guessed.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from thl_engine.errors import ConfigError

_LARGEST = 1 << 31  # no size field of a real model comes near; keeps products of a few sizes within 64 bits


@dataclass(frozen=True)
class THLConfig:
    """Hierarchical recurrent tiers with a slot memory (THL 0.2.0). Sizes are counts of features unless noted."""

    model_type: ClassVar[str] = "thl"
    signature: ClassVar[frozenset[str]] = frozenset({"tier_dims", "tier_timescales"})
    # Published fields that change nothing at inference; accepted so that published files load unchanged.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"pad_token_id", "router_load_balance_lambda", "write_rate", "hidden_dim", "dtype", "device"}
    )

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
        for name in ("vocab_size", "embedding_dim", "num_tiers", "memory_slots", "memory_dim", "query_dim",
                     "value_dim", "num_heads", "head_dim", "read_topk", "write_slots"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.local_window >= 0, "local_window", self.local_window, "0 or more")
        for name in ("tier_dims", "tier_timescales"):
            values = getattr(self, name)
            _require(len(values) == self.num_tiers, name, values, f"{self.num_tiers} entries (num_tiers)")
            _require(min(values) >= 1, name, values, "entries of at least 1")
        _require(self.tier_timescales[0] == 1, "tier_timescales", self.tier_timescales, "1 for the first tier")
        _require(self.value_dim % self.num_heads == 0, "value_dim", self.value_dim,
                 f"a multiple of num_heads ({self.num_heads})")
        for name in ("read_topk", "write_slots"):
            _require(getattr(self, name) <= self.memory_slots, name, getattr(self, name),
                     f"at most memory_slots ({self.memory_slots})")
        capacity = self.read_slot_capacity
        _require(capacity is None or capacity >= 1, "read_slot_capacity", capacity, "null or at least 1")
        for name in ("read_ema_decay", "write_ema_decay", "memory_decay"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "between 0 and 1")

    @property
    def state_dim(self) -> int:
        """Features of all tiers together, the width that the output head reads."""
        return sum(self.tier_dims)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, `model_type` first."""
        return {"model_type": self.model_type, **{k: list(v) if isinstance(v, tuple) else v
                                                  for k, v in asdict(self).items()}}


CONFIGS: dict[str, type] = {cls.model_type: cls for cls in (THLConfig,)}


def parse_config(given: Mapping[str, Any], model_type: str | None = None, where: str = "config") -> Any:
    """Checks a configuration read from JSON and returns its dataclass.

    `model_type` overrides the field of that name; without either, the architecture is the one whose defining
    fields are present. Raises ConfigError that names the field, what was found and what would work.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a JSON object of fields, found {type(given).__name__}")
    values = dict(given)
    stated = values.pop("model_type", None)
    if stated is not None and not isinstance(stated, str):
        raise ConfigError(f"{where}: model_type must be a name, found {stated!r}")
    if model_type is not None and stated is not None and stated != model_type:
        raise ConfigError(f"{where}: model_type is {stated!r}, but {model_type!r} was asked for")
    name = model_type or stated or _recognise(values, where)
    if name not in CONFIGS:
        raise ConfigError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(CONFIGS)}")
    cls = CONFIGS[name]
    known = {field.name: field for field in fields(cls)}
    kept = {}
    for key, value in values.items():
        if key in known:
            kept[key] = _coerce(value, known[key], f"{where}: {key}")
        elif key not in cls.ignored:
            close = difflib.get_close_matches(key, [*known, *cls.ignored], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}: unknown field {key!r} for model_type {name!r}{hint}")
    try:
        return cls(**kept)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _recognise(values: Mapping[str, Any], where: str) -> str:
    matches = [name for name, cls in CONFIGS.items() if cls.signature <= values.keys()]
    if len(matches) != 1:
        raise ConfigError(f"{where}: no model_type given and the fields do not identify one; "
                          f"add \"model_type\": one of {', '.join(CONFIGS)}")
    return matches[0]


def _coerce(value: Any, field: Any, where: str) -> Any:
    """Checks one JSON value against a field's annotation. int, float, `int | None` and tuple[int, ...] occur."""
    kind = field.type
    if kind == (int | None):
        if value is None:
            return None
        kind = int
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where} must be a whole number, found {value!r}")
        if not -_LARGEST < value < _LARGEST:
            raise ConfigError(f"{where} is {value}, beyond any real model")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{where} must be a number, found {value!r}")
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"{where} must be finite, found {value!r}")
        return float(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{where} must be a list of whole numbers, found {value!r}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not -_LARGEST < item < _LARGEST:
            raise ConfigError(f"{where} must be a list of whole numbers, found {item!r} in it")
    return tuple(value)


def _require(holds: bool, name: str, value: Any, needed: str) -> None:
    if not holds:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name} is {shown}; it must be {needed}")


def defaults(cls: type) -> dict[str, Any]:
    """The published defaults of a configuration class, for presets and `--help`."""
    return {field.name: field.default for field in fields(cls) if field.default is not MISSING}
