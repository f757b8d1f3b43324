"""Symmetric int8 values with float32 scales: q = clamp(round_half_even(w / s), -127, 127), s = max|w| / 127, w ≈ s·q.

Matrices [R, C] carry a scale a row, [R], or one for each run of `group` columns, [R, ceil(C / group)]; activations and
cached keys and values [..., C] one a row. -128 is never used, so that a product's sign is its factors' sign.
"""

import torch
from torch import Tensor


def scales_of(largest: Tensor) -> Tensor:
    """Scales for values of these largest magnitudes."""
    return largest / 127


def round_to_int8(x: Tensor, scales: Tensor) -> Tensor:
    """x [..., C] over scales [...], rounded to whole numbers within ±127, still as floats."""
    divisor = torch.where(scales == 0, 1.0, scales)  # zeros, or denormals that no scale can hold
    return (x / divisor[..., None]).round_().clamp_(-127, 127)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] as int8 with one float32 scale a row [...]: rounding errs by up to 1/254 of the row's magnitude."""
    scales = scales_of(x.float().abs().amax(dim=-1))
    return round_to_int8(x.float(), scales).to(torch.int8), scales


def dequantize(w: Tensor, scales: Tensor | None = None, group: int | None = None) -> Tensor:
    """The float32 matrix [R, C] that stored rows stand for: floats without scales, or int8 with them.

    Differentiable where w is a float tensor.
    """
    w = w.float()
    if scales is None:
        return w
    if group is None:
        return w * scales[:, None]
    return w * scales.repeat_interleave(group, dim=1)[:, : w.shape[1]]
