"""Alternating updates: n streams of features of which one is computed and the others follow (Baykal et al. 2023,
arXiv 2301.13310), as in Gemma-3n (Transformers 5.23.0)."""

import torch
from torch import Tensor

LEAST_SQUARE = 1e-5  # mean square below which a stream is not brought to a magnitude


def predict(streams: Tensor, coefficients: Tensor) -> Tensor:
    """Every stream plus a mixture of all: Y_j = X_j + Σ_k C[j, k]·X_k. streams [n, ..., D], C [..., n, n]."""
    return streams + torch.einsum("...jk,k...d->j...d", coefficients, streams)


def correct(predicted: Tensor, activated: Tensor, active: int, coefficients: Tensor) -> Tensor:
    """Z_j = Y_j + k_j·(z - Y_a): every stream moved by what computing stream a changed.

    predicted Y [n, ..., D], activated z [..., D], coefficients k [..., n].
    """
    return predicted + torch.einsum("...j,...d->j...d", coefficients, activated - predicted[active])


def magnitude(x: Tensor) -> Tensor:
    """Root of the mean square over the last axis: [..., D] -> [..., 1]."""
    return x.square().mean(dim=-1, keepdim=True).sqrt()


def scaled_to(x: Tensor, target: Tensor) -> Tensor:
    """x [..., D] brought to the magnitude `target` [..., 1], unless it is nearly zero."""
    return x * (target / x.square().mean(dim=-1, keepdim=True).clamp(min=LEAST_SQUARE).sqrt())
