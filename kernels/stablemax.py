"""Stablemax, a softmax with a linear and a hyperbolic branch in place of exp (Prieto et al. 2025, arXiv 2501.04697)."""

import torch
from torch import Tensor

EPS = 1e-30  # keeps the published form; 1 - x is at least 1 where it is added


def stablemax_scores(x: Tensor) -> Tensor:
    """x + 1 where x >= 0, 1 / (1 - x) below; positive and increasing. Any shape."""
    # The unused branch of `where` still gets a gradient, 0 * inf where 1 - x is 0: keep its input below zero.
    low = torch.where(x < 0, x, 0.0)
    return torch.where(x < 0, 1.0 / (1.0 - low + EPS), x + 1.0)


def log_stablemax(x: Tensor) -> Tensor:
    """Log-probabilities over the last axis, in the dtype of x."""
    scores = stablemax_scores(x)
    return torch.log(scores / scores.sum(dim=-1, keepdim=True))


def stablemax_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """-log p[label] of each position, computed in float64; 0 where the label is `ignore_index`.

    logits [..., V], labels int64 [...]. Returns float64 [...]. The published loss is the mean over all positions, the
    ignored ones included.
    """
    valid = labels != ignore_index
    picked = log_stablemax(logits.double()).gather(-1, torch.where(valid, labels, 0)[..., None]).squeeze(-1)
    return -torch.where(valid, picked, 0.0)
