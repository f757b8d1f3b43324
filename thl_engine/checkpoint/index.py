"""Index of the tensors in safetensors files, checked before a byte of data is read.

The format (https://huggingface.co/docs/safetensors): 8 bytes header length N, little endian; N bytes of JSON,
name -> {"dtype", "shape", "data_offsets": [begin, end]} and an optional "__metadata__" of strings; then the
data, to which the offsets are relative. A checkpoint is one such file, or several listed by
`model.safetensors.index.json`, or a folder with either. Nothing in a file is believed until it has been
checked; every failure is a `CheckpointError` of one line that names file, tensor and numbers.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thl_engine.errors import CheckpointError, ConfigError, said, shown
from thl_engine.files import TEXT_LIMIT, check_fetched, kind_of, open_regular, parse_json, read_text

ELEMENT_LIMIT = 1 << 62  # elements in a tensor; below it no size in bytes overflows a signed 64-bit number

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNSUPPORTED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64", "C64")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WHOLE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CACHED_MODEL = "models--"  # begins the name of a model's folder in a Hugging Face cache
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02")  # torch.save: a zip archive, or a bare pickle before torch 1.6


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at absolute position `offset` of `file`, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def part(self, name: str, start: int, stop: int) -> "TensorInfo":
        """Rows [start, stop) as a tensor of that name."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        shape, offset = (stop - start, *self.shape[1:]), self.offset + start * row
        return replace(self, name=name, shape=shape, offset=offset, nbytes=(stop - start) * row)


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint, its files, its folder, and the metadata (empty for several files)."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    files: tuple[Path, ...]
    root: Path


def read_index(path: str | os.PathLike[str]) -> CheckpointIndex:
    """Index of a .safetensors file, a sharded `*.index.json`, or a folder that holds one of them."""
    path = Path(path)
    if kind_of(path, "checkpoint") == "folder":
        path = _checkpoint_in(path)
    if path.suffix == ".json":
        return _read_sharded(path)
    tensors, metadata = read_header(path)
    return CheckpointIndex(tensors, metadata, (path,), path.parent)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, every number checked. Raises CheckpointError."""
    if kind_of(path, "checkpoint file") != "file":
        raise CheckpointError(f"{path}: expected a file, found a folder")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            _check_prefix(path, prefix, length, size)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror}") from error
    if len(text) != length:
        raise CheckpointError(f"{path}: the file ends after {len(text)} of the {length} bytes of its header")
    header = parse_json(text, f"{path}: the header")
    metadata = _check_metadata(path, header.pop("__metadata__", {}))
    data = 8 + length
    tensors = {name: _check_entry(path, name, entry, data, size - data) for name, entry in header.items()}
    _check_coverage(path, tensors, data, size)
    return tensors, metadata


def read_tensor(info: TensorInfo, rows: slice | None = None) -> torch.Tensor:
    """The tensor, or rows [start, stop) along its first axis, in its stored dtype, on the CPU."""
    shape, offset, nbytes = info.shape, info.offset, info.nbytes
    if rows is not None:
        start, stop, _ = rows.indices(shape[0])
        row_bytes = nbytes // shape[0] if shape[0] else 0
        shape = (stop - start, *shape[1:])
        offset, nbytes = offset + start * row_bytes, (stop - start) * row_bytes
    if nbytes == 0:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    buffer = read_bytes(info.file, offset, nbytes, f"tensor {shown(info.name)}")
    if info.dtype == "BOOL":  # any byte but 0 and 1 is undefined behaviour in a bool tensor
        return (torch.frombuffer(buffer, dtype=torch.uint8) != 0).reshape(shape)
    return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).reshape(shape)


def read_bytes(file: Path, offset: int, nbytes: int, what: str) -> bytearray:
    """Exactly `nbytes` bytes at `offset`; a file that has become shorter is a `CheckpointError`."""
    buffer = bytearray(nbytes)
    view, done = memoryview(buffer), 0
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < nbytes:
                got = os.preadv(descriptor, [view[done:]], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{file}: {what} needs {nbytes} bytes at {offset}, but the file ends at "
                        f"{offset + done}; it was cut short after it was opened"
                    )
                done += got
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read {what} at {offset}: {error.strerror}") from error
    return buffer


def config_beside(folder: Path) -> tuple[dict[str, Any], str] | None:
    """`config.json` in a folder as `read_config` gives it; None where there is none."""
    file = folder / "config.json"
    return read_config(file) if os.path.lexists(file) else None


def read_config(file: Path) -> tuple[dict[str, Any], str]:
    """Fields of a configuration file and the text that names their place in errors.

    The fields stand at the top, or under "config" as in the published fixtures.
    """
    fields = parse_json(read_text(file, ConfigError), str(file), ConfigError)
    nested = fields.get("config")
    if not isinstance(nested, dict):
        return fields, str(file)
    if "model_type" in fields:
        nested = {"model_type": fields["model_type"], **nested}
    return nested, f"{file} (under 'config')"


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint that a folder holds; which one must be beyond doubt. A whole file goes before shards."""
    names = names_in(folder)
    if WHOLE in names:
        return folder / WHOLE
    candidates = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    index = INDEX if INDEX in indices else indices[0] if len(indices) == 1 else None
    if index is not None and not (
        len(candidates) == 1 and candidates[0] not in read_weight_map(folder / index).values()
    ):
        return folder / index
    if len(candidates) == 1:
        return folder / candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder}: holds {len(candidates)} .safetensors files, {shown(', '.join(candidates))}, and "
            f"neither {WHOLE} nor {INDEX}; name the file itself"
        )
    pickled = pickled_in(names)
    if len(pickled) == 1:
        raise CheckpointError(
            f"{folder}: holds {shown(pickled[0])}, no .safetensors file; convert it: thl convert {folder} OUT"
        )
    if pickled:
        raise CheckpointError(
            f"{folder}: holds {len(pickled)} torch.save files ({shown(', '.join(pickled))}), no .safetensors file; "
            f"convert one of them: thl convert {folder}/NAME OUT"
        )
    raise CheckpointError(f"{folder}: no .safetensors file in this folder")


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises CheckpointError."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot list the folder: {error.strerror}") from error


def pickled_in(names: Collection[str]) -> list[str]:
    """Of a folder's names, that of the torch.save file or index of such files that it is converted from.

    Several where it could be any of them; none where there is none.
    """
    for name in (PICKLED_WHOLE, PICKLED_INDEX):
        if name in names:
            return [name]
    return [name for name in names if name.endswith(PICKLE_SUFFIXES) and not name.startswith(".")]


def _read_sharded(path: Path) -> CheckpointIndex:
    folder, weight_map = path.parent, read_weight_map(path)
    tensors: dict[str, TensorInfo] = {}
    files = shard_files(path, weight_map)
    for file in files:
        for name, info in read_header(file)[0].items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {shown(name)} is in {tensors[name].file.name} as well")
            if weight_map.get(name) != file.name:
                listed = f"under {shown(weight_map[name])}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{file}: holds tensor {shown(name)}, which {path.name} lists {listed}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: lacks tensor {shown(name)}, listed in {path.name}")
    return CheckpointIndex(tensors, {}, tuple(files), folder)


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor -> name of the file that holds it, of an index of shards."""
    weight_map = parse_json(read_text(path), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object 'weight_map' of tensor names to file names")
    return {name: _shard_name(path, name, shard) for name, shard in weight_map.items()}


def shard_files(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shards of an index, each in its folder. Raises CheckpointError for those elsewhere."""
    files = [path.parent / shard for shard in dict.fromkeys(weight_map.values())]
    for file in files:
        _check_inside(path, file)
    return files


def _shard_name(path: Path, tensor: str, shard: object) -> str:
    if not isinstance(shard, str) or not shard or shard in (".", "..") or any(c in shard for c in "/\\\0"):
        raise CheckpointError(f"{path}: lists {shown(tensor)} under {shown(shard)}, expected a file name")
    return shard


def _check_inside(path: Path, file: Path) -> None:
    """A shard must lie in the folder of its index, also when it is a symbolic link, or in a Hugging Face cache.

    The cache has a folder for each model, with snapshots/<revision>/... of links to blobs/<hash>; older versions of its
    library filled other folders with such links.
    """
    try:
        folder, target = path.parent.resolve(), file.resolve()
        inside = [folder, *(up.parent / "blobs" for up in folder.parents if up.name == "snapshots")]
        inside = [place.resolve() for place in inside]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{file}: cannot follow the link: {said(error)}") from error
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith(CACHED_MODEL)
    if target.parent not in inside and not cached:
        raise CheckpointError(f"{path}: shard {shown(file.name)} is a link out of the folder, to {target}")


def _check_prefix(path: Path, prefix: bytes, length: int, size: int) -> None:
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    check_fetched(path, prefix)
    if prefix.startswith(PICKLE_MAGIC):
        raise CheckpointError(f"{path}: a torch.save file, expected safetensors; convert it: thl convert {path} OUT")
    if prefix.startswith(b"GGUF"):
        raise CheckpointError(f"{path}: a GGUF file, expected safetensors")
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes long, too short for a safetensors file (cut short?)")
    if length > TEXT_LIMIT:
        raise CheckpointError(
            f"{path}: header length {length} is over the limit of {TEXT_LIMIT}; damaged, or not safetensors"
        )
    if 8 + length > size:
        raise CheckpointError(f"{path}: header length {length}, but the file has {size} bytes (cut short?)")


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: '__metadata__' is a {type(metadata).__name__}, expected an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: metadata {shown(key)} is a {kind}, expected a string")
    return metadata


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_entry(path: Path, name: str, entry: object, data: int, available: int) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = "is not supported here" if dtype in UNSUPPORTED_DTYPES else "is unknown"
        raise CheckpointError(f"{where}: dtype {shown(dtype)} {known}; supported: {' '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise CheckpointError(f"{where}: shape {shown(shape)}, expected a list of sizes")
    count = 1
    for size in shape:
        count *= size
        if count > ELEMENT_LIMIT:
            raise CheckpointError(f"{where}: shape {shown(shape)} overflows the number of elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)}, expected [begin, end]")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets [{shown(begin)}, {shown(end)}] end before they begin")
    if end > available:
        raise CheckpointError(
            f"{where}: data ends at byte {shown(data + end)}, the file at {data + available} (cut short?)"
        )
    nbytes = count * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise CheckpointError(f"{where}: {dtype} {shown(shape)} takes {nbytes} bytes, data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), path, data + begin, nbytes)


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], data: int, size: int) -> None:
    """Tensors must follow each other without overlap or hole and fill the file."""
    position, previous = data, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            problem = "overlaps" if info.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {shown(info.name)} at byte {info.offset} {problem} {previous}, "
                f"which ends at {position}"
            )
        position, previous = info.offset + info.nbytes, f"tensor {shown(info.name)}"
    if position != size:
        raise CheckpointError(f"{path}: the last tensor ends at byte {position}, the file at {size}")
