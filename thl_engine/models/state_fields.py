"""Stored contexts against what a model expects of them."""

from collections.abc import Mapping

from torch import Tensor

from thl_engine.errors import CheckpointError


def check_fields(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError on an unknown or missing field, or one of another shape."""
    for name in values.keys() - expected.keys():
        raise CheckpointError(f"state: unknown field {name!r}; known: {', '.join(expected)}")
    for name, like in expected.items():
        if name not in values:
            raise CheckpointError(f"state: field {name!r} is missing")
        found, shape = list(values[name].shape), list(like.shape)
        if found != shape:
            raise CheckpointError(f"state: field {name!r} has shape {found}, expected {shape}")
