"""Triton's AltUp, and sums behind normalisations, against the float64 references."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_triton_linear import apart
from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.kernels import altup as reference
from thl_engine.kernels.triton import altup, norm
from thl_engine.ops.reference import ReferenceOps

SHAPES = [(1, 1, 1), (2, 3, 70), (3, 1, 1100), (0, 2, 8)]


def wide(*tensors):
    return [t.cpu().double() for t in tensors]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_streams(count, shape):
    streams, x, weight = apart(device_randn(count, *shape)), apart(device_randn(*shape)), device_randn(shape[-1])
    mixing, moving = device_randn(*shape[:-1], count, count), apart(device_randn(*shape[:-1], count))
    close(altup.predict(streams, mixing), reference.predict(*wide(streams, mixing)))
    for active in (0, count - 1):
        close(
            altup.correct(streams, x, active, moving),
            reference.correct(*wide(streams, x), active, moving.cpu().double()),
        )
    close(altup.spread(streams, x, weight, 1e-5), ReferenceOps().altup_spread(*wide(streams, x, weight), 1e-5))


@pytest.mark.parametrize("made, count", [(16, 4), (3, 3), (4, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients(made, count, shape):
    x, weight = apart(device_randn(*shape)), device_randn(shape[-1])
    router, matrix = apart(device_randn(count, shape[-1])), apart(device_randn(made, count))
    exact = wide(x)[0]
    exact = exact * (exact.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * wide(weight)[0] / shape[-1]
    exact = torch.tanh(exact @ wide(router)[0].T) @ wide(matrix)[0].T
    close(altup.coefficients(x, weight, 1e-5, router, matrix), exact)
    close(altup.coefficients(x, weight, 1e-5, router, matrix, 1.0), exact + 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_behind_a_norm(shape, dtype):
    x, addend, second = (apart(device_randn(*shape).to(dtype)) for _ in range(3))
    weight, ops = device_randn(shape[-1]), ReferenceOps()
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    close(
        norm.rms_norm_add(x, weight, 1e-5, addend), ops.rms_norm_add(*wide(x, weight), 1e-5, *wide(addend)), tolerance
    )
    close(
        norm.rms_norm_add(x, None, 1e-5, addend, second, 0.7),
        ops.rms_norm_add(*wide(x), None, 1e-5, *wide(addend, second), 0.7),
        tolerance,
    )
    assert norm.rms_norm_add(x, weight, 1e-5, addend).device.type == DEVICE
