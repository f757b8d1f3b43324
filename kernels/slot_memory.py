"""Sparse reads from, and novelty-gated writes to, a bank of J memory slots (THL upstream 0.2.0).

B batch, H heads, J slots of d features, k entries read per head, W slots written. Every top-k gives equal values in
ascending order of index. Metadata (averages, times) is not differentiated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY_NORM = 1e-6  # a slot with a smaller norm counts as empty
NORM_EPS = 1e-8
CLIP_EPS = 1e-6
UPDATE, LEAST_USEFUL, EMPTY = 0, 1, 2  # values of `Write.branch`


@dataclass(frozen=True)
class Write:
    """What a write did. vector [B, d], gate and novelty [B], branch int64 [B], indices int64 [B, W]."""

    memory: Tensor
    norms: Tensor
    write_ema: Tensor
    last_write: Tensor
    vector: Tensor
    gate: Tensor
    novelty: Tensor
    branch: Tensor
    indices: Tensor


def top_indices(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last axis in descending order, lower index first among equals."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def slot_scores(query: Tensor, memory: Tensor, read_ema: Tensor, scale: float, load_penalty: float) -> Tensor:
    """scale * query_h . M_j - load_penalty * read_ema_j. query [B, H, d], memory [B, J, d] -> [B, H, J].

    Each dot product is reduced on its own: equal slots must give equal bits, or ties break by rounding.
    """
    dots = torch.stack([(memory * query[:, h, None]).sum(dim=-1) for h in range(query.shape[1])], dim=1)
    return dots * scale - load_penalty * read_ema[:, None, :]


def slot_topk(scores: Tensor, k: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over each head's k best slots: (alpha [B, H, k], indices int64 [B, H, k]).

    With a capacity, a slot serves that many entries of a row, in order of head and then rank; the rest lose their
    weight, and a head that loses all of it keeps it all.
    """
    indices = top_indices(scores, k)
    alpha = torch.softmax(scores.gather(-1, indices), dim=-1)
    if capacity is None:
        return alpha, indices
    counts = torch.zeros_like(scores[:, 0], dtype=torch.int64)
    kept = torch.ones_like(alpha)
    for h in range(indices.shape[1]):
        for r in range(k):
            slot = indices[:, h, r : r + 1]
            free = counts.gather(1, slot) < capacity
            kept[:, h, r] = free[:, 0]
            counts.scatter_add_(1, slot, free.long())
    capped = alpha * kept
    total = capped.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, capped / torch.where(total > 0, total, 1.0), alpha), indices


def slot_mix(alpha: Tensor, indices: Tensor, memory: Tensor) -> Tensor:
    """Each head's weighted sum of its slots: alpha, indices [B, H, k], memory [B, J, d] -> [B, H, d]."""
    batch, heads, k = indices.shape
    width = memory.shape[2]
    rows = memory.gather(1, indices.reshape(batch, heads * k, 1).expand(-1, -1, width))
    return (alpha[..., None] * rows.view(batch, heads, k, width)).sum(dim=2)


@torch.no_grad()
def read_metadata(
    alpha: Tensor, indices: Tensor, read_ema: Tensor, last_read: Tensor, t: int | Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """Averages of the weight each slot was read with, and the step at which it was last read; both [B, J]."""
    flat = indices.flatten(1)
    added = torch.zeros_like(read_ema).scatter_add_(1, flat, alpha.detach().flatten(1))
    return decay * read_ema + (1.0 - decay) * added, last_read.scatter(1, flat, t)


def slot_norms(memory: Tensor) -> Tensor:
    """Euclidean norm of every slot: [B, J, d] -> [B, J]. Its gradient at an empty slot is zero."""
    norms: Tensor = torch.linalg.vector_norm(memory, dim=-1)
    return norms


def novelty_write(
    candidate: Tensor,
    memory: Tensor,
    norms: Tensor,
    read_ema: Tensor,
    write_ema: Tensor,
    last_write: Tensor,
    t: int | Tensor,
    *,
    slots: int,
    clip_max: float,
    theta: float,
    beta: float,
    decay: float,
    ema_decay: float,
    stale_weight: float,
    underuse_weight: float,
) -> Write:
    """Clips candidate [B, d], measures its novelty against the memory, and adds it to `slots` slots of each row.

    Novel vectors go to empty slots, else to the least useful; familiar ones to the most similar. Every slot decays.
    """
    length = torch.linalg.vector_norm(candidate, dim=-1, keepdim=True)
    vector = candidate * (clip_max / (length + CLIP_EPS)).clamp(max=1.0)
    scale = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) + NORM_EPS) * (norms + NORM_EPS)
    affinity = (memory * vector[:, None, :]).sum(dim=-1) / scale
    novelty = 1.0 - affinity.amax(dim=-1)
    novel = novelty > theta
    gate = torch.where(novel, torch.sigmoid(beta * (novelty - theta)), 1.0)

    with torch.no_grad():
        empty = norms <= EMPTY_NORM
        order = torch.arange(memory.shape[1], device=memory.device)
        by_emptiness = empty * 1e4 - order
        staleness = (t - last_write).float()
        by_use = stale_weight * staleness + underuse_weight / (NORM_EPS + read_ema)
        branch = torch.where(novel, torch.where(empty.any(dim=-1), EMPTY, LEAST_USEFUL), UPDATE)
        choice = branch[:, None]
        score = torch.where(choice == EMPTY, by_emptiness, torch.where(choice == LEAST_USEFUL, by_use, affinity))
        indices = top_indices(score, slots)
        chosen = torch.zeros_like(write_ema).scatter_(1, indices, 1.0)
        write_ema = ema_decay * write_ema + (1.0 - ema_decay) * chosen
        last_write = last_write.scatter(1, indices, t)

    memory = memory * decay + chosen[..., None] * (gate[:, None] * vector)[:, None, :]
    return Write(
        memory=memory,
        norms=slot_norms(memory),
        write_ema=write_ema,
        last_write=last_write,
        vector=vector,
        gate=gate,
        novelty=novelty,
        branch=branch,
        indices=indices,
    )
