"""Packed stores without a name: copies in memory or on disk that vanish when they are closed.

They carry what does not come from a packed file into the engine: a state dict, or a float checkpoint to be
run in int8. The writer is that of `thl quantize`, so the pages are the same.
"""

import logging
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from thl_engine.checkpoint.contents import Source
from thl_engine.checkpoint.index import DTYPE_NAMES
from thl_engine.checkpoint.pack import plan_pack
from thl_engine.checkpoint.store import Store, open_store
from thl_engine.config import Config, parse_config
from thl_engine.errors import CheckpointError, shown
from thl_engine.files import lies_in_memory
from thl_engine.memory import size

_log = logging.getLogger("thl_engine")


def spool_store(store: Store, quantize: str = "int8", group: int | None = None, in_memory: bool = False) -> Store:
    """A packed copy of a float store; `quantize` and `group` as in `write_store`."""
    copy = _spool(store.config, store.sources(), quantize, group, in_memory, str(store.path))
    copy.tokenizer_json = store.tokenizer_json
    return copy


def spool_tensors(
    model_type: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    quantize: str = "none",
    group: int | None = None,
    in_memory: bool = True,
) -> Store:
    """A packed store of a state dict, independent of `tensors`.

    in_memory keeps it in RAM, outside of what the process counts as resident; otherwise it is a temporary
    file on disk.
    """
    parsed = parse_config(config, model_type, "config")
    return _spool(parsed, tensor_sources(tensors, "state dict"), quantize, group, in_memory, "state dict")


def tensor_sources(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, Source]:
    """Sources of a state dict on any device; each must be an ordinary dense tensor."""
    sources = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{where}: {shown(name)} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{where}: tensor {shown(name)} is sparse, quantised or without data")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{where}: tensor {shown(name)} has unsupported dtype {tensor.dtype}")
        rows = partial(_rows, tensor.detach())
        sources[name] = Source(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), rows)
    return sources


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return (tensor[start:stop] if tensor.dim() else tensor).cpu()


def _spool(
    config: Config, sources: Mapping[str, Source], quantize: str, group: int | None, in_memory: bool, where: str
) -> Store:
    plan = plan_pack(config, sources, quantize=quantize, group=group, tokenizer=None, where=where)
    descriptor = None
    try:
        if in_memory:
            descriptor = os.memfd_create("thl_engine")
        else:
            folder = tempfile.gettempdir()
            if lies_in_memory(Path(folder)):
                _log.warning(
                    "%s: the copy of %s that is streamed lies in %s, which is memory outside of the memory budget; set "
                    "TMPDIR to a folder on a disk",
                    where,
                    size(plan.file_bytes),
                    folder,
                )
            with tempfile.TemporaryFile(dir=folder) as file:
                descriptor = os.dup(file.fileno())
        plan.write(descriptor)
        # The file has no name, but its descriptor has: readers open it as they would any other.
        store = open_store(Path(f"/proc/self/fd/{descriptor}"))
    except BaseException as error:
        if descriptor is not None:
            os.close(descriptor)
        if not isinstance(error, OSError):
            raise
        place = "memory" if in_memory else tempfile.gettempdir()
        amount = size(plan.file_bytes)
        raise CheckpointError(f"{where}: cannot write a copy of {amount} to {place}: {error.strerror}") from error
    store.descriptor = descriptor
    return store
