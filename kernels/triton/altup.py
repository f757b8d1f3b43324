"""AltUp's parts, one launch each; references in ../altup.py and, for what is put together, in compositions.py."""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import tanh
from thl_engine.kernels.triton.norm import check_width

COLUMNS = 1024  # of a program


@triton.jit
def _predict(
    streams,
    coefficients,
    out,
    streams_count,
    rows,
    width,
    s_stream,
    s_row,
    c_row,
    STREAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.arange(0, STREAMS)[:, None]
    inside = (j < streams_count) & (d < width)
    total = tl.load(streams + j * s_stream + row * s_row + d, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(STREAMS):
        if k < streams_count:
            share = tl.load(coefficients + row * c_row + j * streams_count + k, mask=j < streams_count, other=0.0)
            other = tl.load(streams + k * s_stream + row * s_row + d, mask=d < width, other=0.0).to(tl.float32)
            total += share * other[None, :]
    tl.store(out + (j * rows + row) * width + d, total, mask=inside)


@triton.jit
def _correct(
    predicted,
    activated,
    coefficients,
    out,
    active,
    streams_count,
    rows,
    width,
    p_stream,
    p_row,
    a_row,
    c_row,
    STREAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.arange(0, STREAMS)[:, None]
    inside = (j < streams_count) & (d < width)
    at = predicted + row * p_row + d
    moved = tl.load(activated + row * a_row + d, mask=d < width, other=0.0).to(tl.float32)
    moved -= tl.load(at + active * p_stream, mask=d < width, other=0.0).to(tl.float32)
    share = tl.load(coefficients + row * c_row + j, mask=j < streams_count, other=0.0)
    values = tl.load(predicted + j * p_stream + row * p_row + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (j * rows + row) * width + d, values + share * moved[None, :], mask=inside)


@triton.jit
def _coefficients(
    x,
    weight,
    router,
    matrix,
    out,
    width,
    streams_count,
    made,
    eps,
    offset,
    x_row,
    router_row,
    matrix_row,
    WIDTH: tl.constexpr,
    MADE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < width
    values = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
    values *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / width + eps))
    values *= tl.load(weight + d, mask=inside, other=0.0) / width
    m = tl.arange(0, MADE)
    total = tl.zeros([MADE], tl.float32)
    for n in range(streams_count):
        routed = tanh(tl.sum(values * tl.load(router + n * router_row + d, mask=inside, other=0.0), axis=0))
        total += routed * tl.load(matrix + m * matrix_row + n, mask=m < made, other=0.0)
    tl.store(out + row * made + m, total + offset, mask=m < made)


@triton.jit
def _spread(streams, x, weight, out, streams_count, rows, width, eps, s_stream, s_row, x_row, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < width
    values = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
    values *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / width + eps))
    values *= tl.load(weight + d, mask=inside, other=0.0)
    tl.store(out + row * width + d, tl.load(streams + row * s_row + d, mask=inside, other=0.0), mask=inside)
    for j in range(1, streams_count):
        stream = tl.load(streams + j * s_stream + row * s_row + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + (j * rows + row) * width + d, stream + values, mask=inside)


def predict(streams: Tensor, coefficients: Tensor) -> Tensor:
    """As the reference: streams [n, ..., D], coefficients [..., n, n], float32."""
    count, rows, width = streams.shape[0], prod(streams.shape[1:-1]), streams.shape[-1]
    out, streams = streams.new_empty(streams.shape), _streams(streams, rows)
    coefficients = coefficients.reshape(rows, count * count)
    size = min(triton.next_power_of_2(width), COLUMNS)
    if out.numel():
        _predict[rows, triton.cdiv(width, size)](
            streams,
            coefficients,
            out,
            count,
            rows,
            width,
            *streams.stride()[:2],
            coefficients.stride(0),
            STREAMS=triton.next_power_of_2(count),
            COLUMNS=size,
            num_warps=4,
        )
    return out


def correct(predicted: Tensor, activated: Tensor, active: int, coefficients: Tensor) -> Tensor:
    """As the reference: predicted [n, ..., D], activated [..., D], coefficients [..., n], float32."""
    count, rows, width = predicted.shape[0], prod(predicted.shape[1:-1]), predicted.shape[-1]
    out, predicted, activated = predicted.new_empty(predicted.shape), _streams(predicted, rows), _rows(activated, rows)
    coefficients = _rows(coefficients, rows)
    size = min(triton.next_power_of_2(width), COLUMNS)
    if out.numel():
        _correct[rows, triton.cdiv(width, size)](
            predicted,
            activated,
            coefficients,
            out,
            active,
            count,
            rows,
            width,
            *predicted.stride()[:2],
            activated.stride(0),
            coefficients.stride(0),
            STREAMS=triton.next_power_of_2(count),
            COLUMNS=size,
            num_warps=4,
        )
    return out


def coefficients(x: Tensor, weight: Tensor, eps: float, router: Tensor, matrix: Tensor, offset: float = 0.0) -> Tensor:
    """As `altup_coefficients` of the ops: x [..., D], router [n, D], matrix [m, n] -> [..., m], float32."""
    rows, width = prod(x.shape[:-1]), x.shape[-1]
    check_width(width)
    out, x = x.new_empty(*x.shape[:-1], matrix.shape[0]), _rows(x, rows)
    size = triton.next_power_of_2(width)
    if out.numel():
        _coefficients[(rows,)](
            x,
            weight,
            router,
            matrix,
            out,
            width,
            router.shape[0],
            matrix.shape[0],
            eps,
            offset,
            x.stride(0),
            router.stride(0),
            matrix.stride(0),
            WIDTH=size,
            MADE=triton.next_power_of_2(matrix.shape[0]),
            num_warps=min(max(size // 512, 1), 32),
        )
    return out


def spread(streams: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `altup_spread` of the ops: streams [n, ..., D], x [..., D], float32."""
    count, rows, width = streams.shape[0], prod(streams.shape[1:-1]), streams.shape[-1]
    check_width(width)
    out, streams, x = streams.new_empty(streams.shape), _streams(streams, rows), _rows(x, rows)
    size = triton.next_power_of_2(width)
    if out.numel():
        _spread[(rows,)](
            streams,
            x,
            weight,
            out,
            count,
            rows,
            width,
            eps,
            *streams.stride()[:2],
            x.stride(0),
            WIDTH=size,
            num_warps=min(max(size // 512, 1), 32),
        )
    return out


def _rows(x: Tensor, rows: int) -> Tensor:
    flat = x.reshape(rows, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _streams(x: Tensor, rows: int) -> Tensor:
    flat = x.reshape(x.shape[0], rows, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
