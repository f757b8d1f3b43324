"""A configuration read from JSON, checked field by field."""

import logging
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, get_args

from thl_engine.config.base import HUGGING_FACE, LARGEST, Config
from thl_engine.config.gemma3n import Gemma3nConfig
from thl_engine.config.gemma4 import Gemma4Config
from thl_engine.config.him import HIMConfig
from thl_engine.config.hrm import HRMConfig
from thl_engine.config.hrm_gemma3n import HRMGemma3nConfig
from thl_engine.config.hrm_text import HRMTextConfig
from thl_engine.config.inl import INLConfig
from thl_engine.config.published import MODEL_TYPES
from thl_engine.config.thl import THLConfig
from thl_engine.config.unknown import meant, repeated
from thl_engine.errors import ConfigError, shown

_log = logging.getLogger("thl_engine")
_PLURALS = {int: "whole numbers", float: "numbers", str: "names"}

CONFIGS: dict[str, type[Config]] = {
    cls.model_type: cls
    for cls in (
        THLConfig,
        HRMConfig,
        HRMTextConfig,
        INLConfig,
        HIMConfig,
        Gemma3nConfig,
        HRMGemma3nConfig,
        Gemma4Config,
    )
}


def parse_config(given: Mapping[str, Any], model_type: str | None = None, where: str = "config") -> Config:
    """Checks a configuration read from JSON and returns its dataclass.

    `model_type` overrides the field of that name; without either, the architecture is the one whose defining
    fields are present. Raises ConfigError that names the field, what was found and what would work.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a JSON object of fields, found {type(given).__name__}")
    values = dict(given)
    stated = values.pop("model_type", None)
    if stated is not None and not isinstance(stated, str):
        raise ConfigError(f"{where}: model_type must be a name, found {shown(stated)}")
    stated = stated and MODEL_TYPES.get(stated, stated)
    if model_type is not None and stated is not None and stated != model_type:
        raise ConfigError(f"{where}: model_type is {shown(stated)}, but {shown(model_type)} was asked for")
    name = model_type or stated or _recognise(values, where)
    if name not in CONFIGS:
        raise ConfigError(f"{where}: model_type {shown(name)} is not supported; supported: {', '.join(CONFIGS)}")
    cls = CONFIGS[name]
    config: Config = _build(cls, cls.published(values, where), where, f"model_type {shown(name)}")
    return config


def unapplied(given: Mapping[str, Any], config: Config) -> list[str]:
    """Fields of a configuration that act in the published training, and that nothing applies here."""
    inside = given.get("text_config")
    names = {*given, *(inside if isinstance(inside, Mapping) else ())}
    return sorted(names & (type(config).training | {"gradient_checkpointing"}))


def _build(cls: Any, values: Mapping[str, Any], where: str, what: str) -> Any:
    """An instance of the dataclass `cls`, each value checked against its field.

    Fields that it does not have are refused where they are likely to stand for one that it has, and else noted.
    """
    known = {field.name: field for field in fields(cls)}
    kept, others = {}, []
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{where}: a field's name must be text, found {shown(key)}")
        if key in known:
            kept[key] = _coerce(value, known[key], f"{where}: {key}")
        elif key not in cls.ignored and key not in HUGGING_FACE:
            near = meant(key, known)
            if near and not any(name in values and values[name] == value for name in repeated(key, near)):
                names = " or ".join(map(shown, near[:3]))
                raise ConfigError(f"{where}: unknown field {shown(key)} for {what}; did you mean {names}?")
            others.append(key)
    try:
        config = cls(**kept)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        _note(f"{where}: not used here: {', '.join(map(shown, others[:4]))}{more}")
    return config


@lru_cache(maxsize=64)
def _note(text: str) -> None:
    """Logs a line once, however often the same file is read."""
    _log.warning("%s", text)


def _recognise(values: Mapping[str, Any], where: str) -> str:
    signatures = [cls.signature for cls in CONFIGS.values() if cls.signature <= values.keys()]
    matches = [
        name
        for name, cls in CONFIGS.items()
        if cls.signature in signatures and not any(cls.signature < other for other in signatures)
    ]
    if len(matches) != 1:
        raise ConfigError(
            f"{where}: no model_type given and the fields do not identify one; "
            f'add "model_type": one of {", ".join(CONFIGS)}'
        )
    return matches[0]


def _coerce(value: Any, field: Any, where: str) -> Any:
    """Checks one JSON value against a field's annotation: scalar, `scalar | None`, tuple[scalar, ...], dataclass."""
    kind = field.type
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be an object of fields, found {shown(value)}")
        return _build(field.type, value, where, "this object")
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = get_args(kind)[0]
    if not get_args(kind):
        return _scalar(value, kind, where)
    kind = get_args(kind)[0]
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{where} must be a list of {_PLURALS[kind]}, found {shown(value)}")
    return tuple(_scalar(item, kind, f"{where}, entry {i},") for i, item in enumerate(value))


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, found {shown(value)}")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be a name, found {shown(value)}")
        return value
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{where} must be a whole number, found {shown(value)}")
        if not -LARGEST < value < LARGEST:
            raise ConfigError(f"{where} is {shown(value)}, beyond any real model")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} must be a number, found {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where} must be finite, found {shown(value)}")
    return number
