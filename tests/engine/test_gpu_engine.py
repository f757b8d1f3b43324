"""The engine on a GPU: the recorded runs of all models, the CPU's numbers, and the same bits whatever the budget.

Elsewhere triton's interpreter stands in for it in test_triton_ops, at fewer steps. What the memory budget holds on a
GPU is tested in test_device_memory.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, MODELS, TIE_ORDER, Case, configured, load_case, prefix
from triton_device import DEVICE

from thl_engine import Engine
from thl_engine.ops import native

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from int8_error import CASES, logits  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; triton's interpreter would take minutes")
OPTIONS = {"device": DEVICE, "backend": "triton"}
# Relative to the largest logit, as in the recordings' notes; INL's stops are its own where it writes token by token.
TOLERANCE = {"thl": 1e-4, "inl": 1e-4, "him": 1e-4, "hrm": 2e-4, "gemma3n": 2e-4, "hrm_gemma3n": 2e-4, "gemma4": 2e-4}
RECORDED = [(model, name) for model, names in CASES.items() for name in names if (model, name) != ("inl", "greedy")]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.cpu() - expected.cpu()).abs().max() / expected.abs().max())


def recorded_logits(model: str, case: Case) -> list[torch.Tensor]:
    if model == "thl":
        names = [f"{prefix(case)}step{t:03d}.logits" for t in range(len(case.io["tokens"]))]
        return [torch.stack([case.io[name] for name in names], dim=1)]
    if model == "him":
        return [case.io[f"pass{i}.logits"] for i in range(len(case.io["input_ids"]))]
    if "step_logits" in case.io:
        return [case.io["step_logits"]]
    return [case.io["logits"]]


@pytest.mark.parametrize("model, name", RECORDED, ids="-".join)
def test_recorded_logits(model, name):
    case = load_case(FIXTURES / model / name)
    with Engine.from_state_dict(model, case.config, case.weights, **OPTIONS) as engine:
        found = list(logits(engine, case.meta, case.io))
    for got, expected in zip(found, recorded_logits(model, case), strict=True):
        if "step_logits" in case.io:  # of the tokens written, each from those before it
            got = got[:, -1 - expected.shape[1] : -1]
        assert distance(got, expected) <= TOLERANCE[model]


@pytest.mark.parametrize("name", CASES["thl"])
def test_thl_recorded_choices(name, steps=24):
    """Slots and branches are exactly those recorded, and states are near."""
    case = load_case(FIXTURES / "thl" / name)
    tokens, compared = case.io["tokens"][:steps], 0
    first = {key.removeprefix("init."): value for key, value in case.io.items() if key.startswith("init.")}
    with Engine.from_state_dict("thl", case.config, case.weights, **OPTIONS) as engine, engine.trace() as trace:
        state = engine.state_from_dict(first) if first else engine.new_state(tokens.shape[1])
        for t, column in enumerate(tokens):
            engine.step(column, state)
            got, key = {**state.to_dict(), **trace.steps[t]}, f"{prefix(case)}step{t:03d}."
            for field, expected in ((k.removeprefix(key), v) for k, v in case.io.items() if k.startswith(key)):
                if field == "token" or field in TIE_ORDER.get(name, ()):
                    continue
                found = got[field].reshape(expected.shape)
                if expected.is_floating_point():
                    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-30), field
                else:
                    assert torch.equal(found.to(expected.dtype), expected), field
                compared += 1
    assert compared >= 5 * len(tokens)


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built here")
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_the_cpus_numbers(model, quantize):
    config, weights = configured(model)
    outputs = []
    for options in (OPTIONS, {"device": "cpu", "backend": "native"}):
        with Engine.from_state_dict(model, config, weights, quantize=quantize, **options) as engine:
            tokens = torch.randint(engine.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(4))
            out, state = engine.prefill(tokens, engine.new_state())
            outputs.append([engine.forward(tokens)[0], out, *(engine.step(tokens[:, 0], state)[0] for _ in range(3))])
    for found, expected in zip(*outputs, strict=True):
        # The CPU's int8 products take activations in 16 bits.
        assert distance(found, expected) <= (TOLERANCE[model] if quantize == "none" else 2e-3)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_streamed_equals_resident(model, quantize):
    config, weights = configured(model)
    options = {**OPTIONS, "quantize": quantize}
    with Engine.from_state_dict(model, config, weights, stream=True, **options) as engine:
        least = engine.plan().least_budget
    found = []
    for given in (
        {"stream": False},
        {"stream": True, "memory_budget": least},
        {"stream": True, "memory_budget": least + least // 8},
    ):
        with Engine.from_state_dict(model, config, weights, **options, **given) as engine:
            tokens = torch.randint(engine.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(4))
            out, state = engine.prefill(tokens, engine.new_state())
            rows = [out]
            for _ in range(6):
                out, state = engine.step(out.argmax(dim=-1), state)
                rows.append(out)
            found.append([row.cpu() for row in (*rows, engine.forward(tokens)[0])])
    for streamed in found[1:]:
        assert all(map(torch.equal, found[0], streamed))
