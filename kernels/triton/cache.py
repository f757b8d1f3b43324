"""New keys and values into a cache, in one launch: normalised, rotated and, into int8 rows, rounded.

Reference: `Rows.write` in ../../thl_engine/models/kv_cache.py, behind ../norm.py and ../rotary.py. A cache
of C rows is a ring: position p stands in row p mod C.
"""

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.counter import counted
from thl_engine.kernels.triton.heads import prepared

# Added to a float32 below 2^22 and taken away again, it leaves the nearest integer, the even one of two.
ROUNDS = tl.constexpr(12582912.0)


@triton.jit
def _keep(at, weight, eps, cos, sin, rows, scales, width, NORM: tl.constexpr, WIDTH: tl.constexpr):
    """One row at `at` into `rows` and, if its scale is kept, `scales`."""
    d = tl.arange(0, WIDTH)[None, :]
    inside = d < width
    x = prepared(at + tl.zeros([1, 1], tl.int64), weight, eps, cos, sin, d, inside, width, NORM)
    if scales is not None:
        scale = tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0)
        divisor = tl.where(scale == 0, 1.0, scale)  # zeros, or denormals that no scale can hold
        x = (tl.div_rn(x, divisor[:, None] + tl.zeros([1, WIDTH], tl.float32)) + ROUNDS) - ROUNDS
        tl.store(rows + d, tl.clamp(x, -127.0, 127.0).to(tl.int8), mask=inside)
        tl.store(scales + tl.arange(0, 1), scale)
    else:
        tl.store(rows + d, x, mask=inside)


@triton.jit(do_not_specialize=["past"])
def _append(
    key,
    value,
    keys,
    values,
    key_scales,
    value_scales,
    weight,
    cos,
    sin,
    key_eps,
    value_eps,
    past,
    heads,
    capacity,
    width,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    c_batch,
    c_head,
    c_row,
    s_batch,
    s_head,
    ON_DEVICE: tl.constexpr,
    KEY_NORM: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    t, b, h = tl.program_id(1).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    row = (counted(past, ON_DEVICE) + t) % capacity
    kept, scale = b * c_batch + h * c_head + row * c_row, b * s_batch + h * s_head + row
    if tl.program_id(2) == 0:
        _keep(
            key + b * k_batch + t * k_row + h * k_head,
            weight,
            key_eps,
            cos if cos is None else cos + t * width,
            sin if sin is None else sin + t * width,
            keys + kept,
            key_scales if key_scales is None else key_scales + scale,
            width,
            KEY_NORM,
            WIDTH,
        )
    else:
        _keep(
            value + b * v_batch + t * v_row + h * v_head,
            None,
            value_eps,
            None,
            None,
            values + kept,
            value_scales if value_scales is None else value_scales + scale,
            width,
            VALUE_NORM,
            WIDTH,
        )


def append(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    past: int | Tensor,
    *,
    key_norm: tuple[Tensor, float] | None = None,
    value_eps: float | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Stores key and value [B, T, A, d] in the rows of positions `past` to past + T - 1 of keys, values [B, A, C, d].

    The cache is floats, or int8 with float32 scales [B, A, C]; keys and values have equal strides. past: a number or an
    int64 [1]. key_norm: weight [d] and epsilon of an `rms_norm` of each key; value_eps: the epsilon of one of each
    value, without a weight. tables: cos and sin, float32 [T, d], by which normalised keys are rotated.
    """
    batch, rows, heads, width = key.shape
    if keys.stride() != values.stride() or keys.stride(-1) != 1 or rows > keys.shape[2]:
        raise ValueError(
            f"append: expected keys and values of equal strides with room for {rows} rows, found shapes "
            f"{list(keys.shape)} and {list(values.shape)}, strides {keys.stride()} and {values.stride()}"
        )
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    cos, sin = (None, None) if tables is None else (x.contiguous() for x in tables)
    weight, key_eps = (None, 0.0) if key_norm is None else key_norm
    if not key.numel():
        return
    _append[batch * heads, rows, 2](
        key,
        value,
        keys,
        values,
        key_scales,
        value_scales,
        weight,
        cos,
        sin,
        key_eps,
        value_eps or 0.0,
        past,
        heads,
        keys.shape[2],
        width,
        *key.stride()[:3],
        *value.stride()[:3],
        *keys.stride()[:3],
        *((0, 0) if key_scales is None else key_scales.stride()[:2]),
        ON_DEVICE=isinstance(past, Tensor),
        KEY_NORM=key_norm is not None,
        VALUE_NORM=value_eps is not None,
        WIDTH=max(triton.next_power_of_2(width), 16),
        num_warps=1,
    )
