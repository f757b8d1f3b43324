"""What every architecture's state has in common: all that a batch of sequences needs to continue."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from thl_engine.config import Config
from thl_engine.errors import CheckpointError, shown

S = TypeVar("S", bound="State")


class State(ABC):
    """Base of the architectures' states, which are dataclasses of tensors, lists of tensors, and whole numbers.

    Ops may update its tensors in place; a step returns the state to go on with, and the engine makes the one that its
    caller holds `become` it.
    """

    timestep: int  # tokens read
    config: Config | None = None  # of the model that an engine made the state for; no field of its dataclass

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Sequences that the state holds."""

    @abstractmethod
    def named(self) -> dict[str, Tensor]:
        """The fields that a stored state has, under their published names, not copied."""

    @property
    def options(self) -> dict[str, Any]:
        """What `walk` and `forward` need to know of the state, by the names of their keyword arguments."""
        return {}

    @property
    def nbytes(self) -> int:
        """Bytes that the state occupies on its device, and will ever occupy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self))

    @property
    def kept_bytes(self) -> int:
        """Of these, bytes that no step writes anew on a backend that does not work in place: those of a cache."""
        return 0

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of the float32 copies that one layer's int8 rows are read through; 0 without such rows."""
        return 0

    def seek(self, position: int) -> None:
        """Makes a fresh state one that has read so many tokens, whatever they were: what a step of it takes is what
        it takes behind a text, what it computes is not."""
        self.timestep = position

    def clone(self: S) -> S:
        """An independent copy: stepping one leaves the other as it is."""
        return _mapped(self, Tensor.clone)

    def detach(self: S) -> S:
        """The same values cut off from the graph that made them, for truncated backpropagation."""
        return _mapped(self, Tensor.detach)

    def become(self: S, other: S) -> None:
        """Takes over the other's values without copying them."""
        vars(self).update(vars(other))

    def to_dict(self) -> dict[str, Tensor]:
        """Copies of the named fields on the CPU, enough to restart anywhere."""
        return {name: value.detach().cpu().clone() for name, value in self.named().items()}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of a state, with those of dataclasses and lists in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        yield from tensors_of(list(vars(value).values()))


def _mapped(state: S, change: Callable[[Tensor], Tensor]) -> S:
    """The state with every tensor, alone or in a list, replaced by what `change` makes of it."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return [change(item) for item in value] if isinstance(value, list) else value

    out = type(state)(**{field.name: mapped(vars(state)[field.name]) for field in fields(state)})  # type: ignore[arg-type]
    out.config = state.config
    return out


def check_fields(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError on an unknown or missing field of a stored state, or one of another shape or kind.

    Whole numbers do not come as floats, which might be none, and floats come as floats of any precision.
    """
    for name in values.keys() - expected.keys():
        raise CheckpointError(f"state: unknown field {shown(name)}; known: {', '.join(expected)}")
    for name, like in expected.items():
        if name not in values:
            raise CheckpointError(f"state: field {name!r} is missing")
        found, shape = list(values[name].shape), list(like.shape)
        if found != shape:
            raise CheckpointError(f"state: field {name!r} has shape {found}, expected {shape}")
        if kind_of(values[name]) != kind_of(like):
            raise CheckpointError(f"state: field {name!r} is {values[name].dtype}, expected {like.dtype}")


def kind_of(tensor: Tensor) -> str:
    """ "float", "whole", or another type of numbers, none of which a state has."""
    if tensor.dtype.is_floating_point:
        return "float"
    return str(tensor.dtype) if tensor.dtype.is_complex or tensor.dtype == torch.bool else "whole"


def taken_fields(
    values: Mapping[str, Tensor], expected: Mapping[str, Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """Stored fields as contiguous tensors of their own, of the types that are expected, on a device.

    Raises CheckpointError as `check_fields` does.
    """
    check_fields(values, expected)
    return {
        name: values[name].detach().to(device=device, dtype=like.dtype, copy=True).contiguous()
        for name, like in expected.items()
    }
