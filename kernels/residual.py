"""Sums onto the residual stream (HIM upstream, 7M)."""

import torch
from torch import Tensor


def add_blend(x: Tensor, fast: Tensor, slow: Tensor, gate: Tensor) -> Tensor:
    """x plus the blend of fast and slow, all [..., D], of which slow makes up sigmoid(gate [D])."""
    return x + torch.lerp(fast, slow, torch.sigmoid(gate))


def add_scaled(x: Tensor, addend: Tensor, scale: float) -> Tensor:
    """x + scale * addend, both [..., D]."""
    return x + scale * addend
