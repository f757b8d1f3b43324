"""Decoding steps as tapes: replays are eager steps bit for bit, and ask the pager for what the walk says."""

import gc
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, poison  # noqa: F401

if DEVICE == "cuda":
    pytest.skip("captures on the host are for the CPU; test_graphs_models.py has CUDA's", allow_module_level=True)

from conftest import random_weights
from host_graphs import CaptureError, HostCaptures

from thl_engine import Engine
from thl_engine.config import parse_config
from thl_engine.engine import graphs
from thl_engine.engine.graphs import Ports, Recorder, StepGraphs, copy_back, leaves
from thl_engine.kernels.int8 import dequantize
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.triton_ops import TritonOps
from thl_engine.ops.weights import Held


class HostOps(TritonOps):
    """What a tape needs of ops, over torch operations, which are faster than triton's interpreter. Nothing is updated
    in place, so the tape has to bring the state's tensors to where they belong."""

    @staticmethod
    def read_metadata(alpha, indices, read_ema, last_read, t, decay):
        return ReferenceOps.read_metadata(alpha, indices, read_ema, last_read, spread(t, indices.flatten(1)), decay)

    @staticmethod
    def novelty_write(candidate, memory, norms, read_ema, write_ema, last_write, t, **rule):
        return ReferenceOps.novelty_write(
            candidate, memory, norms, read_ema, write_ema, last_write, spread(t, last_write), **rule
        )

    @staticmethod
    def window_read(query, buffer, valid, entry, scale):
        """By masks, which take a number from the host or from the device alike."""
        at, width = torch.arange(buffer.shape[1]), buffer.shape[1]
        used = min(valid, width) if isinstance(valid, int) else valid.clamp(max=width)
        scores = (buffer @ query[:, :, None]).squeeze(-1) * scale
        weights = torch.softmax(scores.masked_fill(at >= used, -1e30), dim=-1) * (at < used)
        full = torch.as_tensor(used == width)
        shifted = torch.where(full, torch.cat([buffer[:, 1:], entry[:, None]], dim=1), buffer)
        new = torch.where((at == used)[:, None], entry[:, None], shifted)
        return (weights[:, None, :] @ buffer).squeeze(1), new

    def whole(self, matrix):
        out = torch.empty(matrix.shape)
        self.each_part(
            matrix, lambda part: out[part.start : part.stop].copy_(dequantize(part.data, part.scales, part.group))
        )
        return Held(out)


def spread(t, like):
    return t if isinstance(t, int) else t.expand(like.shape)


HOOKS = {"counter", "gather", "each_part", "scratch_bytes", "in_place", "capturable"}
PLAIN = {name: value for kind in reversed(ReferenceOps.__mro__[:-1]) for name, value in vars(kind).items()}
for name in {name for name in PLAIN if name[:2] != "__"} - set(vars(HostOps)) - HOOKS:
    setattr(HostOps, name, PLAIN[name])
for name in ("product", "linear_heads", "linear_transposed", "linear_transposed_heads"):
    setattr(
        HostOps,
        name,
        lambda self, x, matrix, *args, name=name: getattr(ReferenceOps, name)(self, x, self.whole(matrix), *args),
    )

CONFIG = parse_config(
    {
        "vocab_size": 37,
        "embedding_dim": 8,
        "num_tiers": 3,
        "tier_dims": [12, 8, 9],
        "tier_timescales": [1, 2, 3],
        "local_window": 2,
        "memory_slots": 5,
        "memory_dim": 7,
        "query_dim": 4,
        "value_dim": 8,
        "num_heads": 2,
        "head_dim": 4,
        "read_topk": 2,
        "write_slots": 1,
        "novelty_theta": 0.25,
    },
    "thl",
)
WEIGHTS = random_weights(CONFIG)
PERIOD = 6


def make(captured: bool, config=CONFIG, **options) -> Engine:
    engine = Engine.from_state_dict("thl", config.to_dict(), WEIGHTS, device="cpu", backend="triton", **options)
    engine._passes.ops = HostOps()
    if captured:
        capture(engine)
    return engine


def capture(engine: Engine) -> None:
    engine._passes.graphs = StepGraphs(engine.ops, HostCaptures(), engine.device, engine._passes.pager.count_uses)


def budgets(batch: int = 1) -> list[int]:
    """The least, and one that pins some pages."""
    least = make(False, stream=True, quantize="int8", batch_size=batch).plan().least_budget
    return [least, (least + make(False, quantize="int8", batch_size=batch).plan().peak_memory_bytes) // 2]


def same(state, other) -> None:
    for name, value in state.to_dict().items():
        assert torch.equal(value, other.to_dict()[name]), name


def tokens(steps: int, batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (steps, batch), generator=torch.Generator().manual_seed(seed))


def options(batch: int) -> list[dict]:
    out = [{"stream": False, "quantize": quantize} for quantize in ("none", "int8")]
    return out + [
        {"stream": True, "quantize": "int8", "batch_size": batch, "memory_budget": budget} for budget in budgets(batch)
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("which", range(4))
def test_replays_are_eager_steps(which, batch):
    chosen = options(batch)[which]
    eager, captured = make(False, **chosen), make(True, **chosen)
    state, other = eager.new_state(batch), captured.new_state(batch)
    for t, column in enumerate(tokens(2 + 3 * PERIOD, batch)):
        expected, _ = eager.step(column, state)
        found, _ = captured.step(column[:, None], other)
        assert torch.equal(found, expected), t
        same(state, other)
    # Two steps fill the window; then a step with each of the four sets of tiers is rehearsed.
    assert captured.stats()["replayed_steps"] == 3 * PERIOD - 4
    assert eager.stats()["replayed_steps"] == 0
    for name in ("page_hits", "page_misses", "bytes_streamed", "bytes_gathered"):
        assert captured.stats()[name] == eager.stats()[name], name
    streams = chosen["stream"]
    assert (captured.stats()["bytes_streamed"] > 0) == streams
    captures = captured._passes.graphs._captures
    assert captures.graphs > captured.stats()["replayed_steps"] if streams else captures.graphs == 3 * PERIOD - 4


def test_the_pager_sees_the_walk(monkeypatch):
    engine = make(True, stream=True, quantize="int8", memory_budget=budgets()[0])
    state, asked = engine.new_state(), []
    use = engine._passes.pager._ring.use
    monkeypatch.setattr(engine._passes.pager._ring, "use", lambda page: asked.append(page) or use(page))
    for column in tokens(2 + 3 * PERIOD, 1):
        engine.step(column, state)
    future = engine._passes.schedule(state).decode(0)
    assert asked == [next(future) for _ in asked]


@pytest.mark.parametrize("stream", [False, True])
def test_states_interleave(stream, tmp_path):
    """Contexts in turn, forked, stored and restored, each as if it were alone."""
    memory = {"stream": stream, "quantize": "int8", "memory_budget": budgets()[0] if stream else None}
    engine, eager = make(True, **memory), make(False, **memory)
    pairs = [(engine.new_state(), eager.new_state())]

    def step(column):
        for i, (state, other) in enumerate(pairs):
            found, _ = engine.step((column + i) % CONFIG.vocab_size, state)
            assert torch.equal(found, eager.step((column + i) % CONFIG.vocab_size, other)[0])
            same(state, other)

    fed = tokens(4 * PERIOD, 1)
    for t, column in enumerate(fed):
        if t == PERIOD:
            pairs.append(tuple(state.clone() for state in pairs[0]))
        if t == 2 * PERIOD:
            engine.save_state(pairs[1][0], tmp_path / "context")
            pairs[1] = engine.load_state(tmp_path / "context"), pairs[1][1]
        step(column)
    assert engine.stats()["replayed_steps"] > 2 * PERIOD


def test_prompts_replay_too():
    engine, eager = make(True), make(False)
    fed = tokens(3 * PERIOD, 2).T
    expected, other = eager.prefill(fed, eager.new_state(2))
    found, state = engine.prefill(fed, engine.new_state(2))
    assert torch.equal(found, expected)
    same(state, other)
    assert engine.stats()["replayed_steps"] == 2 * PERIOD - 2 + PERIOD - 4
    whole, _ = engine.forward(fed, state)
    assert torch.equal(whole, eager.forward(fed, other)[0])


@pytest.mark.parametrize("window", [0, 3 * PERIOD])
def test_windows_of_other_widths(window, batch=2):
    """Replays while the window fills up, and where there is none."""
    config = replace(CONFIG, local_window=window)
    engine, eager = make(True, config), make(False, config)
    state, other = engine.new_state(batch), eager.new_state(batch)
    for column in tokens(3 * PERIOD, batch):
        assert torch.equal(engine.step(column, state)[0], eager.step(column, other)[0])
        same(state, other)
    assert engine.stats()["replayed_steps"] == 3 * PERIOD - 4


def test_a_window_that_is_not_as_old_as_its_sequence():
    """As a stored context may say: its filling is launched anew, then it is full."""
    engine, eager = make(True), make(False)
    state, other = engine.new_state(), eager.new_state()
    state.timestep = other.timestep = PERIOD
    for column in tokens(1 + 2 * PERIOD, 1):
        assert torch.equal(engine.step(column, state)[0], eager.step(column, other)[0])
        same(state, other)
    assert engine.stats()["replayed_steps"] == PERIOD + 1


def test_a_result_is_the_callers():
    engine = make(True)
    state, kept = engine.new_state(), []
    for column in tokens(2 + 2 * PERIOD, 1):
        logits, _ = engine.step(column, state)
        kept.append((logits, logits.clone()))
    assert all(torch.equal(*pair) for pair in kept)


def test_a_trace_is_made_step_by_step():
    engine, eager = make(True), make(False)
    state, other = engine.new_state(), eager.new_state()
    for t, column in enumerate(tokens(2 + 3 * PERIOD, 1)):
        with engine.trace() if t % 4 == 1 else nullcontext() as trace:
            found, _ = engine.step(column, state)
        assert torch.equal(found, eager.step(column, other)[0])
        assert trace is None or {"gate", "logits"} <= trace.steps[0].keys()
    assert engine.stats()["replayed_steps"]


def test_a_state_may_be_given_other_tensors():
    engine, eager = make(True), make(False)
    state, other = engine.new_state(), eager.new_state()
    for t, column in enumerate(tokens(2 + 4 * PERIOD, 1)):
        if t == 3 * PERIOD:
            state.become(state.clone())
        found, _ = engine.step(column, state)
        assert torch.equal(found, eager.step(column, other)[0])
        same(state, other)
    assert engine.stats()["replayed_steps"] == 4 * PERIOD - 4


def test_tapes_go_with_their_state():
    engine = make(True)
    state = engine.new_state()
    for column in tokens(2 + 2 * PERIOD, 1):
        engine.step(column, state)
    assert len(engine._passes.graphs._tapes) == 4
    del state
    gc.collect()
    assert (
        not engine._passes.graphs._tapes and not engine._passes.graphs._states and not engine._passes.graphs._rehearsed
    )


def test_idle_tapes_make_room(monkeypatch):
    monkeypatch.setattr(graphs, "TAPES", 4)
    monkeypatch.setattr(graphs, "IDLE", 4 * PERIOD)
    engine, eager = make(True), make(False)
    first, second, other = engine.new_state(), engine.new_state(), eager.new_state()
    fed = tokens(2 + 5 * PERIOD, 1)
    for column in fed[: 2 + 2 * PERIOD]:
        engine.step(column, first)
    made = engine.stats()["replayed_steps"]
    for t, column in enumerate(fed):
        found, _ = engine.step(column, second)
        assert torch.equal(found, eager.step(column, other)[0])
        if t == 2 + 2 * PERIOD:  # all are the first state's still, and not idle for long enough
            assert engine.stats()["replayed_steps"] == made
    assert engine.stats()["replayed_steps"] > made
    assert len(engine._passes.graphs._tapes) == 4


def test_tapes_are_as_many_as_memory_holds(monkeypatch, caplog):
    engine, eager = make(True), make(False)
    captures, room = engine._passes.graphs._captures, [2]
    begin = captures.begin

    def begins():
        begin()
        room[0] -= 1
        if room[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captures, "begin", begins)
    state, other = engine.new_state(), eager.new_state()
    for column in tokens(2 + 4 * PERIOD, 1):
        assert torch.equal(engine.step(column, state)[0], eager.step(column, other)[0])
        same(state, other)
    assert len(engine._passes.graphs._tapes) == 2 and 0 < engine.stats()["replayed_steps"] < 4 * PERIOD - 4
    assert not caplog.records and room[0] == -1  # asked no more


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_captured_is_computed_without(stream, monkeypatch, caplog):
    """The step that fails to be captured has changed nothing, and is made as all after it."""
    engine, eager = make(True, stream=stream), make(False, stream=stream)
    novelty_write = engine.ops.novelty_write

    def reads(candidate, *args, **rule):
        assert float(candidate[0, 0]) == float(candidate[0, 0])
        return novelty_write(candidate, *args, **rule)

    monkeypatch.setattr(engine.ops, "novelty_write", reads, raising=False)
    state, other = engine.new_state(2), eager.new_state(2)
    with caplog.at_level(logging.WARNING):
        for column in tokens(2 + 2 * PERIOD, 2):
            assert torch.equal(engine.step(column, state)[0], eager.step(column, other)[0])
            same(state, other)
    assert engine.stats()["replayed_steps"] == 0
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "decoding steps are not captured as graphs"
    ]


def test_an_error_of_a_page_is_raised(monkeypatch):
    """As in a step without graphs; the engine then says so again."""
    from thl_engine import CheckpointError

    engine = make(True, stream=True, quantize="int8", memory_budget=budgets()[0])
    state = engine.new_state()
    fed = tokens(2 + 3 * PERIOD, 1)
    for column in fed[:-1]:
        engine.step(column, state)

    def fails(place):
        raise CheckpointError("damaged")

    monkeypatch.setattr(engine._passes.pager._transfer, "finish", fails)
    before = state.timestep
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged"):
            engine.step(fed[-1], state)
    assert state.timestep == before and engine.ops.recorder is None


@dataclass
class Inner:
    rows: torch.Tensor
    used: int


@dataclass
class Context:
    timestep: int
    memory: torch.Tensor
    scale: torch.Tensor | None
    layers: list[Inner]
    name: str = "a"
    tiers: list[torch.Tensor] = field(default_factory=list)


def context() -> Context:
    return Context(
        3,
        torch.zeros(2, 3),
        None,
        [Inner(torch.ones(2), 5), Inner(torch.ones(2), 7)],
        "a",
        [torch.zeros(1), torch.zeros(2)],
    )


def test_a_state_is_settled_where_it_lies():
    state, after = context(), context()
    before = list(leaves(state))
    after.timestep, after.memory, after.layers[0] = 4, torch.full((2, 3), 9.0), state.layers[0]
    after.tiers[1] = torch.full((2,), 2.0)
    state.layers[0].used += 2
    growth = copy_back(before, list(leaves(after)))
    assert [(before[at][:2], count) for at, count in growth.items()] == [
        ((state, "timestep"), 1),
        ((state.layers[0], "used"), 2),
    ]
    assert state.memory.eq(9).all() and state.tiers[1].eq(2).all() and state.tiers[0].eq(0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory": torch.zeros(3, 3)}, r"memory from \[2, 3\] to \[3, 3\]"),
        ({"name": "b"}, "name from 'a' to 'b'"),
        ({"scale": torch.zeros(1)}, "scale from None"),
    ],
)
def test_other_changes_of_a_state_are_refused(change, message):
    state, after = context(), context()
    vars(after).update(change)
    with pytest.raises(RuntimeError, match=message):
        copy_back(list(leaves(state)), list(leaves(after)))


def test_tensors_that_change_places_are_refused():
    state, after = context(), context()
    after.layers[0], after.layers[1] = state.layers[1], state.layers[0]
    with pytest.raises(RuntimeError, match="rows to where another of its tensors lies"):
        copy_back(list(leaves(state)), list(leaves(after)))


def test_rows_from_the_disk_are_read_at_each_replay():
    """Those of the tokens, which the host has, and of ids that are made of them."""
    held, asked = torch.arange(10.0).view(5, 2), []

    class Table:
        shape = (5, 2)

        def resident_rows(self, ids):
            return None

        def rows(self, ids):
            asked.append(ids)
            return held[ids]

    own, captures = torch.tensor([[1], [4]]), HostCaptures()
    recorder = Recorder(captures, Ports(torch.device("cpu")), 0, own)
    with captures.recording():
        recorder.begin()
        first = recorder.gather(Table(), own[:, 0])
        second = recorder.gather(Table(), (own - 1).flatten())
        total = first + second
        recorder.end()
    for ids in (torch.tensor([[2], [3]]), torch.tensor([[4], [1]])):
        own.copy_(ids)
        recorder.fed.ids = ids
        asked.clear()
        for entry in recorder.entries:
            entry()
        assert torch.equal(total, held[ids[:, 0]] + held[ids[:, 0] - 1])
        assert asked[0].data_ptr() == ids.data_ptr()


def test_captures_on_the_host_compute_nothing_before_a_replay():
    captures, x = HostCaptures(), torch.arange(3.0)
    with captures.recording():
        captures.begin()
        y = (x * 2).add_(1)
        x.add_(10)
        replay = captures.end()
    assert x.tolist() == [0, 1, 2]
    replay()
    assert x.tolist() == [10, 11, 12] and y.tolist() == [1, 3, 5]
    replay()
    assert x.tolist() == [20, 21, 22] and y.tolist() == [21, 23, 25]


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.tolist(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0]),
        lambda x: x.max().item(),
        lambda x: torch.equal(x, x),
    ],
)
def test_captures_on_the_host_refuse_reads(reads):
    captures = HostCaptures()
    with pytest.raises(CaptureError), captures.recording():
        captures.begin()
        reads(torch.arange(3.0))
