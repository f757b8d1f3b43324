"""Contexts in files: a state's fields, with the model's kind and configuration beside them."""

import json
import os
from pathlib import Path

from torch import Tensor

from thl_engine.checkpoint.tensors import load_tensors, save_tensors
from thl_engine.config import Config
from thl_engine.errors import CheckpointError, shown
from thl_engine.files import parse_json
from thl_engine.models.state import State

KIND, CONFIG = "thl_engine.state", "thl_engine.config"  # metadata


def write_state(path: str | os.PathLike[str], state: State, config: Config) -> None:
    """Writes the context of a model. Raises CheckpointError; `path` is then as it was."""
    metadata = {KIND: config.model_type, CONFIG: json.dumps(config.to_dict())}
    save_tensors(Path(path), state.to_dict(), metadata)


def read_state(path: str | os.PathLike[str], config: Config) -> dict[str, Tensor]:
    """The fields of a context that `write_state` wrote, or that has no metadata.

    Raises CheckpointError for a file that is none, and for the context of a model of another kind or configuration,
    whatever the shapes.
    """
    fields, metadata = load_tensors(Path(path))
    if metadata.get(KIND, config.model_type) != config.model_type:
        raise CheckpointError(
            f"{path}: the context of a model of type {shown(metadata[KIND])}; this is a {config.model_type} model"
        )
    if CONFIG in metadata:
        theirs, own = parse_json(metadata[CONFIG], f"{path}: metadata {CONFIG!r}"), config.to_dict()
        for name in own:
            if theirs.get(name) != own[name]:
                raise CheckpointError(
                    f"{path}: the context of a model with {name} {shown(theirs.get(name))}; this one has "
                    f"{shown(own[name])}"
                )
    return fields
