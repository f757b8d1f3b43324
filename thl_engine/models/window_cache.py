"""Keys and values of layers that look back on a window of positions only."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class WindowCache:
    """For each layer keys and values float32 [B, A, capacity, d]: the last `window` - 1 positions, before `stops`.

    Positions are appended until a buffer is full; what is still visible then moves to its front.
    """

    window: int
    keys: list[Tensor]
    values: list[Tensor]
    stops: list[int]

    @classmethod
    def empty(cls, layers: int, batch_size: int, heads: int, width: int, window: int, slack: int,
              device: torch.device | str = "cpu") -> "WindowCache":
        """A cache without content that moves its positions once in `slack` of them."""
        def new() -> list[Tensor]:
            return [torch.empty(batch_size, heads, window - 1 + slack, width, device=device) for _ in range(layers)]

        return cls(window, new(), new(), [0] * layers)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def begin(self, past: int) -> None:
        """Makes room for what a sequence of `past` positions holds, to be filled through `held`."""
        self.stops = [min(past, self.window - 1)] * len(self.stops)

    def held(self, layer: int, past: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the position after the first `past` sees, in ascending order, not copied."""
        stop = self.stops[layer]
        span = slice(stop - min(past, self.window - 1), stop)
        return self.keys[layer][:, :, span], self.values[layer][:, :, span]

    def append(self, layer: int, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes key, value [B, A, n, d] behind the first `past` positions, in place.

        Returns [B, A, min(past, window - 1) + n, d] each: what the new positions see, in ascending order.
        """
        held, count = min(past, self.window - 1), key.shape[2]
        capacity = self.keys[layer].shape[2]
        if held + count > capacity:  # more than the buffer is made for: only its end is kept
            out = tuple(torch.cat([old, new], dim=2)
                        for old, new in zip(self.held(layer, past), (key, value), strict=True))
            kept = min(held + count, self.window - 1)
            for own, new in zip((self.keys, self.values), out, strict=True):
                own[layer][:, :, :kept] = new[:, :, -kept:] if kept else new[:, :, :0]
            self.stops[layer] = kept
            return out
        if self.stops[layer] + count > capacity:
            for own, old in zip((self.keys, self.values), self.held(layer, past), strict=True):
                own[layer][:, :, :held] = old.clone()
            self.stops[layer] = held
        start = self.stops[layer]
        self.stops[layer] = start + count
        for own, new in ((self.keys, key), (self.values, value)):
            own[layer][:, :, start : start + count] = new
        span = slice(start - held, start + count)
        return self.keys[layer][:, :, span], self.values[layer][:, :, span]

    def clone(self) -> "WindowCache":
        return WindowCache(self.window, [k.clone() for k in self.keys], [v.clone() for v in self.values],
                           list(self.stops))
