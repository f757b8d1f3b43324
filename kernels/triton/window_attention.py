"""A read of the window of recent embeddings, which the new one then joins; definitions in ../window_attention.py.

Two launches: scores as of memory slots; then each program mixes and moves the columns that it alone reads.
"""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.counter import counted
from thl_engine.kernels.triton.slot_read import partial_scores

ROWS, WIDTH = 32, 128  # of the tile that a program mixes at a time


@triton.jit
def _scores_of(at, i, entries, shares):
    total = tl.load(at + i, mask=i < entries, other=0.0)
    for share in range(1, shares):
        total += tl.load(at + share * entries + i, mask=i < entries, other=0.0)
    return total


@triton.jit(do_not_specialize=["valid"])
def _mix_and_append(
    scores,
    buffer,
    entry,
    mixed,
    entries,
    width,
    shares,
    valid,
    buffer_batch,
    buffer_row,
    entry_row,
    COUNTED: tl.constexpr,
    ALL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    held = tl.minimum(counted(valid, COUNTED), entries).to(tl.int32)
    scores_at = scores + b * shares * entries
    every = tl.arange(0, ALL)
    score = tl.where(every < held, _scores_of(scores_at, every, entries, shares), float("-inf"))
    high = tl.max(score, axis=0)
    total = tl.sum(tl.where(every < held, tl.exp(score - high), 0.0), axis=0)
    row_at = buffer + b * buffer_batch + d[None, :]
    acc = tl.zeros([WIDTH], tl.float32)
    for start in range(0, entries, ROWS):
        i = start + tl.arange(0, ROWS)
        weight = tl.where(i < held, tl.exp(_scores_of(scores_at, i, entries, shares) - high) / total, 0.0)
        at = row_at + i[:, None].to(tl.int64) * buffer_row
        tile = tl.load(at, mask=(i < held)[:, None] & (d < width)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * tile, axis=0)
        tl.debug_barrier()  # a row may be overwritten once every warp has read its part
        tl.store(at - buffer_row, tile, mask=((i > 0) & (i < held) & (held == entries))[:, None] & (d < width)[None, :])
    tl.store(mixed + b * width + d, acc, mask=d < width)
    free = tl.minimum(held, entries - 1).to(tl.int64)
    tl.store(
        buffer + b * buffer_batch + free * buffer_row + d,
        tl.load(entry + b * entry_row + d, mask=d < width, other=0.0),
        mask=d < width,
    )


def window_read(
    query: Tensor, buffer: Tensor, valid: int | Tensor, entry: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As the reference, float32, but buffer [B, W, d] is updated in place: (mixed [B, d], buffer).

    valid may be an int64 tensor of one element; what passes W counts as W.
    """
    batch, entries, width = buffer.shape
    if buffer.stride(-1) != 1:
        raise ValueError("buffer: expected contiguous rows, to be updated in place")
    scores = partial_scores(query[:, None], buffer, None, scale, 0.0)
    mixed, entry = query.new_empty(batch, width), entry.contiguous()
    _mix_and_append[triton.cdiv(width, WIDTH), batch](
        scores,
        buffer,
        entry,
        mixed,
        entries,
        width,
        scores.shape[1],
        valid,
        *buffer.stride()[:2],
        entry.stride(0),
        COUNTED=isinstance(valid, Tensor),
        ALL=triton.next_power_of_2(entries),
        ROWS=ROWS,
        WIDTH=WIDTH,
    )
    return mixed, buffer
