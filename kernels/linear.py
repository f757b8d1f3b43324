"""Products with weights stored as floats or as int8 rows with scales.

w is [R, C]; int8 rows carry float32 scales [R], or [R, ceil(C / group)] with one scale for each run of `group` columns.
"""

import torch
from torch import Tensor
from torch.nn import functional


def widen(w: Tensor, scales: Tensor | None = None, group: int | None = None) -> Tensor:
    """The float32 matrix that stored rows stand for. Differentiable where w is a float tensor."""
    w = w.float()
    if scales is None:
        return w
    if scales.dim() == 1:
        return w * scales[:, None]
    return w * scales.repeat_interleave(group, dim=1)[:, : w.shape[1]]


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C] times the transpose of w [R, C], plus bias [R]: [..., R]."""
    return functional.linear(x, w, bias)


def linear_transposed(x: Tensor, w: Tensor) -> Tensor:
    """x [..., R] times w [R, C]: [..., C]."""
    return x @ w


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] as int8 with one float32 scale a row [...]: rounding errs by up to 1/254 of the row's magnitude."""
    scales = x.float().abs().amax(dim=-1) / 127
    divisor = torch.where(scales == 0, 1.0, scales)[..., None]
    return (x.float() / divisor).round().clamp(-127, 127).to(torch.int8), scales
