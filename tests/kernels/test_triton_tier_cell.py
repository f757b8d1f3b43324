"""Triton's tier cells and its window of recent embeddings against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.kernels import tier_cell as gates
from thl_engine.kernels import window_attention as window
from thl_engine.kernels.int8 import dequantize
from thl_engine.kernels.norm import layer_norm
from thl_engine.kernels.triton import tier_cell, window_attention
from thl_engine.kernels.triton.linear import Weights
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held, Part


def weights(kind, rows, columns):
    """Stored weights, and their values in float64."""
    values = torch.randn(rows, columns) / columns**0.5
    if kind in ("row", "group"):
        group = 16 if kind == "group" else None
        data, scales = quantize_rows(values, group)
        return Weights(data.to(DEVICE), scales.to(DEVICE), group), dequantize(data, scales, group).double()
    data = values.to(getattr(torch, kind))
    return Weights(data.to(DEVICE)), data.double()


@pytest.mark.parametrize("kind", ["row", "group", "float32", "bfloat16"])
@pytest.mark.parametrize("batch, widths", [(1, (128, 256, 128)), (3, (30, 17, 9)), (8, (5, 40)), (2, (70,))])
def test_joined_linear(kind, batch, widths):
    places = [device_randn(batch, width + 3)[:, :width] for width in widths]
    w, values = weights(kind, 11, sum(widths))
    bias, out = device_randn(11), torch.full((batch, 13), 7.0, device=DEVICE)
    tier_cell.joined_linear(places, w, bias, out[:, 1:12])
    expected = torch.cat(places, dim=-1).cpu().double() @ values.T + bias.cpu()
    close(out[:, 1:12], expected)
    assert (out[:, [0, 12]] == 7.0).all()


class Parts:
    """A matrix in uneven parts."""

    def __init__(self, w, cuts=(3, 10)):
        self.w, self.shape, self.transposed, self.cuts = w, tuple(w.data.shape), False, cuts

    def parts(self):
        bounds = (0, *self.cuts, self.shape[0])
        for start, stop in zip(bounds, bounds[1:], strict=False):
            scales = None if self.w.scales is None else self.w.scales[start:stop]
            yield Part(start, stop, self.w.data[start:stop], scales, self.w.group)


@pytest.mark.parametrize(
    "kind, batch, dtype, tolerance",
    [
        ("row", 1, torch.float32, 1e-6),
        ("group", 3, torch.float32, 1e-6),
        ("row", 20, torch.float32, 1e-6),
        ("row", 1, torch.bfloat16, 4e-3),
        ("bfloat16", 3, torch.bfloat16, 4e-3),
        ("row", 20, torch.bfloat16, 1e-2),
        ("row", 2, torch.float16, 5e-4),
    ],
)
def test_gru_cell(kind, batch, dtype, tolerance):
    d, below, read = 16, 24, 40
    state, lower, context, addend = (device_randn(batch, n).to(dtype) for n in (d, below, read, read))
    stored = [weights(kind, d, d + below + read) for _ in range(3)]
    biases = [device_randn(d) for _ in range(3)]
    wide = [x.cpu().double() for x in (state, lower, context, addend)]
    for added in (None, addend):
        tail = [wide[1], wide[2] if added is None else wide[2] + wide[3]]
        z, r = (torch.cat([wide[0], *tail], dim=-1) @ stored[i][1].T + biases[i].cpu() for i in (0, 1))
        h = torch.cat([gates.gru_reset(r, wide[0]), *tail], dim=-1) @ stored[2][1].T + biases[2].cpu()
        expected = gates.gru_update(z, h, wide[0])
        results = []
        for form in (lambda w: Held(*w), Parts):
            kept = state.clone()
            matrices = [(form(w), bias) for (w, _), bias in zip(stored, biases, strict=True)]
            found = load_ops("triton", DEVICE).gru_cell(*matrices, kept, lower, context, added)
            close(found, expected, tolerance)
            assert found is kept
            results.append(found)
        if batch < 20:  # the interpreter's products of tiles depend on where a row lies in them
            assert torch.equal(*results)


@pytest.mark.parametrize("batch, widths", [(3, (130, 17, 300)), (1, (40, 5)), (2, (2100,))])
def test_joined_layer_norm(batch, widths):
    places = [device_randn(batch, width + 1)[:, 1:] * 3 + 50 for width in widths]
    weight, bias = device_randn(sum(widths)), device_randn(sum(widths))
    wide = torch.cat(places, dim=-1).cpu().double()
    close(
        tier_cell.joined_layer_norm(places, weight, bias, 1e-5),
        layer_norm(wide, weight.cpu().double(), bias.cpu().double(), 1e-5),
        4e-6,
    )


def test_inputs_in_many_rows_or_places():
    ops, reference = load_ops("triton", DEVICE), ReferenceOps()
    for batch, count in ((40, 2), (2, 4)):
        places, (w, _) = [device_randn(batch, 9) for _ in range(count)], weights("row", 7, 9 * count)
        close(
            ops.linear_joined(places, Held(*w)),
            reference.linear_joined([x.cpu() for x in places], Held(w.data.cpu(), w.scales.cpu())),
        )
        weight = device_randn(9 * count)
        close(
            ops.layer_norm_joined(places, weight, weight),
            reference.layer_norm_joined([x.cpu() for x in places], weight.cpu(), weight.cpu()),
        )


@pytest.mark.parametrize("batch, entries, width", [(1, 1, 5), (3, 7, 130), (1, 70, 300)])
def test_window_read(batch, entries, width):
    query, entry = device_randn(batch, width), device_randn(batch, width + 1)[:, 1:]
    start = device_randn(batch, entries, width)
    for valid in sorted({0, 1, entries // 2, entries - 1, entries}):
        buffer = start.clone()
        buffer[:, valid:] = float("nan")  # what is not held is not looked at
        wide = start.cpu().double()
        mixed = window.window_mix(query.cpu().double(), wide, valid, 0.2)
        after = window.window_append(wide, valid, entry.cpu().double())[0]
        for given in (valid, torch.tensor([valid], device=DEVICE)):
            kept = buffer.clone()
            found, result = window_attention.window_read(query, kept, given, entry, 0.2)
            assert result is kept
            held = min(valid + 1, entries)
            close(found, mixed)
            assert torch.equal(kept[:, :held].cpu().double(), after[:, :held])
    late = [window_attention.window_read(query, start.clone(), valid, entry, 0.2) for valid in (entries, entries + 9)]
    assert all(torch.equal(a, b) for a, b in zip(*late, strict=True))


def test_window_of_the_reference_is_filled_at_most():
    buffer = torch.randn(1, 4, 3)
    for ops in (ReferenceOps(), load_ops("auto", "cpu")):
        full, late = (
            ops.window_read(torch.ones(1, 3), buffer.clone(), valid, torch.ones(1, 3), 0.5) for valid in (4, 40)
        )
        assert all(torch.equal(a, b) for a, b in zip(full, late, strict=True))
