"""Sparse reads of the slot memory and novelty-gated writes to it; definitions in ../slot_memory.py.

A read is two launches, or three where many slots or a capacity ask for a choice of its own: scores, of which each
program adds up a tile of slots and a share of the features; then choice, weighted sum and metadata. A write is two:
one that reads each tile of the memory once, for affinities and norms, and decays it; one that decides and adds to the
chosen slots. Equal slots get equal bits, because all rows of a tile are summed alike. Sums go in one order, which
depends on the sizes of the memory alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.slot_memory import CLIP_EPS, EMPTY, EMPTY_NORM, LEAST_USEFUL, NORM_EPS, UPDATE, Write
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

PROGRAMS = 512  # that keep a large card busy: about four for each of an H100's 132 multiprocessors
LANES = 128  # slots, or features, side by side: a warp's, of 16 bytes a thread
CHOICES = 8192  # keys of all heads that one program chooses among in registers
VALUES = 3  # that a slot may be chosen by, one for each branch of a write


class Tile(NamedTuple):
    """What a program holds at a time: slots and features, with warps; and the shares that features are split into."""

    slots: int
    width: int
    warps: int
    shares: int = 1


def read_tile(slots: int, width: int, heads: int) -> Tile:
    """For scores: two slots a warp, whose products with up to 16 heads stay in registers until all are added.

    A program reads `slots` rows of its share of the features and as many features of all heads' queries, so 16 slots
    read half as much of 8 queries as of the memory. 1,024 slots of 12,288 features (50 MB): 64 tiles x 8 shares of
    1,536 = 512 programs; of 768 (3 MB): 128 x 3 shares of 256 = 384, each with all its 8 KiB in flight.
    """
    rows = 16 if slots * width >= PROGRAMS * 16 * 1024 else 8
    tiles = triton.cdiv(slots, rows) * triton.cdiv(heads, 16)
    shares = max(1, min(triton.cdiv(PROGRAMS, tiles), width // 256))
    return Tile(rows, min(triton.next_power_of_2(width), LANES), rows // 2, shares)


def write_tile(slots: int, width: int) -> Tile:
    """For a write, and for norms: slots for 256 programs, at most eight of them, since each reads the candidate;
    eight where the memory is so small (256 KiB) that only launching it takes time.

    1,024 slots of 12,288 features: 256 programs read 4 rows (197 KB) and write them, 16 KiB a step; the candidate's
    49 KB come from the cache. 16,384 of 256: 2,048 programs of 8 KiB.
    """
    rows = 8
    while rows > 1 and slots < 256 * rows and slots * width > 65536:
        rows //= 2
    columns = min(triton.next_power_of_2(width), 4096 // rows)
    while columns > LANES and triton.cdiv(width, columns) * columns > width + width // 8:
        columns //= 2
    warps = choice_sizes(slots, CHUNK // 2)["num_warps"]  # as many as the launch that renews single norms has
    # An element for every thread: where two hold the same, one may read it again when the other has written it.
    return Tile(rows, max(columns, 32 * warps // rows), warps)


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


@triton.jit(do_not_specialize=["t"])
def _decay(
    candidate,
    memory,
    norms,
    values,
    length,
    read_ema,
    write_ema,
    last_write,
    slots,
    width,
    t,
    decay,
    clip_max,
    ema_decay,
    stale_weight,
    underuse_weight,
    candidate_batch,
    memory_batch,
    memory_slot,
    ema_batch,
    CLIP_EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    EMPTY_NORM: tl.constexpr,
    WRITE: tl.constexpr,
    COUNTED: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Norms of a tile's slots; with WRITE, after their decay, with all that the choice of slots needs to know of them.

    values [batch, VALUES, slots] are what a slot is chosen by in each branch; length [batch] is the candidate's.
    """
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    here = b * slots + j
    if WRITE:
        norm = tl.load(norms + here, mask=j < slots, other=1.0)
        used = tl.load(read_ema + b * ema_batch + j, mask=j < slots, other=0.0)
        stale = (counted(t, COUNTED) - tl.load(last_write + here, mask=j < slots, other=0)).to(tl.float32)
        tl.store(write_ema + here, ema_decay * tl.load(write_ema + here, mask=j < slots, other=0.0), mask=j < slots)
        dots = tl.zeros([SLOTS, WIDTH], tl.float32)
        length_square = tl.zeros([1, WIDTH], tl.float32)
    square = tl.zeros([SLOTS, WIDTH], tl.float32)
    row_at = memory + b * memory_batch + j[:, None].to(tl.int64) * memory_slot
    for start in tl.range(0, width, WIDTH, num_stages=3):
        d = start + tl.arange(0, WIDTH)[None, :]
        inside = (j < slots)[:, None] & (d < width)
        tile = tl.load(row_at + d, mask=inside, other=0.0)
        if WRITE:
            features = tl.load(candidate + b * candidate_batch + d, mask=d < width, other=0.0).to(tl.float32)
            dots += features * tile
            length_square += features * features
            tile *= decay
            tl.store(row_at + d, tile, mask=inside)
        square = tl.fma(tile, tile, square)
    new_norm = tl.sqrt_rn(tl.sum(square, axis=1))
    if WRITE:
        long = tl.sqrt_rn(tl.sum(length_square, axis=1))
        factor = tl.minimum(tl.div_rn(tl.zeros_like(long) + clip_max, long + CLIP_EPS), 1.0)
        affinity = tl.div_rn(tl.sum(dots, axis=1) * factor, (long * factor + NORM_EPS) * (norm + NORM_EPS))
        by_use = stale_weight * stale + tl.div_rn(tl.zeros_like(used) + underuse_weight, NORM_EPS + used)
        by_emptiness = tl.where(norm <= EMPTY_NORM, 1e4, 0.0) - j.to(tl.float32)
        at = values + b * 3 * slots + j
        tl.store(at, affinity, mask=j < slots)
        tl.store(at + slots, by_use, mask=j < slots)
        tl.store(at + 2 * slots, by_emptiness, mask=j < slots)
        if tl.program_id(0) == 0:
            tl.store(length + b + tl.arange(0, 1), long)
        tl.debug_barrier()  # the old norms have been read by every warp
    tl.store(norms + here, new_norm, mask=j < slots)


@triton.jit(do_not_specialize=["t"])
def _add(
    candidate,
    memory,
    norms,
    values,
    length,
    write_ema,
    last_write,
    vector,
    gate,
    novelty,
    branch,
    indices,
    slots,
    width,
    t,
    clip_max,
    theta,
    beta,
    ema_gain,
    candidate_batch,
    memory_batch,
    memory_slot,
    CLIP_EPS: tl.constexpr,
    UPDATE: tl.constexpr,
    LEAST_USEFUL: tl.constexpr,
    EMPTY: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """How novel a row's candidate is, how strongly it is written, and its sum with the slot that comes w-th."""
    w, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = values + b * 3 * slots
    highest = tl.full([CHUNK], float("-inf"), tl.float32)
    empty = tl.zeros([CHUNK], tl.float32)
    for start in range(0, slots, CHUNK):
        j = start + tl.arange(0, CHUNK)
        highest = tl.maximum(highest, tl.load(at + j, mask=j < slots, other=float("-inf")))
        by_emptiness = tl.load(at + 2 * slots + j, mask=j < slots, other=float("-inf"))
        empty = tl.maximum(empty, by_emptiness + j.to(tl.float32))
    distance = 1.0 - tl.max(highest, axis=0)
    novel = distance > theta
    strength = tl.where(novel, tl.sigmoid(beta * (distance - theta)), 1.0)
    way = tl.where(novel, tl.where(tl.max(empty, axis=0) > 0, EMPTY, LEAST_USEFUL), UPDATE)

    at += way * slots
    keys = load_keys(at, 0, slots, 1, 0, CHUNK) if ONE else None
    last = tl.full([], START, tl.int64)
    for _ in range(0, w + 1):
        last = best_below(last, keys, at, slots, 1, 0, CHUNK, ONE)
    slot = index_of(last).to(tl.int64)

    # In tiles of the same form as `_decay`'s, so that the norm is the one of the slot's bits whoever computes it.
    row = tl.arange(0, SLOTS)
    factor = tl.minimum(tl.div_rn(clip_max, tl.load(length + b) + CLIP_EPS), 1.0)
    square = tl.zeros([SLOTS, WIDTH], tl.float32)
    row_at = memory + b * memory_batch + (slot + row)[:, None] * memory_slot
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)[None, :]
        inside = (row == 0)[:, None] & (d < width)
        features = tl.load(candidate + b * candidate_batch + d, mask=d < width, other=0.0).to(tl.float32) * factor
        tile = tl.load(row_at + d, mask=inside, other=0.0)
        tile = tl.where(inside, tile + strength * features, 0.0)
        tl.store(row_at + d, tile, mask=inside)
        square = tl.fma(tile, tile, square)
        if w == 0:
            tl.store(vector + b * width + d, features, mask=d < width)
    tl.store(norms + b * slots + slot + row, tl.sqrt_rn(tl.sum(square, axis=1)), mask=row == 0)
    here = b * slots + slot
    tl.store(write_ema + here, tl.load(write_ema + here) + ema_gain)
    tl.store(last_write + here, counted(t, COUNTED))
    tl.store(indices + b * tl.num_programs(0) + w, slot)
    if w == 0:
        tl.store(gate + b, strength)
        tl.store(novelty + b, distance)
        tl.store(branch + b, way.to(tl.int64))


def partial_scores(query: Tensor, memory: Tensor, read_ema: Tensor | None, scale: float, load_penalty: float) -> Tensor:
    """Scores in terms that the next launch adds up: query [B, H, d], memory [B, J, d] -> [B, shares, H, J]."""
    query, memory = _contiguous(query), _contiguous(memory)
    read_ema = None if read_ema is None else _contiguous(read_ema)
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
    _check_state(read_ema=read_ema, last_read=last_read)
    memory = _contiguous(memory)
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


def slot_norms(memory: Tensor) -> Tensor:
    """As the reference, with the bits that `novelty_write` keeps up to date."""
    memory = _contiguous(memory)
    batch, slots, width = memory.shape
    norms, tile = memory.new_empty(batch, slots), write_tile(slots, width)
    _decay[triton.cdiv(slots, tile.slots), batch](
        None,
        memory,
        norms,
        None,
        None,
        None,
        None,
        None,
        slots,
        width,
        0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0,
        *memory.stride()[:2],
        0,
        CLIP_EPS=CLIP_EPS,
        NORM_EPS=NORM_EPS,
        EMPTY_NORM=EMPTY_NORM,
        WRITE=False,
        COUNTED=False,
        SLOTS=tile.slots,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return norms


def novelty_write(
    candidate: Tensor,
    memory: Tensor,
    norms: Tensor,
    read_ema: Tensor,
    write_ema: Tensor,
    last_write: Tensor,
    t: int | Tensor,
    *,
    slots: int,
    clip_max: float,
    theta: float,
    beta: float,
    decay: float,
    ema_decay: float,
    stale_weight: float,
    underuse_weight: float,
) -> Write:
    """As the reference, but memory, norms, write_ema and last_write, all contiguous, are updated in place.

    t may be an int64 tensor of one element.
    """
    _check_state(memory=memory, norms=norms, write_ema=write_ema, last_write=last_write)
    candidate, read_ema = _contiguous(candidate), _contiguous(read_ema)
    batch, count, width = memory.shape
    check_choice(count, slots)
    values, length = memory.new_empty(batch, VALUES, count), memory.new_empty(batch)
    vector, gate, novelty = memory.new_empty(batch, width), memory.new_empty(batch), memory.new_empty(batch)
    branch, indices = last_write.new_empty(batch), last_write.new_empty(batch, slots)
    on_device, tile = isinstance(t, Tensor), write_tile(count, width)
    # Without fused multiply-adds, which would tell slots apart that are equal in float32.
    _decay[triton.cdiv(count, tile.slots), batch](
        candidate,
        memory,
        norms,
        values,
        length,
        read_ema,
        write_ema,
        last_write,
        count,
        width,
        t,
        decay,
        clip_max,
        ema_decay,
        stale_weight,
        underuse_weight,
        candidate.stride(0),
        *memory.stride()[:2],
        read_ema.stride(0),
        CLIP_EPS=CLIP_EPS,
        NORM_EPS=NORM_EPS,
        EMPTY_NORM=EMPTY_NORM,
        WRITE=True,
        COUNTED=on_device,
        SLOTS=tile.slots,
        WIDTH=tile.width,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
    _add[slots, batch](
        candidate,
        memory,
        norms,
        values,
        length,
        write_ema,
        last_write,
        vector,
        gate,
        novelty,
        branch,
        indices,
        count,
        width,
        t,
        clip_max,
        theta,
        beta,
        1.0 - ema_decay,
        candidate.stride(0),
        *memory.stride()[:2],
        CLIP_EPS=CLIP_EPS,
        UPDATE=UPDATE,
        LEAST_USEFUL=LEAST_USEFUL,
        EMPTY=EMPTY,
        COUNTED=on_device,
        SLOTS=tile.slots,
        WIDTH=tile.width,
        ptx_options=ALL_REGISTERS,
        **choice_sizes(count, CHUNK // 2),
    )
    return Write(memory, norms, write_ema, last_write, vector, gate, novelty, branch, indices)


def _check_state(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, to be updated in place")


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
