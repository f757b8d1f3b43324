"""Files of a training run: the exported model, and everything needed to continue. Nothing is pickled."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from thl_engine.checkpoint.tensors import load_tensors, save_tensors
from thl_engine.errors import CheckpointError, shown
from thl_engine.files import parse_json, remove_left_over, write_file

RECORD = "thl_engine.training"  # metadata key of the JSON beside the tensors
FORMAT = 2  # 1 had no options
RESUME_FILE = "training.safetensors"
EXPORTED = ("config.json", "tokenizer.json", "model.safetensors")  # in the order in which they are written


def export(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: str) -> None:
    """Writes a checkpoint folder as published: config.json, model.safetensors and tokenizer.json."""
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_file(folder / "tokenizer.json", tokenizer.encode())
    save_tensors(folder / "model.safetensors", tensors)


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes a run's tensors and a JSON record in one file, so that neither exists without the other."""
    save_tensors(path, tensors, {RECORD: json.dumps({"format": FORMAT, **record})})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote: (tensors, record). Raises CheckpointError for any other file."""
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: there is no run to resume; start one without --resume")
    tensors, metadata = load_tensors(path)
    record = parse_json(metadata.get(RECORD, "{}"), f"{path}: metadata {RECORD!r}")
    if (found := record.get("format")) != FORMAT:
        which = "of no run" if found is None else f"of a run in format {shown(found)}, not {FORMAT}"
        raise CheckpointError(f"{path}: the file is {which}; start a new run in another folder")
    return tensors, record


def tidy(folder: Path) -> None:
    """Removes what a run that was killed has left half written."""
    for name in (*EXPORTED, RESUME_FILE):
        remove_left_over(folder / name)
