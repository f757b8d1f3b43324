"""Attention of the few query rows of a key/value head that decoding has; reference in ../attention.py.

Each stream of keys, one row of a tile, has its own running softmax (Dao et al. 2022, arXiv 2205.14135): nothing passes
between threads in the loop but the sums over a row's features. Products are float32 on the ordinary cores; tensor cores
would be idle, since each key is read once.
"""

import triton
import triton.language as tl

from thl_engine.kernels.triton.counter import counted
from thl_engine.kernels.triton.heads import prepared


@triton.jit(do_not_specialize=["past", "piece", "capacity", "window", "hidden"])
def decode(
    query,
    key,
    value,
    key_scales,
    value_scales,
    blocked,
    weight,
    cos,
    sin,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_attend` in attention.py, for all of a key/value head's rows at once."""
    head_batch, cut = tl.program_id(0), tl.program_id(1)
    b, shared = (head_batch // key_heads).to(tl.int64), head_batch % key_heads
    past = counted(past, ON_DEVICE).to(tl.int32)
    m = tl.arange(0, ROWS)
    inside = m < rows * group
    head, t = shared * group + m // rows, m % rows
    position = (past + t)[:, None]
    features = tl.arange(0, WIDTH)[None, :]
    q_at = query + b * q_batch + (head * q_head)[:, None] + t[:, None].to(tl.int64) * q_row
    turn = t[:, None] * width
    q = (
        prepared(
            q_at,
            weight,
            eps,
            cos if cos is None else cos + turn,
            sin if sin is None else sin + turn,
            features,
            inside[:, None] & (features < width),
            width,
            NORM,
        )[:, None, :]
        * scale
    )
    lowest = tl.maximum(past - window + 1, 0) if WINDOW else 0
    begin = lowest + cut * piece
    live = begin < past + rows
    end = tl.minimum(begin + piece, past + rows)
    base = begin // capacity * capacity
    s = tl.arange(0, KEYS)[None, :, None]
    d = tl.arange(0, WIDTH)[None, None, :]
    best = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
    weights = tl.zeros([ROWS, KEYS], tl.float32)
    acc = tl.zeros([ROWS, KEYS, WIDTH], tl.float32)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        row = start + s - base
        if RING:
            row = tl.where(row >= capacity, row - capacity, row)
        row = row.to(tl.int64)
        within = (start + s < end) & (d < width)
        k = tl.load(key + b * k_batch + shared * k_head + row * k_row + d, mask=within, other=0).to(tl.float32)
        v = tl.load(value + b * v_batch + shared * v_head + row * v_row + d, mask=within, other=0).to(tl.float32)
        scores = tl.sum(q * k, axis=2)
        there = start + tl.arange(0, KEYS)[None, :]
        at = there - base
        if RING:
            at = tl.where(at >= capacity, at - capacity, at)
        if key_scales is not None:
            scores *= tl.load(key_scales + b * ks_batch + shared * ks_head + at, mask=there < end, other=0.0)
        seen = inside[:, None] & (there < end)
        if CAUSAL:
            seen &= there <= position
        if WINDOW:
            seen &= there > position - window
        if blocked is not None:
            mask = tl.load(
                blocked
                + b * m_batch
                + (head * m_head)[:, None]
                + t[:, None].to(tl.int64) * m_row
                + (there - hidden).to(tl.int64) * m_key,
                mask=seen,
                other=1,
            )
            seen &= mask == 0
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, scores)
        reached = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp(-inf - 0), not NaN
        shares = tl.exp(scores - reached)
        fade = tl.exp(best - reached)
        weights = weights * fade + shares
        if value_scales is not None:
            shares *= tl.load(value_scales + b * vs_batch + shared * vs_head + at, mask=there < end, other=0.0)
        acc = acc * fade[:, :, None] + shares[:, :, None] * v
        best = higher
    most = tl.max(best, axis=1)
    fade = tl.exp(best - tl.where(most == float("-inf"), 0.0, most)[:, None])
    weights = tl.sum(weights * fade, axis=1)
    made = tl.sum(acc * fade[:, :, None], axis=1)
    wanted = inside[:, None] & (features < width)
    if PIECES:
        at = (head_batch * tl.num_programs(1) + cut) * rows * group + m
        tl.store(out + at[:, None].to(tl.int64) * width + features, made, mask=wanted & live)
        tl.store(highest + at, most, mask=inside & live)
        tl.store(total + at, weights, mask=inside & live)
    else:
        o_at = out + b * o_batch + (head * o_head)[:, None] + t[:, None].to(tl.int64) * o_row
        tl.store(o_at + features, made / weights[:, None], mask=wanted)
