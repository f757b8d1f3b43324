"""Rotary position embedding with the two halves of a head paired (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, d] for positions [T] and frequencies [d / 2]; each frequency stands in both halves."""
    angles = positions[:, None].float() * inverse_frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, d] rotated by the tables of its positions."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
