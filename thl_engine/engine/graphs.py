"""Decoding steps as tapes: what a step launches is captured once and replayed, instead of launched anew each time.

A tape is a list: captured stretches, and between them the uses of matrices whose pages are streamed. Those are made at
each replay, with the same inputs and outputs, because a page lies in another slot each time; so the pager sees the
requests of the walk. While a step is captured nothing is computed. Then it is replayed: there is one way in which a
tape computes, and a step that cannot be captured leaves the state as it was and is computed without.

A tape belongs to a state, whose tensors it reads and writes where they lie, and to a key that the model gives: all
that the host decides in a step (`graph_key` in models/__init__.py). What else differs between two steps is the token,
the timestep and what counts with it; captured launches read them from memory on the device (`counter` in ops.py).
Models without a key are launched anew: HRM and HRM-Gemma decide after each segment or cycle, on the host, whether it
was the last; of HIM each step's context is longer than the one before.
"""

import gc
import logging
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from thl_engine.models.contract import AnyArchitecture
from thl_engine.models.state import State
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held, Matrix, Part, Table

_log = logging.getLogger("thl_engine")

TAPES = 32  # of an engine, at most; each holds what the uses of streamed matrices read and write, all share the rest
IDLE = 256  # steps after which a tape gives way to another, so that many states in turn do not capture all the time

Use = Callable[[Part], object]  # launches what one part of a matrix is needed for
Compute = Callable[[Tensor, State], tuple[Tensor, State]]  # (tokens [B, 1], state) -> (result, the following state)
Name = tuple[int, str, Hashable]  # of a tape: id of its state, what is computed, and key
Leaf = tuple[Any, str, Any]  # of a state: who holds it, the field's name, and what it is


class Captures(Protocol):
    """What captures launches. Within `recording`, nothing between `begin` and `end` is computed."""

    def recording(self) -> AbstractContextManager[None]: ...

    def begin(self) -> None: ...

    def end(self) -> Callable[[], None] | None:
        """What replays all since `begin`, None if that is nothing."""
        ...


class CudaCaptures:
    """CUDA graphs of one memory pool, from which nothing else may take memory: a replay writes to all of it.

    pool: a torch.cuda.MemPool for them alone, None for one of torch's own memory. apart: a context in which no other
    pool is active; torch takes what a capture allocates from the one that became active first.
    """

    def __init__(
        self,
        device: torch.device,
        pool: torch.cuda.MemPool | None = None,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._apart = apart
        with torch.cuda.device(device):
            self._pool = torch.cuda.MemPool() if pool is None else pool
            self._stream = _capture_stream(torch.cuda.current_device())
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        collects = gc.isenabled()
        gc.disable()  # an engine that is collected frees memory, which this thread must not do while it captures
        try:
            with self._apart(), torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._abandon()
        finally:
            if collects:
                gc.enable()

    def _abandon(self) -> None:
        """After an error the stream must not go on capturing."""
        if self._graph is not None:
            with suppress(RuntimeError):
                self._graph.capture_end()
            _abandoned.append(self._graph)
            self._graph = None

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads read and copy pages meanwhile.
        self._graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]

    def end(self) -> Callable[[], None] | None:
        graph = self._graph
        assert graph is not None  # begun
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            graph, self._graph = self._graph, None
            assert graph is not None  # since `begin`
            graph.capture_end()
        empty = any("CUDA Graph is empty" in str(warning.message) for warning in found)
        return None if empty else CudaGraph(graph, self._pool)


_abandoned: list[Any] = []  # captures that failed: torch's allocator may go on asking them what belongs to them


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """One for the process on each device: torch keeps a workspace of cuBLAS for every stream, outside of the pools."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        small = torch.zeros(16, 16, device="cuda")
        torch.mm(small, small)
    return stream


@dataclass(frozen=True)
class CudaGraph:
    """A captured stretch. It holds its pool, which torch wants to outlive it: fields go in their order."""

    graph: torch.cuda.CUDAGraph
    pool: Any

    def __call__(self) -> None:
        self.graph.replay()


class Ports:
    """Memory on the device through which all tapes of an engine are told a step's numbers and give its result."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens: dict[int, Tensor] = {}  # by batch size
        self._counters: dict[int, Tensor] = {}  # by their distance from the timestep
        self._results: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}  # by shape and type

    def tokens(self, batch: int) -> Tensor:
        """int64 [B, 1]."""
        return self._held(self._tokens, batch, (batch, 1), torch.int64)

    def counter(self, distance: int) -> Tensor:
        """int64 [1], the timestep plus `distance`."""
        return self._held(self._counters, distance, (1,), torch.int64)

    def result(self, like: Tensor) -> Tensor:
        """Of the shape and type of `like`."""
        return self._held(self._results, (tuple(like.shape), like.dtype), like.shape, like.dtype)

    def set(self, tokens: Tensor, timestep: int) -> None:
        """Writes int64 tokens [B, 1], which may lie on the host, and all counters."""
        if tokens.numel() == 1 and tokens.device.type == "cpu":
            self.tokens(1).fill_(int(tokens))  # a launch, where a copy from the host's memory would wait for others
        else:
            self.tokens(tokens.shape[0]).copy_(tokens)
        for distance, held in self._counters.items():
            held.fill_(timestep + distance)

    def _held(self, kind: dict[Any, Tensor], key: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if key not in kind:
            kind[key] = torch.empty(*shape, dtype=dtype, device=self._device)
        return kind[key]


class Rehearsal:
    """Makes a step as a captured one will be, so that every kernel that it needs is compiled and loaded before."""

    def __init__(self, ports: Ports, timestep: int) -> None:
        self._ports, self._timestep = ports, timestep

    def counter(self, value: int) -> Tensor:
        return self._ports.counter(value - self._timestep).fill_(value)

    def each_part(self, matrix: Matrix, use: Use) -> None:
        for part in matrix.parts():
            use(part)

    def gather(self, table: Table, ids: Tensor) -> Tensor:
        rows = table.resident_rows(ids)
        return table.rows(ids) if rows is None else rows


@dataclass
@dataclass
class Fed:
    """Tokens of the step being replayed, as they were given."""

    ids: Tensor


class Recorder:
    """Captures a step. Entries of the tape: captured stretches, and what is done anew at each replay between them."""

    def __init__(self, captures: Captures, ports: Ports, timestep: int, tokens: Tensor) -> None:
        self.entries: list[Callable[[], object]] = []
        self.uses = 0  # of pinned pages
        self.fed = Fed(tokens)  # apart, so that entries do not hold the recorder that holds them
        self._captures, self._ports, self._timestep, self._tokens = captures, ports, timestep, tokens

    def counter(self, value: int) -> Tensor:
        return self._ports.counter(value - self._timestep)

    def each_part(self, matrix: Matrix, use: Use) -> None:
        parts = matrix.resident()
        if parts is None:

            def stream() -> None:
                for part in matrix.parts():
                    use(part)

            self._anew(stream)
            return
        if not isinstance(matrix, Held):
            self.uses += len(parts)
        for part in parts:
            use(part)

    def gather(self, table: Table, ids: Tensor) -> Tensor:
        rows = table.resident_rows(ids)
        if rows is not None:
            return rows
        out = torch.empty(*ids.shape, table.shape[1], device=ids.device)
        if ids.data_ptr() == self._tokens.data_ptr() and ids.numel() == self._tokens.numel():
            fed, shape = self.fed, ids.shape
            self._anew(lambda: _copy(out, table.rows(fed.ids.cpu().view(shape))))
        else:  # made of them on the device, which the host then waits for
            self._anew(lambda: _copy(out, table.rows(ids)))
        return out

    def _anew(self, act: Callable[[], object]) -> None:
        self.end()
        self.entries.append(act)
        self.begin()

    def begin(self) -> None:
        self._captures.begin()

    def end(self) -> None:
        replay = self._captures.end()
        if replay is not None:
            self.entries.append(replay)


@dataclass
class Tape:
    """A step of one state."""

    recorder: Recorder
    result: Tensor
    addresses: list[int]  # of the state's tensors
    growth: dict[int, int]  # of the state's numbers, by their place among its leaves
    used: int = 0  # last, in steps of the engine

    def replay(self, tokens: Tensor, own: list[Leaf]) -> Tensor:
        self.recorder.fed.ids = tokens
        for entry in self.recorder.entries:
            entry()
        grow(own, self.growth)
        return self.result.clone()  # the next replay writes there


class StepGraphs:
    """The tapes of an engine.

    The first step of a state with a key is a rehearsal, the second one is captured and replayed, later ones are
    replayed. If a step cannot be captured, a warning says why, and all go on without; if there is no memory for one
    more tape, with those that there are.
    """

    def __init__(
        self, ops: ReferenceOps, captures: Captures, device: torch.device, count_uses: Callable[[int], None]
    ) -> None:
        """count_uses: is told how many uses of pinned pages a replay made."""
        self.replayed = 0
        self._ops, self._captures, self._ports, self._count_uses = ops, captures, Ports(device), count_uses
        self._states: dict[int, weakref.ref[State]] = {}  # by id
        self._rehearsed: set[Name] = set()
        self._tapes: dict[Name, Tape] = {}
        self._steps, self._most = 0, TAPES
        self._works = True

    def step(self, key: Hashable, tokens: Tensor, state: State, compute: Compute) -> Tensor | None:
        """What `compute` gives for int64 tokens [B, 1], whose uses of matrices the pager awaits; updates the state.

        key: the model's `graph_key`. None is returned, and nothing done, where steps are not captured.
        """
        if not self._works or key is None:
            return None
        self._steps += 1
        name, own = (self._named(state), compute.__name__, key), list(leaves(state))
        self._ports.set(tokens, state.timestep)
        tape = self._tapes.get(name)
        if tape is not None and tape.addresses != addresses(own):  # the state was given other tensors
            tape = None
        if tape is None:
            if name not in self._rehearsed or not self._has_room(name):
                self._rehearsed.add(name)
                return self._rehearse(tokens, state, own, compute)
            tape = self._record(tokens, state, own, compute)
            if tape is None:
                return self._rehearse(tokens, state, own, compute)
            self._tapes[name] = tape
        result, tape.used = tape.replay(tokens, own), self._steps
        self._count_uses(tape.recorder.uses)
        self.replayed += 1
        return result

    def _named(self, state: State) -> int:
        """The state's id, whose tapes go when it does."""
        own = id(state)
        if own not in self._states:
            drop = weakref.WeakMethod(self._drop)

            def gone(_: object) -> None:
                forget = drop()
                if forget is not None:
                    forget(own)

            self._states[own] = weakref.ref(state, gone)
        return own

    def _drop(self, own: int) -> None:
        del self._states[own]
        self._rehearsed = {name for name in self._rehearsed if name[0] != own}
        self._tapes = {name: tape for name, tape in self._tapes.items() if name[0] != own}

    def _has_room(self, name: Name) -> bool:
        """Whether there is room for one more tape, if need be in place of one that has been idle."""
        self._tapes.pop(name, None)
        if len(self._tapes) < self._most:
            return True
        idle, tape = min(self._tapes.items(), key=lambda item: item[1].used)
        if self._steps - tape.used >= IDLE:
            self._tapes.pop(idle, None)
        return len(self._tapes) < self._most

    def _rehearse(self, tokens: Tensor, state: State, own: list[Leaf], compute: Compute) -> Tensor:
        with self._recorder(Rehearsal(self._ports, state.timestep)):
            result, following = compute(self._ports.tokens(tokens.shape[0]), state)
        self._ports.result(result)
        try:
            grow(own, copy_back(own, list(leaves(following))))
        except RuntimeError as error:
            state.become(following)
            self._give_up(error)
        return result

    def _record(self, tokens: Tensor, state: State, own: list[Leaf], compute: Compute) -> Tape | None:
        fed = self._ports.tokens(tokens.shape[0])
        recorder = Recorder(self._captures, self._ports, state.timestep, fed)
        try:
            with self._recorder(recorder), self._captures.recording():
                recorder.begin()
                made, following = compute(fed, state)
                result = self._ports.result(made).copy_(made)
                growth = copy_back(own, list(leaves(following)))
                recorder.end()
            return Tape(recorder, result, addresses(own), growth)
        except torch.OutOfMemoryError as error:
            self._most = len(self._tapes)
            if not self._most:
                self._give_up(error)
            return None
        except Exception as error:
            self._give_up(error)
            return None
        finally:
            for owner, name, value in own:  # `advance` may have counted in the state itself
                if type(value) is int:
                    setattr(owner, name, value)

    def _give_up(self, error: Exception) -> None:
        _log.warning("decoding steps are not captured as graphs: %s", error)
        self._works = False
        self._tapes.clear()

    @contextmanager
    def _recorder(self, recorder: Rehearsal | Recorder) -> Iterator[None]:
        self._ops.recorder = recorder
        try:
            yield
        finally:
            self._ops.recorder = None


def step_graphs(
    model: AnyArchitecture, ops: ReferenceOps, device: torch.device, count_uses: Callable[[int], None], **memory: Any
) -> StepGraphs | None:
    """An engine's tapes, None where device, ops or model have no graphs; `memory` as CudaCaptures takes it."""
    if device.type != "cuda" or not ops.capturable or model.graph_key is None:
        return None
    return StepGraphs(ops, CudaCaptures(device, **memory), device, count_uses)


def _copy(out: Tensor, rows: Tensor) -> None:
    out.copy_(rows)


def leaves(state: Any) -> Iterator[Leaf]:
    """All that a state holds, in one order; fields and lists of dataclasses are looked into."""
    for name in (field.name for field in fields(state)):
        value = vars(state)[name]
        for item in value if isinstance(value, list) else (value,):
            if is_dataclass(item):
                yield from leaves(item)
            else:
                yield state, name, item


def addresses(own: list[Leaf]) -> list[int]:
    """Where the tensors lie."""
    return [value.data_ptr() for _, _, value in own if isinstance(value, Tensor)]


def copy_back(before: list[Leaf], after: list[Leaf]) -> dict[int, int]:
    """Copies tensors that a step made anew to where the state's own lie; how its numbers grow, by their place.

    Raises RuntimeError if the state changes in another way: then a replay would not do what the step does.
    """
    growth, copies = {}, []
    lie = {value.untyped_storage().data_ptr() for _, _, value in before if isinstance(value, Tensor)}
    for at, ((_, name, old), (_, _, new)) in enumerate(zip(before, after, strict=True)):
        if isinstance(old, Tensor):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise RuntimeError(f"the step changes the state's {name} from {list(old.shape)} to {list(new.shape)}")
            if new.data_ptr() == old.data_ptr() and new.stride() == old.stride():
                continue
            if new.untyped_storage().data_ptr() in lie:
                raise RuntimeError(f"the step moves the state's {name} to where another of its tensors lies")
            copies.append((old, new))
        elif type(old) is int and type(new) is int:
            if new != old:
                growth[at] = new - old
        elif new != old:
            raise RuntimeError(f"the step changes the state's {name} from {old!r} to {new!r}")
    for old, new in copies:
        old.copy_(new)
    return growth


def grow(own: list[Leaf], growth: dict[int, int]) -> None:
    """Counts on in the numbers of a state."""
    for at, count in growth.items():
        owner, name, value = own[at]
        setattr(owner, name, value + count)
