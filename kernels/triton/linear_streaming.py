"""Products for few rows of activations: weights stream through the ordinary cores, and reading them takes the time.

A thread takes SPAN neighbouring columns of each of a program's rows, 16 bytes of int8 where there is one row of
activations, and the same columns of the activations, so that nothing moves between threads before the final sums. With
more rows of activations it takes fewer columns: what a warp loads of the activations then lies closer together.
"""

import triton
import triton.language as tl

from thl_engine.kernels.triton.arithmetic import silu
from thl_engine.kernels.triton.epilogue import finish


@triton.jit
def _summed(
    sums, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, PADDED: tl.constexpr
):
    """Sums of ROWS * BATCH tensors [FOLD, LANES], all at once: [FOLD, ROWS, PADDED], BATCH of whose columns count."""
    parts = ()
    for i in tl.static_range(ROWS * PADDED):
        if i % PADDED < BATCH:
            parts = parts + (sums[i // PADDED * BATCH + i % PADDED],)
        else:
            parts = parts + (tl.zeros([FOLD, LANES], tl.float32),)
    count: tl.constexpr = ROWS * PADDED
    for level in tl.static_range(8):
        if count >> level > 1:
            joined = ()
            for i in tl.static_range(count >> level + 1):
                joined = joined + (tl.join(parts[i], parts[i + (count >> level + 1)]),)
            parts = joined
    return tl.sum(tl.reshape(parts[0], [FOLD, LANES, ROWS, PADDED]), axis=1)


@triton.jit
def gemv(
    x,
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
    first,
    per_head,
    rank,
    x_row,
    x_head,
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
    HEADS: tl.constexpr,
    BATCH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    LANES: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows of x, or of silu(x) * x_up, times rows of w; if GATED also times w_up. HEADS: a row takes its head's x.

    FOLD rows of w are one tile: 1 on a card, where activations then have weights' layout; many for the interpreter.
    """
    lane = tl.arange(0, LANES)[None, :] * SPAN
    k = lane[:, :, None] + tl.arange(0, SPAN)[None, None, :]
    row, part = tl.program_id(0) * (ROWS * FOLD), tl.program_id(1) * BATCH
    sums = (tl.zeros([FOLD, LANES], tl.float32),) * (ROWS * BATCH)
    sums_up = sums
    for start in range(0, columns, LANES * SPAN):
        # Without remainders no load needs a mask: what lies beyond the last row is the last row once more.
        seen = None if EVEN else start + k < columns
        zero = None if EVEN else 0
        values = ()
        if not HEADS:
            for j in tl.static_range(BATCH):
                b = tl.minimum(part + j, batch - 1).to(tl.int64)
                value = tl.load(x + b * x_row + start + k, mask=seen, other=zero).to(tl.float32)
                if x_up is not None:
                    value = silu(value) * tl.load(x_up + b * x_up_row + start + k, mask=seen, other=zero).to(tl.float32)
                values = values + (value,)
        made, made_up = (), ()
        for i in tl.static_range(ROWS):
            r = tl.minimum(row + i * FOLD + tl.arange(0, FOLD)[:, None], rows - 1).to(tl.int64)
            weights = tl.load(w + r[:, :, None] * w_row + start + k, mask=seen, other=zero).to(tl.float32)
            if GATED:
                weights_up = tl.load(w_up + r[:, :, None] * up_row + start + k, mask=seen, other=zero).to(tl.float32)
            if GROUP is not None:
                g, known = (start + lane) // GROUP, start + lane < columns
                scale = tl.load(scales + r * scales_row + g, mask=known, other=0.0)
                if GATED:
                    scale_up = tl.load(scales_up + r * scales_up_row + g, mask=known, other=0.0)
            for j in tl.static_range(BATCH):
                if HEADS:
                    b = tl.minimum(part + j, batch - 1).to(tl.int64)
                    value = tl.load(
                        x + b * x_row + ((first + r) // per_head * x_head)[:, :, None] + start + k,
                        mask=seen,
                        other=zero,
                    ).to(tl.float32)
                else:
                    value = values[j]
                dots = tl.sum(weights * value, axis=2)
                if GROUP is not None:
                    dots *= scale
                made = made + (sums[i * BATCH + j] + dots,)
                if GATED:
                    dots = tl.sum(weights_up * value, axis=2)
                    if GROUP is not None:
                        dots *= scale_up
                    made_up = made_up + (sums_up[i * BATCH + j] + dots,)
        sums = made
        if GATED:
            sums_up = made_up
    r = row + tl.arange(0, ROWS)[None, :, None] * FOLD + tl.arange(0, FOLD)[:, None, None]
    b = part + tl.arange(0, PADDED)[None, None, :]
    inside = (b < batch) & (b < part + BATCH) & (r < rows)
    acc = _summed(sums, FOLD, LANES, ROWS, BATCH, PADDED)
    up = _summed(sums_up, FOLD, LANES, ROWS, BATCH, PADDED) if GATED else None
    if scales is not None and GROUP is None:
        acc *= tl.load(scales + r, mask=r < rows, other=0.0)
        if GATED:
            up *= tl.load(scales_up + r, mask=r < rows, other=0.0)
    if lift is not None:
        j = tl.arange(0, RANK)
        lows = tl.load(
            low + b[:, :, :, None].to(tl.int64) * low_row + j, mask=(b < batch)[:, :, :, None] & (j < rank), other=0.0
        )
        lifts = tl.load(
            lift + r[:, :, :, None].to(tl.int64) * lift_row + j, mask=(r < rows)[:, :, :, None] & (j < rank), other=0.0
        ).to(tl.float32)
        acc += factor * tl.sum(lows * lifts, axis=3)
    finish(acc, up, b, r, inside, bias, fast, blend, residual, out, fast_row, residual_row, out_row, rows, ACTIVATION)
