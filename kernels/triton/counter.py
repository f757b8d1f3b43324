"""Times and positions that a kernel takes as a number or, in a captured step, from a tensor that advances."""

import triton
import triton.language as tl


@triton.jit
def counted(value, ON_DEVICE: tl.constexpr):
    """The int64 that `value` is, or points to."""
    if ON_DEVICE:
        return tl.load(value)
    else:
        return value.to(tl.int64)
