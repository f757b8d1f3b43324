"""Files of a training run: the exported model, and everything needed to continue. Nothing is pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from thl_engine.checkpoint.tensors import save_tensors
from thl_engine.errors import CheckpointError
from thl_engine.files import write_file

RECORD = "thl_engine.training"  # metadata key of the JSON beside the tensors
FORMAT = 1


def export(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: str) -> None:
    """Writes a checkpoint folder as published: config.json, model.safetensors and tokenizer.json."""
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_file(folder / "tokenizer.json", tokenizer.encode())
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_tensors(folder / "model.safetensors", kept, {"format": "pt"})


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes a run's tensors and a JSON record in one file, so that neither exists without the other."""
    kept = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", RECORD: json.dumps({"format": FORMAT, **record})}
    save_tensors(path, kept, metadata)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote: (tensors, record). Raises CheckpointError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(RECORD, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no run to resume; start one without --resume") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot resume from it ({error}); start a new run") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training run of this version; start a new run")
    return tensors, record
