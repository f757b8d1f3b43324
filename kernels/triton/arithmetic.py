"""What kernels share: products of tiles, activations that stay accurate in float32, and the card they are for."""

import torch
import triton
import triton.language as tl

# For kernels that need many registers: else ptxas spills a few of them to fit one more block on a multiprocessor.
ALL_REGISTERS = "--minnctapersm 1"
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def capability(x: torch.Tensor) -> int:
    """Compute capability of the card that holds x, times ten; under the interpreter that of Ampere."""
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def precision(x: torch.dtype, w: torch.dtype, card: int) -> str:
    """How tiles of weights w are multiplied with tiles of activations x.

    "direct": half-precision tensor cores; int8 is exact in float16 and bfloat16. "split": float32 activations as three
    bfloat16 terms of 8 bits each, so that with weights exact in bfloat16 every product is exact and only the float32
    sums round: half again the cost of a tf32 product, which would keep 11 bits. "tf32x3": both sides in two tf32 terms
    (about 21 bits). "ieee": float32 on the ordinary cores, for cards older than Ampere, whose tensor cores triton does
    not use.
    """
    if card < 80:
        return "ieee"
    if x != torch.float32 and w in (torch.int8, x):
        return "direct"
    return "split" if x == torch.float32 and w in (torch.int8, torch.bfloat16) else "tf32x3"


@triton.jit
def widened(w, DTYPE: tl.constexpr):
    """Stored weights as floats; the interpreter turns integers into bfloat16 by way of float32 only."""
    if INTERPRETED:
        return w.to(tl.float32).to(DTYPE)
    else:
        return w.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; the interpreter has no bfloat16 product, but the same values in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(w, x, acc, PRECISION: tl.constexpr):
    """acc + w x for tiles of weights and activations, as `precision` says; "int8" of both, exactly."""
    if PRECISION == "int8":
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    elif PRECISION == "direct":
        return dot(widened(w, x.dtype), x, acc, "ieee")
    elif PRECISION == "split":
        w = widened(w, tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = dot(w, low, acc, "ieee")
        acc = dot(w, middle, acc, "ieee")
        return dot(w, high, acc, "ieee")
    else:
        return dot(w.to(tl.float32), x.to(tl.float32), acc, PRECISION)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def tanh(x):
    # 2 sigmoid(2x) - 1 cancels near 0, where the series is good to 1e-8.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    # 0.5 (1 + tanh(u)) is sigmoid(2u), and does not cancel for negative x.
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def softplus(x):
    # log(u) e / (u - 1) is log(1 + e) without the rounding of u = 1 + e.
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1 + e
    low = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    return tl.where(x > 20, x, low)
