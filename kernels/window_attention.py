"""One query over a short window of recent embeddings, with the key projection already moved into the query."""

import torch
from torch import Tensor


def window_mix(query: Tensor, buffer: Tensor, valid: int | Tensor, scale: float) -> Tensor:
    """Softmax-weighted sum of the first `valid` entries of buffer [B, W, d]: [B, d]; zeros where valid is 0.

    query [B, d]; the score of entry i is scale * query . buffer_i.
    """
    entries = buffer[:, :valid]
    if valid == 0:
        return torch.zeros_like(query)
    weights = torch.softmax((entries @ query[:, :, None]).squeeze(-1) * scale, dim=-1)
    return (weights[:, None, :] @ entries).squeeze(1)


def window_append(buffer: Tensor, valid: int | Tensor, entry: Tensor) -> tuple[Tensor, int | Tensor]:
    """Adds entry [B, d] behind the `valid` oldest-first entries; a full window drops its oldest."""
    width = buffer.shape[1]
    if valid < width:
        return torch.cat([buffer[:, :valid], entry[:, None], buffer[:, valid + 1 :]], dim=1), valid + 1
    return torch.cat([buffer[:, 1:], entry[:, None]], dim=1), width


def window_append_in_place(buffer: Tensor, valid: int | Tensor, entry: Tensor) -> tuple[Tensor, int | Tensor]:
    """`window_append` in the buffer's own memory."""
    if valid == buffer.shape[1]:
        buffer[:, :-1] = buffer[:, 1:].clone()
        valid -= 1
    buffer[:, valid] = entry
    return buffer, valid + 1
