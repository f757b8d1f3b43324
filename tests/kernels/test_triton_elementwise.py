"""Triton normalisations and gates against the float64 references."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.kernels import geglu, gelu, residual, shared_memory, swiglu, tier_cell
from thl_engine.kernels import norm as norm_reference
from thl_engine.kernels.triton import elementwise, norm
from thl_engine.kernels.triton.shared_memory import erase_then_add
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 6e-4}
SHAPES = [(1, 1), (3, 7), (2, 5, 160), (2, 1531), (0, 8)]


def wide(*tensors):
    return [t.cpu().double() for t in tensors]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape, dtype):
    x, addend = (t.to(dtype) for t in device_randn(*shape[:-1], 2, shape[-1]).unbind(-2))
    weight, bias = device_randn(shape[-1]), device_randn(shape[-1])
    tolerance = TOLERANCE[dtype]
    if shape[-1] > 1:  # one feature less its mean is a rounding error
        close(
            norm.layer_norm(x + 5, weight, bias, 1e-5),
            norm_reference.layer_norm(*wide(x + 5, weight, bias), 1e-5),
            10 * tolerance,
        )
        found, total = norm.add_layer_norm(x, addend, weight, bias, 1e-5)
        exact = wide(x)[0] + wide(addend)[0]
        close(found, norm_reference.layer_norm(exact, *wide(weight, bias), 1e-5), tolerance)
        close(total, exact, tolerance)
    for w in (weight, None):
        exact = None if w is None else wide(w)[0]
        close(norm.rms_norm(x, w, 1e-5), norm_reference.rms_norm(*wide(x), exact, 1e-5), tolerance)
        close(
            norm.add_rms_norm(x, addend, w, 1e-5), norm_reference.add_rms_norm(*wide(x, addend), exact, 1e-5), tolerance
        )


def test_a_row_does_not_depend_on_its_neighbours():
    x, weight = device_randn(3, 70), device_randn(70)
    whole = norm.rms_norm(x, weight, 1e-5)
    assert torch.equal(whole[1:2], norm.rms_norm(x[1:2], weight, 1e-5))
    assert torch.equal(whole, norm.rms_norm(x.T.contiguous().T, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_gates(shape, dtype):
    a, b, state = (4 * t.to(dtype) for t in device_randn(*shape[:-1], 3, shape[-1]).unbind(-2))
    tolerance = TOLERANCE[dtype]
    close(elementwise.swiglu(a, b), swiglu.swiglu(*wide(a, b)), tolerance)
    close(elementwise.gelu(a), gelu.gelu(*wide(a)), tolerance)
    close(elementwise.gru_reset(a, state), tier_cell.gru_reset(*wide(a, state)), tolerance)
    close(elementwise.geglu(a, b), geglu.geglu(*wide(a, b)), tolerance)
    close(elementwise.add_scaled(a, b, 0.3), residual.add_scaled(*wide(a, b), 0.3), tolerance)
    gate = device_randn(shape[-1])
    close(elementwise.add_blend(a, b, state, gate), residual.add_blend(*wide(a, b, state, gate)), tolerance)
    expected = tier_cell.gru_update(*wide(a, b, state))
    state = state.clone()
    assert elementwise.gru_update(a, b, state) is state
    close(state, expected, tolerance)


def test_gates_are_accurate_everywhere():
    x = torch.cat([torch.linspace(-80, 80, 2001), torch.linspace(-1, 1, 2001) ** 5])[None].to(DEVICE)
    state = torch.zeros_like(x)
    elementwise.gru_update(torch.full_like(x, 80.0), x, state)  # the gate is 1: the state becomes tanh(x)
    exact = x.cpu().double().tanh()
    assert (state.cpu() - exact).abs().div(exact.abs().clamp(min=1e-35)).max() < 2e-6
    extreme = torch.tensor([[-1e30, 1e30, float("inf"), float("-inf"), float("nan")]], device=DEVICE)
    state = torch.zeros(1, 5, device=DEVICE)
    elementwise.gru_update(torch.full_like(extreme, 100.0), extreme, state)
    assert state[0, :4].tolist() == [-1.0, 1.0, 1.0, -1.0] and state[0, 4].isnan()


@pytest.mark.parametrize("batch, held, slots, width", [(1, 1, 5, 48), (3, 1, 4, 70), (3, 3, 7, 33)])
def test_slot_memory_of_him(batch, held, slots, width):
    memory, erase, add = device_randn(held, slots, width), device_randn(batch, width), device_randn(batch, width)
    close(erase_then_add(memory, erase, add), shared_memory.erase_then_add(*wide(memory, erase, add)))
    query = device_randn(batch, 4, width // 2)
    found = load_ops("triton", DEVICE).prefix_read(query, memory, 0.2)
    close(found, shared_memory.prefix_read(*wide(query, memory), 0.2))


def test_backend_returns_as_the_reference():
    x, addend, weight, bias = device_randn(2, 40), device_randn(2, 40), device_randn(40), device_randn(40)
    ops, own = load_ops("triton", DEVICE), ReferenceOps()
    for found, expected in zip(
        ops.add_layer_norm(x, addend, weight, bias), own.add_layer_norm(x, addend, weight, bias), strict=True
    ):
        close(found, expected.cpu())
