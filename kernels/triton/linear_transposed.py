"""Products with the rows of a matrix instead of its columns: x [B, R] times w [R, C], w as in linear.py."""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.linear import Weights

BATCH, ROWS, COLUMNS = 4, 16, 64  # of one program


@triton.jit
def _transposed(x, w, scales, out, batch, rows, columns, first, per_head, group, x_row, x_head, w_row, scales_row,
                out_row, out_head, GROUPED: tl.constexpr, ACCUMULATE: tl.constexpr, BATCH: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Tiles are [batch, rows, columns]. Each program adds up all rows of its head, in one order.
    head = tl.program_id(2)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None, None]
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    begin = tl.maximum(head * per_head - first, 0)
    end = tl.minimum((head + 1) * per_head - first, rows)
    acc = tl.zeros([BATCH, ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)[None, :, None]
        far = r.to(tl.int64)
        inside = (r < end) & (c < columns)
        values = tl.load(x + b.to(tl.int64) * x_row + head * x_head + r + first - head * per_head,
                         mask=(b < batch) & (r < end), other=0.0).to(tl.float32)
        weights = tl.load(w + far * w_row + c, mask=inside, other=0).to(tl.float32)
        if GROUPED:
            weights *= tl.load(scales + far * scales_row + c // group, mask=inside, other=0.0)
        elif scales is not None:
            values *= tl.load(scales + r, mask=r < end, other=0.0)
        acc += values * weights
    total = tl.sum(acc, axis=1)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (b < batch) & (c < columns)
    at = out + b.to(tl.int64) * out_row + head * out_head + c
    if ACCUMULATE:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total, mask=inside)


def linear_transposed(x: Tensor, w: Weights, heads: int, rows: int, first: int, out: Tensor, accumulate: bool) -> None:
    """Each head's features times its own rows of a matrix [rows, C], of which w is rows [first, first + n).

    x [B, H, rows / H], out [B, H, C], added to if `accumulate`. A matrix may come in several calls, in order of rows.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    data = w.data if w.data.stride(-1) == 1 else w.data.contiguous()
    batch, columns = x.shape[0], data.shape[1]
    grouped = w.scales is not None and w.scales.dim() == 2
    _transposed[triton.cdiv(columns, COLUMNS), triton.cdiv(batch, BATCH), heads](
        x, data, w.scales, out, batch, data.shape[0], columns, first, rows // heads, w.group or 1, x.stride(0),
        x.stride(1), data.stride(0), 0 if w.scales is None else w.scales.stride(0), out.stride(0), out.stride(1),
        GROUPED=grouped, ACCUMULATE=accumulate, BATCH=BATCH if batch > 1 else 1, ROWS=ROWS, COLUMNS=COLUMNS)
