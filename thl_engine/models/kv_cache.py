"""Keys and values of the positions that attention looks back on."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH = 256  # positions that a full cache grows by; a copy of the whole costs less than computing one of them


@dataclass
class KVCache:
    """For each layer keys and values float32 [B, A, capacity, d] of A key/value heads; later positions are not in use.

    A layer grows when it is appended to, one after the other, so that at most one layer is in memory twice.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def append(self, layer: int, past: int, key: Tensor, value: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Writes key, value [B, A, n, d] behind the first `past` positions, in place; returns all [B, A, past + n, d].

        The capacity never grows beyond `limit` positions.
        """
        stop = past + key.shape[2]
        for own, new in ((self.keys, key), (self.values, value)):
            if own[layer].shape[2] < stop:
                own[layer] = _grown(own[layer], past, capacity(stop, limit))
            own[layer][:, :, past:stop] = new
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def clone(self) -> "KVCache":
        return KVCache([k.clone() for k in self.keys], [v.clone() for v in self.values])


def empty(layers: int, batch_size: int, heads: int, width: int, positions: int,
          device: torch.device | str = "cpu") -> KVCache:
    """A cache without content that holds `positions` before it grows."""
    def new() -> list[Tensor]:
        return [torch.empty(batch_size, heads, positions, width, device=device) for _ in range(layers)]

    return KVCache(new(), new())


def capacity(positions: int, limit: int) -> int:
    """Positions that a cache holds once it has grown to `positions`."""
    return min(-(-positions // GROWTH) * GROWTH, limit)


def _grown(held: Tensor, past: int, positions: int) -> Tensor:
    batch, heads, _, width = held.shape
    out = held.new_empty(batch, heads, positions, width)
    out[:, :, :past] = held[:, :, :past]
    return out
