"""A model's passes over its weights, in memory or on their way: what each reads, the pager is told beforehand."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from thl_engine.checkpoint.store import Store
from thl_engine.device.device_memory import DeviceMemory
from thl_engine.engine.graphs import Compute, step_graphs
from thl_engine.engine.resources import FORWARD_CHUNK, Serve, page_schedule
from thl_engine.engine.trace import Trace
from thl_engine.models.contract import Record
from thl_engine.models.state import State
from thl_engine.ops.reference import ReferenceOps
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.paged_weights import load_vectors, paged_weights
from thl_engine.paging.plan import Plan


class Passes:
    """Runs one model's steps, prompts and whole sequences; the state that it is given follows along.

    trace: takes what steps record, None for nothing. Tokens have been checked: they fit vocabulary, state and context.
    """

    def __init__(
        self,
        store: Store,
        ops: ReferenceOps,
        device: torch.device,
        plan: Plan,
        schedule: PageSchedule,
        memory: DeviceMemory,
        verify: str,
        serve: Serve,
    ) -> None:
        """`serve` opens what serves the pages, which reads what the plan pins; vectors, pages and what is computed lie
        in `memory`."""
        self.config, self.architecture, self.ops, self.device = store.config, store.architecture, ops, device
        self.trace: Trace | None = None
        # By the options that a state was made with.
        self.schedules: dict[tuple[tuple[str, Any], ...], PageSchedule] = {(): schedule}
        self._store, self._pinned = store, plan.pinned
        with memory.computing():
            vectors = load_vectors(store, device)
            self.pager = serve(store, plan, vectors, device, verify)
        self.weights = paged_weights(store, self.pager, vectors)
        self.graphs = step_graphs(
            self.architecture, ops, device, self.pager.count_uses, pool=memory.pool_for_graphs, apart=memory.capturing
        )

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Logits [B, V] after int64 tokens [B], one for each sequence."""
        self._begin(state, 1)
        logits = self._pass(self._advance_to_logits, tokens[:, None], state)
        self._end(state)
        return logits

    def prompt(self, tokens: Tensor, state: State) -> Tensor:
        """Logits [B, V] after the last of int64 tokens [B, T]."""
        for hidden in self._prompt(tokens, state):
            last = hidden[:, -1]  # those of the other passes go at once: a long prompt's would be more than its state
        logits = self.logits(last)
        self._end(state)
        return logits

    def sequence(self, tokens: Tensor, state: State, inputs: Mapping[str, Any]) -> Tensor:
        """Logits [B, T, V] after each of int64 tokens [B, T], by the model's own `forward` where it has one."""
        if self.architecture.forward is not None:
            return self._whole(tokens, state, inputs)
        return self._chained(tokens, state)

    def _whole(self, tokens: Tensor, state: State, inputs: Mapping[str, Any]) -> Tensor:
        inputs, model = {**state.options, **inputs}, self.architecture
        assert model.forward is not None and model.forward_walk is not None
        walk = model.forward_walk(self.config, tuple(tokens.shape), **inputs)
        names = walk.reads(0)
        self.pager.begin(None, lambda: self.schedules[()].once(names), walk.may_stop)
        logits, following = model.forward(
            self.config, self.weights, self.ops, tokens.to(self.device), state, self._recorder(), **inputs
        )
        state.become(following)
        self.pager.end(None)
        return logits

    def _chained(self, tokens: Tensor, state: State) -> Tensor:
        batch, length = tokens.shape
        out = torch.empty(batch, length, self.config.vocab_size, device=self.device)
        span = max(1, FORWARD_CHUNK // batch)
        for first in range(0, length, span):
            hidden = torch.cat(list(self._prompt(tokens[:, first : first + span], state)), dim=1)
            count = hidden.shape[1]
            out[:, first : first + count] = self.logits(hidden.flatten(0, 1)).view(batch, count, -1)
            self._end(state)
        return out

    def _prompt(self, tokens: Tensor, state: State) -> Iterator[Tensor]:
        """Feeds [B, n] in as many passes as the model needs; the hidden states of each. Logits are to follow."""
        self._begin(state, tokens.shape[1])
        for part in tokens.split(self.architecture.chunk(self.config), dim=1):
            yield self._pass(self._advance, part, state)

    def _pass(self, compute: Compute, tokens: Tensor, state: State) -> Tensor:
        """What `compute` makes of tokens [B, n] that the model takes at once; the state follows."""
        out, graph_key = None, self.architecture.graph_key
        if self.graphs is not None and graph_key is not None and self.trace is None and tokens.shape[1] == 1:
            out = self.graphs.step(graph_key(self.config, state), tokens, state, compute)
        if out is None:
            out, following = compute(tokens.to(self.device), state)
            state.become(following)  # ops update tensors in place: the caller's object must not lag behind them
        return out

    def _advance(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        return self.architecture.advance(self.config, self.weights, self.ops, tokens, state, self._recorder())

    def _advance_to_logits(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        hidden, following = self._advance(tokens, state)
        return self.logits(hidden[:, -1]), following

    def _begin(self, state: State, count: int) -> None:
        """Tells the pager which passes over the weights `count` tokens take."""
        passes = -(-count // self.architecture.chunk(self.config))
        schedule, t = self.schedule(state), self._starts_at(state, count)
        if passes == 1 and count > 1 and self.architecture.pass_walk is not None:
            names = self.architecture.pass_walk(self.config, count, **state.options).reads(t)
            self.pager.begin(None, lambda: schedule.once_then(names, t + 1), schedule.may_stop)
        elif passes == 1:
            self.pager.begin(self._key(state, t), lambda: schedule.decode(t), schedule.may_stop)
        else:
            self.pager.begin(("prompt", t, passes), lambda: schedule.prompt(t, passes), schedule.may_stop)

    def _end(self, state: State) -> None:
        """Announces the next step."""
        self.pager.end(self._key(state, self._starts_at(state, 1)))

    def _starts_at(self, state: State, count: int) -> int:
        """Step of the schedule at which the next `count` tokens begin."""
        return self.architecture.starts_at(self.config, state, count)

    def schedule(self, state: State) -> PageSchedule:
        options = state.options
        key = tuple(sorted(options.items()))
        if key not in self.schedules:
            self.schedules[key] = page_schedule(self._store, self.ops, state.batch_size, **options)
            self.schedules[key].pin(frozenset(self._pinned))
        return self.schedules[key]

    def _key(self, state: State, t: int) -> tuple[str, int, int]:
        schedule = self.schedule(state)
        return "decode", id(schedule), t % schedule.period

    def _recorder(self) -> Record | None:
        if self.trace is None:
            return None
        self.trace.steps.append({})
        return self.trace.record

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.architecture.logits(self.config, self.weights, self.ops, hidden)
        if self.trace is not None:
            self.trace.record("logits", logits)
        return logits
