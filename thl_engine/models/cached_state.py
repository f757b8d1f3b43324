"""The part of a state that models with a KV cache share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from thl_engine.errors import CheckpointError
from thl_engine.models.kv_cache import KVCache, restore
from thl_engine.models.state import State, kind_of

S = TypeVar("S", bound="CachedState")


@dataclass
class CachedState(State):
    """Context of a batch of sequences that attention looks back on. context: positions that they may grow to."""

    timestep: int
    context: int
    cache: KVCache

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    @property
    def kept_bytes(self) -> int:
        return self.cache.nbytes

    @property
    def dequantized_bytes(self) -> int:
        return self.cache.dequantized_bytes

    def seek(self, position: int) -> None:
        super().seek(position)
        self.cache.seek(position)

    def clone(self: S) -> S:
        """An independent copy: advancing one leaves the other as it is."""
        copy = super().clone()
        copy.cache = self.cache.clone(self.timestep)
        return copy

    def detach(self: S) -> S:
        """The same state: `forward` in training neither reads nor writes it."""
        return self


def restored(new_state: Callable[[int], S], values: Mapping[str, Tensor], first: str) -> S:
    """The state that `to_dict` described, in the memory of a new one.

    new_state: makes an empty state of so many sequences. first: name of the first layer's keys. Raises CheckpointError
    on a missing field, a wrong shape or another kind of cache.
    """
    keys, step = values.get(first), values.get("timestep")
    batch = keys.shape[0] if keys is not None and keys.dim() == 4 else 1
    length = int(step) if step is not None and step.numel() == 1 and kind_of(step) == "whole" else 0
    try:
        state = new_state(max(batch, 1))
    except RuntimeError:  # keys of no position take no bytes of a file, of however many sequences they are
        raise CheckpointError(f"state: it is of {batch} sequences, for which there is no memory") from None
    if not 0 <= length <= state.context:
        raise CheckpointError(f"state: timestep is {length}; it must be from 0 to the context's {state.context}")
    state.timestep = length
    state.cache.seek(length)
    restore(state.named(), values)
    return state
