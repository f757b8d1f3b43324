"""Sparse reads of the slot memory; the definition is in ../slot_memory.py.

A read is two launches, or three where many slots or a capacity ask for a choice of its own: scores, of which each
program adds up a tile of slots and a share of the features; then choice, weighted sum and metadata. Equal slots get
equal bits, because all rows of a tile are summed alike. Sums go in one order, which depends on the sizes of the memory
alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS
from thl_engine.kernels.triton.counter import counted
from thl_engine.kernels.triton.slot_choice import (
    CHUNK,
    NONE,
    START,
    best_below,
    check_choice,
    choice_sizes,
    index_of,
    keys_of,
    load_keys,
    value_of,
)
from thl_engine.kernels.triton.slot_tiles import LANES, check_state, contiguous, read_tile

CHOICES = 8192  # keys of all heads that one program chooses among in registers


@triton.jit
def _scores(
    query,
    memory,
    read_ema,
    out,
    heads,
    slots,
    width,
    share,
    shares,
    scale,
    load_penalty,
    query_batch,
    query_head,
    memory_batch,
    memory_slot,
    ema_batch,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A share's part of each score: out [batch, shares, heads, slots]."""
    part = tl.program_id(1) % shares
    h = tl.program_id(1) // shares * HEADS + tl.arange(0, HEADS)[None, :, None]
    b = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)[:, None, None]
    slot_at = memory + b * memory_batch + j.to(tl.int64) * memory_slot
    query_at = query + b * query_batch + h * query_head
    end = tl.minimum((part + 1) * share, width)
    dots = tl.zeros([SLOTS, HEADS, WIDTH], tl.float32)
    for start in tl.range(part * share, end, WIDTH, num_stages=4):
        d = start + tl.arange(0, WIDTH)[None, None, :]
        features = tl.load(query_at + d, mask=(h < heads) & (d < end), other=0.0)
        tile = tl.load(slot_at + d, mask=(j < slots) & (d < end), other=0.0)
        dots += tile * features
    scores = tl.sum(dots, axis=2) * scale
    h = tl.program_id(1) // shares * HEADS + tl.arange(0, HEADS)[None, :]
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)[:, None]
    if read_ema is not None:
        load = tl.load(read_ema + b * ema_batch + j, mask=(j < slots) & (part == 0), other=0.0)
        scores -= load_penalty * load
    tl.store(out + ((b * shares + part) * heads + h) * slots + j, scores, mask=(h < heads) & (j < slots))


@triton.jit
def _select(scores, keys_out, heads, slots, shares, k, CHUNK: tl.constexpr, ONE: tl.constexpr):
    """Keys of one head's k best slots, the best first."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = scores + (b * shares * heads + h) * slots
    keys = load_keys(at, 0, slots, shares, heads * slots, CHUNK) if ONE else None
    last = tl.full([], START, tl.int64)
    for rank in range(0, k):
        last = best_below(last, keys, at, slots, shares, heads * slots, CHUNK, ONE)
        tl.store(keys_out + (b * heads + h) * k + rank, last)


@triton.jit
def _best_keys(
    at,
    heads,
    slots,
    shares,
    k,
    r,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Keys [ENTRIES, HEADS] of each head's k best slots, whose scores' terms begin at `at`."""
    h = tl.arange(0, HEADS)[None, :, None]
    j = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    inside = (h < heads) & (j < slots)
    values = tl.zeros([CHUNKS, HEADS, LANES], tl.float32)
    for part in range(0, shares):
        values += tl.load(at + (part * heads + h) * slots + j, mask=inside, other=0.0)
    keys = tl.where(inside, keys_of(values, j), NONE)
    best = tl.full([ENTRIES, HEADS], NONE, tl.int64)
    last = tl.full([HEADS], START, tl.int64)
    for rank in range(0, k):
        last = tl.max(tl.max(tl.where(keys < last[None, :, None], keys, NONE), axis=0), axis=1)
        best = tl.where(r == rank, last[None, :], best)
    return best


@triton.jit
def _capped(weights, slot, order, chosen, entries, capacity):
    """Weights under the slots' capacity.

    A slot serves `capacity` entries of a row, in order of head and rank: an entry with as many before it loses its
    weight, because of those before it the first `capacity` were served.
    """
    before = tl.zeros_like(slot)
    for e in range(0, entries):
        before += ((slot == index_of(tl.load(chosen + e))) & (order > e)).to(tl.int32)
    kept = tl.where(before < capacity, weights, 0.0)
    total = tl.sum(kept, axis=0)[None, :]
    return tl.where(total > 0, kept / tl.where(total > 0, total, 1.0), weights)


@triton.jit(do_not_specialize=["t"])
def _serve(
    scores,
    chosen,
    memory,
    mixed,
    alpha,
    indices,
    read_ema,
    last_read,
    heads,
    slots,
    width,
    shares,
    k,
    t,
    capacity,
    mixers,
    decay,
    gain,
    memory_batch,
    memory_slot,
    COUNTED: tl.constexpr,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """All heads' best slots, chosen here or, with `chosen`, before. The first `mixers` programs add up WIDTH features
    of what they hold, the others renew the metadata of WIDTH slots."""
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, h = tl.arange(0, ENTRIES)[:, None], tl.arange(0, HEADS)[None, :]
    real, order = (r < k) & (h < heads), h * k + r
    entries = heads * k
    if chosen is None:
        best = _best_keys(
            scores + b * shares * heads * slots, heads, slots, shares, k, r, HEADS, ENTRIES, CHUNKS, LANES
        )
    else:
        best = tl.load(chosen + b * entries + order, mask=real, other=NONE)
    values = tl.where(real, value_of(best), float("-inf"))
    slot = tl.where(real, index_of(best), 0)
    weights = tl.exp(values - tl.max(values, axis=0)[None, :])
    weights = tl.where(real, tl.div_rn(weights, tl.zeros_like(weights) + tl.sum(weights, axis=0)[None, :]), 0.0)
    if CAP:
        weights = _capped(weights, slot, order, chosen + b * entries, entries, capacity)
    if program < mixers:
        if program == 0:
            tl.store(alpha + b * entries + order, weights, mask=real)
            tl.store(indices + b * entries + order, slot.to(tl.int64), mask=real)
        d = program * WIDTH + tl.arange(0, WIDTH)
        rows = tl.load(
            memory + b * memory_batch + slot[:, :, None].to(tl.int64) * memory_slot + d[None, None, :],
            mask=real[:, :, None] & (d < width)[None, None, :],
            other=0.0,
        )
        head = tl.arange(0, HEADS)[:, None]
        tl.store(
            mixed + (b * heads + head) * width + d[None, :],
            tl.sum(weights[:, :, None] * rows, axis=0),
            mask=(head < heads) & (d < width)[None, :],
        )
    else:
        j = (program - mixers) * WIDTH + tl.arange(0, WIDTH)
        hit = real[:, :, None] & (slot[:, :, None] == j[None, None, :])
        added = tl.sum(tl.sum(tl.where(hit, weights[:, :, None], 0.0), axis=0), axis=0)
        read = tl.sum(tl.sum(hit.to(tl.int32), axis=0), axis=0) > 0
        ema = tl.load(read_ema + b * slots + j, mask=j < slots, other=0.0)
        tl.store(read_ema + b * slots + j, decay * ema + gain * added, mask=j < slots)
        tl.store(last_read + b * slots + j, tl.zeros([WIDTH], tl.int64) + counted(t, COUNTED), mask=(j < slots) & read)


def partial_scores(query: Tensor, memory: Tensor, read_ema: Tensor | None, scale: float, load_penalty: float) -> Tensor:
    """Scores in terms that the next launch adds up: query [B, H, d], memory [B, J, d] -> [B, shares, H, J]."""
    query, memory = contiguous(query), contiguous(memory)
    read_ema = None if read_ema is None else contiguous(read_ema)
    batch, heads, width = query.shape
    slots = memory.shape[1]
    tile = read_tile(slots, width, heads)
    together = min(triton.next_power_of_2(heads), 16)
    share = triton.cdiv(triton.cdiv(width, tile.shares), tile.width) * tile.width
    shares = triton.cdiv(width, share)
    out = query.new_empty(batch, shares, heads, slots, dtype=memory.dtype)
    _scores[triton.cdiv(slots, tile.slots), shares * triton.cdiv(heads, together), batch](
        query,
        memory,
        read_ema,
        out,
        heads,
        slots,
        width,
        share,
        shares,
        scale,
        load_penalty,
        *query.stride()[:2],
        *memory.stride()[:2],
        0 if read_ema is None else read_ema.stride(0),
        HEADS=together,
        SLOTS=tile.slots,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return out


def slot_read(
    query: Tensor,
    memory: Tensor,
    read_ema: Tensor,
    last_read: Tensor,
    t: int | Tensor,
    *,
    k: int,
    capacity: int | None,
    scale: float,
    load_penalty: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference, float32, but read_ema and last_read, contiguous [B, J], are updated in place.

    (mixed [B, H, d], alpha, indices [B, H, k], read_ema, last_read). t may be an int64 tensor of one element.
    """
    check_state(read_ema=read_ema, last_read=last_read)
    memory = contiguous(memory)
    batch, slots, width = memory.shape
    heads = query.shape[1]
    check_choice(slots, k)
    scores = partial_scores(query, memory, read_ema, scale, load_penalty)
    shares = scores.shape[1]
    all_heads, entries = triton.next_power_of_2(heads), triton.next_power_of_2(k)
    keys = triton.next_power_of_2(triton.cdiv(slots, LANES)) * LANES * all_heads
    chosen = None
    if capacity is not None or keys > CHOICES:
        chosen, keys = last_read.new_empty(batch, heads, k), 0
        _select[heads, batch](
            scores, chosen, heads, slots, shares, k, ptx_options=ALL_REGISTERS, **choice_sizes(slots, CHUNK)
        )
    mixed, alpha = memory.new_empty(batch, heads, width), memory.new_empty(batch, heads, k)
    indices = last_read.new_empty(batch, heads, k)
    across = max(16, min(LANES, CHOICES // (all_heads * entries)))
    mixers = triton.cdiv(width, across)
    _serve[mixers + triton.cdiv(slots, across), batch](
        scores,
        chosen,
        memory,
        mixed,
        alpha,
        indices,
        read_ema,
        last_read,
        heads,
        slots,
        width,
        shares,
        k,
        t,
        capacity or 0,
        mixers,
        decay,
        1.0 - decay,
        *memory.stride()[:2],
        COUNTED=isinstance(t, Tensor),
        CAP=capacity is not None,
        HEADS=all_heads,
        ENTRIES=entries,
        CHUNKS=max(keys // (LANES * all_heads), 1),
        LANES=LANES,
        WIDTH=across,
        ptx_options=ALL_REGISTERS,
        num_warps=8 if max(keys, all_heads * entries * across) > 4096 else 4,
    )
    return mixed, alpha, indices, read_ema, last_read
