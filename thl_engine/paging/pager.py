"""Pages in motion: which page is in which slot of the ring, and the reads that keep it ahead of the compute.

The schedule is known, so nothing here guesses. `Ring` is the bookkeeping alone: deterministic, free of clocks and
files, and used unchanged by the plan to count bytes beforehand. `Pager` adds the memory and the reader.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thl_engine.checkpoint.checksum import crc32c
from thl_engine.checkpoint.page import Page, StoredTensor, extent, label
from thl_engine.checkpoint.store import Store
from thl_engine.errors import CheckpointError
from thl_engine.files import ALIGNMENT
from thl_engine.ops.weights import Part
from thl_engine.paging.reader import Reader
from thl_engine.paging.ring import Ring
from thl_engine.paging.transfer import Request, open_transfer


@dataclass
class Traffic:
    """Counters of a pager. Bytes are those brought from files while serving, alignment included: by the ring, and for
    rows of tables; of those streamed, `bytes_from_memory` had been kept in the host's and were not read again. A hit is
    a use of a page that was in memory already, pinned or kept from an earlier use. Bytes copied are those that went
    over the link to a device, those of pinned pages included."""

    bytes_streamed: int = 0
    bytes_gathered: int = 0
    bytes_copied: int = 0
    bytes_from_memory: int = 0
    page_hits: int = 0
    page_misses: int = 0
    stall_seconds: float = 0.0


class Pager:
    """Serves the pages of a store from memory that is allocated once: pinned pages, then the ring's slots.

    pinned: pages that are read at the start and stay. slots, slot_bytes, horizon: the ring for all others.
    scales: the scales of int8 tensors, by the name of the tensor of scales, on the device. kept: pages for a device
    that stay in the host's memory once they were read. direct_storage: as in `open_transfer`, for the others.
    verify_always: compares a page with its checksum each time that it is read, not the first time alone.
    """

    def __init__(
        self,
        store: Store,
        reader: Reader,
        scales: Mapping[str, Tensor],
        pinned: Iterable[int],
        slots: int,
        slot_bytes: int,
        horizon: int,
        device: torch.device | str = "cpu",
        kept: Iterable[int] = (),
        direct_storage: bool = False,
        verify_always: bool = False,
    ) -> None:
        self._store, self._reader, self._scales = store, reader, scales
        self._verify_always = verify_always
        places, size = {}, 0
        for index in pinned:
            places[index] = size
            size += extent(store.pages[index])[1]
        self._ring_base, self._slot_bytes = size, slot_bytes
        nbytes = max(size + slots * slot_bytes, ALIGNMENT)
        longest = max([slot_bytes, ALIGNMENT, *(extent(store.pages[index])[1] for index in places)])
        every = [*places.values(), *(size + i * slot_bytes for i in range(slots))]
        self._homes: dict[int, int] = {}
        home = 0
        for index in kept:
            self._homes[index] = home
            home += extent(store.pages[index])[1]
        self._transfer = open_transfer(reader, every, nbytes, longest, torch.device(device), direct_storage, home)
        self._ring = Ring(slots, horizon)
        self._coming: dict[int, int] = {}  # page on its way -> place
        self._fresh: set[int] = set()  # fetched and not used yet
        self._checked: set[int] = set()  # pages whose checksum was or is being verified
        self._key: Hashable = None
        self._may_stop = False
        self._failure: Exception | None = None
        self.traffic = Traffic()
        for index, place in places.items():
            self._start(index, place)
        for place in places.values():
            self._finish(place)
        store.check_unchanged()
        self._read_unchanged = 0  # bytes streamed and gathered so far, all of the model that was opened
        self._pinned = {index: self._part(store.pages[index], place) for index, place in places.items()}
        self._places = places
        self._starts: dict[str, Tensor | None] = {}  # of a table's pages in memory, where all are pinned

    def begin(self, key: Hashable, future: Callable[[], Iterator[int]], may_stop: bool = False) -> None:
        """Starts a run of uses. Unless `key` is what the last `end` announced, and not None, `future()` replaces the
        expectation.

        The future names every use of a page in order, pinned ones left out. `may_stop`: uses may be left out where the
        data say so; what follows them is found by looking ahead.
        """
        if self._failure is not None:
            raise self._failure
        if key is None or key != self._key:
            self._land()
            self._ring.follow(future())
            self._prefetch()
        self._key = None
        self._may_stop = may_stop

    def end(self, key: Hashable) -> None:
        """Announces which run comes next if nothing unforeseen happens: the one already being prefetched."""
        self._key = key
        self.traffic.bytes_copied = self._transfer.bytes_copied
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Refuses what has been read since the last time, if the files have changed meanwhile."""
        read = self.traffic.bytes_streamed + self.traffic.bytes_gathered
        if read == self._read_unchanged:
            return
        try:
            self._store.check_unchanged()
        except CheckpointError as error:
            self._failure = error
            raise
        self._read_unchanged = read

    def parts(self, name: str) -> Iterator[Part]:
        """The parts of a matrix in row order; each is valid until the next is asked for."""
        for page in self._store.tensors[name].pages:
            part = self._pinned.get(page.index)
            if part is not None:
                self.traffic.page_hits += 1
                yield part
                continue
            if self._may_stop and not self._ring.expects(page.index):
                self._land()
                self._ring.skip_to(page.index)
                self._prefetch()
            place = self._ring_base + self._ring.use(page.index) * self._slot_bytes
            self._await(page.index)
            try:
                yield self._part(page, place)
            finally:
                self._transfer.released(place)
                self._ring.release(page.index)
                self._prefetch()

    def pinned(self, name: str) -> list[Part] | None:
        """The parts of a matrix in row order, if all are pinned. No use is counted; `count_uses` does that."""
        pages = self._store.tensors[name].pages
        parts = [self._pinned[page.index] for page in pages if page.index in self._pinned]
        return parts if len(parts) == len(pages) else None

    def stored(self, name: str) -> Part:
        """All rows of a matrix as one part without memory, on the device "meta"."""
        tensor = self._store.tensors[name]
        scales = None if tensor.scales is None else self._scales[tensor.scales].to("meta")
        return Part(
            0, tensor.shape[0], torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), scales, tensor.group
        )

    def count_uses(self, count: int) -> None:
        """Notes uses of pinned pages that were made without asking for them."""
        self.traffic.page_hits += count

    def rows(self, name: str, ids: Tensor) -> Part:
        """Rows of a table or matrix in the order of int64 ids [n], in memory of their own, outside of the schedule.

        Each comes from a pinned page or is read at once, however often the ids repeat it. The part's start and stop
        count the ids, which may lie on the host.
        """
        tensor, device = self._store.tensors[name], self._transfer.memory.device
        order = ids.flatten().tolist()
        ids = ids.flatten().to(device)
        rows = {row: self._row(tensor, row).to(device) for row in dict.fromkeys(order)}
        scales = None if tensor.scales is None else self._scales[tensor.scales].index_select(0, ids)
        data = torch.cat([rows[row] for row in order]) if order else torch.empty(0, *tensor.shape[1:])
        return Part(0, len(order), data, scales, tensor.group)

    def pinned_rows(self, name: str, ids: Tensor) -> Part | None:
        """As `rows`, if all pages are pinned, with ids on the device, which the host does not wait for."""
        if name not in self._starts:
            self._starts[name] = self._pages_at(name)
        starts, tensor, ids = self._starts[name], self._store.tensors[name], ids.flatten()
        if starts is None:
            return None
        page = ids.div(tensor.pages[0].stop, rounding_mode="floor")
        first = starts.index_select(0, page) + (ids - page * tensor.pages[0].stop) * tensor.row_bytes
        at = first[:, None] + torch.arange(tensor.row_bytes, device=ids.device)
        data = self._transfer.memory.index_select(0, at.flatten()).view(tensor.dtype)
        scales = None if tensor.scales is None else self._scales[tensor.scales].index_select(0, ids)
        return Part(0, ids.shape[0], data.view(ids.shape[0], *tensor.shape[1:]), scales, tensor.group)

    def _pages_at(self, name: str) -> Tensor | None:
        """Where each page of a table begins in memory, int64 [pages] on the device; None if one is not pinned."""
        pages = self._store.tensors[name].pages
        if not all(page.index in self._places for page in pages):
            return None
        at = [self._places[page.index] + page.offset % ALIGNMENT for page in pages]
        return torch.tensor(at, device=self._transfer.memory.device)

    def _row(self, tensor: StoredTensor, row: int) -> Tensor:
        """One row as stored, [1, C]: a view of a pinned page, or memory of its own.

        A table's page is small and read whole, which verifies it; of a matrix's only the row itself is read.
        """
        page = tensor.pages[row // tensor.pages[0].stop]
        pinned = self._pinned.get(page.index)
        if pinned is not None:
            return pinned.data[row - page.start : row - page.start + 1]
        if tensor.kind == "table":
            return self._read_page(page).data[row - page.start : row - page.start + 1].clone()
        return self._read_page(
            replace(
                page,
                start=row,
                stop=row + 1,
                nbytes=tensor.row_bytes,
                crc=None,
                offset=page.offset + (row - page.start) * tensor.row_bytes,
            )
        ).data

    def _read_page(self, page: Page) -> Part:
        """A few rows read at once into memory of their own."""
        raw = self._reader.read_now(page.file, page.offset, page.nbytes)
        if page.crc is not None and (self._verify_always or page.index not in self._checked):
            found = crc32c(raw.numpy())
            if found != page.crc:
                raise CheckpointError(
                    f"{self._store.files[page.file]}: {label(page)}: checksum mismatch at offset "
                    f"{page.offset}: expected {page.crc:08x}, found {found:08x}; the file is "
                    "damaged, copy or quantise it again"
                )
            self._checked.add(page.index)
        self.traffic.bytes_gathered += extent(page)[1]
        return self._shaped(page, raw)

    def close(self) -> None:
        """Waits for what is in flight and ends the reader. Pinned pages stay valid.

        In the child of a fork there is no transfer to end, nor a device: files are closed, no more.
        """
        if not self._reader.inherited:
            self._transfer.close()
        self._reader.close()

    def _start(self, index: int, place: int) -> None:
        page = self._store.pages[index]
        crc = None if index in self._checked and not self._verify_always else page.crc
        self._checked.add(index)
        self._transfer.start(
            Request(page.file, page.offset, page.nbytes, crc, label(page), self._homes.get(index)), place
        )

    def _finish(self, place: int) -> None:
        try:
            self._transfer.finish(place)
        except Exception as error:
            self._failure = error  # the place holds nothing that may be served, now or later
            raise

    def _prefetch(self) -> None:
        for index, slot in self._ring.fetches():
            self._coming[index] = self._ring_base + slot * self._slot_bytes
            nbytes = extent(self._store.pages[index])[1]
            self.traffic.bytes_streamed += nbytes
            if index in self._homes and index in self._checked:
                self.traffic.bytes_from_memory += nbytes
            self._start(index, self._coming[index])
            self._fresh.add(index)

    def _land(self) -> None:
        """Waits for everything on its way. Once the schedule changes, such a page may lose its slot to another."""
        while self._coming:
            self._finish(self._coming.popitem()[1])

    def _await(self, index: int) -> None:
        if index in self._fresh:
            self._fresh.discard(index)
            self.traffic.page_misses += 1
        else:
            self.traffic.page_hits += 1
        place = self._coming.pop(index, None)
        if place is not None:
            started = time.perf_counter()
            self._finish(place)
            self.traffic.stall_seconds += time.perf_counter() - started

    def _part(self, page: Page, place: int) -> Part:
        begin = place + page.offset % ALIGNMENT
        return self._shaped(page, self._transfer.memory[begin : begin + page.nbytes])

    def _shaped(self, page: Page, raw: Tensor) -> Part:
        """Bytes of a page as its rows, with their scales."""
        tensor = self._store.tensors[page.tensor]
        if raw.data_ptr() % tensor.dtype.itemsize:
            raw = raw.clone()  # a plain checkpoint may place tensors at any byte
        data = raw.view(tensor.dtype).view(page.stop - page.start, *tensor.shape[1:])
        scales = None if tensor.scales is None else self._scales[tensor.scales][page.start : page.stop]
        return Part(page.start, page.stop, data, scales, tensor.group)
