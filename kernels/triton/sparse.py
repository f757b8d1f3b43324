"""Feed-forward layers whose gate lets little through (Gemma-3n): the rule and the reference are in ../geglu.py.

What survives is found on the device, and stays there: later launches have a fixed number of programs, which share the
surviving rows. The indices ascend, so that sums have one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import gelu_tanh
from thl_engine.kernels.triton.linear import LowRank, Weights

WIDEST = 16384  # features of the gate, which one program holds
COMPACTED = 4096  # features at a time
ROWS, COLUMNS = 8, 512  # of one program, for one row of activations
PROGRAMS = 1024  # more than the multiprocessors of any card hold of these in one go


@triton.jit
def _gate(gate, up, out, width, quantile, gate_row, up_row, WIDTH: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, WIDTH)
    inside = f < width
    values = tl.load(gate + b * gate_row + f, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / width
    apart = tl.where(inside, values - mean, 0.0)
    bound = mean + quantile * tl.sqrt_rn(tl.sum(apart * apart, axis=0) / width)
    values = gelu_tanh(tl.maximum(values - bound, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if up is not None:
        values *= tl.load(up + b * up_row + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + b * width + f, values, mask=inside)


@triton.jit
def _survivors(x, indices, count, batch, width, WIDTH: tl.constexpr):
    total = tl.zeros([1], tl.int32)
    for start in range(0, width, WIDTH):
        f = start + tl.arange(0, WIDTH)
        alive = tl.zeros([WIDTH], tl.int32)
        for b in range(0, batch):
            alive |= (tl.load(x + b * width + f, mask=f < width, other=0.0) != 0.0).to(tl.int32)
        tl.store(indices + total + tl.cumsum(alive, axis=0) - 1, f, mask=alive > 0)
        total += tl.sum(alive, axis=0)
    tl.store(count + tl.arange(0, 1), total)


@triton.jit
def _multiply(
    x,
    w,
    scales,
    low,
    lift,
    indices,
    count,
    out,
    factor,
    batch,
    rows,
    columns,
    first,
    rank,
    group,
    x_row,
    w_row,
    scales_row,
    low_row,
    lift_row,
    out_row,
    GROUPED: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    # Tiles are [batch, rows, columns].
    b = tl.arange(0, BATCH)[:, None, None]
    k = tl.arange(0, COLUMNS)[None, None, :]
    found = tl.load(count)
    for begin in range(tl.program_id(0) * ROWS, found, tl.num_programs(0) * ROWS):
        i = begin + tl.arange(0, ROWS)[None, :, None]
        r = tl.load(indices + i, mask=i < found, other=-1) - first
        known = (r >= 0) & (r < rows)
        far = r.to(tl.int64)
        acc = tl.zeros([BATCH, ROWS, COLUMNS], tl.float32)
        for start in range(0, columns, COLUMNS):
            seen = start + k < columns
            values = tl.load(x + b * x_row + start + k, mask=seen & (b < batch), other=0.0).to(tl.float32)
            weights = tl.load(w + far * w_row + start + k, mask=seen & known, other=0).to(tl.float32)
            if GROUPED:
                weights *= tl.load(scales + far * scales_row + (start + k) // group, mask=seen & known, other=0.0)
            acc += weights * values
        total = tl.sum(acc, axis=2)
        i = begin + tl.arange(0, ROWS)[None, :]
        r = tl.load(indices + i, mask=i < found, other=-1) - first
        known = (r >= 0) & (r < rows)
        if scales is not None and not GROUPED:
            total *= tl.load(scales + r, mask=known, other=0.0)
        if lift is not None:
            j = tl.arange(0, RANK)[None, None, :]
            lows = tl.load(low + b * low_row + j, mask=(b < batch) & (j < rank), other=0.0)
            lifts = tl.load(
                lift + r[:, :, None].to(tl.int64) * lift_row + j, mask=known[:, :, None] & (j < rank), other=0.0
            ).to(tl.float32)
            total += factor * tl.sum(lows * lifts, axis=2)
        at = out + tl.arange(0, BATCH)[:, None] * out_row + first + r
        mask = known & (tl.arange(0, BATCH)[:, None] < batch)
        tl.store(at, total * tl.load(at, mask=mask, other=0.0), mask=mask)


def geglu(gate: Tensor, up: Tensor | None, quantile: float) -> Tensor:
    """As the reference with a quantile: gate and up [..., F], F up to WIDEST. up: None for ones."""
    width = gate.shape[-1]
    if width > WIDEST:
        raise ValueError(f"geglu: expected at most {WIDEST} features with a quantile, found {width}")
    out = gate.new_empty(gate.shape)
    if not out.numel():
        return out
    flat, added = _rows(gate), None if up is None else _rows(up.expand(gate.shape))
    size = triton.next_power_of_2(width)
    _gate[(flat.shape[0],)](
        flat,
        added,
        out,
        width,
        quantile,
        flat.stride(0),
        0 if added is None else added.stride(0),
        WIDTH=size,
        num_warps=min(max(size // 512, 1), 32),
    )
    return out


def survivors(gate: Tensor, quantile: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `geglu` multiplies up with: [B, F] of gate [B, F]; and of which features any row keeps something.

    These are ascending indices, int32 [F], and how many they are, int32 [1]; the rest of the indices is undefined.
    """
    out = geglu(gate, None, quantile)
    batch, width = out.shape
    indices, count = out.new_empty(width, dtype=torch.int32), out.new_empty(1, dtype=torch.int32)
    size = min(triton.next_power_of_2(width), COMPACTED)
    _survivors[(1,)](out, indices, count, batch, width, WIDTH=size, num_warps=min(max(size // 256, 1), 16))
    return out, (indices, count)


def multiply(
    out: Tensor, alive: tuple[Tensor, Tensor], x: Tensor, w: Weights, first: int = 0, low_rank: LowRank | None = None
) -> None:
    """out [B, F] times x [B, C] through w, rows [first, first + n) of [F, C], of which those alive are read.

    out has a contiguous last axis and is zero for all rows that are not alive. low_rank: added to the product, its
    lift [n, r].
    """
    (batch, columns), data = x.shape, w.data if w.data.stride(-1) == 1 else w.data.contiguous()
    x = x if x.stride(-1) == 1 or columns == 1 else x.contiguous()
    low, lift, factor = (None, None, 0.0) if low_rank is None else low_rank
    padded = triton.next_power_of_2(batch)
    width = min(triton.next_power_of_2(columns), COLUMNS)
    held = max(ROWS // padded, 1)
    _multiply[(min(triton.cdiv(data.shape[0], held), PROGRAMS),)](
        x,
        data,
        w.scales,
        low,
        lift,
        *alive,
        out,
        factor,
        batch,
        data.shape[0],
        columns,
        first,
        0 if lift is None else lift.shape[1],
        w.group or 1,
        x.stride(0),
        data.stride(0),
        0 if w.scales is None else w.scales.stride(0),
        0 if low is None else low.stride(0),
        0 if lift is None else lift.stride(0),
        out.stride(0),
        GROUPED=w.group is not None,
        BATCH=padded,
        ROWS=held,
        COLUMNS=width,
        RANK=1 if lift is None else triton.next_power_of_2(lift.shape[1]),
        num_warps=4,
    )


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
