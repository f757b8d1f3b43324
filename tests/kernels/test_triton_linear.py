"""Triton products with weights against float64."""

import pytest
import torch

from thl_engine.kernels.int8 import dequantize

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.kernels import int8
from thl_engine.kernels.triton import linear
from thl_engine.kernels.triton.linear import LowRank, Weights
from thl_engine.kernels.triton.linear_tiled import quantize_activations
from thl_engine.kernels.triton.linear_transposed import linear_transposed

KINDS = ["row", "group", "float32", "bfloat16", "float16"]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 5e-4}  # of the result's type


def weights(kind: str, rows: int, columns: int) -> tuple[Weights, torch.Tensor]:
    """A matrix as stored, its rows lying apart, and what it stands for in float64."""
    values = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
    if kind in ("row", "group"):
        group = 128 if kind == "group" else None
        data, scales = quantize_rows(values, group)
        wide = (
            dequantize(data.double(), scales.double(), group)
            if scales.dim() == 1
            else data.double() * scales.double().repeat_interleave(group, dim=1)[:, :columns]
        )
        return Weights(apart(data.to(DEVICE)), scales.to(DEVICE), group), wide
    data = values.to(getattr(torch, kind))
    return Weights(apart(data.to(DEVICE))), data.double()


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between the rows."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "batch, rows, columns",
    [(1, 5, 3), (1, 40, 300), (2, 33, 130), (3, 17, 129), (8, 20, 260), (17, 70, 200), (40, 129, 70)],
)
def test_linear(kind, batch, rows, columns):
    w, wide = weights(kind, rows, columns)
    x, bias = apart(device_randn(batch, columns)), device_randn(rows)
    exact = x.double().cpu() @ wide.T
    close(linear.linear(x, w), exact)
    out = torch.empty(batch, rows + 4, device=DEVICE)
    linear.linear(x, w, bias, out=out[:, 2 : 2 + rows])
    close(out[:, 2 : 2 + rows], exact + bias.double().cpu())
    assert out[:, :2].isnan().all() and out[:, 2 + rows :].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 6, 19])
def test_half_precision_activations(kind, dtype, batch):
    w, wide = weights(kind, 37, 145)
    x = device_randn(batch, 145).to(dtype)
    found = linear.linear(x, w)
    assert found.dtype == dtype
    close(found, x.double().cpu() @ wide.T, TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [1, 20])
def test_linear_of_any_leading_shape_and_layout(batch):
    w, wide = weights("row", 24, 50)
    x = device_randn(50, batch, 2).permute(1, 2, 0)
    close(linear.linear(x, w), x.double().cpu() @ wide.T)
    assert linear.linear(x[:0], w).shape == (0, 2, 24)


@pytest.mark.parametrize("kind", ["row", "group", "float32"])
@pytest.mark.parametrize("batch", [2, 18])
def test_blend_and_residual(kind, batch):
    """HIM's two speeds: x + a slow + (1 - a) fast, a = sigmoid(gate)."""
    w, wide = weights(kind, 30, 140)
    x, bias, gate = device_randn(batch, 140), device_randn(30), device_randn(30)
    fast, residual = apart(device_randn(batch, 30)), apart(device_randn(batch, 30))
    slow = x.double().cpu() @ wide.T
    share = torch.sigmoid(gate.double().cpu())
    mixed = share * slow + (1 - share) * fast.double().cpu()
    close(linear.linear(x, w, fast=fast, blend=gate), mixed)
    close(linear.linear(x, w, fast=fast, blend=gate, residual=residual), mixed + residual.double().cpu())
    close(linear.linear(x, w, bias, residual=residual), slow + bias.double().cpu() + residual.double().cpu())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("kind", ["row", "group", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 5, 21])
def test_gated_linear(kind, batch, activation):
    gate, wide_gate = weights(kind, 35, 150)
    up, wide_up = weights(kind, 35, 150)
    x = device_randn(batch, 150) * 0.3
    exact = x.double().cpu() @ wide_gate.T
    act = (
        torch.nn.functional.silu(exact) if activation == "silu" else torch.nn.functional.gelu(exact, approximate="tanh")
    )
    close(linear.gated_linear(x, gate, up, activation), act * (x.double().cpu() @ wide_up.T))


@pytest.mark.parametrize("kind", ["row", "group", "float32"])
def test_heads_in_parts(kind):
    """Rows of the heads may be cut anywhere."""
    w, wide = weights(kind, 36, 140)
    x = device_randn(3, 4, 140)
    exact = torch.einsum("bhc,hrc->bhr", x.double().cpu(), wide.view(4, 9, 140)).flatten(1)
    whole = linear.linear_heads(x, w, 36)
    close(whole, exact)
    for cut in (5, 9, 22):
        for rows in (slice(0, cut), slice(cut, 36)):
            part = Weights(w.data[rows], None if w.scales is None else w.scales[rows], w.group)
            assert torch.equal(linear.linear_heads(x, part, 36, rows.start), whole[:, rows])


@pytest.mark.parametrize("kind", ["row", "group", "float32"])
@pytest.mark.parametrize(
    "batch",
    [
        1,
        3,
        pytest.param(
            20,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="products of tiles are numpy's, which round by position"),
        ),
    ],
)
def test_a_matrix_in_parts_gives_the_same_bits(kind, batch):
    w, _ = weights(kind, 23, 300)
    x = device_randn(batch, 300)
    whole = linear.linear(x, w)
    assert torch.equal(whole, linear.linear(x, w))
    for rows in (slice(0, 7), slice(7, 23)):
        part = Weights(w.data[rows], None if w.scales is None else w.scales[rows], w.group)
        assert torch.equal(linear.linear(x, part), whole[:, rows])


@pytest.mark.parametrize("kind", ["row", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_activations(kind, dtype):
    """Exact for the activations as they are rounded, which are 0.6 % to 0.9 % off where they are normal."""
    w, wide = weights(kind, 37, 290)
    x, residual = device_randn(19, 290).to(dtype), device_randn(19, 37)
    x[3] = 0
    q, scales = int8.quantize_activations(x.cpu())
    mine = quantize_activations(x)
    assert torch.equal(mine[0].cpu(), q) and torch.equal(mine[1].cpu(), scales)
    exact = (q.double() * scales[:, None].double()) @ wide.T + residual.double().cpu()
    found = linear.linear(x, w, residual=residual, rounded=True)
    close(found, exact, TOLERANCE[dtype])
    close(found, x.double().cpu() @ wide.T + residual.double().cpu(), 0.012)
    up = device_randn(19, 290).to(dtype)
    inner = torch.nn.functional.silu(x.double().cpu()) * up.double().cpu()
    close(linear.linear(x, w, up=up, rounded=True), inner @ wide.T, 0.03)  # a few features dwarf the rest
    assert torch.equal(linear.linear(x[:3], w, rounded=True), linear.linear(x[:3], w))


def test_an_odd_group_is_refused():
    with pytest.raises(ValueError, match="group: expected a power of two from 16 to 1024, found 100"):
        linear.linear(device_randn(1, 200), Weights(torch.zeros(4, 200, dtype=torch.int8), torch.ones(4, 2), 100))


@pytest.mark.parametrize("card", [75, 80, 86, 89, 90])
def test_tiles_are_functions_of_shapes(card, monkeypatch):
    monkeypatch.setattr(linear.INTERPRETED, "value", False)
    for batch in (1, 3, 8, 9, 32, 33, 500):
        for columns in (1, 128, 300, 4096, 20000):
            for gated in (False, True):
                for itemsize in (1, 2, 4):
                    tiles = [linear.gemv_tile(batch, rows, columns, itemsize, gated) for rows in (1, 700, 5000)]
                    assert all(
                        tile.batch * tile.rows <= 64 and tile.columns == tile.warps * 32 * span for tile, span in tiles
                    )
                    assert len({(tile.columns, span) for tile, span in tiles}) == 1  # else parts would change the bits
                for group in (None, 128):
                    for how in ("direct", "split", "tf32x3", "ieee"):
                        tile = linear.gemm_tile(batch, how, card, gated, group)
                        assert (group or tile.columns) % tile.columns == 0


@pytest.mark.parametrize("kind", ["row", "group", "float32"])
@pytest.mark.parametrize("batch, rows, columns", [(1, 9, 300), (3, 17, 160), (8, 12, 128)])
def test_the_streaming_tile_of_a_card(kind, batch, rows, columns, monkeypatch):
    """The interpreter makes many rows at once; a card makes them one by one."""
    monkeypatch.setattr(linear.INTERPRETED, "value", False)
    monkeypatch.setattr(linear, "PROGRAMS", 1)
    w, wide = weights(kind, rows, columns)
    up, wide_up = weights(kind, rows, columns)
    x = device_randn(batch, columns) * 0.3
    exact = x.double().cpu() @ wide.T
    close(linear.linear(x, w), exact)
    close(linear.gated_linear(x, w, up), torch.nn.functional.silu(exact) * (x.double().cpu() @ wide_up.T))


@pytest.mark.parametrize("kind", ["row", "group", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 6, 19])
def test_what_stands_around_a_product(kind, batch):
    w, wide = weights(kind, 37, 150)
    x, up, bias, residual = (device_randn(*shape) for shape in ((batch, 150), (batch, 150), (37,), (batch, 37)))
    low, lift = apart(device_randn(batch, 5)), device_randn(37, 5)
    exact = x.double().cpu() @ wide.T
    x64, up64, bias64, residual64, low64, lift64 = (t.double().cpu() for t in (x, up, bias, residual, low, lift))
    gelu = torch.nn.functional.gelu
    close(linear.linear(x, w, bias, gelu=True, residual=residual), gelu(exact + bias64) + residual64)
    close(linear.linear(apart(x), w, up=apart(up)), (torch.nn.functional.silu(x64) * up64) @ wide.T)
    adapted = exact + bias64 + 0.5 * low64 @ lift64.T
    close(linear.linear(x, w, bias, low_rank=LowRank(low, lift, 0.5), gelu=True), gelu(adapted))
    close(linear.linear(x, w, bias, low_rank=LowRank(low, lift.bfloat16().float(), 0.0)), exact + bias64)
    total = residual.clone()
    linear.linear(x, w, residual=total, out=total)
    close(total, exact + residual64)


@pytest.mark.parametrize("kind", ["row", "group", "bfloat16"])
@pytest.mark.parametrize("heads, batch", [(1, 1), (1, 6), (4, 3)])
def test_linear_transposed_in_parts(kind, heads, batch):
    w, wide = weights(kind, 36, 140)
    x, per_head = apart(device_randn(batch, heads, 36 // heads)), 36 // heads
    exact = torch.einsum("bhr,hrc->bhc", x.double().cpu(), wide.view(heads, per_head, 140))
    for cuts in ((0, 36), (0, 7, 36), (0, 9, 22, 36)):
        out = torch.empty(batch, heads, 140, device=DEVICE)
        for first, last in zip(cuts, cuts[1:], strict=False):
            part = Weights(w.data[first:last], None if w.scales is None else w.scales[first:last], w.group)
            linear_transposed(x, part, heads, 36, first, out, accumulate=first > 0)
        close(out, exact)
