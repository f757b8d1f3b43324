"""A model's bytes on disk: which tensors there are, how they are cut into pages, and where each page lies.

`open_store` reads the packed files of `thl quantize` and ordinary float checkpoints alike. The latter get
pages too, as ranges of rows of the file as it is: without checksums and without alignment. Page boundaries
depend on the file alone, never on a memory budget, so every sum has the same order whatever is streamed.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from thl_engine.checkpoint.adapter_folder import adapted_config, base_of, is_adapter_folder, read_adapters
from thl_engine.checkpoint.checksum import crc32c
from thl_engine.checkpoint.contents import (
    Source,
    check_counts,
    check_repeats,
    check_tensors,
    split_joined,
    without_aliases,
)
from thl_engine.checkpoint.index import (
    DTYPE_NAMES,
    DTYPES,
    CheckpointIndex,
    TensorInfo,
    config_beside,
    read_index,
    read_tensor,
)
from thl_engine.checkpoint.pack import (
    FORMAT,
    PADDING,
    SCALE_SUFFIX,
    as_bytes,
    may_transpose,
    metadata_checksum,
    page_rows,
)
from thl_engine.checkpoint.page import Page, StoredTensor
from thl_engine.checkpoint.quant import GROUP, scale_shape
from thl_engine.config import Config, parse_config
from thl_engine.errors import CheckpointError, ConfigError, EngineError, shown
from thl_engine.files import FileMark, mark_of, parse_json, read_text
from thl_engine.models import architecture
from thl_engine.models.contract import AnyArchitecture
from thl_engine.schedule import Block
from thl_engine.text.chat_template import companions_beside, join_files

_log = logging.getLogger("thl_engine")
TOKENIZER_FILES = ("tokenizer.json", "continual_tokenizer.json", "vocab.json")


@dataclass
class Store:
    """An open checkpoint.

    config      the configuration, one of `thl_engine.config`
    format      "packed" or "plain"
    tensors     every block of the model and, under `<name>.scale` and as vectors, the scales of int8 ones
    pages       all pages, in the order of their index, which is the order of the files
    tokenizer_json  text for `load_tokenizer`, from the file itself or beside it
    """

    path: Path
    files: tuple[Path, ...]
    config: Config
    format: str
    tensors: dict[str, StoredTensor]
    pages: tuple[Page, ...]
    tokenizer_json: str | None
    index: CheckpointIndex = field(repr=False)
    descriptor: int | None = field(default=None, repr=False)  # keeps a file without a name alive
    marks: tuple[FileMark, ...] = field(init=False, repr=False)  # of the files when they were opened

    def __post_init__(self) -> None:
        self.marks = tuple(map(mark_of, self.files))

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file was written to or replaced since it was opened: what is read now may belong
        to another model than what was read before."""
        for file, mark in zip(self.files, self.marks, strict=True):
            if mark_of(file) != mark:
                raise CheckpointError(f"{file}: changed while it was in use; open the model again")

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def architecture(self) -> AnyArchitecture:
        """The hooks of the model that the tensors are."""
        return architecture(self.config.model_type)

    @property
    def vector_bytes(self) -> int:
        """Bytes of all vectors and scales as float32, which stay in memory."""
        return sum(4 * prod(t.shape) for t in self.tensors.values() if t.kind == "vector")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) as stored, on the CPU. Pages read whole are checked against their checksum."""
        tensor = self.tensors[name]
        if not tensor.shape:
            rows = read_tensor(self.index.tensors[name])
        else:
            rows = read_tensor(self.index.tensors[name], slice(start, stop))
        stop = start + (rows.shape[0] if tensor.shape else 1)
        buffer = as_bytes(rows)
        for page in tensor.pages:
            if page.crc is None or page.start < start or page.stop > stop:
                continue
            at = (page.start - start) * tensor.row_bytes
            found = crc32c(buffer[at : at + page.nbytes])
            if found != page.crc:
                raise CheckpointError(
                    f"{self.files[page.file]}: tensor {shown(name)}, rows {page.start} to {page.stop} at "
                    f"byte {page.offset}: CRC32C is {found:08x}, expected {page.crc:08x}; the file is damaged"
                )
        return rows

    def sources(self) -> dict[str, Source]:
        """The float tensors for `write_store`. Raises CheckpointError if the store is quantised already."""
        for tensor in self.tensors.values():
            if tensor.scales is not None:
                raise CheckpointError(f"{self.path}: quantised already, {shown(tensor.name)} is int8")
        return {
            name: Source(DTYPE_NAMES[tensor.dtype], tensor.shape, partial(self.read, name))
            for name, tensor in self.tensors.items()
        }

    def close(self) -> None:
        """Gives back the memory or disk space of a store that was spooled; other stores hold nothing open."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(path: str | os.PathLike[str]) -> Store:
    """Opens a packed file or an ordinary float checkpoint (file, shards or folder), or adapters with their base.

    It is checked against its configuration: CheckpointError for missing, extra or wrong tensors, ConfigError
    for the configuration itself.
    """
    return _open_adapted(Path(path)) if is_adapter_folder(Path(path)) else _open_whole(path)


def _open_whole(path: str | os.PathLike[str]) -> Store:
    index = read_index(path)
    if "thl_engine.format" in index.metadata:
        return _open_packed(Path(path), index)
    return _open_plain(Path(path), index)


def _open_adapted(folder: Path) -> Store:
    """Adapters and the base that they name as one store: the base's files come first."""
    path, given, where = base_of(folder)
    if is_adapter_folder(path):
        raise ConfigError(f"{where}: base_model: {path} holds adapters itself; it must be a gemma3n checkpoint")
    try:
        base = _open_whole(path)
    except EngineError as error:
        raise type(error)(f"{where}: base_model: {error}") from None
    config = adapted_config(given, base.config, where)
    index = read_adapters(folder, config)
    blocks = tuple(block for block in architecture(config.model_type).blocks(config) if block.name not in base.tensors)
    own = _assemble_plain(folder, index, config, blocks, tokenizer_beside(folder))

    def moved(page: Page) -> Page:
        return replace(page, index=page.index + len(base.pages), file=page.file + len(base.files))

    tensors = {name: replace(tensor, pages=tuple(map(moved, tensor.pages))) for name, tensor in own.tensors.items()}
    files, tokenizer = base.files + own.files, own.tokenizer_json or base.tokenizer_json
    return replace(
        own,
        files=files,
        format=base.format,
        tensors=base.tensors | tensors,
        tokenizer_json=tokenizer,
        pages=(*base.pages, *map(moved, own.pages)),
        index=CheckpointIndex(base.index.tensors | index.tensors, {}, files, folder),
    )


def find_config(index: CheckpointIndex) -> tuple[dict[str, Any], str]:
    """Fields of a checkpoint's configuration and where they were found."""
    embedded = index.metadata.get("thl_engine.config")
    if embedded is not None:
        where = f"{index.files[0]}: metadata 'thl_engine.config'"
        return parse_json(embedded, where, ConfigError), where
    found = config_beside(index.root)
    if found is None:
        raise ConfigError(
            f"{index.root / 'config.json'}: no such file; put the model's configuration there, a JSON "
            'object of its fields with "model_type"'
        )
    return found


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Name -> text of the tokenizer's file in a folder, if there is one, and of what a tokenizer.json has beside it."""
    for name in TOKENIZER_FILES:
        if os.path.isfile(folder / name):
            beside = companions_beside(folder) if name == "tokenizer.json" else {}
            return {name: read_text(folder / name), **beside}
    return {}


def note_vocabulary_beside(file: Path, tokenizer: str | None) -> None:
    """Says so where a packed file is written without a vocabulary beside one, which may be another model's."""
    left = [name for name in TOKENIZER_FILES if os.path.exists(file.parent / name)]
    if tokenizer is None and left:
        _log.warning("%s: has no vocabulary in it; %s beside it will be used, whichever model's it is", file, left[0])


def tokenizer_beside(folder: Path) -> str | None:
    """The same as one text."""
    files = tokenizer_files(folder)
    return join_files(files) if files else None


def _open_plain(path: Path, index: CheckpointIndex) -> Store:
    fields, where = find_config(index)
    config = parse_config(fields, where=where)
    check_counts(config, len(index.tensors), str(path))
    index = replace(index, tensors=split_joined(config, index.tensors, TensorInfo.part))
    check_repeats(config, {name: _source(info) for name, info in index.tensors.items()}, str(path))
    index = replace(index, tensors=without_aliases(config, index.tensors))
    blocks = architecture(config.model_type).blocks(config)
    return _assemble_plain(path, index, config, blocks, tokenizer_beside(index.root))


def _source(info: TensorInfo) -> Source:
    return Source(
        info.dtype, info.shape, lambda start, stop: read_tensor(info, slice(start, stop) if info.shape else None)
    )


def _assemble_plain(
    path: Path, index: CheckpointIndex, config: Config, blocks: tuple[Block, ...], tokenizer: str | None
) -> Store:
    groups = _check_stored(path, index, blocks, config.model_type, None)
    for block in blocks:
        if index.tensors[block.name].dtype == "F64" and block.kind != "unused":
            raise CheckpointError(f"{path}: tensor {shown(block.name)} is F64; save it as F32, F16 or BF16")
    pages = {}
    for name, (kind, _, _) in groups.items():
        info = index.tensors[name]
        rows = info.shape[0] if info.shape else 1
        pages[name] = (page_rows(kind, rows, info.nbytes // max(rows, 1)), None)
    return _assemble(path, index, config, groups, pages, "plain", tokenizer)


def _open_packed(path: Path, index: CheckpointIndex) -> Store:
    metadata, file = index.metadata, index.files[0]
    version = metadata["thl_engine.format"]
    if version != FORMAT:
        raise CheckpointError(
            f"{file}: packed format {shown(version)}, this version reads {FORMAT!r}; quantise the model again"
        )
    found, expected = f"{metadata_checksum(metadata):08x}", metadata.get("thl_engine.checksum")
    if found != expected:
        raise CheckpointError(f"{file}: metadata has CRC32C {found!r}, expected {shown(expected)}; the file is damaged")
    fields, where = find_config(index)
    config = parse_config(fields, where=where)
    check_counts(config, len(index.tensors), str(path))
    blocks = architecture(config.model_type).blocks(config)
    table = parse_json(metadata.get("thl_engine.pages", ""), f"{file}: metadata 'thl_engine.pages'")
    groups = _check_stored(path, index, blocks, config.model_type, table)
    pages = {name: _page_table(file, index.tensors[name], table.get(name)) for name in groups}
    tokenizer = metadata.get("thl_engine.tokenizer")
    return _assemble(path, index, config, groups, pages, "packed", tokenizer or tokenizer_beside(index.root))


def _check_stored(
    path: Path, index: CheckpointIndex, blocks: tuple[Block, ...], model_type: str, table: dict[str, Any] | None
) -> dict[str, tuple[str, int | None, bool]]:
    """Checks tensors against the model; name -> (kind, inputs that share a scale, transposed), in file order."""
    scaled = {
        block.name: index.tensors[block.name + SCALE_SUFFIX]
        for block in blocks
        if block.name + SCALE_SUFFIX in index.tensors
        and block.name in index.tensors
        and index.tensors[block.name].dtype == "I8"
    }
    turned = _transposed(path, index, [block for block in blocks if block.name in scaled], table)
    # To check_tensors an int8 tensor with scales is as good as the floats that it stands for.
    found = {
        name: Source("F32", info.shape[:: -1 if name in turned else 1], lambda a, b: torch.empty(0))
        if name in scaled
        else info
        for name, info in index.tensors.items()
        if not name.startswith(PADDING) and name.removesuffix(SCALE_SUFFIX) not in scaled or name in scaled
    }
    check_tensors(blocks, found, model_type, str(path))
    blocks = tuple(block for block in blocks if block.name in found)
    kinds: dict[str, tuple[str, int | None, bool]] = {}
    for block in blocks:
        scale = scaled.get(block.name)
        if scale is None:
            kinds[block.name] = (block.kind, None, False)
            continue
        entry = table.get(block.name) if table is not None else None
        group = entry.get("group") if isinstance(entry, dict) else GROUP if len(scale.shape) == 2 else None
        shape = index.tensors[block.name].shape
        sound = len(shape) == 2 and group in (None, GROUP)
        if not sound or scale.dtype != "F32" or scale.shape != scale_shape(shape[0], shape[1], group):
            raise CheckpointError(
                f"{path}: tensor {shown(scale.name)} is {scale.dtype} {list(scale.shape)}, expected F32 "
                f"scales of int8 {list(shape)} by rows or by groups of {GROUP} inputs"
            )
        kinds[block.name] = (block.kind, group, block.name in turned)
        kinds[scale.name] = ("unused" if block.kind == "unused" else "vector", None, False)
    files = {file: number for number, file in enumerate(index.files)}
    where = {name: (files[index.tensors[name].file], index.tensors[name].offset) for name in kinds}
    return {name: kinds[name] for name in sorted(kinds, key=where.__getitem__)}


def _transposed(path: Path, index: CheckpointIndex, quantized: list[Block], table: dict[str, Any] | None) -> set[str]:
    """Names of the int8 tensors that are stored transposed: what the metadata mark, or else what the shapes tell."""
    able = {block.name: block.shape[::-1] for block in quantized if may_transpose(block)}
    if table is None:
        return {name for name, shape in able.items() if index.tensors[name].shape == shape}
    marked = {
        name: entry["transposed"] for name, entry in table.items() if isinstance(entry, dict) and "transposed" in entry
    }
    for name, mark in marked.items():
        if mark is not True or name not in able:
            raise CheckpointError(
                f"{path}: metadata 'thl_engine.pages' marks {shown(name)} as transposed "
                f"({shown(mark)}), which this model does not store so"
            )
    return set(marked)


def _page_table(file: Path, info: TensorInfo, entry: object) -> tuple[int, list[int]]:
    """(rows of a page, checksums) of one tensor out of the metadata."""
    rows = info.shape[0] if info.shape else 1
    size, text = (entry.get("rows"), entry.get("crc")) if isinstance(entry, dict) else (None, None)
    if isinstance(size, int) and not isinstance(size, bool) and size > 0 and isinstance(text, str):
        count = -(-rows // size)
        try:
            checksums = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
        except ValueError:
            checksums = []
        if len(text) == 8 * count and len(checksums) == count:
            return size, checksums
    raise CheckpointError(f"{file}: metadata 'thl_engine.pages' has no valid entry for {shown(info.name)}")


def _assemble(
    path: Path,
    index: CheckpointIndex,
    config: Config,
    groups: Mapping[str, tuple[str, int | None, bool]],
    pages: Mapping[str, tuple[int, list[int] | None]],
    layout: str,
    tokenizer: str | None,
) -> Store:
    files = {file: number for number, file in enumerate(index.files)}
    tensors: dict[str, StoredTensor] = {}
    every: list[Page] = []
    for name, (kind, group, transposed) in groups.items():
        info = index.tensors[name]
        size, checksums = pages[name]
        rows = info.shape[0] if info.shape else 1
        row_bytes = info.nbytes // max(rows, 1)
        own = []
        for number, start in enumerate(range(0, rows, size)):
            stop = min(start + size, rows)
            crc = checksums[number] if checksums is not None else None
            place = (files[info.file], info.offset + start * row_bytes, (stop - start) * row_bytes)
            own.append(Page(len(every) + number, name, start, stop, *place, crc))
        every += own
        scales = name + SCALE_SUFFIX if info.dtype == "I8" and name + SCALE_SUFFIX in groups else None
        tensors[name] = StoredTensor(name, kind, info.shape, DTYPES[info.dtype], tuple(own), scales, group, transposed)
    return Store(path, index.files, config, layout, tensors, tuple(every), tokenizer, index)
