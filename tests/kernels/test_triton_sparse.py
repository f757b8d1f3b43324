"""Triton's sparse feed-forward layers against the float64 references, and the backend's against the reference's."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_triton_linear import apart, weights
from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.kernels import geglu as reference
from thl_engine.kernels.triton import sparse
from thl_engine.kernels.triton.linear import LowRank, Weights
from thl_engine.kernels.triton.linear_transposed import linear_transposed
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Adapted, Held


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (2, 3, 130), (0, 8)])
@pytest.mark.parametrize("quantile", [0.3, 1.6])
def test_geglu(shape, quantile):
    gate, up = apart(device_randn(*shape)), device_randn(*shape)
    found = sparse.geglu(gate, up, quantile)
    exact = reference.geglu(gate.double().cpu(), up.double().cpu(), quantile)
    if shape[-1] > 1:  # one feature less its own mean is a rounding error
        close(found, exact, 1e-5)


@pytest.mark.parametrize("quantile", [-9.0, 0.8, 9.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_survivors_ascend(batch, quantile):
    """All, some, or none of the features."""
    gate = device_randn(batch, 133)
    out, (indices, count) = sparse.survivors(gate, quantile)
    exact = reference.geglu(gate.double().cpu(), torch.ones(()), quantile)
    assert (out.cpu() - exact).abs().max() <= 1e-5
    alive = (out != 0).any(dim=0).nonzero()[:, 0]
    assert count.tolist() == [len(alive)] and torch.equal(indices[: len(alive)].long(), alive)


@pytest.mark.parametrize("kind", ["row", "group", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cuts", [(0, 61), (0, 7, 40, 61)])
def test_rows_that_do_not_survive_are_not_read(kind, batch, cuts):
    up, wide_up = weights(kind, 61, 150)
    down, wide_down = weights(kind, 61, 140)
    gate, x = device_randn(batch, 61), device_randn(batch, 150)
    low, lift = device_randn(batch, 4), device_randn(61, 4)
    inner, alive = sparse.survivors(gate, 0.8)
    dead = (inner == 0).all(dim=0)
    assert 5 < int(dead.sum()) < 60
    exact = x.double().cpu() @ wide_up.T + 0.5 * low.double().cpu() @ lift.double().cpu().T
    exact = inner.double().cpu() * exact
    for w in (up, down):
        (w.data if w.scales is None else w.scales)[dead] = float("nan")
    lift[dead] = float("nan")
    out = torch.empty(batch, 1, 140, device=DEVICE)
    for first, last in zip(cuts, cuts[1:], strict=False):

        def part(w, first=first, last=last):
            return Weights(w.data[first:last], None if w.scales is None else w.scales[first:last], w.group)

        sparse.multiply(inner, alive, x, part(up), first, LowRank(low, lift[first:last], 0.5))
    close(inner, exact)
    for first, last in zip(cuts, cuts[1:], strict=False):
        linear_transposed(inner[:, None], part(down, first, last), 1, 61, first, out, first > 0, alive)
    close(out[:, 0], exact @ wide_down)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("batch", [2, 11])
def test_a_layer(batch, adapted):
    ops, own = load_ops("triton", DEVICE), ReferenceOps()
    up, down = (
        Held(*(t.to(DEVICE) for t in quantize_rows(torch.randn(300, 64), None)), transposed=turned)
        for turned in (False, True)
    )
    if adapted:
        up = Adapted(up, Held(device_randn(3, 64)), Held(device_randn(300, 3)), 0.5)
        down = Adapted(down, Held(device_randn(3, 300)), Held(device_randn(64, 3)), 2.0)
    gate, x = device_randn(1, batch, 300), device_randn(1, batch, 64)
    close(ops.geglu_sparse(gate, x, up, down, 1.645), own.geglu_sparse(gate, x, up, down, 1.645).cpu(), 1e-5)
    gate, up = Held(device_randn(300, 64)), Held(device_randn(300, 64))
    close(ops.geglu_linears(x, gate, up), own.geglu_linears(x, gate, up).cpu(), 1e-5)
