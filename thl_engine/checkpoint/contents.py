"""What a checkpoint must hold: the tensors of its model, each once, or equal where it is there several times."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Protocol, TypeVar

import torch

from thl_engine.config import Config
from thl_engine.errors import CheckpointError, shown
from thl_engine.models import architecture
from thl_engine.schedule import Block

FEW = 64  # layers that are listed whatever the file holds, so that a message names what is missing
NEAREST_OF = 1000  # names, and letters of one, that are compared for a hint
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")  # of published counters, which are vectors like any other once loaded
COMPARED_ELEMENTS = 8 << 20  # of two tensors at a time


class Described(Protocol):
    """What is known of a tensor before it is read: a dtype of safetensors and a shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T")
D = TypeVar("D", bound=Described)


@dataclass(frozen=True)
class Source:
    """A tensor to be written: `rows(start, stop)` gives rows along the first axis (a scalar has one row)."""

    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]


def split_joined(config: Config, found: Mapping[str, D], rows: Callable[[D, str, int, int], D]) -> dict[str, D]:
    """Tensors by published names, each by itself where a checkpoint holds several as one.

    rows: rows [start, stop) of a tensor, as one of that name.
    """
    joined, out = architecture(config.model_type).joined, dict[str, D]()
    for name, tensor in found.items():
        parts = joined(config, name)
        if not parts or not tensor.shape or tensor.shape[0] % len(parts):
            out[name] = tensor
            continue
        count = tensor.shape[0] // len(parts)
        for i, part in enumerate(parts):
            out[part] = rows(tensor, part, i * count, (i + 1) * count)
    return out


def rows_of_source(source: Source, name: str, start: int, stop: int) -> Source:
    """Rows [start, stop) as a tensor of their own."""
    rows = source.rows
    return Source(source.dtype, (stop - start, *source.shape[1:]), lambda a, b: rows(start + a, start + b))


def without_aliases(config: Config, found: Mapping[str, T]) -> dict[str, T]:
    """Tensors by the names of the model's blocks.

    Published checkpoints repeat shared ones under further names, and may hold the model as one part among others.
    """
    model = architecture(config.model_type)
    stored = {name: model.stored_name(config, name) for name in found}
    found = {own: found[name] for name, own in stored.items() if own is not None}
    aliases = model.aliases(config)
    out = {name: value for name, value in found.items() if name not in aliases}
    for alias, name in aliases.items():
        if alias in found:
            out.setdefault(name, found[alias])
    return out


def check_counts(config: Config, tensors: int, where: str) -> None:
    """Refuses a configuration of more layers than there are tensors, before any of them is listed."""
    for name in config.layers:
        if (count := vars(config)[name]) > max(tensors, FEW):
            raise CheckpointError(f"{where}: holds {tensors} tensors, too few for the configuration's {count} {name}")


def check_repeats(config: Config, found: Mapping[str, Source], where: str) -> None:
    """Tensors that take the place of another one must be equal to it: a head of its own is not the embedding.

    Reads a chunk of rows of both at a time. Raises CheckpointError.
    """
    model = architecture(config.model_type)
    used = {block.name for block in model.blocks(config) if block.kind != "unused"}
    names = {own: name for name in found if (own := model.stored_name(config, name)) is not None}
    for alias, name in model.aliases(config).items():
        first = names.setdefault(name, names[alias]) if alias in names else None  # what `without_aliases` keeps
        if first is None or first == names[alias] or name not in used:
            continue
        repeat, kept = found[names[alias]], found[first]
        if repeat.shape != kept.shape or not _equal(repeat, kept):
            raise CheckpointError(
                f"{where}: tensor {shown(names[alias])} differs from {shown(first)}, which takes its place in this "
                f"{config.model_type} model; models where the two differ are not supported"
            )


def _equal(one: Source, other: Source) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN equals NaN."""
    rows = one.shape[0] if one.shape else 1
    step = max(1, COMPARED_ELEMENTS // max(1, prod(one.shape[1:])))
    for start in range(0, rows, step):
        a, b = (tensor.rows(start, min(start + step, rows)) for tensor in (one, other))
        if a.dtype != b.dtype:
            a, b = a.double(), b.double()
        if not torch.equal(a, b) and not torch.allclose(a.double(), b.double(), rtol=0.0, atol=0.0, equal_nan=True):
            return False
    return True


def check_tensors(blocks: Sequence[Block], found: Mapping[str, Described], model_type: str, where: str) -> None:
    """`found` must be the model's tensors; floats, where used.

    Unused ones may be missing.
    """
    expected = {block.name: block for block in blocks}
    extra = [name for name in found if name not in expected]
    missing = [name for name, block in expected.items() if name not in found and block.kind != "unused"]
    if extra:
        candidates = list(islice(missing or expected, NEAREST_OF))
        near = difflib.get_close_matches(extra[0][:NEAREST_OF], candidates, n=1, cutoff=0)
        hint = f"; nearest expected name: {shown(near[0])}" if near else ""
        raise CheckpointError(
            f"{where}: tensor {shown(extra[0])}{_and_more(extra)} is no part of this {model_type} model{hint}"
        )
    if missing:
        needed = list(expected[missing[0]].shape)
        raise CheckpointError(f"{where}: tensor {shown(missing[0])} {needed}{_and_more(missing)} is missing")
    for name, block in expected.items():
        if name not in found:
            continue
        dtype, stored = found[name].dtype, tuple(found[name].shape)
        if stored != block.shape:
            raise CheckpointError(
                f"{where}: tensor {shown(name)} has shape {list(stored)}, the config needs {list(block.shape)}"
            )
        counter = block.kind == "vector" and dtype in INTEGERS
        if dtype not in FLOATS and block.kind != "unused" and not counter:
            expected_dtypes = " ".join(FLOATS)
            raise CheckpointError(f"{where}: tensor {shown(name)} has dtype {dtype}, expected one of {expected_dtypes}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
