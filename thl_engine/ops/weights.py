"""Weights as ops see them: vectors are plain tensors; matrices come in parts; tables give rows by token id."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thl_engine.schedule import Block


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a matrix [R, C] as stored: floats, or int8 with float32 scales [rows] or [rows, groups].

    `group` is the number of columns that share a scale where scales is two-dimensional.
    """

    start: int
    stop: int
    data: Tensor
    scales: Tensor | None = None
    group: int | None = None


class Matrix(Protocol):
    """A matrix [R, C]. Its parts come in row order; a part's memory is valid until the next one is asked for.

    transposed: R are the inputs and C the outputs of the linear map that it stands for, for `linear_sparse`.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def transposed(self) -> bool: ...

    def parts(self) -> Iterator[Part]: ...

    def resident(self) -> list[Part] | None:
        """The parts, if all of them stay where they are; to look at them is no use of the matrix."""
        ...

    def stored(self) -> Part:
        """All rows as one part without memory (device "meta"), to tell their type and scales."""
        ...


class Table(Protocol):
    """A table [V, C] of which single rows are read."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, C] of int64 ids [n], all within the table."""
        ...

    def resident_rows(self, ids: Tensor) -> Tensor | None:
        """The same from memory on the device of the ids, whose values the host does not see; None where rows are not
        held there."""
        ...


@dataclass(frozen=True)
class Held:
    """A matrix in memory as it is: floats, or int8 with scales, in one part."""

    data: Tensor
    scales: Tensor | None = None
    group: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data.shape
        return rows, columns

    def parts(self) -> Iterator[Part]:
        yield Part(0, self.data.shape[0], self.data, self.scales, self.group)

    def resident(self) -> list[Part]:
        return list(self.parts())

    def stored(self) -> Part:
        scales = None if self.scales is None else self.scales.to("meta")
        return Part(0, self.data.shape[0], self.data.to("meta"), scales, self.group)


@dataclass(frozen=True)
class Adapted:
    """A matrix [R, C] and what a low-rank adapter adds to it: base + scale * up @ down, with down [r, C], up [R, r].

    The parts stay apart, each in its own precision (LoRA, Hu et al. 2021, arXiv 2106.09685).
    """

    base: Matrix
    down: Matrix
    up: Matrix
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape


@dataclass(frozen=True)
class Trainable:
    """A float matrix or table that gradients flow through."""

    tensor: Tensor
    transposed = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape
        return rows, columns

    def parts(self) -> Iterator[Part]:
        yield Part(0, self.tensor.shape[0], self.tensor)

    def resident(self) -> list[Part]:
        return list(self.parts())

    def stored(self) -> Part:
        return Part(0, self.tensor.shape[0], self.tensor.to("meta"))

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.tensor)

    def resident_rows(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


def trainable(blocks: Iterable[Block], parameters: Mapping[str, Tensor]) -> dict[str, Tensor | Trainable]:
    """Parameters by published name, as a model's step takes them."""
    return {b.name: parameters[b.name] if b.kind == "vector" else Trainable(parameters[b.name]) for b in blocks}
