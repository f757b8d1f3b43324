"""Compiled operations of INL, HIM and HRM against the references in kernels/, on every instruction set."""

import math
from dataclasses import dataclass

import pytest
import torch
from native_inputs import close_everywhere as close
from native_inputs import everywhere, needs_native

from thl_engine import native
from thl_engine.kernels import attention as attention_kernels
from thl_engine.kernels import integrator, norm, rotary
from thl_engine.ops import NativeOps, ReferenceOps
from thl_engine.quant import dequantize_rows, quantize_rows
from thl_engine.weights import Held, Part

pytestmark = [needs_native, pytest.mark.usefixtures("native_settings", "poison")]

REFERENCE, NATIVE = ReferenceOps(), NativeOps()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 160), (1, 64, 256), (17, 1531)])
def test_rms_norm(shape):
    x, addend = torch.randn(*shape[:-1], 2, shape[-1]).unbind(-2)  # rows with gaps between them
    weight = torch.randn(shape[-1])
    for w in (weight, None):
        wide = None if w is None else w.double()
        close(everywhere(lambda w=w: NATIVE.rms_norm(x, w, 1e-5)), norm.rms_norm(x.double(), wide, 1e-5))
        close(everywhere(lambda w=w: NATIVE.add_rms_norm(x, addend, w, 1e-5)),
              norm.rms_norm((x + addend).double(), wide, 1e-5))
    whole = NATIVE.add_rms_norm(x, addend, weight, 1e-5)
    assert torch.equal(whole[-1:], NATIVE.add_rms_norm(x[-1:], addend[-1:], weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 10), (1, 8, 64, 32), (7, 6)])
def test_rotate(shape):
    x = torch.randn(*shape[:-1], 3 * shape[-1])[..., shape[-1] : 2 * shape[-1]]
    if len(shape) == 4:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves the heads
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, shape[-1], 2) / shape[-1])
    cos, sin = rotary.rotary_tables(torch.arange(shape[-2]), frequencies)
    close(everywhere(lambda: NATIVE.rotate(x, cos, sin)), rotary.rotate(x.double(), cos.double(), sin.double()))


@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 3, 1000), (1, 64, 640)])
def test_activations(shape):
    both = 5 * torch.randn(*shape[:-1], 2 * shape[-1])
    gate, up = both.chunk(2, dim=-1)
    close(everywhere(lambda: NATIVE.swiglu(gate, up)), REFERENCE.swiglu(gate.double(), up.double()))
    close(everywhere(lambda: NATIVE.gelu(gate)), REFERENCE.gelu(gate.double()))


def test_activations_over_their_range():
    """Relative errors, also where values are small: the functions behind them are accurate, not only their products."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.linspace(-1e-3, 1e-3, 999), torch.tensor([0.0, -80.0, 80.0])])
    wide = x.double()
    normal = 0.5 * torch.special.erfc(-wide / math.sqrt(2.0))
    found, expected = everywhere(lambda: NATIVE.gelu(x[None]))[0], wide * normal
    near = x > -2  # further out the rounding of x² / 2 in the exponent is more
    assert ((found - expected).abs()[near] <= 1e-6 * expected.abs()[near]).all()
    assert ((found - expected).abs() <= torch.maximum(1e-5 * expected.abs(), torch.tensor(1e-12)))[x > -10].all()
    found = everywhere(lambda: NATIVE.swiglu(x[None], torch.ones(1, len(x))))[0]
    expected = torch.nn.functional.silu(wide)
    assert ((found - expected).abs() <= 2e-6 * expected.abs())[:-2].all()
    special = torch.tensor([[float("nan"), float("inf")]])
    assert torch.equal(NATIVE.gelu(special).isnan(), torch.tensor([[True, False]]))


ATTENTION = [(1, 1, 1, 1, 1, 1), (1, 8, 8, 1, 65, 64), (2, 4, 2, 1, 300, 20), (1, 8, 8, 64, 64, 32),
             (2, 8, 2, 64, 64, 20), (3, 6, 3, 5, 70, 7), (1, 4, 1, 3, 17, 80), (1, 2, 2, 70, 333, 48),
             (1, 1, 1, 2, 5000, 16), (2, 3, 3, 2, 9, 130)]


@pytest.mark.parametrize(("batch", "heads", "key_heads", "rows", "keys", "width"), ATTENTION)
def test_attention(batch, heads, key_heads, rows, keys, width):
    query = torch.randn(batch, rows, heads, width).transpose(1, 2)
    key, value = (torch.randn(batch, key_heads, keys + 11, width)[:, :, :keys] for _ in range(2))  # of a longer cache
    scale = 1.0 / math.sqrt(width)
    masks = [None, torch.rand(rows, keys) < 0.4, torch.rand(batch, 1, 1, keys) < 0.4,
             torch.rand(batch, 1, rows, keys) < 0.4, torch.rand(batch, heads, rows, 1) < 0]
    if keys > rows:
        masks.append(attention_kernels.causal(rows, keys - rows))
    for mask in masks:
        if mask is not None:
            mask[..., 0] = False
        wide = attention_kernels.attention(query.double(), key.double(), value.double(), scale, mask)
        found = everywhere(lambda mask=mask: NATIVE.attention(query, key, value, scale, mask))
        close(found, wide, 2e-6)
        if mask is None:  # a position has the same bits whatever comes with it
            for t in {0, rows // 2, rows - 1}:
                assert torch.equal(found[:, :, t : t + 1], NATIVE.attention(query[:, :, t : t + 1], key, value, scale))
            assert torch.equal(found[:1], NATIVE.attention(query[:1], key[:1], value[:1], scale))


@pytest.mark.parametrize(("batch", "heads", "rows", "width"), [(1, 8, 64, 32), (2, 3, 5, 2), (3, 1, 1, 18),
                                                               (1, 2, 131, 40)])
def test_rotary_attention(batch, heads, rows, width):
    joined = torch.randn(batch, rows + 2, 3 * heads * width + 5)[:, 1:-1, : 3 * heads * width]
    cos, sin = rotary.rotary_tables(torch.arange(rows), 1.0 / 10000.0 ** (torch.arange(0, width, 2) / width))
    found = everywhere(lambda: NATIVE.rotary_attention(joined, heads, cos, sin, 0.3))
    close(found, attention_kernels.rotary_attention(joined.double(), heads, cos.double(), sin.double(), 0.3), 2e-6)
    assert torch.equal(found[:1], NATIVE.rotary_attention(joined[:1], heads, cos, sin, 0.3))
    query, key, value = joined.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
    apart = NATIVE.attention(NATIVE.rotate(query, cos, sin), NATIVE.rotate(key, cos, sin), value, 0.3)
    assert torch.equal(found, apart.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class InParts(Held):
    """A matrix that comes in parts of `step` rows."""

    step: int = 1

    def parts(self):
        for start in range(0, self.shape[0], self.step):
            here = slice(start, min(start + self.step, self.shape[0]))
            yield Part(here.start, here.stop, self.data[here], None if self.scales is None else self.scales[here],
                       self.group)


@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 3, 130), (1, 64, 160)])
@pytest.mark.parametrize("quantized", [False, True])
def test_linear_maps_of_the_same_activations(shape, quantized):
    x, gate, up = torch.randn(*shape[:-1], 3 * shape[-1]).chunk(3, dim=-1)
    matrices = []
    for rows in (5, 48):
        w = torch.randn(rows, shape[-1])
        matrices.append(Held(*quantize_rows(w)) if quantized else Held(w))
    for found, matrix in zip(everywhere(lambda: NATIVE.linears(x, matrices)), matrices, strict=True):
        close(found, REFERENCE.linear(x, matrix), 1e-4 if quantized else 1e-6)
        assert torch.equal(found, NATIVE.linear(x, InParts(matrix.data, matrix.scales, step=3)))
        inner = everywhere(lambda matrix=matrix: NATIVE.swiglu_linear(gate, up, matrix))
        close(inner, REFERENCE.swiglu_linear(gate, up, matrix), 1e-4 if quantized else 1e-6)
        assert torch.equal(inner, NATIVE.linear(NATIVE.swiglu(gate, up), matrix))
        assert torch.equal(inner, NATIVE.swiglu_linear(gate, up, InParts(matrix.data, matrix.scales, step=2)))


def test_attention_is_exact_about_what_is_blocked():
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    blocked = torch.rand(5, 9) < 0.5
    blocked[:, 0], blocked[2] = False, True
    seen = NATIVE.attention(query, key, value, 1.0, blocked)
    assert seen[:, :, 2].isnan().all() and not seen[:, :, [0, 1, 3, 4]].isnan().any()  # as in the reference
    key, value = key.clone(), value.clone()
    key[:, :, blocked[0]], value[:, :, blocked[0]] = 100.0, 1e30
    assert torch.equal(seen[:, :, 0], NATIVE.attention(query, key, value, 1.0, blocked)[:, :, 0])
    assert not NATIVE.attention(1e4 * query, key, torch.ones_like(value), 1.0).isnan().any()


@pytest.mark.parametrize(("batch", "positions", "rank", "slots", "width"),
                         [(1, 64, 16, 16, 160), (3, 1, 5, 7, 9), (2, 6, 64, 64, 70)])
def test_prefix_read(batch, positions, rank, slots, width):
    query = torch.randn(batch, positions, rank)
    for held in (1, batch):
        rows = torch.randn(held, slots, width)
        close(everywhere(lambda rows=rows: NATIVE.prefix_read(query, rows, 0.25)),
              REFERENCE.prefix_read(query.double(), rows.double(), 0.25), 2e-6)


class Paged(Held):
    """A matrix in several parts, which are overwritten once the next one is asked for, like a streamed one's."""

    def parts(self):
        memory = None
        for start in range(0, self.shape[0], 37):
            rows = slice(start, min(start + 37, self.shape[0]))
            if memory is not None:
                memory.data.zero_()
            scales = None if self.scales is None else self.scales[rows]
            memory = Part(rows.start, rows.stop, self.data[rows].clone(), scales, self.group)
            yield memory
        memory.data.zero_()


def controller(width, hidden=64):
    scale = 1.0 / math.sqrt(3 * width)
    return (scale * torch.randn(hidden, 3 * width), 0.1 * torch.randn(hidden), 0.1 * torch.randn(3 * width, hidden),
            torch.randn(3 * width) - 1.0, 0.1 * torch.randn(width))


@pytest.mark.parametrize("stored", ["int8", "grouped", "float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 512), (1, 1), (7, 24), (66, 33), (3, 130)])
@pytest.mark.parametrize("together", [False, True])
def test_integrate(stored, rows, width, together):
    x, context = torch.randn(rows, 2 * width).chunk(2, dim=-1)
    w1, b1, w2, b2, mu = controller(width)

    def hold(w, cls):
        if stored in ("int8", "grouped"):
            group = 128 if stored == "grouped" else None
            q, scales = quantize_rows(w, group)
            return cls(q, scales, group), dequantize_rows(q, scales, group).double()
        w = w.to(getattr(torch, stored))
        return cls(w), w.double()

    (first, wide1), (second, wide2) = hold(w1, Held), hold(w2, Held)
    stopped = set()
    for threshold in (None, 0.05 * math.sqrt(width), 1e9):
        expected = integrator.integrate(x.double(), context.double(), wide1, b1.double(), wide2, b2.double(),
                                        mu.double(), steps=9, threshold=threshold, together=together)
        out = everywhere(lambda threshold=threshold: NATIVE.integrate(
            x, context, first, b1, second, b2, mu, steps=9, threshold=threshold, together=together)[:3])
        paged = NATIVE.integrate(x, context, hold(w1, Paged)[0], b1, hold(w2, Paged)[0], b2, mu, steps=9,
                                 threshold=threshold, together=together)
        assert all(torch.equal(a, b) for a, b in zip(out, paged[:3], strict=True)) and paged.steps == expected.steps
        close(out[0], expected.x, 2e-6)
        close(out[1], expected.v, 4e-6)
        assert torch.equal(out[2], expected.iterations)
        stopped |= set(out[2].tolist())
        if not together:
            last = NATIVE.integrate(x[-1:], context[-1:], first, b1, second, b2, mu, steps=9, threshold=threshold)
            assert torch.equal(last.x, out[0][-1:]) and torch.equal(last.v, out[1][-1:])
    assert {4, 9} <= stopped


def test_wrong_arguments():
    q, k = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="key: expected a number of heads that divides 3, found 2"):
        NATIVE.attention(q, k, k, 1.0)
    with pytest.raises(ValueError, match="key"):
        NATIVE.attention(q, k[..., :3], k, 1.0)
    with pytest.raises(ValueError, match="cos"):
        NATIVE.rotate(q, torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="up"):
        NATIVE.swiglu(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="addend"):
        NATIVE.add_rms_norm(torch.randn(2, 3), torch.randn(3, 3), None, 1e-5)
    with pytest.raises(ValueError, match="joined: expected queries, keys and values of 2 heads of even width"):
        NATIVE.rotary_attention(torch.randn(1, 5, 18), 2, torch.randn(5, 3), torch.randn(5, 3), 1.0)
    with pytest.raises(ValueError, match="sin"):
        NATIVE.rotary_attention(torch.randn(1, 5, 24), 2, torch.randn(5, 4), torch.randn(4, 4), 1.0)
    with pytest.raises(ValueError, match="up"):
        native.pack_swiglu(torch.randn(2, 3), torch.randn(3, 3))
    with pytest.raises(ValueError, match="x: expected rows at even distances"):
        native.pack_activations(torch.randn(2, 3, 4)[:, :2])
