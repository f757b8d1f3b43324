"""What a memory budget costs, said beforehand: which pages are pinned, which are streamed, and how fast that is.

The plan runs the pager's own `Ring` over one period of the schedule, so the bytes it predicts are the bytes that will
be read. Times follow from bandwidths, given or measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from thl_engine.checkpoint.page import extent
from thl_engine.checkpoint.store import Store
from thl_engine.errors import BudgetError
from thl_engine.memory import size
from thl_engine.paging.ring import Ring
from thl_engine.schedule import Walk

LEAST_SLOTS = 2  # one that is computed from while the other is filled
# Ring sizes tried; more slots prefetch deeper, but each displaces pinned pages. Beyond 32 pages of 8 MiB nothing gains.
SLOT_CHOICES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# Reads take turns unevenly, which the prediction does not know: a 5B INL at 4 GiB gave 0.67 tokens/s with 2 slots, 0.75
# with 4, 0.90 with 5 and 0.94 with 8. So there are this many wherever they take little of what pages have.
AMPLE_SLOTS, AMPLE_SHARE = 8, 1 / 16
LEAD_SECONDS = 1e-3  # from asking for a page to its first bytes, hidden where others are on their way
LONGEST_STRETCH = 512  # steps that a prediction runs through; clocks with a longer common period are sampled
READ_SECONDS = 20e-6  # fixed cost of one matrix product in a step: dispatch, activations, thread hand-over


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second. `disk` feeds the pages; `memory` is what products over resident weights achieve; `link` is
    host to device and None on the CPU."""

    disk: float
    memory: float
    link: float | None = None


# The ring's size is chosen with these, never with measured values, so that a budget always gives the same plan.
NOMINAL = Bandwidths(disk=1.5e9, memory=24e9)
NOMINAL_CUDA = Bandwidths(disk=1.5e9, memory=250e9, link=12e9)  # of a small card on PCIe 3.0 x16


class PageSchedule:
    """A model's walk in pages: which pages each step reads, which the logits read, and endless futures of both."""

    def __init__(
        self,
        store: Store,
        walk: Walk,
        head: tuple[str, ...],
        products: Mapping[str, float] | None = None,
        touched: Mapping[str, float] | None = None,
    ) -> None:
        """products: how many products a reading of a matrix serves, where it is not one. touched: the share of a matrix
        that they need, where it is not all."""
        self._pages = {
            name: tuple(page.index for page in tensor.pages)
            for name, tensor in store.tensors.items()
            if tensor.kind == "matrix"
        }
        self.may_stop = walk.may_stop
        self._walk = walk
        self.head = self._in_pages(head)
        self.period = walk.period
        products = products or {}
        self.products_per_token = sum(products.get(name, 1) / clock for name, clock in walk.clocked) + len(head)
        self._products = {page: times for name, times in products.items() for page in self._pages[name]}
        self._touched = {page: share for name, share in (touched or {}).items() for page in self._pages[name]}
        self._runs: dict[tuple[str, ...], tuple[int, ...]] = {}  # names read -> their streamed pages
        self._pinned: frozenset[int] = frozenset()

    def _in_pages(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(page for name in names for page in self._pages[name])

    def step(self, t: int) -> tuple[int, ...]:
        """Pages that step `t` reads, in order."""
        return self._in_pages(self._walk.reads(t))

    def products(self, page: int) -> float:
        """Products that are made with a page each time that it is read."""
        return self._products.get(page, 1)

    def touched(self, page: int) -> float:
        """Share of a page that products read from memory each time that it is used."""
        return self._touched.get(page, 1.0)

    def uses(self) -> dict[int, float]:
        """Page -> uses per token of decoding."""
        count = dict.fromkeys(self.head, 1.0)
        for name, clock in self._walk.clocked:
            for page in self._pages[name]:
                count[page] = count.get(page, 0.0) + 1.0 / clock
        return count

    def pin(self, pinned: frozenset[int]) -> None:
        """Leaves pinned pages out of the futures."""
        self._pinned = pinned
        self._runs.clear()

    def _streamed(self, names: tuple[str, ...]) -> tuple[int, ...]:
        if names not in self._runs:
            self._runs[names] = tuple(page for page in self._in_pages(names) if page not in self._pinned)
        return self._runs[names]

    def decode(self, t: int) -> Iterator[int]:
        """Streamed pages of the steps from `t` on, each followed by its logits."""
        clocks = {clock for name, clock in self._walk.clocked if not self._pinned.issuperset(self._pages[name])}
        head = tuple(page for page in self.head if page not in self._pinned)
        if head:
            clocks.add(1)
        while clocks:
            t = min(-(-t // clock) * clock for clock in clocks)  # on to the next step that streams anything
            yield from self._streamed(self._walk.reads(t))
            yield from head
            t += 1

    def once(self, names: tuple[str, ...]) -> Iterator[int]:
        """Streamed pages of the named matrices, in order."""
        return iter(self._streamed(names))

    def once_then(self, names: tuple[str, ...], t: int) -> Iterator[int]:
        """The same, then their logits and the steps from `t` on."""
        yield from self._streamed(names)
        yield from (page for page in self.head if page not in self._pinned)
        yield from self.decode(t)

    def prompt(self, t: int, count: int) -> Iterator[int]:
        """As `decode` with logits only after `count` steps, then decoding."""
        for i in range(count - 1):
            yield from self._streamed(self._walk.reads(t + i))
        yield from self.decode(t + count - 1)


@dataclass(frozen=True)
class Plan:
    """A division of the budget and what follows from it. Sizes in bytes, times in seconds, rates per second.

    What is given per token is for one token of each of the batch's sequences.
    """

    batch_size: int
    budget: int | None
    fixed_bytes: int  # vectors, scales, gather buffers
    state_bytes: int
    state_traffic: int  # bytes of the state that a token reads or writes
    workspace_bytes: int
    reserve_bytes: int  # that the device's allocator may take beyond its tensors; none on the CPU
    pinned: tuple[int, ...]
    pinned_bytes: int
    resident_tables: tuple[str, ...]
    table_bytes: int
    slots: int
    slot_bytes: int
    streamed_pages: int
    streamed_bytes: int  # pages that are not pinned, each counted once
    kept: tuple[int, ...]  # of these, the ones for a device that stay in the host's memory once they were read
    kept_bytes: int
    bytes_per_token: float  # that products read, wherever from; of sparse ones, only what they need
    bytes_streamed_per_token: float
    seconds_per_token: float
    stall_per_token: float
    bandwidths: Bandwidths
    least_budget: int

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch_size / self.seconds_per_token

    @property
    def peak_memory_bytes(self) -> int:
        """All that the engine keeps in memory."""
        return (
            self.fixed_bytes
            + self.state_bytes
            + self.workspace_bytes
            + self.reserve_bytes
            + self.pinned_bytes
            + self.table_bytes
            + self.slots * self.slot_bytes
        )

    @property
    def limited_by(self) -> str:
        """The resource that more of would help most."""
        if self.stall_per_token < 0.1 * self.seconds_per_token:
            return "memory"
        link = self.bandwidths.link
        if link is None or self.kept_bytes == 0:
            return "link" if link is not None and link < self.bandwidths.disk else "disk"
        return "link" if self.kept_bytes == self.streamed_bytes else "disk"

    def at(
        self, bandwidths: Bandwidths, store: Store, schedule: PageSchedule, state_traffic: int | None = None
    ) -> "Plan":
        """The same division with its times predicted from other bandwidths, and another use of the state."""
        traffic = self.state_traffic if state_traffic is None else state_traffic
        return _predict(replace(self, bandwidths=bandwidths, state_traffic=traffic), store, schedule)

    @property
    def horizon(self) -> int:
        """Uses that the ring looks ahead."""
        return 2 * self.streamed_pages

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "batch_size": self.batch_size,
            "memory_budget": self.budget,
            "least_budget": self.least_budget,
            "peak_memory_bytes": self.peak_memory_bytes,
            "fixed_bytes": self.fixed_bytes,
            "state_bytes": self.state_bytes,
            "state_bytes_per_step": self.state_traffic,
            "workspace_bytes": self.workspace_bytes,
            "reserve_bytes": self.reserve_bytes,
            "pinned_pages": len(self.pinned),
            "pinned_bytes": self.pinned_bytes,
            "resident_tables": list(self.resident_tables),
            "table_bytes": self.table_bytes,
            "ring_slots": self.slots,
            "ring_bytes": self.slots * self.slot_bytes,
            "streamed_pages": self.streamed_pages,
            "streamed_bytes": self.streamed_bytes,
            "host_memory_bytes": self.kept_bytes,
            "bytes_per_token": self.bytes_per_token,
            "bytes_streamed_per_token": self.bytes_streamed_per_token,
            "seconds_per_token": self.seconds_per_token,
            "stall_seconds_per_token": self.stall_per_token,
            "tokens_per_second": self.tokens_per_second,
            "limited_by": self.limited_by,
            "disk_bandwidth": self.bandwidths.disk,
            "memory_bandwidth": self.bandwidths.memory,
            "link_bandwidth": self.bandwidths.link,
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, *more: tuple[str, str]) -> str:
        """The plan for people, one row a line; `more`: rows (name, value) that come first."""
        ring = f"{self.slots} slots of {size(self.slot_bytes)}" if self.slots else "none"
        link = self.bandwidths.link
        rows = [
            *more,
            ("memory budget", size(self.budget) if self.budget is not None else "none"),
            ("least budget that runs", size(self.least_budget)),
            ("peak memory", size(self.peak_memory_bytes)),
            ("  pinned pages", f"{size(self.pinned_bytes)} in {len(self.pinned)} pages"),
            ("  tables", f"{size(self.table_bytes)} resident" if self.resident_tables else "rows read by token id"),
            ("  ring", ring),
            ("  state", size(self.state_bytes) + (f" of {self.batch_size} sequences" if self.batch_size > 1 else "")),
            ("  norms, scales, workspace", size(self.fixed_bytes + self.workspace_bytes)),
            *(
                [("  for torch's allocator", f"{size(self.reserve_bytes)}, which it rounds up by and leaves in pieces")]
                if self.reserve_bytes
                else []
            ),
            ("streamed pages", f"{size(self.streamed_bytes)} in {self.streamed_pages} pages"),
            *([] if link is None else [("  kept in host memory", size(self.kept_bytes))]),
            ("bytes per token", size(self.bytes_per_token)),
            ("  of these streamed", size(self.bytes_streamed_per_token)),
            ("disk, memory bandwidth", f"{self.bandwidths.disk / 1e9:.2f}, {self.bandwidths.memory / 1e9:.2f} GB/s"),
            *([] if link is None else [("link to the device", f"{link / 1e9:.2f} GB/s")]),
            ("predicted tokens/s", f"{self.tokens_per_second:.2f}"),
            (
                "limited by",
                f"{self.limited_by} ({100 * self.stall_per_token / self.seconds_per_token:.0f} % of the "
                "time waiting for pages)",
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def make_plan(
    store: Store,
    schedule: PageSchedule,
    *,
    budget: int | None,
    stream: bool,
    state_bytes: int,
    workspace_bytes: int,
    reserve_bytes: int = 0,
    batch_size: int = 1,
    state_traffic: int | None = None,
    host_room: int = 0,
    nominal: Bandwidths = NOMINAL,
) -> Plan:
    """Divides `budget` bytes among pinned pages, tables and the ring.

    Without a budget everything is resident, or, when `stream` asks for paging, nothing but the least ring is.
    Raises BudgetError, naming the least budget that runs, when even that does not fit. `schedule` is left with
    the pages that the plan pins removed from its futures. state_traffic: bytes of the state that a token reads or
    writes; four times the state unless given. host_room: bytes of host memory that pages streamed to a device may stay
    in. nominal: bandwidths by which the ring's size is chosen.
    """
    pages = {index: extent(store.pages[index])[1] for index in schedule.uses()}
    slot_bytes = max(pages.values())
    tables = {
        name: sum(extent(page)[1] for page in tensor.pages)
        for name, tensor in store.tensors.items()
        if tensor.kind == "table"
    }
    fixed = store.vector_bytes + sum(max(extent(page)[1] for page in store.tensors[name].pages) for name in tables)
    base = fixed + state_bytes + workspace_bytes + reserve_bytes
    everything = base + sum(pages.values()) + sum(tables.values())
    least = base + LEAST_SLOTS * slot_bytes
    if len(pages) <= LEAST_SLOTS:
        least = min(least, base + sum(pages.values()))
    if budget is not None and budget < (least if stream else everything):
        what = "needs at least" if stream else "is not enough to keep everything resident, which needs"
        hint = "" if stream else f"; streaming runs from {size(least)} ({least} bytes) on: stream=True or 'auto'"
        amount = least if stream else everything
        raise BudgetError(
            f"memory budget {size(budget)} ({budget} bytes): this {store.model_type} model {what} "
            f"{size(amount)} ({amount} bytes){hint}"
        )

    def divide(slots: int, limit: int | None) -> Plan:
        room = None if limit is None else limit - base - slots * slot_bytes
        pinned = pins(schedule.uses(), pages, room)
        pinned_bytes = sum(pages[p] for p in pinned)
        resident = tuple(tables) if room is None or room - pinned_bytes >= sum(tables.values()) else ()
        if len(pinned) < len(pages):
            resident = ()  # a table's rows cost a few KiB a token: any page is worth more
        streamed = {page: count for page, count in schedule.uses().items() if page not in pinned}
        kept = pins(streamed, {page: pages[page] for page in streamed}, host_room)
        return _predict(
            Plan(
                batch_size=batch_size,
                budget=budget,
                fixed_bytes=fixed,
                state_bytes=state_bytes,
                state_traffic=4 * state_bytes if state_traffic is None else state_traffic,
                workspace_bytes=workspace_bytes,
                reserve_bytes=reserve_bytes,
                pinned=pinned,
                pinned_bytes=pinned_bytes,
                resident_tables=resident,
                table_bytes=sum(tables.values()) if resident else 0,
                slots=slots,
                slot_bytes=slot_bytes,
                streamed_pages=len(pages) - len(pinned),
                streamed_bytes=sum(pages.values()) - pinned_bytes,
                kept=kept,
                kept_bytes=sum(pages[page] for page in kept),
                bytes_per_token=0.0,
                bytes_streamed_per_token=0.0,
                seconds_per_token=1.0,
                stall_per_token=0.0,
                bandwidths=nominal,
                least_budget=least,
            ),
            store,
            schedule,
        )

    if not stream or (budget is not None and budget >= base + sum(pages.values())):
        plan = divide(0, budget)
    elif budget is None:
        plan = divide(LEAST_SLOTS, least)
    else:
        ample = AMPLE_SLOTS if AMPLE_SLOTS * slot_bytes <= AMPLE_SHARE * (budget - base) else LEAST_SLOTS
        fitting = [n for n in SLOT_CHOICES if base + n * slot_bytes <= budget and ample <= n <= len(pages)]
        plan = min((divide(n, budget) for n in fitting or [LEAST_SLOTS]), key=lambda p: (p.seconds_per_token, p.slots))
    schedule.pin(frozenset(plan.pinned))
    return plan


def pins(uses: dict[int, float], pages: dict[int, int], room: int | None) -> tuple[int, ...]:
    """Pages that save the most reads per byte of `room`: the most used first.

    Of the class that fits in part, the pages left out are spread evenly over the walk, so that reading them overlaps
    computing with the others.
    """
    if room is None:
        return tuple(sorted(pages))
    chosen: list[int] = []
    for count in sorted(set(uses.values()), reverse=True):
        equal = sorted(p for p in pages if uses[p] == count)
        total = sum(pages[p] for p in equal)
        if total <= room:
            chosen += equal
            room -= total
            continue
        share, credit = room / total, 0.0
        for page in equal:
            credit += share * pages[page]
            if pages[page] <= min(credit, room):
                chosen.append(page)
                credit -= pages[page]
                room -= pages[page]
        for page in sorted(set(equal).difference(chosen), key=lambda p: -pages[p]):
            if pages[page] <= room:  # rounding may have left space for one more
                chosen.append(page)
                room -= pages[page]
    return tuple(sorted(chosen))


def _predict(plan: Plan, store: Store, schedule: PageSchedule) -> Plan:
    """Runs the ring through a stretch of decoding to reach its rhythm, then times another."""
    pages = {index: extent(store.pages[index])[1] for index in schedule.uses()}
    schedule.pin(frozenset(plan.pinned))
    ring = Ring(plan.slots, plan.horizon)
    ring.follow(schedule.decode(0))
    clock = _Clock(plan.bandwidths, frozenset(plan.kept))
    overhead = schedule.products_per_token * READ_SECONDS + plan.state_traffic / plan.bandwidths.memory
    stretch = min(schedule.period, LONGEST_STRETCH)
    runs: dict[tuple[int, ...], list[tuple[float, float, int | None]]] = {}
    clock.fetch(ring, pages)
    for first in (0, stretch):
        started = replace(clock)
        for t in range(first, first + stretch):
            clock.now += overhead
            step = (*schedule.step(t), *schedule.head)
            if step not in runs:
                runs[step] = _runs(step, frozenset(plan.pinned), store, schedule)
            for nbytes, multiplied, page in runs[step]:
                if page is not None:
                    ring.use(page)
                    clock.wait_for(page)
                clock.compute(nbytes, multiplied)
                if page is not None:
                    ring.release(page)
                    clock.fetch(ring, pages)
    return replace(
        plan,
        bytes_per_token=(clock.read - started.read) / stretch,
        bytes_streamed_per_token=(clock.streamed - started.streamed) / stretch,
        seconds_per_token=(clock.now - started.now) / stretch,
        stall_per_token=(clock.stalled - started.stalled) / stretch,
    )


def _runs(
    step: tuple[int, ...], pinned: frozenset[int], store: Store, schedule: PageSchedule
) -> list[tuple[float, float, int | None]]:
    """A step as (bytes touched, bytes multiplied, page) per streamed page; neighbouring pinned pages are taken
    together, with page None."""
    out: list[tuple[float, float, int | None]] = []
    for page in step:
        nbytes = store.pages[page].nbytes * schedule.touched(page)
        entry = (nbytes, nbytes * schedule.products(page), None if page in pinned else page)
        if page in pinned and out and out[-1][2] is None:
            entry = (out[-1][0] + entry[0], out[-1][1] + entry[1], None)
            out.pop()
        out.append(entry)
    return out


@dataclass
class _Clock:
    """Resources that pages pass in order: the disk, the link to the device if there is one, and what computes."""

    rates: Bandwidths
    kept: frozenset[int]  # pages that need no disk
    now: float = 0.0
    stalled: float = 0.0
    streamed: int = 0
    read: float = 0.0
    disk_free: float = 0.0
    link_free: float = 0.0
    landed: dict[int, float] = field(default_factory=dict)

    def fetch(self, ring: Ring, pages: dict[int, int]) -> None:
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
        wait = max(0.0, self.landed[page] - self.now)
        self.stalled += wait
        self.now += wait

    def compute(self, nbytes: float, multiplied: float) -> None:
        self.now += multiplied / self.rates.memory
        self.read += nbytes
