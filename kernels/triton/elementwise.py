"""Gates and activations, element by element: references in ../tier_cell.py, ../swiglu.py and ../gelu.py."""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import silu, tanh

ELEMENTS = 1024  # of a program, at most


@triton.jit
def _elementwise(a, b, c, out, width, a_row, b_row, c_row, out_row, KIND: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = d < width
    x = tl.load(a + row * a_row + d, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gelu":
        value = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.load(b + row * b_row + d, mask=inside, other=0.0).to(tl.float32)
        if KIND == "swiglu":
            value = silu(x) * y
        elif KIND == "reset":
            value = tl.sigmoid(x) * y
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


def _launch(kind: str, out: Tensor, *inputs: Tensor) -> Tensor:
    if not out.numel():
        return out
    width, rows = out.shape[-1], prod(out.shape[:-1])
    flat = [x.reshape(rows, width) for x in inputs]
    flat = [x if x.stride(-1) == 1 or width == 1 else x.contiguous() for x in flat]
    flat += [None] * (3 - len(flat))
    into = out.view(rows, width)
    size = min(triton.next_power_of_2(width), ELEMENTS)
    _elementwise[rows, triton.cdiv(width, size)](
        *flat, into, width, *(0 if x is None else x.stride(0) for x in flat), into.stride(0), KIND=kind, WIDTH=size,
        num_warps=max(size // 256, 1))
    return out
