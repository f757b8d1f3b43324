"""What a memory budget costs, said beforehand: which pages are pinned, which are streamed, and how fast that is.

Sizes of the ring are tried by `predict`, which gives the plan its bytes and its times.
"""

from dataclasses import dataclass, replace
from typing import Any

from thl_engine.checkpoint.page import extent
from thl_engine.checkpoint.store import Store
from thl_engine.errors import BudgetError
from thl_engine.memory import size
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.prediction import NOMINAL, Bandwidths, Costs, Counted, Work, bytes_in_order, predict

LEAST_SLOTS = 2  # one that is computed from while the other is filled
# Ring sizes tried; more slots prefetch deeper, but each displaces pinned pages. Beyond 32 pages of 8 MiB nothing gains.
SLOT_CHOICES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
# Reads take turns unevenly, which the prediction does not know: a 5B INL at 4 GiB gave 0.67 tokens/s with 2 slots, 0.75
# with 4, 0.90 with 5 and 0.94 with 8. So there are this many wherever they take little of what pages have.
AMPLE_SLOTS, AMPLE_SHARE = 8, 1 / 16


@dataclass(frozen=True)
class Plan:
    """A division of the budget and what follows from it. Sizes in bytes, times in seconds, rates per second.

    What is given per token is for one token of each of the batch's sequences.
    """

    batch_size: int
    budget: int | None
    fixed_bytes: int  # vectors, scales, gather buffers
    state_bytes: int
    work: Work  # of a pass
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
    multiply_adds_per_token: float
    bytes_streamed_per_token: float
    bytes_in_order_per_token: float  # that a reader streams in the same memory who does not know the schedule
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
        self,
        bandwidths: Bandwidths,
        store: Store,
        schedule: PageSchedule,
        work: Work | None = None,
        costs: Costs | None = None,
    ) -> "Plan":
        """The same division with its times predicted from other bandwidths and of other work.

        costs: what computing takes; counted at the bandwidths unless given.
        """
        work = work or self.work
        pace = predict(
            store,
            schedule,
            work,
            costs or Counted(store, schedule, bandwidths, work),
            bandwidths,
            slots=self.slots,
            horizon=self.horizon,
            pinned=self.pinned,
            kept=self.kept,
        )
        return replace(
            self,
            bandwidths=bandwidths,
            work=work,
            bytes_per_token=pace.bytes,
            multiply_adds_per_token=pace.multiply_adds,
            bytes_streamed_per_token=pace.streamed,
            seconds_per_token=pace.seconds,
            stall_per_token=pace.stall,
        )

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
            "state_bytes_per_step": self.work.traffic,
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
            "multiply_adds_per_token": self.multiply_adds_per_token,
            "bytes_streamed_per_token": self.bytes_streamed_per_token,
            "bytes_in_order_per_token": self.bytes_in_order_per_token,
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

    def _saving(self) -> list[tuple[str, str]]:
        """What knowing the schedule saves, if anything is streamed."""
        ours, others = self.bytes_streamed_per_token, self.bytes_in_order_per_token
        if not ours:
            return []
        return [("  read in order instead", f"{size(others)}, {others / ours:.1f} times as much in the same memory")]

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
            *self._saving(),
            ("multiply-adds per token", f"{self.multiply_adds_per_token / 1e6:.1f} million"),
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
    work: Work | None = None,
    host_room: int = 0,
    nominal: Bandwidths = NOMINAL,
    smaller_state: str = "",
) -> Plan:
    """Divides `budget` bytes among pinned pages, tables and the ring.

    Without a budget everything is resident, or, when `stream` asks for paging, nothing but the least ring is.
    Raises BudgetError, naming the least budget that runs, when even that does not fit. `schedule` is left with
    the pages that the plan pins removed from its futures. work: of a pass, of one row that reads and writes the state
    four times unless given. host_room: bytes of host memory that pages streamed to a device may stay in. nominal:
    bandwidths by which the ring's size is chosen. smaller_state: names of options that would make the state smaller.
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
        if state_bytes > amount / 2 and smaller_state:
            hint += f"; {size(state_bytes)} of it are the state, which {smaller_state} make smaller"
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
        return (
            Plan(
                batch_size=batch_size,
                budget=budget,
                fixed_bytes=fixed,
                state_bytes=state_bytes,
                work=work or Work(traffic=4 * state_bytes),
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
                multiply_adds_per_token=0.0,
                bytes_streamed_per_token=0.0,
                bytes_in_order_per_token=0.0,
                seconds_per_token=1.0,
                stall_per_token=0.0,
                bandwidths=nominal,
                least_budget=least,
            )
        ).at(nominal, store, schedule)

    if not stream or (budget is not None and budget >= base + sum(pages.values())):
        plan = divide(0, budget)
    elif budget is None:
        plan = divide(LEAST_SLOTS, least)
    else:
        ample = AMPLE_SLOTS if AMPLE_SLOTS * slot_bytes <= AMPLE_SHARE * (budget - base) else LEAST_SLOTS
        fitting = [n for n in SLOT_CHOICES if base + n * slot_bytes <= budget and ample <= n <= len(pages)]
        plan = min((divide(n, budget) for n in fitting or [LEAST_SLOTS]), key=lambda p: (p.seconds_per_token, p.slots))
    schedule.pin(frozenset(plan.pinned))
    room = plan.pinned_bytes + plan.slots * plan.slot_bytes
    return replace(plan, bytes_in_order_per_token=bytes_in_order(schedule, pages, room))


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
