"""What a training run can be told, and the learning rate that follows from it."""

import math
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from thl_engine.config.base import check_seed
from thl_engine.errors import ConfigError, shown

MOST = (1 << 40) - 1  # of any number: each pass over the text draws from a multiple of the seed
MOST_THREADS = 1024
PLACES = ("model_type", "config", "data", "out", "resume")  # what has to be said anew of a run that is resumed


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run. Raises ConfigError for values that cannot work.

    config, data: JSON and UTF-8 text files. out: the folder that the run writes.
    objective: one of the model's ways of training, None for its usual one.
    tokenizer: a file, or None to make one from the training part of the text, of `tokenizer_type` "bpe"
      (byte-level) or "char", None for the objective's usual one. vocab_size: in place of the configuration's.
    steps: updates. batch_size: sequences read side by side. chunk: tokens of each between two updates, which
      is how far gradients flow. carry: tokens after which a sequence starts from an empty state again.
    learning_rate: its peak; final_rate: the last rate as a share of it; warmup: updates before the peak.
    weight_decay: of the matrices, none of the others. clip: largest norm of the gradient.
    dropout, weight_dropout, precision: see `TrainableModel`.
    held_out: share of the text, at its end, that is kept out of training and evaluated.
    evaluate_every, save_every: updates between evaluations, and between saves for `resume`.
    sample_tokens: length of the text written after an evaluation. threads: of the CPU; None: torch's choice.
    resume: continue the run in `out`. What is not given then, by position or name, is as that run has it
      (`dataclasses.replace` gives everything).
    """

    model_type: str
    config: Path
    data: Path
    out: Path
    objective: str | None = None
    tokenizer: Path | None = None
    tokenizer_type: str | None = None
    vocab_size: int | None = None
    steps: int = 3000
    batch_size: int = 64
    chunk: int = 48
    carry: int = 4096
    learning_rate: float = 3e-3
    final_rate: float = 0.02
    warmup: int = 150
    weight_decay: float = 0.05
    clip: float = 1.0
    dropout: float = 0.1
    weight_dropout: float = 0.1
    precision: str = "float32"
    held_out: float = 0.1
    evaluate_every: int = 300
    save_every: int = 100
    sample_tokens: int = 120
    seed: int = 0
    threads: int | None = None
    resume: bool = False

    def __new__(cls, *values: Any, **named: Any) -> "TrainOptions":
        options = super().__new__(cls)
        by_position = [one.name for one in fields(cls)][: len(values)]
        vars(options)["_given"] = frozenset(by_position) | named.keys()
        return options

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were given; the others have their defaults."""
        names: frozenset[str] = vars(self)["_given"]
        return names

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _typed(one, getattr(self, one.name)))
        for name in ("steps", "batch_size", "chunk", "carry", "evaluate_every", "save_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup", "sample_tokens", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        check_seed(self.seed, MOST)
        for name in ("learning_rate", "clip"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        for name in ("dropout", "weight_dropout", "weight_decay"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        _require(0 <= self.final_rate <= 1, "final_rate", self.final_rate, "from 0 to 1")
        _require(0 < self.held_out <= 0.5, "held_out", self.held_out, "above 0 and at most 0.5")
        for name, choices in (("precision", ("float32", "bfloat16")), ("tokenizer_type", ("bpe", "char", None))):
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(filter(None, choices)))
        few = self.threads is None or 1 <= self.threads <= MOST_THREADS
        _require(few, "threads", self.threads, f"from 1 to {MOST_THREADS}")

    def recorded(self) -> dict[str, Any]:
        """What a run that is resumed takes from here, as JSON values."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in PLACES}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def resumed(self, before: Mapping[str, Any]) -> "TrainOptions":
        """Of a run that goes on: what was given, and for the rest what it `recorded` before. Raises ConfigError."""
        places = {name: getattr(self, name) for name in PLACES}
        TrainOptions(**places, **before)  # none of it is believed, used or not
        own = {name: getattr(self, name) for name in self.given if name in before}
        return TrainOptions(**places, **{**before, **own})


def rate(options: TrainOptions, step: int) -> float:
    """Learning rate of update `step`, from 0: linear warm-up, then half a cosine down to the final rate."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return options.learning_rate * (options.final_rate + (1 - options.final_rate) * cosine)


def _typed(one: "Field[Any]", value: Any) -> Any:
    """The value of a field in its type. Raises ConfigError for another one."""
    kinds = get_args(one.type) or (one.type,)
    if value is None and type(None) in kinds:
        return None
    kind, flag = kinds[0], isinstance(value, bool)
    if kind is Path and isinstance(value, (str, os.PathLike)):
        return Path(value)
    if kind is float and isinstance(value, (int, float)) and not flag:
        return float(value) if abs(value) <= MOST or value != value else math.inf
    if kind is int and isinstance(value, int) and not flag and abs(value) <= MOST:
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    wanted = {Path: "a path", float: "a number", int: f"a whole number of at most {MOST}", str: "a name"}
    raise ConfigError(f"{one.name} is {shown(value)}; it must be {wanted.get(kind, 'true or false')}")


def _require(holds: bool, name: str, value: Any, needed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {shown(value)}; it must be {needed}")
