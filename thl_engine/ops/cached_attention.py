"""Attention of new positions to what a cache holds of the earlier ones: one pass, layer by layer.

Models hand over heads as projections leave them; how rows are stored and read is the backend's affair.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from thl_engine.kernels.attention import causal

Norm = tuple[Tensor, float]  # weight [d] and epsilon of an `rms_norm` of each head
Tables = tuple[Tensor, Tensor]  # cos and sin [T, d] of `rotary_tables`

LEAST = 256  # positions


def bucket(length: int) -> int:
    """The most positions that a step captured at `length` of them may be replayed with: so many are launched for."""
    return max(LEAST, 1 << (length - 1).bit_length())


class Rows(Protocol):
    """Keys or values of a layer: data [B, A, capacity, d] with, where int8, scales [B, A, capacity]."""

    data: Tensor
    scales: Tensor | None


class Layer(Protocol):
    """A layer of models/kv_cache.py."""

    @property
    def keys(self) -> Rows: ...

    @property
    def values(self) -> Rows: ...

    @property
    def window(self) -> int | None: ...

    @property
    def capacity(self) -> int: ...

    def kept(self, past: int) -> int: ...

    def read(self, first: int, stop: int) -> tuple[Tensor, Tensor]: ...

    def align(self) -> None: ...


class Cache(Protocol):
    """`KVCache` of models/kv_cache.py, as attention sees it."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    def append(self, layer: int, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class Attending(Protocol):
    """The ops that attention is made of."""

    @property
    def attention(self) -> Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]: ...

    @property
    def rms_norm(self) -> Callable[[Tensor, Tensor | None, float], Tensor]: ...

    @property
    def rotate(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]: ...

    def counter(self, t: int) -> int | Tensor: ...


class CachedAttention:
    """Of T positions behind the first `past`, by the small ops of any backend.

    Each layer with keys of its own is appended to once; from then on the pass may attend to it, as often as it likes.
    """

    def __init__(self, ops: Attending, cache: Cache | None, past: int, rows: int, device: torch.device) -> None:
        """cache: a KVCache, or None where the positions see only each other; see `ReferenceOps.cached_attention`."""
        self._ops, self._cache, self._past, self._rows, self._device = ops, cache, past, rows, device
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._blocked: dict[int | None, Tensor] = {}  # by window

    @property
    def positions(self) -> Tensor:
        """int64 [T]."""
        return torch.arange(self._past, self._past + self._rows, device=self._device)

    def append(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        *,
        key_norm: Norm | None = None,
        value_eps: float | None = None,
        tables: Tables | None = None,
    ) -> None:
        """Stores key and value [B, T, A_k, d] of a layer; first normalised, and keys rotated, if so wanted.

        value_eps: epsilon of an `rms_norm` of each value, without a weight.
        """
        key = self._prepared(key, key_norm, tables)
        value = self._prepared(value, None if value_eps is None else (None, value_eps), None)
        self._seen[layer] = (key, value) if self._cache is None else self._cache.append(layer, self._past, key, value)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        scale: float,
        *,
        norm: Norm | None = None,
        tables: Tables | None = None,
        blocked: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """query [B, T, A, d], or [B, 1, A, d] of the last position, attends to a layer: [B, T, A * d].

        blocked: bool, broadcastable to [B, A, T, S] for the S positions that the layer's window, if it has one, leaves
        of those before and of these; True where one must not be seen. None: later positions, and those out of the
        window, are not. last: nothing attends to the layer any more in this pass, so that float32 copies of its int8
        rows need not be kept.
        """
        query, (key, value) = self._prepared(query, norm, tables), self._seen[layer]
        if last:
            del self._seen[layer]
        window = None if self._cache is None else self._cache.layers[layer].window
        if query.shape[2] < self._rows and window is not None:
            key, value = key[:, :, -window:], value[:, :, -window:]
        elif blocked is None and query.shape[2] > 1:  # a lone position sees all that its layer's cache returns
            if window not in self._blocked:
                self._blocked[window] = causal(self._rows, self._past, self._device, window)
            blocked = self._blocked[window]
        return self._ops.attention(query, key, value, scale, blocked).transpose(1, 2).flatten(2)

    def _prepared(self, x: Tensor, norm: tuple[Tensor | None, float] | None, tables: Tables | None) -> Tensor:
        """[B, T, A, d] to [B, A, T, d]."""
        x = (x if norm is None else self._ops.rms_norm(x, *norm)).transpose(1, 2)
        return x if tables is None else self._ops.rotate(x, *tables)
