"""What follows a product before it is written: bias, activation, blend, residual."""

import triton
import triton.language as tl

from thl_engine.kernels.triton.arithmetic import gelu, gelu_tanh, silu


@triton.jit
def finish(
    acc,
    up,
    b,
    r,
    inside,
    bias,
    fast,
    blend,
    residual,
    out,
    fast_row,
    residual_row,
    out_row,
    rows,
    ACTIVATION: tl.constexpr,
):
    """Writes acc and what is made of it to rows b and columns r of out; b and r broadcast to acc's shape."""
    if bias is not None:
        acc += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        acc = silu(acc) * up
    elif ACTIVATION == "gelu_tanh":
        acc = gelu_tanh(acc) * up
    elif ACTIVATION == "gelu":
        acc = gelu(acc)
    b = b.to(tl.int64)
    if fast is not None:
        start = tl.load(fast + b * fast_row + r, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(tl.load(blend + r, mask=r < rows, other=0.0).to(tl.float32))
        acc = start + share * (acc - start)
    if residual is not None:
        acc += tl.load(residual + b * residual_row + r, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + b * out_row + r, acc, mask=inside)
