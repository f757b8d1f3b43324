"""Sinusoidal position encoding (Vaswani et al. 2017, arXiv 1706.03762)."""

from functools import cache
from math import log

import torch
from torch import Tensor


def sinusoid(positions: int, width: int, start: int | Tensor = 0, device: torch.device | str = "cpu") -> Tensor:
    """float32 [positions, width] from `start` on: sin(p · 10000^(-2i/width)) at 2i, the cosine of the same at 2i + 1.

    start: a number, or int64 [1] on the device.
    Angles are taken in float32 as published models do; in float64 the table would differ by up to 2e-5. The rates'
    exponents are float32 too, but the exponential is rounded from float64: processors differ in the last bit of it.
    """
    if isinstance(start, Tensor):
        places = (torch.arange(positions, device=device) + start).float()
    else:
        places = torch.arange(start, start + positions, dtype=torch.float32, device=device)
    angles = places[:, None] * _rates(width, device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def _rates(width: int, device: torch.device | str) -> Tensor:
    """Kept on the CPU only: elsewhere a kept table would outlive the memory that it was made in, or a capture."""
    return _kept_rates(width) if torch.device(device) == torch.device("cpu") else _new_rates(width, device)


@cache  # for good: captured steps read it where it lies
def _kept_rates(width: int) -> Tensor:
    return _new_rates(width, "cpu")


def _new_rates(width: int, device: torch.device | str) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) * (-log(10000.0) / width)
    return exponents.double().exp().float()
