"""How fast steps are: the reads and the products of a stretch of decoding, on a clock.

The pager's own `Ring` runs over the walk, so the bytes predicted are the bytes that will be read. What computing takes
between two reads is counted (`Counted`: bytes and multiply-adds at given rates), or was measured on the model itself.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from thl_engine.checkpoint.page import extent
from thl_engine.checkpoint.store import Store
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.ring import Ring

LEAD_SECONDS = 1e-3  # from asking for a page to its first bytes, hidden where others are on their way
LONGEST_STRETCH = 512  # steps that a prediction runs through; clocks with a longer common period are sampled
READ_SECONDS = 20e-6  # fixed cost of one matrix product in a step: dispatch, activations, thread hand-over
ATTENDED_SHARE = 1 / 4  # of the rate of products with int8 weights: attention is float32, of few features a head


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second, and multiply-adds per second. `disk` feeds the pages; `memory` is what products over resident
    weights achieve; `link` is host to device and None on the CPU. `arithmetic` is what products of many rows achieve,
    None where computing was measured as a whole."""

    disk: float
    memory: float
    link: float | None = None
    arithmetic: float | None = 200e9  # HRM's steps reach 190e9 on two cores with AVX-512-VNNI


# The ring's size is chosen with these, never with measured values, so that a budget always gives the same plan.
NOMINAL = Bandwidths(disk=1.5e9, memory=24e9)
NOMINAL_CUDA = Bandwidths(disk=1.5e9, memory=250e9, link=12e9, arithmetic=20e12)  # a small card on PCIe 3.0 x16


@dataclass(frozen=True)
class Work:
    """What a pass takes besides reading weights, for all sequences of a batch. A pass is a step that reads a matrix
    other than the head's: it may serve the tokens of several steps.

    rows, head_rows: of activations in products with the walk's matrices, and with the head's. attended: multiply-adds
    of activations with each other or with the state. traffic: bytes of the state that are read or written.
    """

    rows: int = 1
    head_rows: int = 1
    attended: int = 0
    traffic: int = 0


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step besides its matrices, and of one use of each page that it reads."""

    besides: float
    pages: Mapping[int, float]


class Costs(Protocol):
    """What computing takes."""

    def step(self, reads: tuple[str, ...]) -> StepCost:
        """Of a step that reads these matrices, in order, and then those of the logits."""
        ...


@dataclass(frozen=True)
class Counted:
    """Costs from counts: products take the time of their bytes or of their multiply-adds, whichever is longer."""

    store: Store
    schedule: PageSchedule
    rates: Bandwidths
    work: Work

    def step(self, reads: tuple[str, ...]) -> StepCost:
        arithmetic = self.rates.arithmetic or float("inf")
        names = (*reads, *self.schedule.head_names)
        besides = READ_SECONDS * sum(self.schedule.products(name) for name in names)
        if reads:
            attended = self.work.attended / (ATTENDED_SHARE * arithmetic)
            besides += max(self.work.traffic / self.rates.memory, attended)
        pages = {}
        for name in dict.fromkeys(names):
            for page in self.schedule.pages(name):
                nbytes = self.store.pages[page].nbytes * self.schedule.touched(page) * self.schedule.products(name)
                added = multiply_adds(self.store, self.schedule, self.work, name, page)
                pages[page] = max(nbytes / self.rates.memory, added / arithmetic)
        return StepCost(besides, pages)


def multiply_adds(store: Store, schedule: PageSchedule, work: Work, name: str, page: int) -> float:
    """Of one use of a page of the named matrix."""
    rows = work.head_rows if name in schedule.head_names else work.rows
    weights = store.pages[page].nbytes // store.tensors[name].dtype.itemsize
    return rows * weights * schedule.touched(page) * schedule.products(name)


@dataclass(frozen=True)
class Pace:
    """Means over a stretch of steps: bytes, multiply-adds and seconds of a step."""

    bytes: float  # that products read, wherever from; of sparse ones, only what they need
    multiply_adds: float
    streamed: float
    seconds: float
    stall: float


def predict(
    store: Store,
    schedule: PageSchedule,
    work: Work,
    costs: Costs,
    rates: Bandwidths,
    *,
    slots: int,
    horizon: int,
    pinned: Iterable[int],
    kept: Iterable[int],
) -> Pace:
    """Runs a ring of `slots` through a stretch of decoding to reach its rhythm, then times another.

    pinned, kept: pages that stay in memory, and pages for a device that stay in the host's. The schedule is left with
    the pinned ones removed from its futures.
    """
    pages = {index: extent(store.pages[index])[1] for index in schedule.uses()}
    held = frozenset(pinned)
    schedule.pin(held)
    ring = Ring(slots, horizon)
    ring.follow(schedule.decode(0))
    clock = Clock(rates, frozenset(kept))
    stretch = min(schedule.period, LONGEST_STRETCH)
    kinds: dict[tuple[str, ...], _Kind] = {}
    nbytes = added = 0.0
    clock.fetch(ring, pages)
    for first in (0, stretch):
        started = replace(clock)
        nbytes = added = 0.0
        for t in range(first, first + stretch):
            reads = schedule.reads(t)
            kind = kinds.get(reads)
            if kind is None:
                kind = kinds[reads] = _kind(reads, held, store, schedule, work, costs)
            nbytes += kind.bytes
            added += kind.multiply_adds
            clock.now += kind.besides
            for seconds, page in kind.runs:
                if page is not None:
                    ring.use(page)
                    clock.wait_for(page)
                clock.now += seconds
                if page is not None:
                    ring.release(page)
                    clock.fetch(ring, pages)
    return Pace(
        bytes=nbytes / stretch,
        multiply_adds=added / stretch,
        streamed=(clock.streamed - started.streamed) / stretch,
        seconds=(clock.now - started.now) / stretch,
        stall=(clock.stalled - started.stalled) / stretch,
    )


def bytes_in_order(schedule: PageSchedule, pages: Mapping[int, int], room: int) -> float:
    """Bytes a step that a reader would move that does not know the schedule: it keeps the pages last used, as far as
    `room` bytes hold them, as a mapped file in memory of that size does. pages: their bytes."""
    stretch, moved = min(schedule.period, LONGEST_STRETCH), 0
    held: OrderedDict[int, int] = OrderedDict()
    free = room
    for first in (0, stretch):
        moved = 0
        for t in range(first, first + stretch):
            for page in (*schedule.step(t), *schedule.head):
                if page in held:
                    held.move_to_end(page)
                    continue
                moved += pages[page]
                while held and free < pages[page]:
                    free += held.popitem(last=False)[1]
                held[page] = pages[page]
                free -= pages[page]
    return moved / stretch


@dataclass(frozen=True)
class _Kind:
    """A step: what it reads and multiplies, and its computing as (seconds, page) for each streamed page; neighbouring
    pinned pages are taken together, with page None."""

    bytes: float
    multiply_adds: float
    besides: float
    runs: tuple[tuple[float, int | None], ...]


def _kind(
    reads: tuple[str, ...], pinned: frozenset[int], store: Store, schedule: PageSchedule, work: Work, costs: Costs
) -> _Kind:
    cost, runs = costs.step(reads), list[tuple[float, int | None]]()
    nbytes, added = 0.0, float(work.attended if reads else 0)
    for name in (*reads, *schedule.head_names):
        for page in schedule.pages(name):
            nbytes += store.pages[page].nbytes * schedule.touched(page)
            added += multiply_adds(store, schedule, work, name, page)
            if page not in pinned:
                runs.append((cost.pages[page], page))
            elif runs and runs[-1][1] is None:
                runs[-1] = (runs[-1][0] + cost.pages[page], None)
            else:
                runs.append((cost.pages[page], None))
    return _Kind(nbytes, added, cost.besides, tuple(runs))


@dataclass
class Clock:
    """Resources that pages pass in order: the disk, the link to the device if there is one, and what computes."""

    rates: Bandwidths
    kept: frozenset[int]  # pages that need no disk
    now: float = 0.0
    stalled: float = 0.0
    streamed: int = 0
    disk_free: float = 0.0
    link_free: float = 0.0
    landed: dict[int, float] = field(default_factory=dict)

    def fetch(self, ring: Ring, pages: dict[int, int]) -> None:
        """Starts what the ring has slots for."""
        for page, _ in ring.fetches():
            ready = self.now
            if page not in self.kept:
                ready = self.disk_free = max(self.disk_free, ready + LEAD_SECONDS) + pages[page] / self.rates.disk
            self.landed[page] = ready
            if self.rates.link is not None:  # a page is copied once it has been read, and others meanwhile
                self.link_free = max(self.link_free, ready) + pages[page] / self.rates.link
                self.landed[page] = self.link_free
            self.streamed += pages[page]

    def wait_for(self, page: int) -> None:
        """Until the page has landed."""
        wait = max(0.0, self.landed[page] - self.now)
        self.stalled += wait
        self.now += wait
