"""What forecasts count, against what steps really do, for every architecture; and that telling takes bounded work.

Times are compared by benchmarks/bench_forecast.py.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.checkpoint.store import open_store
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import page_schedule, pass_work
from thl_engine.models import ARCHITECTURES
from thl_engine.models.state import tensors_of
from thl_engine.ops.backends import load_ops
from thl_engine.paging.paged_weights import PagedMatrix
from thl_engine.paging.prediction import NOMINAL, Counted
from thl_engine.report import bandwidth, rehearsal, stand_in
from thl_engine.report.forecast import forecast, usual_steps

GEMMA = {
    "vocab_size": 60,
    "vocab_size_per_layer_input": 60,
    "hidden_size": 32,
    "intermediate_size": [48] * 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 4,
    "sliding_window": 16,
}
GEMMA4 = {name: value for name, value in GEMMA.items() if name not in ("activation_sparsity_pattern", "laurel_rank")}
GEMMA4 |= {"intermediate_size": 48, "use_double_wide_mlp": True, "global_head_dim": 24}
# Attention weighs in all of them; nothing halts early, since a fresh model never does.
MODELS = {
    "thl": {"vocab_size": 40, "embedding_dim": 24, "tier_dims": [24, 32], "tier_timescales": [1, 4], "num_tiers": 2,
            "value_dim": 24, "memory_dim": 24, "memory_slots": 64, "local_window": 16, "query_dim": 8, "head_dim": 8},
    "inl": {"vocab_size": 40, "d_model": 32, "num_layers": 2, "num_heads": 2, "num_iterations_per_layer": 3,
            "feedforward_dim": 64, "max_seq_len": 128},
    "him": {"vocab_size": 40, "embed_dim": 64, "num_heads": 4, "num_encoder_layers": 3, "dim_feedforward": 48,
            "max_answer_len": 8, "max_seq_len": 64, "mem_slots": 4, "mem_rank": 8, "reasoning_tokens": 6},
    "hrm": {"vocab_size": 40, "hidden_size": 32, "num_heads": 2, "L_layers": 2, "H_layers": 1, "halt_max_steps": 3},
    "hrm_text": {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_layers_per_stack": 1,
                 "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 96},
    "gemma3n": GEMMA,
    "gemma4": GEMMA4,
    "hrm_gemma3n": {**GEMMA, "hrm": {"L_size": 16, "H_size": 24, "cycles": 2, "L_steps": 3, "L_threshold": 0.0,
                                     "L_rank": 2, "H_rank": 3}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_amounts(monkeypatch):
    monkeypatch.setattr(bandwidth, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 16 << 20)
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    init_checkpoint(request.param, MODELS[request.param], path)
    return path


class Sums(TorchDispatchMode):
    """Counts what torch sums up: products that are written as a product of elements and a sum."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.sum.dim_IntList:
            self.count += args[0].numel()
        return function(*args, **(kwargs or {}))


@contextmanager
def matrices_used(monkeypatch):
    """Names of the matrices that steps ask for, in order."""
    names, parts = [], PagedMatrix.parts
    with monkeypatch.context() as patch:
        patch.setattr(PagedMatrix, "parts", lambda self: names.append(self.name) or parts(self))
        yield names


def test_every_architecture_is_here():
    assert MODELS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("batch", [1, 3])
def test_counts_are_those_of_real_steps(checkpoint, batch, monkeypatch):
    """Bytes, passes and multiply-adds a token, attention among them."""
    ops, options = load_ops("reference", "cpu"), EngineOptions(backend="reference", batch_size=batch)
    with open_store(checkpoint) as store:
        schedule = page_schedule(store, ops, batch)
        steps = usual_steps(store, schedule, {})
        with Engine(open_store(checkpoint), options) as engine:
            plan, state = engine.plan(), engine.new_state(batch)
            for tensor in tensors_of(state):
                tensor.zero_()
            state.seek(steps.start)
            with matrices_used(monkeypatch) as names, FlopCounterMode(display=False) as products, Sums() as sums:
                for _ in steps:
                    engine.step(torch.zeros(batch, dtype=torch.int64), state)
        found = plan.at(NOMINAL, store, schedule, pass_work(store, batch, {}, steps.start))
        read = sum(store.tensors[name].nbytes for name in names)
    assert found.bytes_per_token == pytest.approx(read / len(steps))
    passes = sum(bool(schedule.reads(t)) for t in steps)
    assert passes == names.count(schedule.reads(0)[0]) / schedule.reads(0).count(schedule.reads(0)[0])
    counted = products.get_total_flops() / 2 + sums.count
    assert found.multiply_adds_per_token == pytest.approx(counted / len(steps), rel=0.25)


def test_a_pass_is_charged_to_all_tokens_that_it_yields(tmp_path):
    """A pass of 64 answers with 512 rows takes the time of its arithmetic once in 64 tokens."""
    path = tmp_path / "him.safetensors"
    init_checkpoint("him", {}, path, quantize="int8")
    with open_store(path) as store, Engine(open_store(path), EngineOptions()) as engine:
        schedule = page_schedule(store, engine.ops, 1)
        work = pass_work(store, 1, {}, store.config.max_seq_len)
        plan = engine.plan().at(NOMINAL, store, schedule, work)
        costs = Counted(store, schedule, NOMINAL, work)
        weights = sum(store.tensors[name].nbytes for name in schedule.reads(0))
    assert work.rows == 512 and work.head_rows == 1
    pass_seconds = costs.step(schedule.reads(0)).pages
    assert sum(pass_seconds[page] for name in schedule.reads(0) for page in schedule.pages(name)) == pytest.approx(
        512 * weights / NOMINAL.arithmetic, rel=0.01
    )
    whole, other = _seconds(costs, schedule, 0), _seconds(costs, schedule, 1)
    assert plan.seconds_per_token == pytest.approx((whole + 63 * other) / 64)


def _seconds(costs, schedule, t):
    step = costs.step(schedule.reads(t))
    pages = (page for name in (*schedule.reads(t), *schedule.head_names) for page in schedule.pages(name))
    return step.besides + sum(step.pages[page] for page in pages)


def test_rehearsed_steps_are_the_models_own(checkpoint, backend):
    """Each kind of step is made with all its matrices, and a plan follows from what they took."""
    options = EngineOptions(backend=backend)
    with open_store(checkpoint) as store:
        found = forecast(store, options)
        ops = load_ops(backend, "cpu")
        schedule = page_schedule(store, ops, 1)
        steps = usual_steps(store, schedule, {})
        seen = rehearsal.rehearse(store, found.plan, options, steps)
    assert set(seen.kinds) == {schedule.reads(t) for t in steps}
    for reads, kind in seen.kinds.items():
        assert kind.matrices.keys() == {*reads, *schedule.head_names} and kind.seconds > 0
    assert found.plan.seconds_per_token > 0 and found.plan.stall_per_token == 0
    assert found.plan.bandwidths.memory == pytest.approx(found.plan.bytes_per_token / found.plan.seconds_per_token)


def test_measuring_is_bounded(checkpoint, monkeypatch):
    """Bytes that are read, steps that are made, and memory of the state do not grow with the model."""
    held, steps = [], []
    make, step = stand_in.StandIn.__init__, Engine.step
    monkeypatch.setattr(stand_in.StandIn, "__init__", lambda self, *given: held.append(self) or make(self, *given))
    monkeypatch.setattr(
        Engine, "step", lambda self, tokens, state: steps.append(state.nbytes) or step(self, tokens, state)
    )
    monkeypatch.setattr(rehearsal, "STATE_BYTES", 4096)
    limit = 24 << 10
    monkeypatch.setattr(stand_in, "SAMPLE_BYTES", limit)
    with open_store(checkpoint) as store:
        found = forecast(store)
        largest = 2 * max(page.nbytes for page in store.pages) + (8 << 10)
        kinds = {page_schedule(store, load_ops("auto", "cpu"), 1).reads(t) for t in range(64)}
        cached = "context" in store.architecture.state_options
    assert found.plan.tokens_per_second > 0
    assert held[0].bytes_read <= limit + largest
    assert len(steps) <= 2 * rehearsal.LEAST_RUNS * len(kinds)
    assert not cached or max(steps) <= 4096


def test_a_step_beyond_the_limit_is_broken_off(checkpoint, monkeypatch):
    """What was not seen is told from bytes."""
    monkeypatch.setattr(rehearsal, "LIMIT", -1.0)
    with open_store(checkpoint) as store:
        plan = forecast(store).plan
        assert 0 < plan.tokens_per_second < 1e7
