"""A store's tensors as a model's weights: vectors in memory, matrices from the pager, tables by row."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thl_engine.checkpoint.store import Store
from thl_engine.kernels.int8 import dequantize
from thl_engine.ops.weights import Part
from thl_engine.paging.pager import Traffic


class Pages(Protocol):
    """What serves the pages of a store to a model's passes: a `Pager`, or what stands in for one."""

    traffic: Traffic

    def begin(self, key: Hashable, future: Callable[[], Iterator[int]], may_stop: bool = False) -> None: ...

    def end(self, key: Hashable) -> None: ...

    def parts(self, name: str) -> Iterator[Part]: ...

    def pinned(self, name: str) -> list[Part] | None: ...

    def stored(self, name: str) -> Part: ...

    def rows(self, name: str, ids: Tensor) -> Part: ...

    def pinned_rows(self, name: str, ids: Tensor) -> Part | None: ...

    def count_uses(self, count: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class PagedMatrix:
    """A matrix whose parts come from a pager, pinned or streamed: the same parts either way."""

    name: str
    shape: tuple[int, int]
    pager: Pages
    transposed: bool = False

    def parts(self) -> Iterator[Part]:
        return self.pager.parts(self.name)

    def resident(self) -> list[Part] | None:
        return self.pager.pinned(self.name)

    def stored(self) -> Part:
        return self.pager.stored(self.name)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, C] of int64 ids [n], on the engine's device: for tables that are also the output head."""
        return _dequantized(self.pager.rows(self.name, ids), ids, self.shape[1])

    def resident_rows(self, ids: Tensor) -> Tensor | None:
        part = self.pager.pinned_rows(self.name, ids)
        return None if part is None else _dequantized(part, ids, self.shape[1])


@dataclass(frozen=True)
class PagedTable:
    """A table of which the pager holds all pages, or reads those with the rows asked for."""

    name: str
    shape: tuple[int, int]
    pager: Pages

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, C] of int64 ids, on the engine's device."""
        return _dequantized(self.pager.rows(self.name, ids), ids, self.shape[1])

    def resident_rows(self, ids: Tensor) -> Tensor | None:
        part = self.pager.pinned_rows(self.name, ids)
        return None if part is None else _dequantized(part, ids, self.shape[1])


def _dequantized(part: Part, ids: Tensor, columns: int) -> Tensor:
    return dequantize(part.data, part.scales, part.group).view(*ids.shape, columns)


def load_vectors(store: Store, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Norms, biases and scales as float32 in memory of their own, each checked against its checksum."""
    return {
        name: store.read(name).to(device=device, dtype=torch.float32, copy=True)
        for name, tensor in store.tensors.items()
        if tensor.kind == "vector"
    }


def paged_weights(
    store: Store, pager: Pages, vectors: Mapping[str, Tensor]
) -> dict[str, Tensor | PagedMatrix | PagedTable]:
    """Every tensor that takes part in the model, under its published name."""
    weights: dict[str, Tensor | PagedMatrix | PagedTable] = {}
    for name, tensor in store.tensors.items():
        if tensor.kind == "vector":
            weights[name] = vectors[name]
        elif tensor.kind == "matrix":
            weights[name] = PagedMatrix(name, (tensor.shape[0], tensor.shape[1]), pager, tensor.transposed)
        elif tensor.kind == "table":
            weights[name] = PagedTable(name, (tensor.shape[0], tensor.shape[1]), pager)
    return weights
