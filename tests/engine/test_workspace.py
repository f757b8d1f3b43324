"""What the plan counts against what is alive, of all architectures: on tensors without memory, and on real ones.

Steps on fake tensors also show tensors that are made on the wrong device, and where the host waits for a device.
"""

import logging
from dataclasses import replace

import pytest
import torch
import triton_device  # noqa: F401  before triton is imported
from conftest import FIXTURES, load_case, reasoning_case
from fake_models import FakeModel, HostReads
from live_bytes import LiveBytes

from thl_engine import Engine
from thl_engine.config import PRESETS, HIMConfig, HRMConfig, HRMTextConfig, THLConfig
from thl_engine.device.caching_allocator import CachingAllocator
from thl_engine.engine.resources import fragments, workspace
from thl_engine.models.state import tensors_of
from thl_engine.ops.backends import load_ops

triton = pytest.importorskip("triton")

RECORDED = {
    "thl": "batch3",
    "inl": "full_forward_early",
    "him": "encode3",
    "hrm": "forward_n2t2",
    "hrm_text": "causal",
    "gemma3n": "forward48",
    "gemma4": "forward40",
}
_e4b, _e2b = PRESETS["gemma3n-e4b"], PRESETS["gemma4-e2b"]
WIDE = {  # real widths, but few layers: activations of one layer at a time are alive
    "thl": THLConfig(),
    "inl": replace(PRESETS["inl-5b"], num_layers=2, num_iterations_per_layer=4),
    "him": HIMConfig(),
    "hrm": HRMConfig(halt_max_steps=2, H_layers=2, L_layers=2),
    "hrm_text": HRMTextConfig(num_layers_per_stack=2),
    "gemma3n": replace(
        _e4b,
        num_hidden_layers=7,
        num_kv_shared_layers=2,
        layer_types=_e4b.layer_types[:7],
        intermediate_size=_e4b.intermediate_size[:7],
        activation_sparsity_pattern=(0.95, *[0.0] * 6),
    ),
    "gemma4": replace(
        _e2b,
        num_hidden_layers=10,
        num_kv_shared_layers=3,
        layer_types=_e2b.layer_types[:10],
        intermediate_size=_e2b.intermediate_size[-10:],
        num_key_value_heads=_e2b.num_key_value_heads[:10],
        head_dim=_e2b.head_dim[:10],
    ),
}
# Where the host waits by design: whether rows halt, which decides what is read and computed next.
AWAITED = {"hrm": {"bool(halted.all())"}, "hrm_gemma3n": {"live = live[residual", "live = live[going]", "plan[going]"}}
AWAITED_BY_REFERENCE = {"inl": {"bool(converged.all())"}}


def recorded(kind):
    """Configuration and weights of a small model."""
    if kind == "hrm_gemma3n":
        return reasoning_case()
    case = load_case(FIXTURES / kind / RECORDED[kind])
    return case.config, case.weights


@pytest.fixture
def no_launches(monkeypatch):
    """Launchers of triton's kernels allocate what they need, and launch nothing."""
    from triton.runtime import interpreter, jit

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **options: None)
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **options: None)
    logging.disable(logging.ERROR)  # of fake tensors
    yield
    logging.disable(logging.NOTSET)


def segments(trace):
    """Bytes that torch's allocator takes for recorded allocations."""
    allocator, held = CachingAllocator(), {}
    for number, nbytes in trace:
        if nbytes:
            held[number] = allocator.allocate(nbytes)
        else:
            allocator.free(held.pop(number))
    return allocator.reserved


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", [*RECORDED, "hrm_gemma3n", *(f"wide {name}" for name in WIDE)])
def test_steps_stay_on_the_device_and_within_the_workspace(kind, backend, no_launches):
    fields = WIDE[kind[5:]].to_dict() if kind.startswith("wide") else recorded(kind)[0]
    if kind == "hrm":
        fields = {**fields, "halt_max_steps": 2}
    kind, wide = kind.removeprefix("wide "), kind.startswith("wide")
    ops, fake, batch = load_ops(backend, "cpu"), FakeModel(kind, fields), 2
    model, config = fake.model, fake.config
    options = {"context": min(2000, config.max_seq_len)} if kind == "inl" else {}
    if kind in ("gemma3n", "gemma4", "hrm_text"):
        options = {"context": min(2000, config.max_position_embeddings)}
    with fake.mode:
        state = fake.state(batch, **options)
        assert {x.device for x in tensors_of(state)} == {fake.device}
        passing, scratch = workspace(model, config, ops, state, fake.page_elements, fake.columns)
        chunk = min(model.chunk(config), 64, options.get("context", 64) - 3)
        with LiveBytes() as meter, HostReads() as reads:
            for count in (chunk, 1):
                hidden, state = model.advance(config, fake.weights, ops, fake.tokens(batch, count), state)
                logits = model.logits(config, fake.weights, ops, hidden[:, -1])
                assert logits.device == fake.device
            del hidden, logits
        assert {x.device for x in tensors_of(state)} == {fake.device}
        restored = model.state_from_dict(config, state.named(), ops, fake.device, **options) if kind == "thl" else state
        assert {x.device for x in tensors_of(restored)} == {fake.device}
    planned = passing + scratch
    assert meter.peak <= planned
    if wide:  # a plan that keeps much more free than is used wastes pages
        assert meter.peak >= planned / 20
        assert segments(meter.trace) <= planned + fragments(passing, scratch)
    awaited = AWAITED.get(kind, set()) | (AWAITED_BY_REFERENCE.get(kind, set()) if backend == "reference" else set())
    assert all(any(site in found for site in awaited) for found in reads.found), reads.found


@pytest.mark.parametrize("kind", [*RECORDED, "hrm_gemma3n"])
def test_engines_keep_to_what_the_plan_counts(kind):
    """Prompts, long texts, whole sequences and batches, streamed through the least ring: state, rows of tables, widened
    pages and sampling included."""
    config, weights = recorded(kind)
    batch = 1 if kind == "him" else 2
    with Engine.from_state_dict(
        kind, config, weights, backend="reference", quantize="int8", stream=True, batch_size=batch
    ) as engine:
        plan, ids = engine.plan(), engine.config.vocab_size
        vectors = sum(x.nbytes for x in tensors_of(list(engine._passes.weights.values())))
        planned = plan.state_bytes + plan.workspace_bytes + plan.fixed_bytes - vectors
        generator = torch.Generator().manual_seed(0)
        length = 8
        with LiveBytes() as meter:
            for _ in engine.generate_batch([[1, 2, 3], [4] * 9][:batch], max_new_tokens=length, seed=1, top_p=0.9):
                pass
            assert meter.peak <= planned
            meter.restart()
            state = engine.new_state(batch)
            logits, state = engine.forward(torch.randint(ids, (batch, length), generator=generator), state)
            assert meter.peak <= planned + 2 * logits.nbytes  # the caller's, and before they are joined
