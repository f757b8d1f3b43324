"""The triton backend in the engine: recorded runs of THL, and every model's small operations against the reference."""

import pytest
import torch
from conftest import FIXTURES, SMALL, load_case, random_weights

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine import ConfigError, Engine
from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Adapted, Held, Part


@pytest.mark.parametrize("name", ["warm", "capacity"])
def test_thl_recorded_run(name, steps=4):
    case = load_case(FIXTURES / "thl" / name)
    engine = Engine.from_state_dict("thl", case.config, case.weights, device=DEVICE, backend="triton")
    prefix = "lowest_index." if any(key.startswith("lowest_index.") for key in case.io) else ""
    tokens = case.io["tokens"]
    stored = {key.removeprefix("init."): value for key, value in case.io.items() if key.startswith("init.")}
    state = engine.state_from_dict(stored) if stored else engine.new_state(tokens.shape[1])
    compared = 0
    for t, column in enumerate(tokens[:steps]):
        with engine.trace() as trace:
            logits, state = engine.step(column, state)
        found = {**state.to_dict(), **trace.steps[0], "logits": logits}
        for name, expected in case.io.items():
            field = name.removeprefix(f"{prefix}step{t:03d}.")
            if name == field or field == "token":
                continue
            value = found[field].reshape(expected.shape).cpu()
            if expected.is_floating_point():
                assert (value - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-30), name
            else:
                assert torch.equal(value.to(expected.dtype), expected), name
            compared += 1
    assert compared >= 5 * steps


def test_thl_int8_streamed_is_resident():
    config, weights = SMALL.to_dict(), random_weights(SMALL)
    tokens = torch.tensor([[3, 50, 7], [9, 1, 96]])
    found = []
    for budget in ({"stream": False}, {"stream": True, "memory_budget": "16MiB"}):
        engine = Engine.from_state_dict(
            "thl", config, weights, device=DEVICE, backend="triton", quantize="int8", **budget
        )
        found.append(engine.forward(tokens)[0].cpu())
    assert torch.equal(*found)
    reference = Engine.from_state_dict("thl", config, weights, device="cpu", backend="reference", quantize="int8")
    close(found[0], reference.forward(tokens)[0], 1e-4)


class Cut:
    """A matrix in parts of uneven size; a part's memory is spoilt when the next one is asked for."""

    def __init__(self, data, scales, group=None, cuts=(5, 11)):
        self.shape, self.whole, self.cuts = tuple(data.shape), Held(data, scales, group), cuts

    def resident(self):
        return None

    def parts(self):
        bounds = (0, *self.cuts, self.shape[0])
        for start, stop in zip(bounds, bounds[1:], strict=False):
            data = self.whole.data[start:stop].clone()
            scales = None if self.whole.scales is None else self.whole.scales[start:stop].clone()
            yield Part(start, stop, data, scales, self.whole.group)
            if DEVICE == "cpu":
                data.zero_()


@pytest.mark.parametrize("group", [None, 128])
def test_products_in_parts(group):
    ops, reference = load_ops("triton", DEVICE), ReferenceOps()
    data, scales = (t.to(DEVICE) for t in quantize_rows(torch.randn(24, 140), group))
    whole, cut = Held(data, scales, group), Cut(data, scales, group)
    x, bias = device_randn(2, 3, 140), device_randn(24)
    close(ops.linear(x, cut, bias), reference.linear(x, whole, bias).cpu(), 1e-6)
    heads, back = device_randn(2, 4, 140), device_randn(2, 4, 6)
    close(ops.linear_heads(heads, cut), reference.linear_heads(heads, whole).cpu(), 1e-6)
    close(ops.linear_transposed(x[0, :, :24], cut), reference.linear_transposed(x[0, :, :24], whole).cpu(), 1e-6)
    close(ops.linear_transposed_heads(back, cut), reference.linear_transposed_heads(back, whole).cpu(), 1e-6)


@pytest.mark.parametrize("batch", [3, 12])
def test_adapted_products(batch):
    """An adapter at hand goes with the base's product; one that passes by adds to it."""
    ops, reference = load_ops("triton", DEVICE), ReferenceOps()
    data, scales = (t.to(DEVICE) for t in quantize_rows(torch.randn(24, 140), None))
    down, up, cut = device_randn(5, 140), device_randn(24, 5), Cut(data, scales)
    whole = Adapted(Held(data, scales), Held(down), Held(up), 0.5)
    x, bias, addend = device_randn(1, batch, 140), device_randn(24), device_randn(1, batch, 24)
    for options in ({}, {"bias": bias, "gelu": True, "addend": addend}):
        expected = reference.linear(x, whole, **options).cpu()
        for matrix in (
            whole,
            Adapted(cut, Held(down), Held(up), 0.5),
            Adapted(cut, Cut(down, None, cuts=(2,)), Cut(up, None), 0.5),
        ):
            close(ops.linear(x, matrix, **options), expected)


@pytest.mark.parametrize("batch", [2, 12])
def test_swiglu_products(batch):
    ops, reference = load_ops("triton", DEVICE), ReferenceOps()
    matrix, cut = (make(*(t.to(DEVICE) for t in quantize_rows(torch.randn(24, 140), None))) for make in (Held, Cut))
    gate, up, x, fast = (device_randn(1, batch, n) for n in (140, 140, 24, 24))
    for each in (matrix, cut):
        whole = each if each is matrix else each.whole
        for blend in (None, (x, fast, device_randn(24))):
            expected = reference.swiglu_linear(gate, up, whole, blend).cpu()
            close(ops.swiglu_linear(gate, up, each, blend), expected)


@pytest.mark.parametrize(
    "model, name",
    [
        ("inl", "greedy"),
        ("him", "reconstruction"),
        ("hrm", "forward_n1t1"),
        ("gemma3n", "forward48"),
        ("gemma4", "forward40"),
        ("gemma4", "forward33"),
    ],
)
def test_other_models_run(model, name):
    """They reach operations that THL does not."""
    case = load_case(FIXTURES / model / name)
    engine = Engine.from_state_dict(model, case.config, case.weights, device=DEVICE, backend="triton")
    reference = Engine.from_state_dict(model, case.config, case.weights, device="cpu", backend="reference")
    tokens = torch.randint(0, case.config["vocab_size"], (1, 5))
    close(engine.forward(tokens)[0], reference.forward(tokens)[0], 1e-4)


def test_the_cpu_needs_the_interpreter(monkeypatch):
    from thl_engine.ops import triton_ops

    monkeypatch.setattr(triton_ops.INTERPRETED, "value", False)
    with pytest.raises(ConfigError, match="backend 'triton' computes on CUDA devices, not on 'cpu'"):
        load_ops("triton", "cpu")
