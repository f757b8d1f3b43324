"""Ordinary safetensors files of whole tensors in memory, replaced as a whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from thl_engine.errors import CheckpointError, shown
from thl_engine.files import replacing_by_name


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous tensors that share no memory, with metadata.

    Raises CheckpointError on any failure; `path` is then as it was.
    """
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        with replacing_by_name(path, nbytes) as temporary:
            save_file(dict(tensors), temporary, dict(metadata))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot write: {shown(str(error))}") from None
