"""Normalisations over the last axis."""

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, biased variance (Ba et al. 2016, arXiv 1607.06450)."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + addend, both [..., D], and its `layer_norm`: a residual sum with the normalisation behind it."""
    total = x + addend
    return total, layer_norm(total, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def add_rms_norm(x: Tensor, addend: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm` of x + addend, both [..., D]: a residual sum with the normalisation behind it."""
    return rms_norm(x + addend, weight, eps)
