"""Attention with grouped key/value heads, for one query row (decoding) as for many; reference in ../attention.py.

A program takes rows of the queries that share a key/value head, group by group, and runs over the keys with a running
softmax (Dao et al. 2022, arXiv 2205.14135). Where there are few rows, the keys are cut into pieces that run side by
side and are joined by a second launch; how many depends on the number of keys only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS, capability, dot

DECODING_ROWS = 16  # of a key/value head's queries, at most, for keys to be cut into pieces
PIECE = 256  # keys, at least
MOST_PIECES = 64
WIDEST = 256  # features of a head
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
WIDEST_SPLIT = 64  # features of a float32 head whose two tf32 terms fit in registers


class Tile(NamedTuple):
    """Rows of queries and of keys of one program; warps and stages of loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile(rows: int, width: int, half: bool, card: int) -> Tile:
    """For `rows` rows of queries a key/value head, heads of `width` features in `half` precision or float32."""
    if card < 80:
        return Tile(16, 16, 4 if width <= 128 else 8, 1)
    if half and rows <= DECODING_ROWS:
        return Tile(16, 32, 4, 2) if width <= 128 else Tile(16, 32, 8, 1)
    if half:
        return Tile(64 if width <= 64 else 32, 32, 4 if 64 < width <= 128 else 8, 2)
    if rows <= DECODING_ROWS or width > WIDEST_SPLIT:
        return Tile(16, 16, 4 if width <= 128 else 8, 1)
    return Tile(32, 32, 8, 1)


def pieces(rows: int, keys: int) -> tuple[int, int]:
    """How many pieces the keys are cut into, and keys of a piece, a multiple of every tile's."""
    if rows > DECODING_ROWS:
        return 1, -(-max(keys, 1) // 64) * 64
    count = min(max(keys // PIECE, 1), MOST_PIECES)
    size = -(-max(-(-keys // count), 1) // 64) * 64
    return max(-(-keys // size), 1), size


@triton.jit
def _rotated(at, cos, sin, d, mask, width, DTYPE: tl.constexpr):
    """Rows of features [rows, d] at `at`, rotated by the tables at cos and sin: halves are paired."""
    half = width // 2
    x = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(at + tl.where(d < half, d + half, d - half), mask=mask, other=0.0).to(tl.float32)
    turned = x * tl.load(cos + d, mask=mask, other=0.0)
    turned += tl.where(d < half, -other, other) * tl.load(sin + d, mask=mask, other=0.0)
    return turned.to(DTYPE)


@triton.jit(do_not_specialize=["keys", "past", "piece"])
def _attend(query, key, value, key_scales, value_scales, blocked, query_cos, query_sin, key_cos, key_sin, out, highest,
            total, scale, rows, keys, past, window, piece, width, group, key_heads,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, ks_batch, ks_head, vs_batch,
            vs_head, m_batch, m_head, m_row, m_key, o_batch, o_head, o_row,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PIECES: tl.constexpr, DTYPE: tl.constexpr,
            PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    first, head_batch, cut = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    b, shared = (head_batch // key_heads).to(tl.int64), head_batch % key_heads
    m = first + tl.arange(0, ROWS)
    inside = m < rows * group
    head, t = shared * group + m // rows, m % rows
    position = past + t
    d = tl.arange(0, WIDTH)[None, :]
    q_at = query + b * q_batch + (head * q_head)[:, None] + t[:, None].to(tl.int64) * q_row
    q_mask = inside[:, None] & (d < width)
    if query_cos is not None:
        q = _rotated(q_at, query_cos + t[:, None] * width, query_sin + t[:, None] * width, d, q_mask, width, DTYPE)
    else:
        q = tl.load(q_at + d, mask=q_mask, other=0.0).to(DTYPE)
    begin, end = cut * piece, tl.minimum(cut * piece + piece, keys)
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(inside, position, -1), axis=0) + 1)
    if WINDOW:
        earliest = tl.min(tl.where(inside, position, keys), axis=0) - window + 1
        begin = tl.maximum(begin, earliest // KEYS * KEYS)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        s = start + tl.arange(0, KEYS)
        far = s.to(tl.int64)
        k_at = key + b * k_batch + shared * k_head + far[:, None] * k_row
        k_mask = (s < keys)[:, None] & (d < width)
        if key_cos is not None:
            k = _rotated(k_at, key_cos + far[:, None] * width, key_sin + far[:, None] * width, d, k_mask, width, DTYPE)
        elif key_scales is not None:
            k = tl.load(k_at + d, mask=k_mask, other=0).to(tl.float32).to(DTYPE)
        else:
            k = tl.load(k_at + d, mask=k_mask, other=0.0).to(DTYPE)
        scores = dot(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32), PRECISION) * scale
        if key_scales is not None:
            scores *= tl.load(key_scales + b * ks_batch + shared * ks_head + far, mask=s < keys, other=0.0)[None, :]
        seen = inside[:, None] & (s < keys)[None, :]
        if CAUSAL:
            seen &= s[None, :] <= position[:, None]
        if WINDOW:
            seen &= s[None, :] > position[:, None] - window
        if blocked is not None:
            hidden = tl.load(blocked + b * m_batch + (head * m_head)[:, None] + t[:, None].to(tl.int64) * m_row
                             + far[None, :] * m_key, mask=seen, other=1)
            seen &= hidden == 0
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        reached = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp(-inf - 0), not NaN
        shares = tl.exp(scores - reached[:, None])
        fade = tl.exp(best - reached)
        weight = weight * fade + tl.sum(shares, axis=1)
        acc *= fade[:, None]
        v_at = value + b * v_batch + shared * v_head + far[:, None] * v_row
        if value_scales is not None:
            v = tl.load(v_at + d, mask=k_mask, other=0).to(tl.float32).to(DTYPE)
            shares *= tl.load(value_scales + b * vs_batch + shared * vs_head + far, mask=s < keys, other=0.0)[None, :]
        else:
            v = tl.load(v_at + d, mask=k_mask, other=0.0).to(DTYPE)
        acc = dot(shares.to(DTYPE), v, acc, PRECISION)
        best = higher
    if PIECES:
        at = (head_batch * tl.num_programs(2) + cut) * rows * group + m
        tl.store(out + at[:, None].to(tl.int64) * width + d, acc, mask=q_mask)
        tl.store(highest + at, best, mask=inside)
        tl.store(total + at, weight, mask=inside)
    else:
        o_at = out + b * o_batch + (head * o_head)[:, None] + t[:, None].to(tl.int64) * o_row
        tl.store(o_at + d, acc / weight[:, None], mask=q_mask)


@triton.jit(do_not_specialize=["count"])
def _join(parts, highest, total, out, count, rows, width, group, key_heads, o_batch, o_head, o_row,
          COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Pieces [B * A_k, count, rows * group, d] of a softmax over keys, joined for one row."""
    m, head_batch = tl.program_id(0), tl.program_id(1)
    b, head, t = (head_batch // key_heads).to(tl.int64), head_batch % key_heads * group + m // rows, m % rows
    c, d = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = (head_batch * count + c) * rows * group + m
    best = tl.load(highest + at, mask=c < count, other=float("-inf"))
    most = tl.max(best, axis=0)
    most = tl.where(most == float("-inf"), 0.0, most)
    fade = tl.exp(best - most)
    weight = tl.sum(fade * tl.load(total + at, mask=c < count, other=0.0), axis=0)
    acc = tl.zeros([WIDTH], tl.float32)
    for piece in range(0, count):
        share = tl.sum(tl.where(c == piece, fade, 0.0), axis=0)
        features = (head_batch * count + piece).to(tl.int64) * rows * group * width + m * width + d
        acc += share * tl.load(parts + features, mask=d < width, other=0.0)
    tl.store(out + b * o_batch + head * o_head + t * o_row + d, acc / weight, mask=d < width)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, blocked: Tensor | None = None, *,
              causal: bool = False, window: int | None = None, key_scales: Tensor | None = None,
              value_scales: Tensor | None = None, query_tables: tuple[Tensor, Tensor] | None = None,
              key_tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """softmax(scale * query keyᵀ) value: query [B, A, T, d], key and value [B, A_k, S, d] -> [B, A, T, d].

    d up to 256, A a multiple of A_k; any strides. The last row of the queries stands at the last of the S positions.
    blocked: bool, broadcastable to [B, A, T, S], True where a key must not be seen; a row that sees none is NaN.
    causal: later keys are not seen. window: nor those `window` or more positions back. key_scales, value_scales
    float32 [B, A_k, S]: keys and values are int8 and stand for these multiples. query_tables, key_tables: cos and sin,
    float32 [T, d] and [S, d], to rotate rows by as in ../rotary.py. Float32 queries are multiplied
    in two tf32 terms, wide heads and old cards on the ordinary cores; others in their own precision.
    """
    batch, heads, rows, width = query.shape
    key_heads, keys = key.shape[1:3]
    if width > WIDEST or heads % key_heads:
        raise ValueError(f"attention: expected at most {WIDEST} features a head and query heads in equal groups; found "
                         f"{width} features, {heads} query heads, {key_heads} key heads")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    # Positions before heads: what follows joins the heads of a position, which then are in one row already.
    out = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    if not out.numel():
        return out
    unseen = 0 if window is None else max(keys - rows - window + 1, 0)
    if unseen:
        key, value = key[:, :, unseen:], value[:, :, unseen:]
        key_scales, value_scales = (None if x is None else x[:, :, unseen:] for x in (key_scales, value_scales))
        key_tables = None if key_tables is None else tuple(x[unseen:] for x in key_tables)
        blocked = blocked if blocked is None or blocked.shape[-1] == 1 else blocked[..., unseen:]
        keys -= unseen
    group, card = heads // key_heads, capability(query)
    half = query.dtype != torch.float32 and card >= 80
    sizes = tile(rows * group, width, half, card)
    count, piece = pieces(rows * group, keys)
    padded = max(triton.next_power_of_2(width), 16)
    made, highest, total = out, None, None
    if count > 1:
        made = query.new_empty(batch, key_heads, count, group * rows, width, dtype=torch.float32)
        highest, total = (made.new_empty(batch, key_heads, count, group * rows) for _ in range(2))
    mask_strides = (0, 0, 0, 0)
    if blocked is not None:
        blocked = blocked.expand(batch, heads, rows, keys).view(torch.uint8)
        mask_strides = blocked.stride()
    cos_sin = [None if tables is None else x.contiguous() for tables in (query_tables, key_tables)
               for x in (tables or (None, None))]
    _attend[triton.cdiv(rows * group, sizes.rows), batch * key_heads, count](
        query, key, value, key_scales, value_scales, blocked, *cos_sin, made, highest, total, scale, rows, keys,
        keys - rows, window or 0, piece, width, group, key_heads, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], *_leading(key_scales), *_leading(value_scales), *mask_strides, *out.stride()[:3],
        CAUSAL=causal, WINDOW=window is not None, PIECES=count > 1, DTYPE=TYPES[query.dtype if half else torch.float32],
        PRECISION="ieee" if card < 80 or half or width > WIDEST_SPLIT else "tf32x3", ROWS=sizes.rows, KEYS=sizes.keys,
        WIDTH=padded, num_warps=sizes.warps, num_stages=sizes.stages, ptx_options=ALL_REGISTERS)
    if count > 1:
        _join[rows * group, batch * key_heads](
            made, highest, total, out, count, rows, width, group, key_heads, *out.stride()[:3],
            COUNT=triton.next_power_of_2(count), WIDTH=padded, num_warps=4)
    return out


def _leading(scales: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scales is None else scales.stride()[:2]
