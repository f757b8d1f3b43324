"""Gates, activations and sums, element by element.

References in ../tier_cell.py, ../swiglu.py, ../gelu.py, ../geglu.py and ../residual.py.
"""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import gelu as normal_gelu
from thl_engine.kernels.triton.arithmetic import gelu_tanh, silu, tanh

ELEMENTS = 1024  # of a program, at most


@triton.jit
def _elementwise(
    a, b, c, vector, out, scale, width, a_row, b_row, c_row, out_row, KIND: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = d < width
    x = tl.load(a + row * a_row + d, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gelu":
        value = normal_gelu(x)
    else:
        y = tl.load(b + row * b_row + d, mask=inside, other=0.0).to(tl.float32)
        if KIND == "swiglu":
            value = silu(x) * y
        elif KIND == "geglu":
            value = gelu_tanh(x) * y
        elif KIND == "reset":
            value = tl.sigmoid(x) * y
        elif KIND == "scaled":
            value = x + scale * y
        elif KIND == "blend":
            share = tl.sigmoid(tl.load(vector + d, mask=inside, other=0.0).to(tl.float32))
            slow = tl.load(c + row * c_row + d, mask=inside, other=0.0).to(tl.float32)
            value = x + (y + share * (slow - y))
        else:
            z = tl.sigmoid(x)
            state = tl.load(c + row * c_row + d, mask=inside, other=0.0).to(tl.float32)
            value = (1.0 - z) * state + z * tanh(y)
    tl.store(out + row * out_row + d, value, mask=inside)


def gru_reset(reset: Tensor, state: Tensor) -> Tensor:
    """As the reference: sigmoid(reset) * state, both [B, d]."""
    return _launch("reset", state.new_empty(state.shape), reset, state)


def gru_update(update: Tensor, candidate: Tensor, state: Tensor) -> Tensor:
    """As the reference, but state [B, d] is updated in place."""
    return _launch("update", state, update, candidate, state)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference: silu(gate) * up, both [..., F]."""
    return _launch("swiglu", gate.new_empty(gate.shape), gate, up)


def gelu(x: Tensor) -> Tensor:
    """As the reference: x [..., F] times the normal distribution function of x."""
    return _launch("gelu", x.new_empty(x.shape), x)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference without a quantile (`sparse.geglu` takes one): gelu(gate) * up, both [..., F], by tanh."""
    return _launch("geglu", gate.new_empty(gate.shape), gate, up)


def add_blend(x: Tensor, fast: Tensor, slow: Tensor, gate: Tensor) -> Tensor:
    """As the reference: x plus the blend of fast and slow, all [..., D], of which slow makes up sigmoid(gate [D])."""
    return _launch("blend", x.new_empty(x.shape), x, fast, slow, vector=gate)


def add_scaled(x: Tensor, addend: Tensor, scale: float) -> Tensor:
    """As the reference: x + scale * addend, both [..., D]."""
    return _launch("scaled", x.new_empty(x.shape), x, addend, scale=scale)


def _launch(kind: str, out: Tensor, *inputs: Tensor, vector: Tensor | None = None, scale: float = 0.0) -> Tensor:
    if not out.numel():
        return out
    width, rows = out.shape[-1], prod(out.shape[:-1])
    flat = [x.expand(out.shape).reshape(rows, width) for x in inputs]
    flat = [x if x.stride(-1) == 1 or width == 1 else x.contiguous() for x in flat]
    given: list[Tensor | None] = [*flat, *[None] * (3 - len(flat))]
    into = out.view(rows, width)
    size = min(triton.next_power_of_2(width), ELEMENTS)
    _elementwise[rows, triton.cdiv(width, size)](
        *given,
        vector,
        into,
        scale,
        width,
        *(0 if x is None else x.stride(0) for x in given),
        into.stride(0),
        KIND=kind,
        WIDTH=size,
        num_warps=max(size // 256, 1),
    )
    return out
