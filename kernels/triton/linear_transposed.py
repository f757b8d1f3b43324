"""Products with the rows of a matrix instead of its columns: x [B, R] times w [R, C], w as in linear.py.

Rows are cut into pieces that run side by side and are joined by a second launch where columns alone make few programs.
Of sparse x, only rows are read that do not meet zeros alone (`sparse.py` finds them).
"""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.linear import Weights

BATCH, ROWS, COLUMNS = 4, 16, 64  # of one program
PROGRAMS = 512  # to have work for all multiprocessors
LEAST = 128  # rows of a piece


@triton.jit
def _transposed(
    x,
    w,
    scales,
    indices,
    count,
    out,
    batch,
    rows,
    columns,
    first,
    per_head,
    group,
    pieces,
    x_row,
    x_head,
    w_row,
    scales_row,
    out_piece,
    out_row,
    out_head,
    GROUPED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Tiles are [batch, rows, columns]. Each program adds up all rows of its piece of a head, in one order.
    head, piece = tl.program_id(2) // pieces, tl.program_id(2) % pieces
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None, None]
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    if indices is not None:
        begin, end = 0, tl.load(count)
    else:
        begin = tl.maximum(head * per_head - first, 0)
        end = tl.minimum((head + 1) * per_head - first, rows)
    size = tl.cdiv(tl.maximum(end - begin, 0), pieces)
    begin += piece * size
    end = tl.minimum(begin + size, end)
    acc = tl.zeros([BATCH, ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        i = start + tl.arange(0, ROWS)[None, :, None]
        if indices is not None:
            r = tl.load(indices + i, mask=i < end, other=-1) - first
            known = (r >= 0) & (r < rows)
        else:
            r = i
            known = i < end
        far = r.to(tl.int64)
        inside = known & (c < columns)
        values = tl.load(
            x + b.to(tl.int64) * x_row + head * x_head + r + first - head * per_head,
            mask=(b < batch) & known,
            other=0.0,
        ).to(tl.float32)
        weights = tl.load(w + far * w_row + c, mask=inside, other=0).to(tl.float32)
        if GROUPED:
            weights *= tl.load(scales + far * scales_row + c // group, mask=inside, other=0.0)
        elif scales is not None:
            values *= tl.load(scales + r, mask=known, other=0.0)
        acc += values * weights
    total = tl.sum(acc, axis=1)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (b < batch) & (c < columns)
    at = out + piece.to(tl.int64) * out_piece + b.to(tl.int64) * out_row + head * out_head + c
    if ACCUMULATE:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total, mask=inside)


@triton.jit
def _joined(
    parts, out, pieces, columns, heads, parts_piece, out_row, out_head, ACCUMULATE: tl.constexpr, COLUMNS: tl.constexpr
):
    b, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = out + b * out_row + head * out_head + c
    total = tl.zeros([COLUMNS], tl.float32)
    if ACCUMULATE:
        total += tl.load(at, mask=c < columns, other=0.0).to(tl.float32)
    for piece in range(pieces):
        total += tl.load(parts + piece * parts_piece + (b * heads + head) * columns + c, mask=c < columns, other=0.0)
    tl.store(at, total, mask=c < columns)


def linear_transposed(
    x: Tensor,
    w: Weights,
    heads: int,
    rows: int,
    first: int,
    out: Tensor,
    accumulate: bool,
    alive: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Each head's features times its own rows of a matrix [rows, C], of which w is rows [first, first + n).

    x [B, H, rows / H], out [B, H, C], added to if `accumulate`. A matrix may come in several calls, in order of rows.
    alive, of one head: rows for which an x is not zero, ascending int32 [rows], and how many they are, int32 [1].
    """
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    data = w.data if w.data.stride(-1) == 1 else w.data.contiguous()
    batch, columns = x.shape[0], data.shape[1]
    grouped = w.scales is not None and w.scales.dim() == 2
    across, down = triton.cdiv(columns, COLUMNS), triton.cdiv(batch, BATCH)
    pieces = max(min(PROGRAMS // (across * down * heads), data.shape[0] // heads // LEAST), 1)
    into = out
    if pieces > 1:
        into = out.new_empty(pieces, batch, heads, columns)
    indices, count = (None, None) if alive is None else alive
    _transposed[(across, down, heads * pieces)](
        x,
        data,
        w.scales,
        indices,
        count,
        into,
        batch,
        data.shape[0],
        columns,
        first,
        rows // heads,
        w.group or 1,
        pieces,
        x.stride(0),
        x.stride(1),
        data.stride(0),
        0 if w.scales is None else w.scales.stride(0),
        into.stride(0) if pieces > 1 else 0,
        into.stride(-3),
        into.stride(-2),
        GROUPED=grouped,
        ACCUMULATE=accumulate and pieces == 1,
        BATCH=BATCH if batch > 1 else 1,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    if pieces > 1:
        _joined[triton.cdiv(columns, 256), batch * heads](
            into,
            out,
            pieces,
            columns,
            heads,
            into.stride(0),
            out.stride(0),
            out.stride(1),
            ACCUMULATE=accumulate,
            COLUMNS=256,
        )
