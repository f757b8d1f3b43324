"""What a file to resume from says, each value checked before it is used."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thl_engine.errors import CheckpointError, ConfigError, said, shown
from thl_engine.train.options import MOST, TrainOptions

SLOTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each parameter that had a gradient
FIXED = ("batch_size", "chunk", "carry", "seed", "held_out")  # the order of the data follows from them
STARTING = ("objective", "tokenizer", "tokenizer_type", "vocab_size")  # what they led to is compared instead


@dataclass(frozen=True)
class Evaluation:
    """Mean loss on held-out text: perplexity of a token, and bits per character of text."""

    perplexity: float
    bits_per_character: float


@dataclass(frozen=True)
class Record:
    """What goes beside the tensors of a run.

    step: updates made. best: the best evaluation so far. origin: what a resumed run must have in common with its
    beginning. tokenizer: its JSON. options: `TrainOptions.recorded`.
    """

    step: int
    best: Evaluation | None
    origin: dict[str, Any]
    tokenizer: str
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def parse_record(given: Mapping[str, Any], where: Path) -> Record:
    """A record out of a file. Raises CheckpointError that names the field."""
    _check_names(given, ("format", "step", "best", "origin", "tokenizer", "options"), f"{where}: the record")
    step, best, tokenizer = given["step"], given["best"], given["tokenizer"]
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MOST:
        raise CheckpointError(f"{where}: step is {shown(step)}, expected a whole number from 0 to {MOST}")
    for name in ("origin", "options"):
        if not isinstance(given[name], dict):
            raise CheckpointError(f"{where}: {name} is {shown(given[name])}, expected an object")
    if not isinstance(tokenizer, str):
        raise CheckpointError(f"{where}: tokenizer is {shown(tokenizer)}, expected the text of one")
    if best is not None:
        if not isinstance(best, dict):
            raise CheckpointError(f"{where}: best is {shown(best)}, expected an object or null")
        _check_names(best, ("perplexity", "bits_per_character"), f"{where}: best")
        for name, value in best.items():
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise CheckpointError(f"{where}: {name} is {shown(value)}, expected a number of at least 0")
        best = Evaluation(**best)
    return Record(step, best, given["origin"], tokenizer, given["options"])


def resumed_options(options: TrainOptions, record: Record, where: Path) -> tuple[TrainOptions, list[str]]:
    """The options of a run that goes on, and what is different now, as "dropout 0.2 (0.1 before)".

    Raises CheckpointError for options in the record that are none, ConfigError for given ones that cannot change.
    """
    before = record.options
    _check_names(before, tuple(options.recorded()), f"{where}: options")
    try:
        resumed = options.resumed(before)
    except ConfigError as error:
        raise CheckpointError(f"{where}: options: {error}") from None
    now = resumed.recorded()
    changed = [name for name in now if now[name] != before[name] and name not in STARTING]
    for name in changed:
        if name in FIXED:
            raise _another_run(options, name, before[name], now[name])
    return resumed, [f"{name} {now[name]} ({said(before[name])} before)" for name in changed]


def check_origin(options: TrainOptions, record: Record, origin: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError where a run began otherwise: with another model, objective or text."""
    _check_names(record.origin, tuple(origin), f"{where}: origin")
    was, now = _flat(record.origin), _flat(origin)
    for name in [*now, *was]:
        if was.get(name) != now.get(name):
            raise _another_run(options, name, was.get(name), now.get(name))


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path) -> None:
    """Raises CheckpointError unless the tensors have the names, shapes and types expected, and hold finite numbers."""
    for name, value in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{where}: tensor {shown(name)} is none of this run's")
        like = expected[name]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise CheckpointError(
                f"{where}: tensor {shown(name)} is {value.dtype} {shown(list(value.shape))}, "
                f"expected {like.dtype} {list(like.shape)}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{where}: tensor {shown(name)} holds NaN or infinity")
    for name in expected:
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {shown(name)} is missing")


def moments(name: str) -> dict[str, str]:
    """Slot of the optimizer -> the tensor that holds it, of a parameter."""
    return {slot: f"optimizer.{slot}.{name}" for slot in SLOTS}


def check_moments(tensors: Mapping[str, Tensor], name: str, step: int, where: Path) -> None:
    """Raises CheckpointError for moments, of the right shapes, that no optimizer has after `step` updates."""
    names = moments(name)
    count = float(tensors[names["step"]])
    if not 1 <= count <= step or count != int(count):
        raise CheckpointError(
            f"{where}: tensor {shown(names['step'])} is {count:g}, expected a whole number from 1 to {step}"
        )
    if (tensors[names["exp_avg_sq"]] < 0).any():
        raise CheckpointError(f"{where}: tensor {shown(names['exp_avg_sq'])} holds negative squares")


def check_noise(state: Tensor, where: Path) -> None:
    """Raises CheckpointError for a state of torch's random numbers that would be read past its end.

    state: uint8, of the right size: a Mersenne twister's seed, how many of its 624 words are left, whether it was
    seeded, and which is next. torch checks each of these alone.
    """
    left, seeded = state[8:16].view(torch.int32).tolist()
    following = int(state[16:24].view(torch.int64))
    if seeded != 1 or not (left + following == 625 and 1 <= left <= 624 or (left, following) == (1, 0)):
        raise CheckpointError(f"{where}: tensor 'noise' is no state of random numbers")


def _check_names(found: Mapping[str, Any], expected: tuple[str, ...], where: str) -> None:
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{where} lacks {name!r}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{where} has an unknown field {shown(name)}")


def _another_run(options: TrainOptions, name: str, was: object, now: object) -> ConfigError:
    return ConfigError(
        f"cannot resume {options.out}: {said(name)} was {said(was)} and is now {said(now)}; "
        "give the same as before, or start a new run in another folder"
    )


def _flat(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The origin with the fields of the configuration as "config.NAME"."""
    config = origin["config"]
    inside = {f"config.{name}": value for name, value in config.items()} if isinstance(config, dict) else {}
    return {**inside, **{name: value for name, value in origin.items() if name != "config" or not inside}}
