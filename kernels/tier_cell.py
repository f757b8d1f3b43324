"""Gates of a GRU cell, given the three products with its weights (Cho et al. 2014, arXiv 1406.1078).

z is the update gate: s' = (1 - z) s + z tanh(h). All tensors [B, d].
"""

import torch
from torch import Tensor


def gru_reset(reset: Tensor, state: Tensor) -> Tensor:
    """The state as the candidate sees it: sigmoid(reset) * state."""
    return torch.sigmoid(reset) * state


def gru_update(update: Tensor, candidate: Tensor, state: Tensor) -> Tensor:
    """The next state from the pre-activations of the update gate and of the candidate."""
    z = torch.sigmoid(update)
    return (1.0 - z) * state + z * torch.tanh(candidate)
