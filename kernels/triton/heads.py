"""Heads as projections leave them, on their way into attention: normalised (../norm.py) and rotated (../rotary.py)."""

import triton
import triton.language as tl


@triton.jit
def prepared(at, weight, eps, cos, sin, d, mask, width, NORM: tl.constexpr):
    """float32 features [rows, d] at `at`, each row normalised if NORM, and rotated by the tables at cos and sin.

    weight may be None, and so may cos and sin.
    """
    x = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        share = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / width + eps))[:, None]
        x *= share
        if weight is not None:
            x *= tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    if cos is not None:
        half = width // 2
        paired = tl.where(d < half, d + half, d - half)
        other = tl.load(at + paired, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            other *= share
            if weight is not None:
                other *= tl.load(weight + paired, mask=d < width, other=0.0).to(tl.float32)
        x = x * tl.load(cos + d, mask=mask, other=0.0)
        x += tl.where(d < half, -other, other) * tl.load(sin + d, mask=mask, other=0.0)
    return x
