"""`CachedAttention` on triton kernels, which append to the cache and read it where it lies, int8 rows too.

Layers are rings: position p is in row p mod C of C rows. Nothing that is launched for one position a sequence depends
on the position but by way of its counter and of how many positions there may be (`bucket`), so that a captured
step can be replayed at any other.
"""

from typing import Any

import torch
from torch import Tensor

from thl_engine.kernels.triton.attention import attention
from thl_engine.kernels.triton.cache import append
from thl_engine.ops.cached_attention import Attending, Cache, CachedAttention, Layer, Norm, Tables, bucket


class RingAttention(CachedAttention):
    """Of heads that the kernels hold."""

    def __init__(self, ops: Attending, cache: Cache, past: int, rows: int, device: torch.device) -> None:
        super().__init__(ops, cache, past, rows, device)
        self._at = ops.counter(past)
        self._layers = cache.layers
        for layer in cache.layers:
            layer.align()

    @property
    def positions(self) -> Tensor:
        if isinstance(self._at, int):
            return super().positions
        return torch.arange(self._rows, device=self._device) + self._at

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
        held = self._layers[layer]
        kept, room = held.kept(self._past), held.capacity
        if kept + self._rows <= room:
            self._store(held, self._at, key, value, key_norm, value_eps, tables)
            return
        # More than fits beside what the first of them sees: what all see is put together outside of the cache.
        seen = [held.read(self._past - kept, self._past)]
        for first in range(0, self._rows, room - kept):
            some = slice(first, min(first + room - kept, self._rows))
            past = self._past + first
            self._store(
                held,
                past,
                key[:, some],
                value[:, some],
                key_norm,
                value_eps,
                None if tables is None else (tables[0][some], tables[1][some]),
            )
            seen.append(held.read(past, self._past + some.stop))
        keys, values = (torch.cat(rows, dim=2) for rows in zip(*seen, strict=True))
        self._seen[layer] = keys, values

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
        held, rows = self._layers[layer], query.shape[1]
        query = query.transpose(1, 2)
        shared: dict[str, Any] = {
            "window": held.window,
            "causal": blocked is None,
            "query_norm": norm,
            "query_tables": tables,
        }
        if layer in self._seen:
            mixed = attention(query, *self._seen[layer], scale, blocked, **shared)
            if last:
                del self._seen[layer]
        else:
            at = self._at + (self._rows - rows) if rows < self._rows else self._at
            mixed = attention(
                query,
                held.keys.data,
                held.values.data,
                scale,
                blocked,
                key_scales=held.keys.scales,
                value_scales=held.values.scales,
                past=at,
                at_most=bucket(self._past + self._rows),
                **shared,
            )
        return mixed.transpose(1, 2).flatten(2)

    def _store(
        self,
        held: Layer,
        past: int | Tensor,
        key: Tensor,
        value: Tensor,
        key_norm: Norm | None,
        value_eps: float | None,
        tables: Tables | None,
    ) -> None:
        append(
            key,
            value,
            held.keys.data,
            held.values.data,
            held.keys.scales,
            held.values.scales,
            past,
            key_norm=key_norm,
            value_eps=value_eps,
            tables=tables,
        )
