"""Products for many rows of activations, on tensor cores.

Activations may be int8 too, rounded row by row (`quantize_activations` in ../int8.py): products and their sums are
then exact integers, of one scale or of a group's columns. Against a product with unrounded normally distributed
activations that errs by 0.6 % to 0.9 % of its norm, and more where a few features dwarf the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import dot, product, silu
from thl_engine.kernels.triton.epilogue import finish


@triton.jit
def gemm(
    x,
    x_scales,
    x_up,
    w,
    scales,
    w_up,
    scales_up,
    bias,
    low,
    lift,
    fast,
    blend,
    residual,
    out,
    factor,
    batch,
    rows,
    columns,
    rank,
    x_row,
    x_up_row,
    w_row,
    scales_row,
    up_row,
    scales_up_row,
    low_row,
    lift_row,
    fast_row,
    residual_row,
    out_row,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows of x, or of silu(x) * x_up, times rows of w; if GATED also times w_up."""
    # Weights are the left operand: they are widened in registers, where tensor cores take that operand from.
    b = tl.program_id(0) * BATCH + tl.arange(0, BATCH)[None, :]
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    far, far_b = r.to(tl.int64), b.to(tl.int64)
    across, down = tl.arange(0, COLUMNS)[None, :], tl.arange(0, COLUMNS)[:, None]
    kind: tl.constexpr = tl.int32 if x_scales is not None else tl.float32
    acc = tl.zeros([ROWS, BATCH], kind if GROUP is None else tl.float32)
    up = acc
    for start in range(0, columns, COLUMNS):
        seen = (start + down < columns) & (b < batch)
        values = tl.load(x + far_b * x_row + down + start, mask=seen, other=0.0)
        if x_up is not None:
            by = tl.load(x_up + far_b * x_up_row + down + start, mask=seen, other=0.0).to(tl.float32)
            values = (silu(values.to(tl.float32)) * by).to(x.dtype.element_ty)
        held = (start + across < columns) & (r < rows)
        weights = tl.load(w + far * w_row + across + start, mask=held, other=0)
        if GROUP is None:
            acc = product(weights, values, acc, PRECISION)
        else:
            scale = tl.load(scales + far * scales_row + start // GROUP, mask=r < rows, other=0.0)
            acc += scale * product(weights, values, tl.zeros([ROWS, BATCH], kind), PRECISION).to(tl.float32)
        if GATED:
            weights = tl.load(w_up + far * up_row + across + start, mask=held, other=0)
            if GROUP is None:
                up = product(weights, values, up, PRECISION)
            else:
                scale = tl.load(scales_up + far * scales_up_row + start // GROUP, mask=r < rows, other=0.0)
                up += scale * product(weights, values, tl.zeros([ROWS, BATCH], kind), PRECISION).to(tl.float32)
    if x_scales is not None:
        of_row = tl.load(x_scales + b, mask=b < batch, other=0.0)
        acc = acc.to(tl.float32) * of_row
        up = up.to(tl.float32) * of_row
    if scales is not None and GROUP is None:
        acc *= tl.load(scales + r, mask=r < rows, other=0.0)
        if GATED:
            up *= tl.load(scales_up + r, mask=r < rows, other=0.0)
    if lift is not None:
        exact: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32x3"
        added = tl.zeros([ROWS, BATCH], tl.float32)
        for start in range(0, rank, 16):
            j = start + tl.arange(0, 16)
            lows = tl.load(low + far_b * low_row + j[:, None], mask=(j < rank)[:, None] & (b < batch), other=0.0)
            lifts = tl.load(lift + far * lift_row + j[None, :], mask=(r < rows) & (j < rank)[None, :], other=0.0)
            added = dot(lifts.to(tl.float32), lows.to(tl.float32), added, exact)
        acc += factor * added
    finish(
        acc,
        up,
        b,
        r,
        (b < batch) & (r < rows),
        bias,
        fast,
        blend,
        residual,
        out,
        fast_row,
        residual_row,
        out_row,
        rows,
        ACTIVATION,
    )


@triton.jit
def _quantize(x, out, scales, width, x_row, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    most = tl.zeros([WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        most = tl.maximum(
            most, tl.abs(tl.load(x + row * x_row + start + d, mask=start + d < width, other=0.0).to(tl.float32))
        )
    scale = tl.div_rn(tl.max(most, axis=0), 127.0)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, width, WIDTH):
        inside = start + d < width
        values = tl.div_rn(tl.load(x + row * x_row + start + d, mask=inside, other=0.0).to(tl.float32), divisor)
        # Added to 1.5 * 2^23 a float keeps no fraction: it is rounded to the nearest integer, halves to even.
        values = tl.minimum(tl.maximum((values + 12582912.0) - 12582912.0, -127.0), 127.0)
        tl.store(out + row * width + start + d, values.to(tl.int8), mask=inside)
    tl.store(scales + row, scale)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference, of x [n, C] with a contiguous last axis."""
    rows, width = x.shape
    out, scales = x.new_empty(rows, width, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    if rows:
        size = min(triton.next_power_of_2(width), 2048)
        _quantize[(rows,)](x, out, scales, width, x.stride(0), WIDTH=size, num_warps=max(size // 256, 1))
    return out, scales
