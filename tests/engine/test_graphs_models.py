"""Models on triton's kernels decode with captured steps as without, bit for bit: with CUDA graphs where there is a GPU,
else under the interpreter with captures on the host."""

import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from conftest import FIXTURES, SMALL, load_case
from triton_device import DEVICE, poison  # noqa: F401

from thl_engine import Engine
from thl_engine.config import parse_config
from thl_engine.engine.graphs import StepGraphs
from thl_engine.models import ARCHITECTURES

GPU = DEVICE == "cuda"
STEPS = 30 if GPU else 3
CASES = [
    ("thl", True),
    ("inl", False),
    ("gemma3n", True),
    ("hrm_text", False),
    ("gemma4", False),
    *([("hrm_text", True), ("thl", False), ("inl", True), ("gemma3n", False), ("gemma4", True)] if GPU else []),
]
pytestmark = pytest.mark.filterwarnings("ignore")  # the interpreter's arithmetic on what is captured and not yet made


def small(name: str):
    """Two tiers, or one or two layers of a recorded configuration."""
    if name == "thl":
        return replace(
            SMALL,
            embedding_dim=8,
            num_tiers=2,
            tier_dims=(12, 9),
            tier_timescales=(1, 1 + GPU),
            local_window=3,
            memory_slots=5,
            memory_dim=7,
            query_dim=4,
            value_dim=8,
            num_heads=2,
            head_dim=4,
            read_topk=2,
        )
    case = {"inl": "greedy", "gemma3n": "greedy16", "gemma4": "greedy16", "hrm_text": "causal"}[name]
    fields = load_case(FIXTURES / name / case).config
    if name == "hrm_text":
        return parse_config({**fields, "num_layers_per_stack": 1, "L_cycles": 1}, name)
    change = (
        {"num_layers": 1}
        if name == "inl"
        else {
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 0,
            **{
                field: fields[field][1:3]
                for field in ("layer_types", "intermediate_size", "activation_sparsity_pattern")
                if isinstance(fields.get(field), list)
            },
            **({"per_layer_config": {"1": {"head_dim": 16}}} if name == "gemma4" else {}),
        }
    )
    return parse_config({**fields, **change}, name)


def make(name: str, captured: bool, **options) -> Engine:
    config, generator = small(name), torch.Generator().manual_seed(0)
    weights = {
        block.name: ARCHITECTURES[name].initial(config, block, slice(None), generator)
        for block in ARCHITECTURES[name].blocks(config)
    }
    engine = Engine.from_state_dict(
        name, config.to_dict(), weights, device=DEVICE, backend="triton", quantize="int8", **options
    )
    if not captured:
        engine._passes.graphs = None
    elif not GPU:
        from host_graphs import HostCaptures

        engine._passes.graphs = StepGraphs(engine.ops, HostCaptures(), engine.device, engine._passes.pager.count_uses)
    return engine


def same(state, other) -> None:
    for name, value in state.to_dict().items():
        assert torch.equal(value, other.to_dict()[name]), name


@pytest.mark.parametrize("name, stream", CASES)
def test_captured_steps_are_eager_steps(name, stream, batch=1 + GPU):
    eager, captured = (make(name, captured, stream=stream, batch_size=batch) for captured in (False, True))
    state, other = eager.new_state(batch), captured.new_state(batch)
    if name == "thl":
        state.timestep = other.timestep = 4
        state.local_valid = other.local_valid = 3
    fed = torch.randint(0, 90, (STEPS, batch), generator=torch.Generator().manual_seed(1))
    for t, column in enumerate(fed):
        assert torch.equal(captured.step(column, other)[0], eager.step(column, state)[0]), t
        same(state, other)
    assert captured.stats()["replayed_steps"] == STEPS - len(captured._passes.graphs._tapes)
    for count in ("page_hits", "page_misses", "bytes_streamed", "bytes_gathered"):
        assert captured.stats()[count] == eager.stats()[count], count


@pytest.mark.skipif(not GPU, reason="of CUDA's own captures")
@pytest.mark.parametrize("stream", [False, True])
def test_states_interleave_and_prompts_replay(stream):
    eager, captured = (make("thl", captured, stream=stream) for captured in (False, True))
    fed = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(2))
    pairs = []
    for count in (20, 25, 30):
        found, other = captured.prefill(fed[:, :count], captured.new_state())
        expected, state = eager.prefill(fed[:, :count], eager.new_state())
        assert torch.equal(found, expected)
        pairs.append((state, other))
    for token in fed[0]:
        for state, other in pairs:
            assert torch.equal(captured.step(token.view(1), other)[0], eager.step(token.view(1), state)[0])
            same(state, other)
    assert captured.stats()["replayed_steps"] > 100


@pytest.mark.skipif(not GPU, reason="of CUDA's own captures")
def test_a_failed_capture_leaves_the_device_usable(monkeypatch, caplog):
    eager, captured = (make("thl", captured) for captured in (False, True))
    layer_norm = captured.ops.layer_norm
    monkeypatch.setattr(
        captured.ops, "layer_norm", lambda x, *rest: layer_norm(x + 0 * float(x.sum()), *rest), raising=False
    )
    state, other = eager.new_state(), captured.new_state()
    with caplog.at_level(logging.WARNING):
        for token in range(12):
            ids = torch.tensor([token])
            assert torch.equal(captured.step(ids, other)[0], eager.step(ids, state)[0])
            same(state, other)
    assert captured.stats()["replayed_steps"] == 0
    assert any("are not captured as graphs" in record.getMessage() for record in caplog.records)
    torch.cuda.synchronize()
