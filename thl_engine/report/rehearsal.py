"""What computing takes, measured on the model itself: a few of its steps, over stand-ins for its weights.

An engine takes these steps, so that all that it does is in the time: products of as many rows as the model gives them,
attention to as long a context, the operations between them and Python's share. Only waiting for pages is not.
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from thl_engine.checkpoint.store import Store
from thl_engine.engine.engine import Engine
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import page_schedule
from thl_engine.models.state import State, tensors_of
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.plan import Plan
from thl_engine.paging.prediction import NOMINAL, StepCost
from thl_engine.report.bandwidth import read_bandwidth
from thl_engine.report.stand_in import Enough, StandIn

SECONDS = 1.5  # for all kinds of steps together; each is made LEAST_RUNS times, unless that takes longer than LIMIT
LIMIT = 5.0  # seconds after which a step is broken off, and what it had yet to do is told from what it did
LEAST_RUNS, MOST_RUNS = 4, 50  # of a kind, the first of which finds cold caches
STATE_BYTES = 256 << 20  # of a state that steps are made with; the rest of a longer context's traffic is added


@dataclass(frozen=True)
class Seen:
    """Steps that read the same: seconds in all, before the first matrix, and of one use of each."""

    seconds: float
    besides: float
    matrices: Mapping[str, float]


@dataclass(frozen=True)
class Rehearsed:
    """Costs as steps showed them, by what they read.

    traffic: seconds that a pass takes besides, for the part of a long context that was not there.
    """

    store: Store
    schedule: PageSchedule
    kinds: Mapping[tuple[str, ...], Seen]
    traffic: float = 0.0

    def step(self, reads: tuple[str, ...]) -> StepCost:
        """As `Costs`. Of a matrix that was not seen in such a step, what it took in others, or its share by bytes."""
        known: dict[str, float] = {}
        for kind in self.kinds.values():
            known |= kind.matrices
        own = self.kinds.get(reads)
        if own is None:
            own = _mean(list(self.kinds.values()))
        seen = sum(self.store.tensors[name].nbytes for name in known)
        rate = sum(known.values()) / seen if seen else 1.0 / NOMINAL.memory
        pages = {}
        for name in dict.fromkeys((*reads, *self.schedule.head_names)):
            whole = self.store.tensors[name].nbytes
            seconds = own.matrices.get(name, known.get(name, rate * whole))
            for page in self.schedule.pages(name):
                pages[page] = seconds * self.store.pages[page].nbytes / whole
        return StepCost(own.besides + (self.traffic if reads else 0.0), pages)


def joined(runs: Sequence[Rehearsed]) -> Rehearsed:
    """The mean of several rehearsals of the same steps."""
    kinds = {}
    for reads in runs[0].kinds:
        kinds[reads] = _mean([run.kinds[reads] for run in runs if reads in run.kinds])
    return replace(runs[0], kinds=kinds, traffic=statistics.mean(run.traffic for run in runs))


def rehearse(
    store: Store, plan: Plan, options: EngineOptions, steps: range, state_options: Mapping[str, Any] | None = None
) -> Rehearsed:
    """What the given steps of a sequence's decoding compute, those in the middle standing for all that read the same.

    On the CPU. The plan tells which rows of tables are read. It takes SECONDS, and LIMIT where a step is long.
    """
    model, config, batch = store.architecture, store.config, options.batch_size
    walking, states = dict(state_options or {}), options.for_states(store.architecture)
    held: list[StandIn] = []

    def serve(store: Store, _: Plan, vectors: Mapping[str, torch.Tensor], device: torch.device, verify: str) -> StandIn:
        held.append(StandIn(store, plan, vectors))
        return held[0]

    room = _room(store, batch, {**states, **walking}, steps.stop)
    opened = replace(options, stream=False, memory_budget=None)
    if "context" in model.state_options:
        opened = replace(opened, context=room)
    with Engine(store, opened, serve) as engine:
        state = engine.new_state(batch, **walking)
        schedule = page_schedule(store, engine.ops, batch, **state.options)
        traffic = 0
        if room < steps.stop:
            middle = (steps.start + steps.stop) // 2
            traffic = model.traffic(config, state, middle) - model.traffic(config, state, room - 1)
        for tensor in tensors_of(state):
            tensor.zero_()  # memory that nothing was written to may hold anything, and is not there yet
        look = _Look(engine, held[0], state, room)
        kinds = look.at(_kinds(schedule, steps))
        held[0].finish()
    seconds = traffic / read_bandwidth(torch.device("cpu")) if traffic else 0.0
    return Rehearsed(store, schedule, kinds, seconds)


def _room(store: Store, batch: int, options: Mapping[str, Any], wanted: int) -> int:
    """Positions that a state has room for which is as long as wanted, or takes no more than STATE_BYTES."""
    model, config = store.architecture, store.config
    if "context" not in model.state_options:
        return wanted

    def nbytes(context: int) -> int:
        return int(model.init_state(config, batch, "meta", **{**options, "context": context}).nbytes)

    while wanted > 1 and nbytes(wanted) > STATE_BYTES:
        wanted //= 2
    return wanted


def _kinds(schedule: PageSchedule, steps: range) -> dict[tuple[str, ...], list[int]]:
    """Of steps that read the same, the one in the middle, or two if it lies between them; those first of which there
    are most."""
    found: dict[tuple[str, ...], list[int]] = {}
    for t in steps:
        found.setdefault(schedule.reads(t), []).append(t)
    middle = {}
    for reads, at in found.items():
        below, above = at[(len(at) - 1) // 2], at[len(at) // 2]
        middle[reads] = [below, above] if above - below > 1 else [above]
    return dict(sorted(middle.items(), key=lambda own: -len(found[own[0]])))


class _Look:
    """Makes steps and notes what they take."""

    def __init__(self, engine: Engine, pages: StandIn, state: State, room: int) -> None:
        """room: positions that the state has room for."""
        self._engine, self._pages, self._state, self._room = engine, pages, state, room
        self._generator = torch.Generator().manual_seed(0)

    def at(self, kinds: Mapping[tuple[str, ...], Iterable[int]]) -> dict[tuple[str, ...], Seen]:
        """What each kind takes, at its places."""
        self._pages.deadline = time.perf_counter() + LIMIT
        out: dict[tuple[str, ...], Seen] = {}
        try:
            for reads, places in kinds.items():
                own = list(places)
                out[reads] = _mean([self._kind(t, SECONDS / len(kinds) / len(own)) for t in own])
        except Enough:
            if not out:  # not even the first step came to its end
                out[next(iter(kinds))] = self._noted()
        return out

    def _kind(self, t: int, seconds: float) -> Seen:
        """The median of several such steps by what they took, without the first."""
        runs: list[Seen] = []
        started = time.perf_counter()
        while len(runs) < MOST_RUNS and (len(runs) < LEAST_RUNS or time.perf_counter() - started < seconds):
            try:
                runs.append(self._step(t))
            except Enough:
                if not runs:
                    raise
                break
        warm = sorted(runs[1:] or runs, key=lambda run: run.seconds)
        return warm[(len(warm) - 1) // 2]

    def _step(self, t: int) -> Seen:
        engine = self._engine
        ids = torch.randint(engine.config.vocab_size, (self._state.batch_size,), generator=self._generator)
        self._state.seek(min(t, self._room - 1))
        self._pages.watch()
        engine.step(ids, self._state)
        return self._noted()

    def _noted(self) -> Seen:
        besides, uses = self._pages.seen()
        spent: dict[str, list[float]] = {}
        for name, seconds in uses:
            spent.setdefault(name, []).append(seconds)
        total = besides + sum(seconds for _, seconds in uses)
        return Seen(total, besides, {name: statistics.mean(each) for name, each in spent.items()})


def _mean(seen: Sequence[Seen]) -> Seen:
    names = {name for own in seen for name in own.matrices}
    return Seen(
        statistics.mean(own.seconds for own in seen),
        statistics.mean(own.besides for own in seen),
        {name: statistics.mean(own.matrices[name] for own in seen if name in own.matrices) for name in names},
    )
