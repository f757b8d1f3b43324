"""Compiled operations of INL, HIM and HRM against the references in kernels/, on every instruction set."""

import math

import pytest
import torch
from native_inputs import close_everywhere as close
from native_inputs import everywhere, needs_native

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.kernels import attention as attention_kernels
from thl_engine.kernels import integrator, norm, rotary
from thl_engine.kernels.int8 import dequantize
from thl_engine.ops import native
from thl_engine.ops.native_ops import NativeOps
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held, Part

pytestmark = [needs_native, pytest.mark.usefixtures("native_settings", "poison")]

STORED = ["int8", "grouped", "float32", "bfloat16"]
REFERENCE, NATIVE = ReferenceOps(), NativeOps()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 160), (1, 64, 256), (17, 1531)])
def test_rms_norm(shape):
    x, addend = torch.randn(*shape[:-1], 2, shape[-1]).unbind(-2)  # rows with gaps between them
    weight = torch.randn(shape[-1])
    for w in (weight, None):
        wide = None if w is None else w.double()
        close(everywhere(lambda w=w: NATIVE.rms_norm(x, w, 1e-5)), norm.rms_norm(x.double(), wide, 1e-5))
        close(
            everywhere(lambda w=w: NATIVE.add_rms_norm(x, addend, w, 1e-5)),
            norm.rms_norm((x + addend).double(), wide, 1e-5),
        )
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
    for quantile in (None, 1.6448536, 0.0, -3.0):
        close(
            everywhere(lambda q=quantile: NATIVE.geglu(gate, up, q)),
            REFERENCE.geglu(gate.double(), up.double(), quantile),
        )
        assert torch.equal(NATIVE.geglu(gate[-1:], up[-1:], quantile), NATIVE.geglu(gate, up, quantile)[-1:])


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


ATTENTION = [
    (1, 1, 1, 1, 1, 1),
    (1, 8, 8, 1, 65, 64),
    (2, 4, 2, 1, 300, 20),
    (1, 8, 8, 64, 64, 32),
    (2, 8, 2, 64, 64, 20),
    (3, 6, 3, 5, 70, 7),
    (1, 4, 1, 3, 17, 80),
    (1, 2, 2, 70, 333, 48),
    (1, 1, 1, 2, 5000, 16),
    (2, 3, 3, 2, 9, 130),
]


@pytest.mark.parametrize(("batch", "heads", "key_heads", "rows", "keys", "width"), ATTENTION)
def test_attention(batch, heads, key_heads, rows, keys, width):
    query = torch.randn(batch, rows, heads, width).transpose(1, 2)
    key, value = (torch.randn(batch, key_heads, keys + 11, width)[:, :, :keys] for _ in range(2))  # of a longer cache
    scale = 1.0 / math.sqrt(width)
    masks = [
        None,
        torch.rand(rows, keys) < 0.4,
        torch.rand(batch, 1, 1, keys) < 0.4,
        torch.rand(batch, 1, rows, keys) < 0.4,
        torch.rand(batch, heads, rows, 1) < 0,
    ]
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


@pytest.mark.parametrize(
    ("batch", "heads", "rows", "width"), [(1, 8, 64, 32), (2, 3, 5, 2), (3, 1, 1, 18), (1, 2, 131, 40)]
)
def test_rotary_attention(batch, heads, rows, width):
    joined = torch.randn(batch, rows + 2, 3 * heads * width + 5)[:, 1:-1, : 3 * heads * width]
    cos, sin = rotary.rotary_tables(torch.arange(rows), 1.0 / 10000.0 ** (torch.arange(0, width, 2) / width))
    found = everywhere(lambda: NATIVE.rotary_attention(joined, heads, cos, sin, 0.3))
    close(found, attention_kernels.rotary_attention(joined.double(), heads, cos.double(), sin.double(), 0.3), 2e-6)
    assert torch.equal(found[:1], NATIVE.rotary_attention(joined[:1], heads, cos, sin, 0.3))
    query, key, value = joined.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
    apart = NATIVE.attention(NATIVE.rotate(query, cos, sin), NATIVE.rotate(key, cos, sin), value, 0.3)
    assert torch.equal(found, apart.transpose(1, 2).flatten(2))


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
        assert torch.equal(found, NATIVE.linear(x, Paged(*vars(matrix).values())))
        inner = everywhere(lambda matrix=matrix: NATIVE.swiglu_linear(gate, up, matrix))
        close(inner, REFERENCE.swiglu_linear(gate, up, matrix), 1e-4 if quantized else 1e-6)
        assert torch.equal(inner, NATIVE.linear(NATIVE.swiglu(gate, up), matrix))
        assert torch.equal(inner, NATIVE.swiglu_linear(gate, up, Paged(*vars(matrix).values())))


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


@pytest.mark.parametrize(
    ("batch", "positions", "rank", "slots", "width"), [(1, 64, 16, 16, 160), (3, 1, 5, 7, 9), (2, 6, 64, 64, 70)]
)
def test_prefix_read(batch, positions, rank, slots, width):
    query = torch.randn(batch, positions, rank)
    for held in (1, batch):
        rows = torch.randn(held, slots, width)
        close(
            everywhere(lambda rows=rows: NATIVE.prefix_read(query, rows, 0.25)),
            REFERENCE.prefix_read(query.double(), rows.double(), 0.25),
            2e-6,
        )


@pytest.mark.parametrize("kind", ["float", "int8", "grouped"])
def test_geglu_with_the_product_before_it(kind):
    """Rows of the matrix that the gate leaves out are not read: with the bits of reading all."""
    weight, group = torch.randn(301, 200), 128 if kind == "grouped" else None
    matrix = Paged(weight) if kind == "float" else Paged(*quantize_rows(weight, group), group)
    for rows in (1, 2, 5):
        gate, x = torch.randn(rows, 1, 301), torch.randn(rows, 1, 200)
        gate[:, :, :40] = -9.0  # nothing is left of the first part
        for quantile in (1.6448536, -1.0, 50.0):
            found = everywhere(lambda g=gate, x=x, q=quantile: NATIVE.geglu_linear(g, x, matrix, q))
            assert torch.equal(found, NATIVE.geglu(gate, NATIVE.linear(x, matrix), quantile))
            assert found.shape == gate.shape and (quantile != 50.0 or not found.any())
            if quantile != 50.0:
                close(found, REFERENCE.geglu_linear(gate, x, matrix, quantile), 1e-4)


def controller(width, hidden=64):
    scale = 1.0 / math.sqrt(3 * width)
    return (
        scale * torch.randn(hidden, 3 * width),
        0.1 * torch.randn(hidden),
        0.1 * torch.randn(3 * width, hidden),
        torch.randn(3 * width) - 1.0,
        0.1 * torch.randn(width),
    )


def hold(w, stored):
    """A matrix as it is stored, and the float64 values that it stands for."""
    if stored in ("int8", "grouped"):
        group = 128 if stored == "grouped" else None
        q, scales = quantize_rows(w, group)
        return Held(q, scales, group), dequantize(q, scales, group).double()
    w = w.to(getattr(torch, stored))
    return Held(w), w.double()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 512), (3, 130), (2, 5, 160), (3, 4, 1)])
def test_linear_with_what_stands_around_it(stored, shape):
    rows, columns = 75, shape[-1]
    x, addend = torch.randn(*shape[:-1], 2 * columns)[..., columns:], torch.randn(*shape[:-1], rows)
    matrix, wide = hold(torch.randn(rows, columns) / math.sqrt(columns), stored)
    paged = Paged(*vars(matrix).values())
    norm_of, bias = (torch.randn(columns), torch.randn(columns)), torch.randn(rows)
    for around in (
        {},
        {"norm": norm_of},
        {"gelu": True},
        {"addend": addend},
        {"norm": norm_of, "gelu": True, "addend": addend},
    ):
        expected = x.double()
        if "norm" in around:
            expected = norm.layer_norm(expected, *(t.double() for t in norm_of), 1e-5)
        expected = torch.nn.functional.linear(expected, wide, bias.double())
        expected = torch.nn.functional.gelu(expected) if "gelu" in around else expected
        expected = expected + addend if "addend" in around else expected
        close(REFERENCE.linear(x, paged, bias, **around), expected, 4e-6)
        out = everywhere(lambda around=around: NATIVE.linear(x, matrix, bias, **around))
        close(out, expected, 2e-4 if matrix.scales is not None else 4e-6)
        assert torch.equal(out, NATIVE.linear(x, paged, bias, **around))
        plain = NATIVE.linear(x if "norm" not in around else NATIVE.layer_norm(x, *norm_of), matrix, bias)
        plain = NATIVE.gelu(plain) if "gelu" in around else plain
        assert torch.equal(out, plain + addend if "addend" in around else plain)


def test_linear_of_many_rows_with_what_stands_around_it():
    x, addend, norm_of = torch.randn(70, 260), torch.randn(70, 50), (torch.randn(260), torch.randn(260))
    matrix, _ = hold(torch.randn(50, 260), "int8")
    out = everywhere(lambda: NATIVE.linear(x, matrix, None, norm=norm_of, gelu=True, addend=addend))
    alone = [
        NATIVE.linear(x[b : b + 1], matrix, None, norm=norm_of, gelu=True, addend=addend[b : b + 1]) for b in range(70)
    ]
    assert torch.equal(out, torch.cat(alone))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("rows", "width"), [(1, 512), (1, 1), (7, 24), (66, 33), (3, 130)])
@pytest.mark.parametrize("together", [False, True])
def test_integrate(stored, rows, width, together):
    x, context = torch.randn(rows, 2 * width).chunk(2, dim=-1)
    w1, b1, w2, b2, mu = controller(width)
    (first, wide1), (second, wide2) = hold(w1, stored), hold(w2, stored)
    stopped = set()
    for threshold in (None, 0.05 * math.sqrt(width), 1e9):
        expected = integrator.integrate(
            x.double(),
            context.double(),
            wide1,
            b1.double(),
            wide2,
            b2.double(),
            mu.double(),
            steps=9,
            threshold=threshold,
            together=together,
        )
        out = everywhere(
            lambda threshold=threshold: NATIVE.integrate(
                x, context, first, b1, second, b2, mu, steps=9, threshold=threshold, together=together
            )[:3]
        )
        paged = NATIVE.integrate(
            x,
            context,
            Paged(*vars(first).values()),
            b1,
            Paged(*vars(second).values()),
            b2,
            mu,
            steps=9,
            threshold=threshold,
            together=together,
        )
        assert all(torch.equal(a, b) for a, b in zip(out, paged[:3], strict=True)) and paged.steps == expected.steps
        close(out[0], expected.x, 2e-6)
        close(out[1], expected.v, 4e-6)
        assert torch.equal(out[2], expected.iterations)
        stopped |= set(out[2].tolist())
        if not together:
            last = NATIVE.integrate(x[-1:], context[-1:], first, b1, second, b2, mu, steps=9, threshold=threshold)
            assert torch.equal(last.x, out[0][-1:]) and torch.equal(last.v, out[1][-1:])
    assert {4, 9} <= stopped


def test_integrate_with_few_equilibria():
    w1, b1, w2, b2, _ = controller(70)
    matrices, mu, x = (Held(w1), Held(w2)), torch.randn(5), torch.randn(2, 70)
    spread = mu.repeat_interleave(16)[:70]
    assert torch.equal(integrator.spread(mu, 16, 70), spread)
    for ops in (REFERENCE, NATIVE):
        few = ops.integrate(x, x, matrices[0], b1, matrices[1], b2, mu, steps=3, group=16)
        each = ops.integrate(x, x, matrices[0], b1, matrices[1], b2, spread, steps=3)
        assert torch.equal(few.x, each.x) and torch.equal(few.v, each.v)


def test_integrate_with_the_norm_before_it():
    w1, b1, w2, b2, mu = controller(70)
    matrices, x, context = (Held(w1), Held(w2)), torch.randn(5, 140)[:, 70:], torch.randn(5, 70)
    norm_of = (torch.randn(70), torch.randn(70))
    for ops in (REFERENCE, NATIVE):
        args = (context, matrices[0], b1, matrices[1], b2, mu)
        apart = ops.integrate(ops.layer_norm(x, *norm_of), *args, steps=5, threshold=0.1)
        joined = ops.integrate(x, *args, steps=5, threshold=0.1, norm=norm_of)
        assert all(torch.equal(a, b) for a, b in zip(apart[:3], joined[:3], strict=True))
    out = everywhere(lambda: NATIVE.integrate(x, *args, steps=5, norm=norm_of)[:3])
    close(out[0], REFERENCE.integrate(x, *args, steps=5, norm=norm_of).x, 4e-6)
    with pytest.raises(ValueError, match=r"norm bias: expected shape \[70\], found \[69\]"):
        NATIVE.integrate(x, *args, steps=1, norm=(norm_of[0], norm_of[1][1:]))


def test_wrong_arguments():
    matrix, x = Held(*quantize_rows(torch.randn(3, 8))), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"addend: expected shape \[2, 3\], found \[2, 4\]"):
        NATIVE.linear(x, matrix, addend=torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \[8\], found \[7\]"):
        NATIVE.linear(x, matrix, norm=(torch.randn(7), torch.randn(8)))
    packed = native.pack_activations(x)
    for start in (1, 5):
        with pytest.raises(ValueError, match=f"out: expected at least {start + 3} columns, found 3"):
            native.linear_int8(packed, matrix.data, matrix.scales, None, torch.randn(2, 3), start)
    kept = native.KeptMatrix(False)
    with pytest.raises(ValueError, match="w: expected rows within 4, found 2 to 5"):
        native.keep(kept, 4, 2, matrix.data, matrix.scales)
    with pytest.raises(ValueError, match="w: expected more rows of the same matrix, found those of another"):
        native.keep(kept, 6, 3, matrix.data, matrix.scales)
    w1, b1, w2, b2, mu = controller(8)
    with pytest.raises(ValueError, match="first: expected 24 columns, found 8"):
        NATIVE.integrate(x, x, matrix, b1, Held(w2), b2, mu, steps=1)
    with pytest.raises(ValueError, match="second: expected transposed, 24 rows of 64, found 3 rows of 8"):
        NATIVE.integrate(x, x, Held(w1), b1, matrix, b2, mu, steps=1)
    with pytest.raises(ValueError, match=r"mu: expected shape \[2\], found \[8\]"):
        NATIVE.integrate(x, x, Held(w1), b1, Held(w2), b2, mu, steps=1, group=4)
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
