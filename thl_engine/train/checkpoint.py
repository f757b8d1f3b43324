"""Files of a training run: the exported model, and everything needed to continue. Nothing is pickled."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thl_engine.errors import CheckpointError

RECORD = "thl_engine.training"  # metadata key of the JSON beside the tensors
FORMAT = 1


def export(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: str) -> None:
    """Writes a checkpoint folder as published: config.json, model.safetensors and tokenizer.json."""
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _replace(folder / "model.safetensors", lambda path: save_file(kept, path, {"format": "pt"}))


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes a run's tensors and a JSON record in one file, so that neither exists without the other."""
    kept = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", RECORD: json.dumps({"format": FORMAT, **record})}
    _replace(path, lambda temporary: save_file(kept, temporary, metadata))


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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is complete or not there."""
    _replace(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)
