"""Attention with grouped key/value heads, for one query row (decoding) as for many; reference in ../attention.py.

A program takes rows of the queries that share a key/value head, group by group, and runs over the keys with a running
softmax (Dao et al. 2022, arXiv 2205.14135). Where there are few rows, the keys are cut into pieces that run side by
side and are joined by a second launch. How they are cut depends on how many there can be, not on how many there are: so
results do not depend on the grid, which in a captured step is that of the most keys it may be replayed with.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS, capability, dot
from thl_engine.kernels.triton.counter import counted
from thl_engine.kernels.triton.decode_attention import decode
from thl_engine.kernels.triton.heads import prepared

DECODING_ROWS = 16  # of a key/value head's queries, at most, for keys to be cut into pieces
FEW_ROWS = 8  # for them to be held by one program, with an accumulator for each stream of keys
PIECE = 64  # keys: pieces are multiples of it
MOST_PIECES = 128
# Programs that a sequence's pieces should make. A card of 3.35 TB/s and 700 ns (H100) reads at full speed with 2.3 MB
# under way, 18 KB on each of its 132 multiprocessors. Two programs on each, whose loads run two to three tiles ahead of
# the sums (2048 elements each of keys and values: 8 KB as bytes, 32 KB as float32), have 16 to 64 KB under way. A piece
# leaves 8 bytes of partial sums to be written and read for each of its query rows' features: at 8192 keys of 8 heads,
# pieces of 256 keys, 4 rows to a head, that is 3 % of float16 keys and values, 6 % of int8.
PROGRAMS = 264
JOINED = 64  # features that one program joins
WIDEST, WIDEST_SMALL = 512, 256  # features of a head: where a block has 99 KiB of shared memory and more, and less
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WIDEST_SPLIT = 64  # features of a float32 head whose two tf32 terms fit in registers


class Tile(NamedTuple):
    """Rows of queries and of keys of one program; warps and stages of loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def widest(x: Tensor, *, turned: bool = False) -> int:
    """Features of a head, at most, on the device of x. turned: where keys are rotated, which takes as much again."""
    return WIDEST if capability(x) >= 80 and not turned else WIDEST_SMALL


def tile(rows: int, width: int, half: bool, card: int) -> Tile:
    """For `rows` rows of queries a key/value head, heads of `width` features in `half` precision or float32."""
    if width > WIDEST_SMALL:
        return Tile(16, 16, 8, 1)
    if card < 80:
        return Tile(16, 16, 4 if width <= 128 else 8, 1)
    if half and rows <= DECODING_ROWS:
        return Tile(16, 32, 4, 2) if width <= 128 else Tile(16, 32, 8, 1)
    if half:
        return Tile(64 if width <= 64 else 32, 32, 4 if 64 < width <= 128 else 8, 2)
    if rows <= DECODING_ROWS or width > WIDEST_SPLIT:
        return Tile(16, 16, 4 if width <= 128 else 8, 1)
    return Tile(32, 32, 8, 1)


def few_tile(rows: int, padded: int, card: int) -> Tile:
    """For at most FEW_ROWS rows: 16 accumulators a thread for each of up to four."""
    keys = min((2048 if rows <= 4 else 1024) // padded, PIECE)
    return Tile(triton.next_power_of_2(rows), keys, 4, 3 if card >= 80 else 1)


def pieces(rows: int, keys: int, key_heads: int) -> int:
    """Keys of a piece, for `rows` rows of queries a key/value head and at most `keys` keys."""
    count = min(max(PROGRAMS // key_heads, 1), MOST_PIECES) if rows <= DECODING_ROWS else 1
    return -(-max(keys, 1) // (count * PIECE)) * PIECE


@triton.jit(do_not_specialize=["past", "piece", "capacity", "window", "hidden"])
def _attend(
    query,
    key,
    value,
    key_scales,
    value_scales,
    blocked,
    weight,
    query_cos,
    query_sin,
    key_cos,
    key_sin,
    out,
    highest,
    total,
    scale,
    eps,
    rows,
    past,
    window,
    capacity,
    piece,
    hidden,
    width,
    group,
    key_heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    ks_batch,
    ks_head,
    vs_batch,
    vs_head,
    m_batch,
    m_head,
    m_row,
    m_key,
    o_batch,
    o_head,
    o_row,
    ON_DEVICE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    NORM: tl.constexpr,
    PIECES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Position p of the keys is in row p mod capacity; column `hidden` + j of positions is column j of `blocked`."""
    first, head_batch, cut = tl.program_id(1) * ROWS, tl.program_id(0), tl.program_id(2)
    b, shared = (head_batch // key_heads).to(tl.int64), head_batch % key_heads
    past = counted(past, ON_DEVICE).to(tl.int32)
    m = first + tl.arange(0, ROWS)
    inside = m < rows * group
    head, t = shared * group + m // rows, m % rows
    position = past + t
    d = tl.arange(0, WIDTH)[None, :]
    q_at = query + b * q_batch + (head * q_head)[:, None] + t[:, None].to(tl.int64) * q_row
    q_mask = inside[:, None] & (d < width)
    turn = t[:, None] * width
    q = prepared(
        q_at,
        weight,
        eps,
        query_cos if query_cos is None else query_cos + turn,
        query_sin if query_sin is None else query_sin + turn,
        d,
        q_mask,
        width,
        NORM,
    ).to(DTYPE)
    lowest = tl.maximum(past - window + 1, 0) if WINDOW else 0
    begin = lowest + cut * piece
    live = begin < past + rows
    end = tl.minimum(begin + piece, past + rows)
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(inside, position, -1), axis=0) + 1)
    if WINDOW:
        begin = tl.maximum(begin, tl.min(tl.where(inside, position, past + rows), axis=0) - window + 1)
    base = begin // capacity * capacity
    best = tl.full([ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        s = start + tl.arange(0, KEYS)
        row = s - base
        if RING:
            row = tl.where(row >= capacity, row - capacity, row)
        far = row.to(tl.int64)
        k_at = key + b * k_batch + shared * k_head + far[:, None] * k_row
        k_mask = (s < end)[:, None] & (d < width)
        if key_cos is not None:
            turned = far[:, None] * width
            k = prepared(k_at, None, eps, key_cos + turned, key_sin + turned, d, k_mask, width, False).to(DTYPE)
        elif key_scales is not None:
            k = tl.load(k_at + d, mask=k_mask, other=0).to(tl.float32).to(DTYPE)
        else:
            k = tl.load(k_at + d, mask=k_mask, other=0.0).to(DTYPE)
        scores = dot(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32), PRECISION) * scale
        if key_scales is not None:
            scores *= tl.load(key_scales + b * ks_batch + shared * ks_head + far, mask=s < end, other=0.0)[None, :]
        seen = inside[:, None] & (s < end)[None, :]
        if CAUSAL:
            seen &= s[None, :] <= position[:, None]
        if WINDOW:
            seen &= s[None, :] > position[:, None] - window
        if blocked is not None:
            mask = tl.load(
                blocked
                + b * m_batch
                + (head * m_head)[:, None]
                + t[:, None].to(tl.int64) * m_row
                + (s - hidden).to(tl.int64)[None, :] * m_key,
                mask=seen,
                other=1,
            )
            seen &= mask == 0
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        reached = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp(-inf - 0), not NaN
        shares = tl.exp(scores - reached[:, None])
        fade = tl.exp(best - reached)
        weights = weights * fade + tl.sum(shares, axis=1)
        acc *= fade[:, None]
        v_at = value + b * v_batch + shared * v_head + far[:, None] * v_row
        if value_scales is not None:
            v = tl.load(v_at + d, mask=k_mask, other=0).to(tl.float32).to(DTYPE)
            shares *= tl.load(value_scales + b * vs_batch + shared * vs_head + far, mask=s < end, other=0.0)[None, :]
        else:
            v = tl.load(v_at + d, mask=k_mask, other=0.0).to(DTYPE)
        acc = dot(shares.to(DTYPE), v, acc, PRECISION)
        best = higher
    if PIECES:
        at = (head_batch * tl.num_programs(2) + cut) * rows * group + m
        tl.store(out + at[:, None].to(tl.int64) * width + d, acc, mask=q_mask & live)
        tl.store(highest + at, best, mask=inside & live)
        tl.store(total + at, weights, mask=inside & live)
    else:
        o_at = out + b * o_batch + (head * o_head)[:, None] + t[:, None].to(tl.int64) * o_row
        tl.store(o_at + d, acc / weights[:, None], mask=q_mask)


@triton.jit(do_not_specialize=["count", "past", "piece", "window"])
def _join(
    parts,
    highest,
    total,
    out,
    count,
    rows,
    past,
    window,
    piece,
    width,
    group,
    key_heads,
    o_batch,
    o_head,
    o_row,
    ON_DEVICE: tl.constexpr,
    WINDOW: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Pieces [B * A_k, count, rows * group, d] of a softmax over keys, joined for one row; those behind the last key
    hold nothing."""
    m, head_batch = tl.program_id(1), tl.program_id(0)
    b, head, t = (head_batch // key_heads).to(tl.int64), head_batch % key_heads * group + m // rows, m % rows
    past = counted(past, ON_DEVICE).to(tl.int32)
    lowest = tl.maximum(past - window + 1, 0) if WINDOW else 0
    c, d = tl.arange(0, COUNT), tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    live = (c < count) & (lowest + c * piece < past + rows)
    at = (head_batch * count + c) * rows * group + m
    best = tl.load(highest + at, mask=live, other=float("-inf"))
    most = tl.max(best, axis=0)
    fade = tl.exp(best - tl.where(most == float("-inf"), 0.0, most))
    weight = tl.sum(fade * tl.load(total + at, mask=live, other=0.0), axis=0)
    held = tl.load(
        parts + at[:, None].to(tl.int64) * width + d[None, :], mask=live[:, None] & (d < width)[None, :], other=0.0
    )
    tl.store(
        out + b * o_batch + head * o_head + t * o_row + d, tl.sum(fade[:, None] * held, axis=0) / weight, mask=d < width
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    blocked: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    query_norm: tuple[Tensor | None, float] | None = None,
    query_tables: tuple[Tensor, Tensor] | None = None,
    key_tables: tuple[Tensor, Tensor] | None = None,
    past: int | Tensor | None = None,
    at_most: int | None = None,
) -> Tensor:
    """softmax(scale * query keyᵀ) value: query [B, A, T, d], key and value [B, A_k, S, d] -> [B, A, T, d].

    d up to `widest`, A a multiple of A_k; any strides. The last row of the queries stands at the last of the S
    positions. blocked: bool, broadcastable to [B, A, T, S], True where a key must not be seen; a row that sees none is
    NaN. causal: later keys are not seen. window: nor those `window` or more positions back. key_scales, value_scales
    float32 [B, A_k, S]: keys and values are int8 and stand for these multiples. query_norm: weight [d] or None, and
    epsilon, of an `rms_norm` of each query row. query_tables, key_tables: cos and sin, float32 [T, d] and [S, d], to
    rotate rows by as in ../rotary.py, after that.

    past: keys and values are a ring of S rows, position p in row p mod S, and the queries' first row stands at position
    `past`, a number or int64 [1] on the device; at least all positions that the queries see must be in the ring.
    blocked then has a column for each position from max(0, past - window + 1) on. at_most: with a tensor, the most that
    past + T may be; what is launched depends on it and on no position.

    Float32 queries of few rows are multiplied in float32; of many in two tf32 terms, wide heads and old cards on the
    ordinary cores; others in their own precision.
    """
    batch, heads, rows, width = query.shape
    key_heads, capacity = key.shape[1:3]
    most_features = widest(query, turned=key_tables is not None)
    if width > most_features or heads % key_heads:
        raise ValueError(
            f"attention: expected at most {most_features} features a head and query heads in equal groups; found "
            f"{width} features, {heads} query heads, {key_heads} key heads"
        )
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    # Positions before heads: what follows joins the heads of a position, which then are in one row already.
    out = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    if not out.numel():
        return out
    ring = past is not None
    past = capacity - rows if past is None else past
    known = not isinstance(past, Tensor)
    if isinstance(past, int):
        most = past + rows
    elif at_most is None or blocked is not None:
        raise ValueError("attention: a position on the device needs at_most, and takes no mask")
    else:
        most = at_most
    reach = None if window is None else window + rows - 1  # keys that the rows together see, at most
    group, card = heads // key_heads, capability(query)
    few = rows * group <= FEW_ROWS and key_tables is None
    half = query.dtype != torch.float32 and card >= 80
    padded = max(triton.next_power_of_2(width), 16)
    sizes = few_tile(rows * group, padded, card) if few else tile(rows * group, width, half, card)
    cuttable = capacity if reach is None else min(reach, capacity)
    piece = pieces(rows * group, cuttable, key_heads)
    count = triton.cdiv(max(min(most, cuttable), 1), piece)
    made, highest, total = out, None, None
    if count > 1:
        made = query.new_empty(batch, key_heads, count, group * rows, width, dtype=torch.float32)
        highest, total = (made.new_empty(batch, key_heads, count, group * rows) for _ in range(2))
    hidden = 0
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if blocked is not None:
        hidden = max(most - rows - window + 1, 0) if ring and window is not None else 0
        blocked = blocked.expand(batch, heads, rows, most - hidden).view(torch.uint8)
        mask_strides = blocked.stride()
    weight, eps = (None, 0.0) if query_norm is None else query_norm
    query_cos, query_sin = (None, None) if query_tables is None else (x.contiguous() for x in query_tables)
    strides = (
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *_leading(key_scales),
        *_leading(value_scales),
        *mask_strides,
        *out.stride()[:3],
    )
    sees = {
        "ON_DEVICE": not known,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "RING": ring and window is not None,
        "NORM": query_norm is not None,
        "PIECES": count > 1,
    }
    if few:
        decode[batch * key_heads, count](
            query,
            key,
            value,
            key_scales,
            value_scales,
            blocked,
            weight,
            query_cos,
            query_sin,
            made,
            highest,
            total,
            scale,
            eps,
            rows,
            past,
            window or 0,
            capacity,
            piece,
            hidden,
            width,
            group,
            key_heads,
            *strides,
            **sees,
            ROWS=sizes.rows,
            KEYS=sizes.keys,
            WIDTH=padded,
            STAGES=sizes.stages,
            num_warps=sizes.warps,
            ptx_options=ALL_REGISTERS,
        )
    else:
        key_cos, key_sin = (None, None) if key_tables is None else (x.contiguous() for x in key_tables)
        _attend[batch * key_heads, triton.cdiv(rows * group, sizes.rows), count](
            query,
            key,
            value,
            key_scales,
            value_scales,
            blocked,
            weight,
            query_cos,
            query_sin,
            key_cos,
            key_sin,
            made,
            highest,
            total,
            scale,
            eps,
            rows,
            past,
            window or 0,
            capacity,
            piece,
            hidden,
            width,
            group,
            key_heads,
            *strides,
            **sees,
            DTYPE=TYPES[query.dtype if half else torch.float32],
            PRECISION="ieee" if card < 80 or half or width > WIDEST_SPLIT else "tf32x3",
            ROWS=sizes.rows,
            KEYS=sizes.keys,
            WIDTH=padded,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
            ptx_options=ALL_REGISTERS,
        )
    if count > 1:
        features = min(padded, JOINED)
        _join[batch * key_heads, rows * group, triton.cdiv(width, features)](
            made,
            highest,
            total,
            out,
            count,
            rows,
            past,
            window or 0,
            piece,
            width,
            group,
            key_heads,
            *out.stride()[:3],
            ON_DEVICE=not known,
            WINDOW=window is not None,
            COUNT=triton.next_power_of_2(triton.cdiv(cuttable, piece)),
            WIDTH=features,
            num_warps=4,
        )
    return out


def _leading(scales: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if scales is None else scales.stride()[:2]
