"""Writer of the packed file: an ordinary safetensors file laid out for direct reads of single pages.

Layout, in the order of the bytes:

  header          padded with spaces so that the data section begins on a 4,096-byte boundary
  vectors         norms, biases and the scales of int8 tensors, float32, one after the other
  matrices,       each from a 4,096-byte boundary, in the order in which the schedule first uses them,
  tables          under the published name; int8 rows (or columns, see "transposed"), or floats as they came
  unused          tensors that take part in nothing, and their scales

safetensors allows no holes, so the gaps before boundaries are U8 tensors named `__padding__.N`. A tensor is
cut into pages of a fixed number of rows; they begin on boundaries too, unless the length of a row forbids it.
Metadata (strings):

  thl_engine.format     "1"
  thl_engine.config     JSON of the configuration, with model_type
  thl_engine.pages      JSON: name -> {"rows": rows of a page, "group": inputs that share a scale or null,
                        "crc": CRC32C of each page's rows without padding, 8 hex digits a page,
                        "transposed": true where the rows are the columns of the published matrix}
  thl_engine.tokenizer  tokenizer.json or a character vocabulary, if there is one
  thl_engine.checksum   CRC32C of the strings above

Files are written in chunks of rows under a temporary name and renamed when complete.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import gcd, prod
from pathlib import Path

import torch

from thl_engine.checkpoint.checksum import crc32c
from thl_engine.checkpoint.contents import (
    FLOATS,
    Source,
    check_counts,
    check_repeats,
    check_tensors,
    rows_of_source,
    split_joined,
    without_aliases,
)
from thl_engine.checkpoint.index import DTYPES
from thl_engine.checkpoint.quant import GROUP, quantize_rows, scale_shape
from thl_engine.config import Config
from thl_engine.errors import CheckpointError, ConfigError, shown
from thl_engine.files import ALIGNMENT, TEXT_LIMIT, replacing, write_at
from thl_engine.models import architecture
from thl_engine.schedule import Block

FORMAT = "1"
# About the size of a matrix's page. Milliseconds a token of thl-default (174 M, int8, batch 1, 2-core AMD EPYC Zen 5)
# with pages of 1, 2, 4, 8, 16, 32 MiB: resident 5.0 4.8 4.6 4.5 4.4 4.4, streamed within 128 MiB 6.1 5.8 5.5 5.5 5.3
# 5.4. Larger pages gain no more, and the ring takes a few of them.
PAGE_BYTES = 8 << 20
TABLE_PAGE_BYTES = 16 << 10  # least size of a table's page: one is read for each token
CHUNK_ELEMENTS = 8 << 20  # elements converted at a time, 32 MiB as float32, if a page is not larger
COLUMN_CHUNKS = 4  # chunks' elements taken at a time of a matrix stored by columns, which is read anew for each time
PADDING = "__padding__."
SCALE_SUFFIX = ".scale"

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True)
class Entry:
    """A tensor's place in the packed file. `offset` counts from the start of the data section."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    page_rows: int
    group: int | None = None
    transposed: bool = False
    offset: int = 0

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def pages(self) -> int:
        return -(-self.rows // self.page_rows)


def page_rows(kind: str, rows: int, row_bytes: int) -> int:
    """Rows of a page. Vectors are one page; others end on boundaries unless that makes them far too large."""
    if kind == "vector" or row_bytes == 0:
        return max(rows, 1)
    step = ALIGNMENT // gcd(row_bytes, ALIGNMENT)  # so many rows end on a boundary
    if kind == "table":
        if step * row_bytes > 16 * TABLE_PAGE_BYTES:
            step = 1
        steps = -(-TABLE_PAGE_BYTES // (step * row_bytes))
    else:
        if step * row_bytes > 4 * PAGE_BYTES:
            step = 1
        steps = max(1, PAGE_BYTES // (step * row_bytes))
    return min(step * steps, max(rows, 1))


def write_store(
    path: str | os.PathLike[str],
    config: Config,
    sources: Mapping[str, Source],
    *,
    quantize: str = "none",
    group: int | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the packed file of a model.

    sources hold every tensor of the model; quantize is "none" (matrices keep their dtype)
    or "int8" with a scale a row, or, with group=128, one for each 128 inputs. Takes memory for two chunks of rows
    and one tensor's scales. On any failure nothing is left at `path` that was not there before.
    """
    path = Path(path)
    plan = plan_pack(config, sources, quantize=quantize, group=group, tokenizer=tokenizer, where=str(path))
    with replacing(path, plan.file_bytes) as descriptor:
        plan.write(descriptor, progress)


def write_tensors(
    path: Path,
    sources: Mapping[str, Source],
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an ordinary safetensors file of the sources as they are, a chunk of rows at a time.

    Wide elements come first, so that all are aligned; otherwise the order is that of the sources.
    """
    entries, position = [], 0
    for name, source in sorted(sources.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize):
        entries.append(replace(_entry(name, "matrix", source.dtype, source.shape), offset=position))
        position += entries[-1].nbytes
    header = {"__metadata__": {"format": "pt", **(metadata or {})}} | {
        e.name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.offset, e.offset + e.nbytes]}
        for e in entries
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data = 8 + len(text)
    with replacing(path, data + position) as descriptor, ThreadPoolExecutor(1, "pack-source") as ahead:
        write_at(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for entry in entries:
            for start, rows in _chunks(entry, sources[entry.name], ahead):
                at = entry.offset + start * entry.row_bytes
                write_at(descriptor, as_bytes(rows), data + at)
                if progress:
                    progress(at + as_bytes(rows).nbytes, position)


@dataclass(frozen=True)
class PackPlan:
    """Where everything goes, known before anything is written."""

    where: str
    sources: Mapping[str, Source] = field(repr=False)
    quantized: bool
    config: str
    tokenizer: str | None
    entries: tuple[Entry, ...]
    padding: tuple[tuple[int, int], ...]  # (offset, bytes)
    data_bytes: int

    @property
    def file_bytes(self) -> int:
        return len(self.header({})) + self.data_bytes

    def header(self, checksums: Mapping[str, list[int]]) -> bytes:
        """Length prefix and JSON, up to the data; of the same size whatever the checksums."""
        pages = {
            e.name: {
                "rows": e.page_rows,
                "group": e.group,
                "crc": "".join(f"{crc:08x}" for crc in checksums.get(e.name, [0] * e.pages)),
                **({"transposed": True} if e.transposed else {}),
            }
            for e in self.entries
        }
        metadata = {
            "format": "pt",
            "thl_engine.format": FORMAT,
            "thl_engine.config": self.config,
            "thl_engine.pages": json.dumps(pages, separators=(",", ":")),
        }
        if self.tokenizer is not None:
            metadata["thl_engine.tokenizer"] = self.tokenizer
        metadata["thl_engine.checksum"] = f"{metadata_checksum(metadata):08x}"
        spans = [(e.offset, e.nbytes, e.name, e.dtype, list(e.shape)) for e in self.entries]
        spans += [(at, size, f"{PADDING}{n}", "U8", [size]) for n, (at, size) in enumerate(self.padding)]
        tensors = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            for at, size, name, dtype, shape in sorted(spans)
        }
        header = {"__metadata__": metadata, **tensors}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        if len(text) > TEXT_LIMIT:
            raise CheckpointError(f"{self.where}: needs a header of {len(text)} bytes, over the limit of {TEXT_LIMIT}")
        return len(text).to_bytes(8, "little") + text

    def write(self, descriptor: int, progress: Progress | None = None) -> None:
        """Fills an empty file. The header comes last, so that an unfinished file is not readable."""
        data = len(self.header({}))
        os.ftruncate(descriptor, data + self.data_bytes)
        checksums: dict[str, list[int]] = {}
        done = 0
        scale_entries = {e.name: e for e in self.entries if e.name not in self.sources}
        with ThreadPoolExecutor(1, "pack-source") as ahead:
            for entry in self.entries:
                if entry.name in scale_entries:
                    continue  # written with the tensor that they scale
                sums: list[int] = []
                scale_parts: list[torch.Tensor] = []
                source = self.sources[entry.name]
                for start, rows in _chunks(entry, _columns(source) if entry.transposed else source, ahead):
                    stored, scales = _encode(rows, entry, start, self)
                    if scales is not None:
                        scale_parts.append(scales)
                    buffer = as_bytes(stored)
                    sums += page_checksums(buffer, entry.page_rows * entry.row_bytes)
                    write_at(descriptor, buffer, data + entry.offset + start * entry.row_bytes)
                    done += len(buffer)
                    if progress:
                        progress(done, self.data_bytes)
                checksums[entry.name] = sums
                scale_entry = scale_entries.get(entry.name + SCALE_SUFFIX)
                if scale_entry:
                    buffer = as_bytes(torch.cat(scale_parts))
                    checksums[scale_entry.name] = page_checksums(buffer, scale_entry.nbytes)
                    write_at(descriptor, buffer, data + scale_entry.offset)
                    done += len(buffer)
        write_at(descriptor, self.header(checksums), 0)
        if progress:
            progress(self.data_bytes, self.data_bytes)


def plan_pack(
    config: Config,
    sources: Mapping[str, Source],
    *,
    quantize: str,
    group: int | None,
    tokenizer: str | None,
    where: str,
) -> PackPlan:
    """Checks options and sources and lays out the file."""
    if quantize not in ("none", "int8"):
        raise ConfigError(f"quantize is {quantize!r}, expected 'none' or 'int8'")
    if group is not None and (group != GROUP or quantize != "int8"):
        raise ConfigError(f"group is {group!r}, expected {GROUP} together with quantize 'int8', or none")
    check_counts(config, len(sources), where)
    blocks = architecture(config.model_type).blocks(config)
    sources = split_joined(config, sources, rows_of_source)
    check_repeats(config, sources, where)
    sources = without_aliases(config, sources)
    check_tensors(blocks, sources, config.model_type, where)
    present = [block for block in blocks if block.name in sources]
    return _lay_out(present, sources, quantize, group, json.dumps(config.to_dict()), tokenizer, where)


def metadata_checksum(metadata: Mapping[str, str]) -> int:
    """CRC32C over the strings that page checksums do not cover."""
    keys = ("thl_engine.format", "thl_engine.config", "thl_engine.pages", "thl_engine.tokenizer")
    return crc32c("\n".join(metadata.get(key, "") for key in keys).encode("utf-8", "surrogatepass"))


def page_checksums(buffer: memoryview, page_bytes: int) -> list[int]:
    """CRC32C of each page of `page_bytes` bytes; the last may be shorter."""
    return [crc32c(buffer[at : at + page_bytes]) for at in range(0, len(buffer), page_bytes)]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, row-major; shares memory if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _lay_out(
    blocks: Sequence[Block],
    sources: Mapping[str, Source],
    quantize: str,
    group: int | None,
    config: str,
    tokenizer: str | None,
    where: str,
) -> PackPlan:
    vectors: list[Entry] = []
    scales: list[Entry] = []
    paged: list[Entry] = []
    unused: list[Entry] = []
    for block in blocks:
        dtype = _stored_dtype(block, sources[block.name].dtype, quantize)
        quantized = dtype == "I8" and sources[block.name].dtype != "I8"
        transposed = quantized and may_transpose(block)
        entry = _entry(block.name, block.kind, dtype, block.shape[::-1] if transposed else block.shape)
        section = vectors if block.kind == "vector" else unused if block.kind == "unused" else paged
        if quantized:
            entry = replace(entry, group=group, transposed=transposed)
            kind = "unused" if block.kind == "unused" else "vector"
            scale = _entry(block.name + SCALE_SUFFIX, kind, "F32", scale_shape(entry.shape[0], entry.shape[1], group))
            (unused if kind == "unused" else scales).append(scale)
        section.append(entry)
    placed: list[Entry] = []
    padding: list[tuple[int, int]] = []
    position = 0
    for entry in (*vectors, *scales, *paged, *unused):
        if entry.kind != "vector" and position % ALIGNMENT:
            padding.append((position, -position % ALIGNMENT))
            position += -position % ALIGNMENT
        placed.append(replace(entry, offset=position))
        position += entry.nbytes
    if position % ALIGNMENT:
        padding.append((position, -position % ALIGNMENT))
        position += -position % ALIGNMENT
    return PackPlan(where, sources, quantize == "int8", config, tokenizer, tuple(placed), tuple(padding), position)


def may_transpose(block: Block) -> bool:
    """Whether int8 files keep the block's columns as rows. The shape has to tell where another tool has dropped the
    metadata, so square matrices stay as they are."""
    return block.transposed and block.shape != block.shape[::-1]


def _columns(source: Source) -> Source:
    """The transpose of a matrix, which is read anew for each chunk of its columns: it need not fit in memory."""
    height, width = source.shape
    step = max(1, CHUNK_ELEMENTS // max(1, width))

    def rows(start: int, stop: int) -> torch.Tensor:
        out = torch.empty(stop - start, height, dtype=DTYPES[source.dtype])
        for first in range(0, height, step):
            out[:, first : first + step] = source.rows(first, min(first + step, height))[:, start:stop].T
        return out

    return Source(source.dtype, (width, height), rows)


def _entry(name: str, kind: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    entry = Entry(name, kind, dtype, shape, page_rows=1)
    return replace(entry, page_rows=page_rows(kind, entry.rows, entry.row_bytes))


def _stored_dtype(block: Block, dtype: str, quantize: str) -> str:
    if dtype not in FLOATS:
        return dtype
    if block.kind == "vector":
        return "F32"
    if quantize == "int8" and len(block.shape) == 2 and not block.exact:
        return "I8"
    return "F32" if dtype == "F64" else dtype


def _chunks(entry: Entry, source: Source, ahead: ThreadPoolExecutor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of whole pages; the next chunk is read while this one is converted."""
    page = entry.page_rows
    elements = CHUNK_ELEMENTS * (COLUMN_CHUNKS if entry.transposed else 1)
    step = page * max(1, elements // max(1, page * prod(entry.shape[1:])))
    starts = range(0, entry.rows, step)
    pending = ahead.submit(source.rows, 0, min(step, entry.rows))
    for start in starts:
        rows = pending.result()
        following = start + step
        if following < entry.rows:
            pending = ahead.submit(source.rows, following, min(following + step, entry.rows))
        yield start, rows


def _encode(rows: torch.Tensor, entry: Entry, start: int, plan: PackPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as stored, and their scales where the entry is quantised."""
    scales = None
    if entry.dtype == "I8" and rows.is_floating_point():
        rows, scales = quantize_rows(rows, entry.group)
    finite = (rows if scales is None else scales).isfinite()
    if plan.quantized and not finite.all():
        row = start + int((~finite).nonzero()[0, 0]) if finite.dim() else start
        line = "column" if entry.transposed else "row"
        raise CheckpointError(
            f"{plan.where}: tensor {shown(entry.name)} cannot be quantised: NaN or infinity in {line} {row}"
        )
    return rows.to(DTYPES[entry.dtype]), scales
