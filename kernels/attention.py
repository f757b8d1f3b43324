"""Scaled dot-product attention with grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245)."""

import torch
from torch import Tensor

from thl_engine.kernels.rotary import rotate


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, blocked: Tensor | None = None) -> Tensor:
    """softmax(scale * query keyᵀ) value for each head.

    query [B, A, T, d]; key, value [B, A_k, S, d], A a multiple of A_k: query head h uses key/value head h·A_k // A.
    blocked: bool, broadcastable to [B, A, T, S], True where a key must not be seen. Returns [B, A, T, d].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


def rotary_attention(joined: Tensor, heads: int, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """Attention of every position to every position, later ones included, from one product with all projections.

    joined [B, T, 3·A·d]: the queries of all A heads, then their keys, then their values. Queries and keys are rotated
    by the tables [T, d]. Returns [B, T, A·d].
    """
    query, key, value = joined.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, A, T, d]
    return attention(rotate(query, cos, sin), rotate(key, cos, sin), value, scale).transpose(1, 2).flatten(2)


def causal(rows: int, past: int, device: torch.device | str = "cpu", window: int | None = None) -> Tensor:
    """bool [rows, m + rows]: which keys the last `rows` positions of a sequence must not see.

    window: positions that each of them sees, its own included; keys are those of the m = min(past, window - 1)
    positions before them and their own. None: they see all `past` earlier ones.
    """
    here = torch.arange(past, past + rows, device=device)[:, None]
    first = 0 if window is None else max(0, past - window + 1)
    keys = torch.arange(first, past + rows, device=device)[None, :]
    return keys > here if window is None else (keys > here) | (keys <= here - window)
