"""Compiled operations of HIM's encoder against the references in kernels/, on every instruction set."""

import pytest
import torch
from native_inputs import close_everywhere, everywhere, needs_native

from thl_engine.kernels import norm, residual, shared_memory
from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.ops import native
from thl_engine.ops.native_ops import NativeOps

pytestmark = [needs_native, pytest.mark.usefixtures("native_settings", "poison")]

NATIVE = NativeOps()
SHAPES = [(1, 1), (3, 7), (2, 5, 160), (1, 64, 66), (2, 40, 777)]


def apart(*shape, count):
    """Random tensors whose rows have gaps between them."""
    return torch.randn(*shape[:-1], count, shape[-1]).unbind(-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape):
    x, addend = apart(*shape, count=2)
    weight, bias = torch.randn(2, shape[-1])
    wide = (weight.double(), bias.double(), LAYER_NORM_EPS)
    close_everywhere(everywhere(lambda: NATIVE.layer_norm(x, weight, bias)), norm.layer_norm(x.double(), *wide))
    total, normed = everywhere(lambda: NATIVE.add_layer_norm(x, addend, weight, bias))
    assert torch.equal(total, x + addend) and torch.equal(normed, NATIVE.layer_norm(total, weight, bias))
    _, expected = norm.add_layer_norm(x.double(), addend.double(), *wide)
    close_everywhere(normed, expected, 2e-6)
    assert torch.equal(normed[-1:], NATIVE.add_layer_norm(x[-1:], addend[-1:], weight, bias)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_sums(shape):
    x, fast, slow = apart(*shape, count=3)
    gate = 3 * torch.randn(shape[-1])
    close_everywhere(
        everywhere(lambda: NATIVE.add_blend(x, fast, slow, gate)),
        residual.add_blend(x.double(), fast.double(), slow.double(), gate.double()),
    )
    assert torch.equal(everywhere(lambda: NATIVE.add_scaled(x, fast, 0.1)), residual.add_scaled(x, fast, 0.1))
    if x.dim() == 3:  # rows at uneven distances
        x, fast = x[:, ::2], fast.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2]
        assert torch.equal(NATIVE.add_scaled(x, fast, 0.1), residual.add_scaled(x, fast, 0.1))


@pytest.mark.parametrize(
    ("batch", "held", "slots", "width"), [(1, 1, 1, 66), (3, 1, 6, 100), (3, 3, 16, 160), (2, 2, 64, 7)]
)
def test_slot_memory(batch, held, slots, width):
    memory, erase, add = torch.randn(held, slots, width), 4 * torch.randn(batch, width), torch.randn(batch, width)
    expected = shared_memory.erase_then_add(memory.double(), erase.double(), add.double())
    found = everywhere(lambda: NATIVE.erase_then_add(memory, erase, add))
    close_everywhere(found, expected, 4e-6)
    assert torch.equal(found[-1:], NATIVE.erase_then_add(memory[-1:], erase[-1:], add[-1:]))
    for features in {1, width // 2, width}:
        query = torch.randn(batch, 9, features)
        close_everywhere(
            everywhere(lambda query=query: NATIVE.prefix_read(query, memory, 0.4)),
            shared_memory.prefix_read(query.double(), memory.double(), 0.4),
            2e-6,
        )


def test_wrong_arguments():
    x, d = torch.randn(2, 3), torch.randn(3)
    with pytest.raises(ValueError, match=r"addend: expected shape \[2, 3\], found \[3, 3\]"):
        NATIVE.add_layer_norm(x, torch.randn(3, 3), d, d)
    with pytest.raises(ValueError, match="gate"):
        NATIVE.add_blend(x, x, x, torch.randn(4))
    with pytest.raises(ValueError, match="addend"):
        NATIVE.add_scaled(x, torch.randn(2, 4), 0.5)
    with pytest.raises(ValueError, match="memory: expected shape"):
        NATIVE.erase_then_add(torch.randn(3, 4, 3), x, x)
    with pytest.raises(ValueError, match="rows: expected at least one row of 5 features"):
        NATIVE.prefix_read(torch.randn(1, 2, 5), torch.randn(1, 4, 3), 1.0)
    with pytest.raises(ValueError, match="out: expected a tensor whose elements do not overlap"):
        native.add_scaled(x, x, 0.5, torch.randn(1, 3).expand(2, 3))
