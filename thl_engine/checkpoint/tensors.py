"""Ordinary safetensors files of whole tensors in memory: training runs, exported models, contexts.

They are read as checkpoints are: by checked offsets and not through mapped memory, where a file that is cut short while
it is read would end the process.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from thl_engine.checkpoint.index import read_header, read_tensor
from thl_engine.checkpoint.pack import write_tensors
from thl_engine.checkpoint.spool import tensor_sources


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors with metadata. Raises CheckpointError on any failure; `path` is then as it was."""
    write_tensors(path, tensor_sources(tensors, str(path)), metadata=metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file, in memory of their own, and its metadata. Raises CheckpointError."""
    infos, metadata = read_header(path)
    return {name: read_tensor(info).clone() for name, info in infos.items()}, metadata
