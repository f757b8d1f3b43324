"""Novelty-gated writes to the slot memory; the definition is in ../slot_memory.py.

A write is two launches: one that reads each tile of the memory once, for affinities and norms, and decays it; one that
decides and adds to the chosen slots. Sums go in one order, which depends on the sizes of the memory alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.slot_memory import CLIP_EPS, EMPTY, EMPTY_NORM, LEAST_USEFUL, NORM_EPS, UPDATE, Write
from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS
from thl_engine.kernels.triton.counter import counted
from thl_engine.kernels.triton.slot_choice import (
    CHUNK,
    START,
    best_below,
    check_choice,
    choice_sizes,
    index_of,
    load_keys,
)
from thl_engine.kernels.triton.slot_tiles import check_state, contiguous, write_tile

VALUES = 3  # that a slot may be chosen by, one for each branch of a write


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


def slot_norms(memory: Tensor) -> Tensor:
    """As the reference, with the bits that `novelty_write` keeps up to date."""
    memory = contiguous(memory)
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
    check_state(memory=memory, norms=norms, write_ema=write_ema, last_write=last_write)
    candidate, read_ema = contiguous(candidate), contiguous(read_ema)
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
