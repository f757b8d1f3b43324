"""The slot memory and the reasoning buffer that HIM's encoder blocks share (HIM upstream, 7M).

Both are rows of D features, read by softmax over the rows. Only the first r features of a row serve as its key and as
its content, r being the width of the query.
"""

import torch
from torch import Tensor

NORM_EPS = 1e-5
REASONING_RATE = 0.1  # how far one update moves the reasoning buffer


def prefix_read(query: Tensor, rows: Tensor, scale: float) -> Tensor:
    """softmax(scale * query · row[:r]) weighted sum of row[:r] over the rows.

    query [B, T, r]; rows [B or 1, m, D] with D at least r. Returns [B, T, r].
    """
    prefixes = rows[..., : query.shape[-1]]
    return torch.softmax((query @ prefixes.transpose(-1, -2)) * scale, dim=-1) @ prefixes


def erase_then_add(memory: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """memory * (1 - sigmoid(erase)) + add, then each slot to zero mean and unit variance.

    memory [B or 1, m, D]; erase, before its sigmoid, and add [B, D], the same for every slot. Returns [B, m, D].
    """
    memory = memory * torch.sigmoid(-erase)[:, None, :] + add[:, None, :]
    return torch.nn.functional.layer_norm(memory, memory.shape[-1:], eps=NORM_EPS)


def reasoning_update(buffer: Tensor, mean: Tensor) -> Tensor:
    """Every row of buffer [R, D] moved by REASONING_RATE towards the batch's mean of mean [B, D]."""
    return (1.0 - REASONING_RATE) * buffer + REASONING_RATE * mean.mean(dim=0)
