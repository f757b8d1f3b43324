"""A few of a model's pages in the place of all, so that computing is seen without the memory that the model needs."""

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor

from thl_engine.checkpoint.page import Page, StoredTensor, extent
from thl_engine.checkpoint.store import Store
from thl_engine.files import ALIGNMENT
from thl_engine.ops.weights import Part
from thl_engine.paging.pager import Traffic
from thl_engine.paging.plan import Plan
from thl_engine.paging.reader import Arena, Reader

# Eight times the largest last-level cache met so far (32 MiB), so that pages come from memory as the model's do.
SAMPLE_BYTES = 256 << 20
FLYING = 8  # reads at once


class Enough(Exception):
    """The time for looking is over."""


class StandIn:
    """Serves a store's pages as a `Pager` does, from the first of them that fit into `limit` bytes: another page is
    given the bytes of one of these of its type, each in its turn, and its own scales. On the CPU.

    Notes between which moments each matrix is in use. `deadline`: a moment of `time.perf_counter` after which the next
    use raises Enough.
    """

    def __init__(self, store: Store, plan: Plan, vectors: Mapping[str, Tensor], limit: int | None = None) -> None:
        self.traffic = Traffic()
        self.deadline = float("inf")
        self._store, self._vectors = store, vectors
        limit = SAMPLE_BYTES if limit is None else limit
        self._resident, self._pinned = plan.resident_tables, frozenset(plan.pinned)
        self._reader = Reader(store.files)
        matrices = [tensor for tensor in store.tensors.values() if tensor.kind == "matrix"]
        tables = [tensor for tensor in store.tensors.values() if tensor.kind == "table"]
        pages = [(page, tensor) for tensor in matrices for page in tensor.pages]
        pages += [(tensor.pages[0], tensor) for tensor in tables]
        self._parts: dict[int, Part] = {}
        self.bytes_read = 0  # of the file, to stand in for all
        for dtype in {tensor.dtype for _, tensor in pages}:
            alike = [(page, tensor) for page, tensor in pages if tensor.dtype == dtype]
            share = sum(page.nbytes for page, _ in alike) / sum(page.nbytes for page, _ in pages)
            self._take(alike, int(share * limit))
        self._begun: float | None = None
        self._uses: list[tuple[str, float]] = []  # each matrix with the moment from which it was in use

    def _take(self, pages: list[tuple[Page, StoredTensor]], limit: int) -> None:
        """Reads the first pages, and the largest in any case, and gives each page a place."""
        largest = max(pages, key=lambda own: extent(own[0])[1])[0]
        places, size = {largest.index: 0}, extent(largest)[1]
        for page, _ in pages:
            nbytes = extent(page)[1]
            if page.index not in places and size + nbytes <= limit:
                places[page.index] = size
                size += nbytes
        arena = Arena(size)
        memory, taken = arena.tensor(), [page for page, _ in pages if page.index in places]
        for some in range(0, len(taken), FLYING):
            batch = taken[some : some + FLYING]
            for ticket in [self._reader.submit(p.file, p.offset, p.nbytes, arena, places[p.index]) for p in batch]:
                self._reader.wait(ticket)
        self.bytes_read += size
        turns = itertools.cycle(taken)
        for page, tensor in pages:
            given = page if page.index in places else next(own for own in turns if own.nbytes >= page.nbytes)
            begin = places[given.index] + given.offset % ALIGNMENT
            self._parts[page.index] = self._part(page, tensor, memory[begin : begin + page.nbytes])

    def _part(self, page: Page, tensor: StoredTensor, raw: Tensor) -> Part:
        if raw.data_ptr() % tensor.dtype.itemsize:
            raw = raw.clone()
        scales = None if tensor.scales is None else self._vectors[tensor.scales][page.start : page.stop]
        data = raw.view(tensor.dtype).view(page.stop - page.start, *tensor.shape[1:])
        return Part(page.start, page.stop, data, scales, tensor.group)

    def watch(self) -> None:
        """Begins a step."""
        self._begun, self._uses = time.perf_counter(), []

    def seen(self) -> tuple[float, list[tuple[str, float]]]:
        """Of the step that ends now: seconds before its first matrix, and each matrix in order with the seconds from
        its use to the next one's, or to the end."""
        assert self._begun is not None
        moments = [self._begun, *(moment for _, moment in self._uses), time.perf_counter()]
        spans = [later - earlier for earlier, later in itertools.pairwise(moments)]
        return spans[0], [(name, span) for (name, _), span in zip(self._uses, spans[1:], strict=True)]

    def parts(self, name: str) -> Iterator[Part]:
        now = time.perf_counter()
        if now > self.deadline:
            raise Enough
        self._uses.append((name, now))
        for page in self._store.tensors[name].pages:
            yield self._parts[page.index]

    def pinned(self, name: str) -> list[Part]:
        return [self._parts[page.index] for page in self._store.tensors[name].pages]

    def stored(self, name: str) -> Part:
        tensor = self._store.tensors[name]
        scales = None if tensor.scales is None else self._vectors[tensor.scales].to("meta")
        data = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return Part(0, tensor.shape[0], data, scales, tensor.group)

    def rows(self, name: str, ids: Tensor) -> Part:
        """Rows of the first page, whatever the ids. As a pager does, those that do not stay in memory are read."""
        tensor, order = self._store.tensors[name], ids.flatten().tolist()
        first = self._parts[tensor.pages[0].index]
        rows = {}
        for row in dict.fromkeys(order):
            page = tensor.pages[row // tensor.pages[0].stop]
            if page.index not in self._pinned and name not in self._resident:
                nbytes = page.nbytes if tensor.kind == "table" else tensor.row_bytes
                self._reader.read_now(page.file, page.offset, nbytes)
            at = row % first.stop
            rows[row] = first.data[at : at + 1]
        scales = None if first.scales is None else first.scales.index_select(0, ids.flatten() % first.stop)
        return Part(0, len(order), torch.cat([rows[row] for row in order]), scales, first.group)

    def pinned_rows(self, name: str, ids: Tensor) -> Part | None:
        return self.rows(name, ids)

    def begin(self, key: Hashable, future: Callable[[], Iterator[int]], may_stop: bool = False) -> None:
        """Nothing is fetched."""

    def end(self, key: Hashable) -> None:
        """Nothing is expected."""

    def count_uses(self, count: int) -> None:
        self.traffic.page_hits += count

    def close(self) -> None:
        """An engine with all tables in memory needs no file any more; what stands in for them is read on: `finish`."""

    def finish(self) -> None:
        """Ends the reader."""
        self._reader.close()
