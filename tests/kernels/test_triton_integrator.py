"""Triton's integrator against the float64 reference."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, poison  # noqa: F401

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.kernels import integrator as reference
from thl_engine.kernels.int8 import dequantize
from thl_engine.kernels.triton import integrator
from thl_engine.kernels.triton.linear import Weights


@pytest.mark.parametrize("stored", ["float32", "int8"])
@pytest.mark.parametrize("rows, width, units", [(1, 9, 5), (21, 40, 20)])
@pytest.mark.parametrize("together", [False, True])
def test_integrate(stored, rows, width, units, together):
    x, context = torch.randn(rows, 2 * width).chunk(2, dim=-1)
    w1, w2 = torch.randn(units, 3 * width) / math.sqrt(3 * width), torch.randn(3 * width, units) / math.sqrt(units)
    b1, b2, mu = torch.randn(units), torch.randn(3 * width), torch.randn(width)

    def hold(w):
        if stored == "int8":
            q, scales = quantize_rows(w)
            return Weights(q.to(DEVICE), scales.to(DEVICE)), dequantize(q, scales).double()
        return Weights(w.to(DEVICE)), w.double()

    (first, wide1), (second, wide2) = hold(w1), hold(w2)
    stopped = set()
    for threshold in (None, 0.11 * math.sqrt(width), 1e9):
        expected = reference.integrate(
            x.double(),
            context.double(),
            wide1,
            b1.double(),
            wide2,
            b2.double(),
            mu.double(),
            steps=6,
            threshold=threshold,
            together=together,
        )
        found = integrator.integrate(
            *(t.to(DEVICE) for t in (x, context)),
            first,
            b1.to(DEVICE),
            second,
            b2.to(DEVICE),
            mu.to(DEVICE),
            steps=6,
            threshold=threshold,
            together=together,
        )
        assert found.steps == expected.steps and torch.equal(found.iterations.cpu(), expected.iterations)
        close(found.x, expected.x, 2e-6)
        close(found.v, expected.v, 4e-6)
        stopped |= set(expected.iterations.tolist())
    assert {4, 6} <= stopped and (rows == 1 or len(stopped) > 2)


def test_no_rows_and_too_many_units():
    empty = torch.zeros(0, 4, device=DEVICE)
    first, second = Weights(torch.zeros(3, 12, device=DEVICE)), Weights(torch.zeros(12, 3, device=DEVICE))
    out = integrator.integrate(empty, empty, first, torch.zeros(3), second, torch.zeros(12), torch.zeros(4), steps=3)
    assert out.x.shape == (0, 4)
    with pytest.raises(ValueError, match="at most 64 hidden units, found 300"):
        integrator.integrate(
            empty,
            empty,
            Weights(torch.zeros(300, 12)),
            torch.zeros(300),
            second,
            torch.zeros(12),
            torch.zeros(4),
            steps=3,
        )
