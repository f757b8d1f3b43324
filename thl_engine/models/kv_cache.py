"""Keys and values of the positions that attention looks back on: float32 or int8 rows, of all positions or a window.

Rows of a window come in the order of positions, moved to the front when the end is reached, for kernels that take them
as they lie; or as a ring, for those that find each position's row themselves. Both take the same room.

All that a cache may come to hold is allocated at once. So a plan can count it, no layer is ever in memory twice, and
no token pays for moving a long context; on the CPU, memory that no position was written to stays with the system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.kernels.int8 import round_to_int8, scales_of
from thl_engine.models.state import check_fields

FORMATS = ("float32", "int8")
SLACK = 64  # positions that a window's rows have to spare: once in so many tokens they are moved to the front


@dataclass
class Rows:
    """data [B, A, capacity, d] of A key/value heads: float32, or int8 with float32 scales [B, A, capacity]."""

    data: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales) if t is not None)

    def write(self, at: int, new: Tensor) -> None:
        """Stores float32 [B, A, n, d] from row `at` on."""
        rows = slice(at, at + new.shape[2])
        if self.scales is None:
            self.data[:, :, rows] = new
            return
        scales = scales_of(new.abs().amax(dim=-1))
        self.data[:, :, rows] = round_to_int8(new, scales)
        self.scales[:, :, rows] = scales

    def read(self, first: int, stop: int) -> Tensor:
        """float32 [B, A, stop - first, d]: a view, or int8 rows dequantized into memory of their own."""
        data = self.data[:, :, first:stop]
        if self.scales is None:
            return data
        return data.float().mul_(self.scales[:, :, first:stop, None])

    def move(self, first: int, stop: int) -> None:
        """Moves the rows [first, stop) to the front."""
        for own in (self.data, self.scales):
            if own is not None:
                own[:, :, : stop - first] = own[:, :, first:stop].clone()  # the two may overlap

    def copy(self, stop: int) -> "Rows":
        """The same with the first `stop` rows."""
        out = Rows(torch.empty_like(self.data), None if self.scales is None else torch.empty_like(self.scales))
        out.data[:, :, :stop] = self.data[:, :, :stop]
        if self.scales is not None and out.scales is not None:
            out.scales[:, :, :stop] = self.scales[:, :, :stop]
        return out


@dataclass
class Layer:
    """One layer's rows, in ascending order of positions: of all, or at least of those that a window still sees.

    window: positions that a query sees, its own included; None for all. first: the position of row 0. Where `first`
    stays 0 though positions go on beyond the rows, they begin again at row 0: rows are a ring.
    """

    keys: Rows
    values: Rows
    window: int | None
    first: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.data.shape[2]

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of the float32 copies that attention needs of keys and values: none of float32 rows."""
        return 0 if self.keys.scales is None else 8 * self.keys.data.numel()

    def kept(self, past: int) -> int:
        """How many of the first `past` positions the next one sees."""
        return past if self.window is None else min(past, self.window - 1)

    def append(self, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`."""
        count, kept, room = key.shape[2], self.kept(past), self.capacity
        if self.window is not None and kept + count > room:
            return self._append_in_pieces(past, key, value)
        begin, at = past - kept - self.first, past - self.first
        if at + count > room:
            for rows in (self.keys, self.values):
                rows.move(begin, at)
            self.first, begin, at = past - kept, 0, kept
        for rows, new in ((self.keys, key), (self.values, value)):
            rows.write(at, new)
        return self.keys.read(begin, at + count), self.values.read(begin, at + count)

    def _append_in_pieces(self, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """More positions than there is room for at once: what they see is put together outside of the cache."""
        begin, at = past - self.kept(past) - self.first, past - self.first
        out = [(self.keys.read(begin, at).clone(), self.values.read(begin, at).clone())]
        for new in zip(key.split(SLACK, dim=2), value.split(SLACK, dim=2), strict=True):
            count = new[0].shape[2]
            seen = self.append(past, *new)
            out.append((seen[0][:, :, -count:].clone(), seen[1][:, :, -count:].clone()))
            past += count
        return torch.cat([keys for keys, _ in out], dim=2), torch.cat([values for _, values in out], dim=2)

    def spans(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The rows of positions [first, stop): one run of them, or in a ring two."""
        start, count = (first - self.first) % self.capacity, stop - first
        if start + count <= self.capacity:
            return [(start, start + count)]
        return [(start, self.capacity), (0, start + count - self.capacity)]

    def read(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions [first, stop) as float32 [B, A, n, d] in memory of their own."""
        spans = self.spans(first, stop)
        keys, values = (torch.cat([rows.read(*span) for span in spans], dim=2) for rows in (self.keys, self.values))
        return keys, values

    def align(self) -> None:
        """Makes the rows a ring, with position 0 in row 0."""
        if self.first:
            for own in (self.keys.data, self.keys.scales, self.values.data, self.values.scales):
                if own is not None:
                    own.copy_(own.roll(self.first, dims=2))
            self.first = 0

    def named(self, past: int) -> dict[str, Tensor]:
        """What positions from `past` on see of the earlier ones, as stored; not copied but from the ends of a ring."""
        spans, out = self.spans(past - self.kept(past), past), {}

        def rows(own: Tensor) -> Tensor:
            some = [own[:, :, first:stop] for first, stop in spans]
            return some[0] if len(some) == 1 else torch.cat(some, dim=2)

        for name, own in (("keys", self.keys), ("values", self.values)):
            out[name] = rows(own.data)
            if own.scales is not None:
                out[f"{name}_scale"] = rows(own.scales)
        return out


@dataclass
class KVCache:
    """The layers of a batch of sequences."""

    layers: list[Layer]

    @property
    def batch_size(self) -> int:
        return self.layers[0].keys.data.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of the float32 copies that attention needs of one layer, the largest."""
        return max(own.dequantized_bytes for own in self.layers)

    def traffic(self, past: int) -> int:
        """Bytes that a token behind `past` positions reads or writes."""
        total = 0
        for layer in self.layers:
            batch, heads, _, width = layer.keys.data.shape
            row = 2 * batch * heads * width  # elements of a position's key and value
            total += (layer.kept(past) + 1) * row * (4 if layer.keys.scales is None else 1 + 4 + 4)  # dequantized, read
        return total

    def append(self, layer: int, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes float32 key, value [B, A, n, d] behind the first `past` positions.

        Returns the keys and values [B, A, m + n, d] that these n positions see: of the m = min(past, window - 1)
        before them, and their own, as the cache holds them. They are valid until the next call for the layer.
        """
        return self.layers[layer].append(past, key, value)

    def seek(self, past: int) -> None:
        """Makes room for the rows of a context of `past` positions, to be written to what `Layer.named` returns."""
        for layer in self.layers:
            layer.first = past - layer.kept(past)

    def clone(self, past: int) -> "KVCache":
        """The same for sequences of `past` positions."""
        used = [min(past - own.first, own.capacity) for own in self.layers]
        return KVCache(
            [
                Layer(own.keys.copy(rows), own.values.copy(rows), own.window, own.first)
                for own, rows in zip(self.layers, used, strict=True)
            ]
        )


def empty(
    windows: Sequence[int | None],
    batch_size: int,
    heads: int | Sequence[int],
    width: int | Sequence[int],
    positions: int,
    device: torch.device | str = "cpu",
    rows: str = "float32",
) -> KVCache:
    """A cache without content for up to `positions` positions.

    windows: of each layer, None where it sees all positions. heads, width: key/value heads and their features, of all
    layers or of each. rows: one of FORMATS.
    """

    def new(heads: int, width: int, capacity: int) -> Rows:
        shape = (batch_size, heads, capacity)
        if rows == "int8":
            return Rows(torch.empty(*shape, width, dtype=torch.int8, device=device), torch.empty(shape, device=device))
        return Rows(torch.empty(*shape, width, device=device), None)

    counts, widths = ([own] * len(windows) if isinstance(own, int) else own for own in (heads, width))
    layers = []
    for window, count, features in zip(windows, counts, widths, strict=True):
        size = count, features, positions if window is None else min(positions, window - 1 + SLACK)
        layers.append(Layer(new(*size), new(*size), window))
    return KVCache(layers)


def checked_context(context: int | None, limit_name: str, limit: int, rows: str) -> int:
    """The positions that a sequence may grow to: `context`, or the most that the model has where that is None.

    rows: how the cache is to hold them. Raises ConfigError for a context or rows that cannot be.
    """
    if rows not in FORMATS:
        raise ConfigError(f"kv_cache is {rows!r}; it must be one of {', '.join(FORMATS)}")
    if context is None:
        return limit
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= limit:
        raise ConfigError(f"context is {context!r}; it must be a whole number from 1 to {limit_name} ({limit})")
    return context


def check_room(length: int, context: int, limit_name: str, limit: int) -> None:
    """Raises ConfigError if `length` positions are more than the context; `limit`: the most that the model has."""
    if length > context:
        own = "" if context == limit else f"the context ends at {context} (option context); "
        raise ConfigError(f"the context would be {length} tokens long; {own}the model's {limit_name} is {limit}")


def restore(fields: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies stored values into a state's fields, views of its own memory.

    Raises CheckpointError on a missing or unknown field, a wrong shape or another kind of cache.
    """
    for name, own in fields.items():
        value = values.get(name, own)
        if (value.dtype == torch.int8) != (own.dtype == torch.int8):
            raise CheckpointError(
                f"state: field {name!r} is {value.dtype}, expected {own.dtype}; open the engine with "
                "the kv_cache that the state was made with"
            )
    check_fields(values, fields)
    for name, own in fields.items():
        own.copy_(values[name].detach())
