"""Sparse reads of the slot memory and novelty-gated writes to it; definitions in ../slot_memory.py.

A read is three launches: scores, the choice of slots with their weighted sum, metadata. A write reads the memory once
for the affinities, of which all must be known before anything is written, and once more to decay it. Equal slots get
equal bits, because all rows of a tile are summed alike. Sums go in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.slot_memory import (
    CLIP_EPS,
    EMPTY,
    EMPTY_NORM,
    LEAST_USEFUL,
    NORM_EPS,
    UPDATE,
    Write,
)

CHOICE = 4096  # slots that a program looks at together when it chooses
WIDTH = 256  # features that a tile holds at a time
SLOTS = 16  # in a tile
METADATA = 256  # slots whose metadata one program renews


@triton.jit
def _scores(query, memory, read_ema, out, heads, slots, width, scale, load_penalty, query_batch, query_head,
            memory_batch, memory_slot, ema_batch, HEADS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    h = tl.arange(0, HEADS)
    dots = tl.zeros([HEADS, SLOTS], tl.float32)
    at = memory + b * memory_batch + j[:, None].to(tl.int64) * memory_slot
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        tile = tl.load(at + d[None, :], mask=(j < slots)[:, None] & (d < width)[None, :], other=0.0)
        for head in range(0, heads):
            features = tl.load(query + b * query_batch + head * query_head + d, mask=d < width, other=0.0)
            dots += tl.where(h[:, None] == head, tl.sum(tile * features[None, :], axis=1)[None, :], 0.0)
    load = tl.load(read_ema + b * ema_batch + j, mask=j < slots, other=0.0)
    scores = dots * scale - (load_penalty * load)[None, :]
    tl.store(out + (b * heads + h[:, None]) * slots + j[None, :], scores,
             mask=(h < heads)[:, None] & (j < slots)[None, :])


@triton.jit
def _next_best(at, slots, value, index, CHUNK: tl.constexpr):
    """The best of what comes after (value, index): descending values, ascending indices among equals."""
    best, found = tl.full([], float("-inf"), tl.float32), slots
    for start in range(0, slots, CHUNK):
        j = start + tl.arange(0, CHUNK)
        values = tl.load(at + j, mask=j < slots, other=float("-inf"))
        after = ((values < value) | ((values == value) & (j > index))) & (j < slots)
        high = tl.max(tl.where(after, values, float("-inf")), axis=0)
        here = tl.min(tl.where(after & (values == high), j, slots), axis=0)
        better = (high > best) | (found == slots)
        best, found = tl.where(better, high, best), tl.where(better, here, found)
    return best, tl.minimum(found, slots - 1)  # NaN has no order, and must not lead out of the memory


@triton.jit
def _mix(weights, chosen, r, entries, slot_at, memory_slot, out, width, WIDTH: tl.constexpr):
    """out [width] = the sum of weights [r] * slots chosen [r], in their order."""
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], tl.float32)
        for rank in range(0, entries):
            slot = tl.sum(tl.where(r == rank, chosen, 0), axis=0).to(tl.int64)
            weight = tl.sum(tl.where(r == rank, weights, 0.0), axis=0)
            total += weight * tl.load(slot_at + slot * memory_slot + d, mask=d < width, other=0.0)
        tl.store(out + d, total, mask=d < width)


@triton.jit
def _select(scores, memory, alpha, indices, mixed, heads, slots, width, k, scores_batch, scores_head, memory_batch,
            memory_slot, MIX: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """One head's k best slots, their softmax and, with MIX, their weighted sum."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, ENTRIES)
    best = tl.full([ENTRIES], float("-inf"), tl.float32)
    chosen = tl.zeros([ENTRIES], tl.int32)
    value, index = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for rank in range(0, k):
        value, index = _next_best(scores + b * scores_batch + h * scores_head, slots, value, index, CHUNK)
        best = tl.where(r == rank, value, best)
        chosen = tl.where(r == rank, index, chosen)
    weights = tl.exp(best - tl.max(best, axis=0))
    weights = tl.div_rn(weights, tl.zeros([ENTRIES], tl.float32) + tl.sum(weights, axis=0))
    at = (b * heads + h) * k
    tl.store(alpha + at + r, weights, mask=r < k)
    tl.store(indices + at + r, chosen.to(tl.int64), mask=r < k)
    if MIX:
        _mix(weights, chosen, r, k, memory + b * memory_batch, memory_slot, mixed + (b * heads + h) * width, width,
             WIDTH)


@triton.jit
def _settle(alpha, indices, memory, mixed, heads, slots, width, k, capacity, alpha_batch, alpha_head, indices_batch,
            indices_head, memory_batch, memory_slot, CAP: tl.constexpr, MIX: tl.constexpr, ENTRIES: tl.constexpr,
            WIDTH: tl.constexpr):
    """One head's weights under the slots' capacity (CAP, in place), and their weighted sum (MIX).

    A slot serves `capacity` entries of a row, in order of head and rank: an entry with as many before it loses its
    weight, because of those before it the first `capacity` were served.
    """
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, ENTRIES)
    weights = tl.load(alpha + b * alpha_batch + h * alpha_head + r, mask=r < k, other=0.0)
    chosen = tl.load(indices + b * indices_batch + h * indices_head + r, mask=r < k, other=0)
    if CAP:
        before = tl.zeros([ENTRIES], tl.int32)
        for head in range(0, h + 1):
            for rank in range(0, k):
                taken = tl.load(indices + b * indices_batch + head * indices_head + rank)
                before += ((chosen == taken) & ((head < h) | (rank < r))).to(tl.int32)
        kept = tl.where(before < capacity, weights, 0.0)
        total = tl.sum(kept, axis=0)
        weights = tl.where(total > 0, kept / tl.where(total > 0, total, 1.0), weights)
        tl.store(alpha + b * alpha_batch + h * alpha_head + r, weights, mask=r < k)
    if MIX:
        _mix(weights, tl.minimum(tl.maximum(chosen, 0), slots - 1), r, k, memory + b * memory_batch, memory_slot,
             mixed + (b * heads + h) * width, width, WIDTH)


@triton.jit(do_not_specialize=["t"])
def _metadata(alpha, indices, read_ema, last_read, entries, slots, t, decay, gain, COUNTED: tl.constexpr, SLOTS: tl.constexpr):
    if COUNTED:
        t = tl.load(t)
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    added = tl.zeros([SLOTS], tl.float32)
    read = tl.zeros([SLOTS], tl.int32)
    for e in range(0, entries):
        hit = j == tl.load(indices + b * entries + e)
        added += tl.where(hit, tl.load(alpha + b * entries + e), 0.0)
        read |= hit.to(tl.int32)
    at = b * slots + j
    tl.store(read_ema + at, decay * tl.load(read_ema + at, mask=j < slots, other=0.0) + gain * added,
             mask=j < slots)
    tl.store(last_read + at, tl.zeros([SLOTS], tl.int64) + t, mask=(j < slots) & (read > 0))


@triton.jit
def _clip(candidate, at, width, clip_max, eps, WIDTH: tl.constexpr):
    """What a candidate is multiplied with to be no longer than clip_max."""
    square = tl.zeros([WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        features = tl.load(candidate + at + d, mask=d < width, other=0.0)
        square += features * features
    return tl.minimum(tl.div_rn(clip_max, tl.sqrt_rn(tl.sum(square, axis=0)) + eps), 1.0)


@triton.jit
def _affinities(candidate, memory, norms, vector, out, slots, width, clip_max, candidate_batch, memory_batch,
                memory_slot, CLIP_EPS: tl.constexpr, NORM_EPS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    factor = _clip(candidate, b * candidate_batch, width, clip_max, CLIP_EPS, WIDTH)
    dots = tl.zeros([SLOTS], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        features = tl.load(candidate + b * candidate_batch + d, mask=d < width, other=0.0) * factor
        tile = tl.load(memory + b * memory_batch + j[:, None].to(tl.int64) * memory_slot + d[None, :],
                       mask=(j < slots)[:, None] & (d < width)[None, :], other=0.0)
        dots += tl.sum(tile * features[None, :], axis=1)
        square += features * features
        if tl.program_id(0) == 0:
            tl.store(vector + b * width + d, features, mask=d < width)
    length = tl.sqrt_rn(tl.sum(square, axis=0))
    norm = tl.load(norms + b * slots + j, mask=j < slots, other=1.0)
    tl.store(out + b * slots + j, tl.div_rn(dots, (length + NORM_EPS) * (norm + NORM_EPS)), mask=j < slots)


@triton.jit(do_not_specialize=["t"])
def _choose(affinity, norms, read_ema, last_write, gate, novelty, branch, indices, slots, t, chosen, theta, beta,
            stale_weight, underuse_weight, ema_batch, EMPTY_NORM: tl.constexpr, NORM_EPS: tl.constexpr,
            UPDATE: tl.constexpr, LEAST_USEFUL: tl.constexpr, EMPTY: tl.constexpr, COUNTED: tl.constexpr, CHUNK: tl.constexpr):
    """How novel a row's candidate is, how strongly it is written, and to which slots."""
    if COUNTED:
        t = tl.load(t)
    b = tl.program_id(0).to(tl.int64)
    values_at = affinity + b * slots
    highest, least = tl.full([CHUNK], float("-inf"), tl.float32), tl.full([CHUNK], float("inf"), tl.float32)
    for start in range(0, slots, CHUNK):
        j = start + tl.arange(0, CHUNK)
        highest = tl.maximum(highest, tl.load(values_at + j, mask=j < slots, other=float("-inf")))
        least = tl.minimum(least, tl.load(norms + b * slots + j, mask=j < slots, other=float("inf")))
    distance = 1.0 - tl.max(highest, axis=0)
    novel = distance > theta
    way = tl.where(novel, tl.where(tl.min(least, axis=0) <= EMPTY_NORM, EMPTY, LEAST_USEFUL), UPDATE)
    tl.store(gate + b, tl.where(novel, tl.sigmoid(beta * (distance - theta)), 1.0))
    tl.store(novelty + b, distance)
    tl.store(branch + b, way.to(tl.int64))
    if way != UPDATE:  # values to choose by take the place of the affinities
        for start in range(0, slots, CHUNK):
            j = start + tl.arange(0, CHUNK)
            inside = j < slots
            empty = tl.load(norms + b * slots + j, mask=inside, other=1.0) <= EMPTY_NORM
            stale = (t - tl.load(last_write + b * slots + j, mask=inside, other=0)).to(tl.float32)
            used = tl.load(read_ema + b * ema_batch + j, mask=inside, other=0.0)
            by_use = stale_weight * stale + tl.div_rn(used * 0 + underuse_weight, NORM_EPS + used)
            by_emptiness = tl.where(empty, 1e4, 0.0) - j.to(tl.float32)
            tl.store(values_at + j, tl.where(way == EMPTY, by_emptiness, by_use), mask=inside)
    tl.debug_barrier()
    value, index = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    for rank in range(0, chosen):
        value, index = _next_best(values_at, slots, value, index, CHUNK)
        tl.store(indices + b * chosen + rank, index.to(tl.int64))


@triton.jit(do_not_specialize=["t"])
def _renew(memory, norms, vector, gate, indices, write_ema, last_write, slots, width, chosen, t, decay, ema_decay,
           ema_gain, memory_batch, memory_slot, WRITE: tl.constexpr, SLOTS: tl.constexpr, COUNTED: tl.constexpr, WIDTH: tl.constexpr):
    """With WRITE, decays the slots, adds the vector to the chosen ones and renews metadata; always, their norms."""
    if COUNTED:
        t = tl.load(t)
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    if WRITE:
        hit = tl.zeros([SLOTS], tl.int32)
        for w in range(0, chosen):
            hit |= (j == tl.load(indices + b * chosen + w)).to(tl.int32)
        strength = tl.load(gate + b)
    square = tl.zeros([SLOTS, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        inside = (j < slots)[:, None] & (d < width)[None, :]
        at = memory + b * memory_batch + j[:, None].to(tl.int64) * memory_slot + d[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
        if WRITE:
            added = strength * tl.load(vector + b * width + d, mask=d < width, other=0.0)
            tile = tile * decay + tl.where((hit > 0)[:, None], added[None, :], 0.0)
            tl.store(at, tile, mask=inside)
        square += tile * tile
    tl.store(norms + b * slots + j, tl.sqrt_rn(tl.sum(square, axis=1)), mask=j < slots)
    if WRITE:
        at = b * slots + j
        ema = tl.load(write_ema + at, mask=j < slots, other=0.0)
        tl.store(write_ema + at, ema_decay * ema + ema_gain * hit.to(tl.float32), mask=j < slots)
        tl.store(last_write + at, tl.zeros([SLOTS], tl.int64) + t, mask=(j < slots) & (hit > 0))


def slot_scores(query: Tensor, memory: Tensor, read_ema: Tensor, scale: float, load_penalty: float) -> Tensor:
    """As the reference, float32: query [B, H, d], memory [B, J, d], read_ema [B, J] -> [B, H, J]."""
    query, memory, read_ema = _contiguous(query), _contiguous(memory), _contiguous(read_ema)
    batch, heads, width = query.shape
    slots = memory.shape[1]
    out = query.new_empty(batch, heads, slots)
    _scores[triton.cdiv(slots, SLOTS), batch](
        query, memory, read_ema, out, heads, slots, width, scale, load_penalty, *query.stride()[:2],
        *memory.stride()[:2], read_ema.stride(0), HEADS=triton.next_power_of_2(heads), SLOTS=SLOTS, WIDTH=WIDTH)
    return out


def slot_topk(scores: Tensor, k: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """As the reference: scores [B, H, J] -> (alpha [B, H, k], indices int64 [B, H, k])."""
    alpha, indices, _ = _selected(scores, None, k, capacity)
    return alpha, indices


def slot_mix(alpha: Tensor, indices: Tensor, memory: Tensor) -> Tensor:
    """As the reference: alpha, indices [B, H, k], memory [B, J, d] -> [B, H, d]."""
    memory = _contiguous(memory)
    mixed = memory.new_empty(*indices.shape[:2], memory.shape[2])
    _settled(_contiguous(alpha), _contiguous(indices), memory, mixed, None)
    return mixed


def read_metadata(alpha: Tensor, indices: Tensor, read_ema: Tensor, last_read: Tensor, t: int,
                  decay: float) -> tuple[Tensor, Tensor]:
    """As the reference, but read_ema and last_read, contiguous [B, J], are updated in place."""
    _check_state(read_ema=read_ema, last_read=last_read)
    batch, slots = read_ema.shape
    _metadata[triton.cdiv(slots, METADATA), batch](
        alpha.contiguous(), indices.contiguous(), read_ema, last_read, indices[0].numel(), slots, t, decay,
        1.0 - decay, SLOTS=METADATA, COUNTED=isinstance(t, Tensor))
    return read_ema, last_read


def slot_read(query: Tensor, memory: Tensor, read_ema: Tensor, last_read: Tensor, t: int, *, k: int,
              capacity: int | None, scale: float, load_penalty: float,
              decay: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four above in three launches, or four with a capacity: (mixed, alpha, indices, read_ema, last_read)."""
    alpha, indices, mixed = _selected(slot_scores(query, memory, read_ema, scale, load_penalty), memory, k, capacity)
    return mixed, alpha, indices, *read_metadata(alpha, indices, read_ema, last_read, t, decay)


def slot_norms(memory: Tensor) -> Tensor:
    """As the reference, with the bits that `novelty_write` keeps up to date."""
    memory = _contiguous(memory)
    batch, slots, width = memory.shape
    norms = memory.new_empty(batch, slots)
    _renew[triton.cdiv(slots, SLOTS), batch](
        memory, norms, None, None, None, None, None, slots, width, 0, 0, 0.0, 0.0, 0.0, *memory.stride()[:2],
        WRITE=False, SLOTS=SLOTS, WIDTH=WIDTH, COUNTED=False)
    return norms


def novelty_write(candidate: Tensor, memory: Tensor, norms: Tensor, read_ema: Tensor, write_ema: Tensor,
                  last_write: Tensor, t: int, *, slots: int, clip_max: float, theta: float, beta: float,
                  decay: float, ema_decay: float, stale_weight: float, underuse_weight: float) -> Write:
    """As the reference, but memory, norms, write_ema and last_write, all contiguous, are updated in place."""
    _check_state(memory=memory, norms=norms, write_ema=write_ema, last_write=last_write)
    candidate, read_ema = _contiguous(candidate), _contiguous(read_ema)
    batch, count, width = memory.shape
    _check_choice(count, slots)
    vector, affinity = memory.new_empty(batch, width), memory.new_empty(batch, count)
    gate, novelty = memory.new_empty(batch), memory.new_empty(batch)
    branch, indices = last_write.new_empty(batch), last_write.new_empty(batch, slots)
    tiles = triton.cdiv(count, SLOTS), batch
    _affinities[tiles](candidate, memory, norms, vector, affinity, count, width, clip_max, candidate.stride(0),
                       *memory.stride()[:2], CLIP_EPS=CLIP_EPS, NORM_EPS=NORM_EPS, SLOTS=SLOTS, WIDTH=WIDTH)
    # Without fused multiply-adds, which would tell slots apart that are equal in float32.
    _choose[(batch,)](affinity, norms, read_ema, last_write, gate, novelty, branch, indices, count, t, slots, theta,
                      beta, stale_weight, underuse_weight, read_ema.stride(0), EMPTY_NORM=EMPTY_NORM,
                      NORM_EPS=NORM_EPS, UPDATE=UPDATE, LEAST_USEFUL=LEAST_USEFUL, EMPTY=EMPTY,
                      COUNTED=isinstance(t, Tensor), enable_fp_fusion=False, **_choice_sizes(count))
    _renew[tiles](memory, norms, vector, gate, indices, write_ema, last_write, count, width, slots, t, decay,
                  ema_decay, 1.0 - ema_decay, *memory.stride()[:2], WRITE=True, SLOTS=SLOTS, WIDTH=WIDTH,
                  COUNTED=isinstance(t, Tensor))
    return Write(memory, norms, write_ema, last_write, vector, gate, novelty, branch, indices)


def _selected(scores: Tensor, memory: Tensor | None, k: int,
              capacity: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """alpha, indices and, of a memory, the weighted sums of its slots."""
    scores = _contiguous(scores)
    batch, heads, slots = scores.shape
    _check_choice(slots, k)
    alpha = scores.new_empty(batch, heads, k)
    indices = scores.new_empty(batch, heads, k, dtype=torch.int64)
    width, strides, mixed = 0, (0, 0), None
    if memory is not None:
        memory = _contiguous(memory)
        width, strides = memory.shape[2], memory.stride()[:2]
        mixed = memory.new_empty(batch, heads, width)
    mixes_at_once = memory is not None and capacity is None
    _select[heads, batch](scores, memory, alpha, indices, mixed, heads, slots, width, k, *scores.stride()[:2], *strides,
                          MIX=mixes_at_once, ENTRIES=triton.next_power_of_2(k), WIDTH=WIDTH, **_choice_sizes(slots))
    if capacity is not None:
        _settled(alpha, indices, memory, mixed, capacity)
    return alpha, indices, mixed


def _settled(alpha: Tensor, indices: Tensor, memory: Tensor | None, mixed: Tensor | None,
             capacity: int | None) -> None:
    batch, heads, k = indices.shape
    slots, width, strides = (1, 0, (0, 0)) if memory is None else (*memory.shape[1:], memory.stride()[:2])
    _settle[heads, batch](alpha, indices, memory, mixed, heads, slots, width, k, capacity or 0, *alpha.stride()[:2],
                          *indices.stride()[:2], *strides, CAP=capacity is not None, MIX=mixed is not None,
                          ENTRIES=triton.next_power_of_2(k), WIDTH=WIDTH)


def _choice_sizes(slots: int) -> dict[str, int]:
    size = min(max(triton.next_power_of_2(slots), 32), CHOICE)
    return {"CHUNK": size, "num_warps": max(size // 256, 1)}


def _check_choice(slots: int, k: int) -> None:
    if k > slots:
        raise ValueError(f"slots: expected at least the {k} that are chosen, found {slots}")


def _check_state(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, to be updated in place")


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
