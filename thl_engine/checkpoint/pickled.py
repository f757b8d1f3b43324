"""torch.save files and their shards, read without running anything that they name.

A file is looked through before it is loaded: a zip archive holds its records as they are (torch never deflates), and
the pickle in it has so many instructions and names nothing but tensors, containers and a few plain things of training
scripts. Those (numpy numbers, namespaces, paths) are read as stand-ins: none of their own code runs.
"""

import io
import os
import pickletools
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from encodings import normalize_encoding
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch

from thl_engine.checkpoint.index import (
    PICKLE_MAGIC,
    PICKLE_SUFFIXES,
    PICKLED_INDEX,
    names_in,
    pickled_in,
    read_weight_map,
    shard_files,
)
from thl_engine.errors import CheckpointError, said, shown
from thl_engine.files import check_fetched, kind_of, open_regular

OPERATIONS_LIMIT = 1_000_000  # instructions of a pickle: 20,000 tensors; each takes up to 64 bytes
ARCHIVE_MAGIC = PICKLE_MAGIC[0]
LEGACY_PARTS = 5  # pickles before the data in files from before torch 1.6
SHARD = re.compile(r"-\d+-of-\d+\.")
# What a state dict and the record of a run consist of. Others that torch would load allocate what they are told to.
_TORCH = re.compile(
    r"torch\.(\w+Storage|storage\.(Typed|Untyped)Storage|Tensor|Size|device|b?float\w*|u?int\d+|bool|half|double|complex\d+"
    r"|nn\.parameter\.Parameter|_tensor\._rebuild_from_type_v2"
    r"|_utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state))"
)
_PLAIN = frozenset(("collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode"))
# Bytes are pickled as text and an encoding. These encode bytes again, each time to more of them.
_GROWING = frozenset(
    "hex hex_codec base64 base_64 base64_codec bz2 bz2_codec quopri quopri_codec quoted_printable quotedprintable uu "
    "uu_codec zip zlib zlib_codec".split()
)

TORCH_NEEDED = "2.10"  # versions before have known holes in weights_only


class Omitted:
    """Stands for an object of a training script that is not needed; `fields` has the attributes that it was given."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __new__(cls, *_: Any, **__: Any) -> "Omitted":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, dict) else {}


class NumpyType(Omitted):
    """numpy.dtype: the code of a number's type, such as "f8"."""

    def __init__(self, code: object = "", *_: Any) -> None:
        self.code = code if isinstance(code, str) else ""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and ">" in state[1:2]:  # of another byte order: not read
            self.code = ""


def mapping(*_: Any) -> dict[Any, Any]:
    """Stands for a dictionary with a default."""
    return {}


def numpy_number(kind: object = None, content: object = b"") -> Any:
    """numpy's scalar of that type and those bytes, as a number of Python's."""
    if isinstance(kind, NumpyType) and isinstance(content, bytes):
        form = _NUMBERS.get(kind.code)
        if form is not None and struct.calcsize(form) == len(content):
            return struct.unpack(form, content)[0]
    return Omitted()


_NUMBERS = dict(
    f2="<e", f4="<f", f8="<d", i1="<b", i2="<h", i4="<i", i8="<q", u1="<B", u2="<H", u4="<I", u8="<Q", b1="<?"
)
_STANDINS: dict[str, Any] = {
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), Omitted),
    **dict.fromkeys((f"pathlib.{kind}" for kind in ("PosixPath", "WindowsPath", "Path", "PurePosixPath")), Omitted),
    **dict.fromkeys((f"datetime.{kind}" for kind in ("datetime", "date", "timedelta")), Omitted),
    **dict.fromkeys((f"numpy{core}.multiarray.scalar" for core in (".core", "._core")), numpy_number),
    **dict.fromkeys((f"numpy{core}.multiarray._reconstruct" for core in (".core", "._core")), Omitted),
    **dict.fromkeys(("numpy.ndarray", "builtins.int", "builtins.float", "builtins.list", "builtins.dict"), Omitted),
    "numpy.dtype": NumpyType,
    "collections.defaultdict": mapping,
}


def pickled_checkpoint(src: Path) -> Path:
    """The torch.save file, or the index of several, that `src` is or holds. Raises CheckpointError."""
    if kind_of(src, "checkpoint") == "folder":
        found = pickled_in(names_in(src))
        if len(found) == 1:
            return src / found[0]
        listed = f"{len(found)} ({shown(', '.join(found))}); name one of them" if found else "none"
        raise CheckpointError(
            f"{src}: expected pytorch_model.bin, its index.json or one file of {' '.join(PICKLE_SUFFIXES)}, "
            f"found {listed}"
        )
    if src.suffix == ".safetensors":
        raise CheckpointError(f"{src}: is a safetensors file already; it needs no conversion")
    if SHARD.search(src.name) and (src.parent / PICKLED_INDEX).is_file():
        raise CheckpointError(f"{src}: is one of several shards; convert all of them: thl convert {src.parent} OUT")
    return src


def read_pickled(file: Path) -> tuple[Any, tuple[Path, ...]]:
    """What a torch.save file holds, or the tensors of all shards of an index, and the files that were read.

    Tensors are on the CPU, mapped from the file where it is a zip archive. Raises CheckpointError.
    """
    if file.suffix != ".json":
        return _load(file), (file,)
    weight_map = read_weight_map(file)
    files, tensors = shard_files(file, weight_map), {}
    for shard in files:
        held = _load(shard)
        if not isinstance(held, dict):
            raise CheckpointError(f"{shard}: expected a state dict of tensors")
        for name, tensor in held.items():
            if weight_map.get(name) != shard.name:
                raise CheckpointError(f"{shard}: holds {shown(name)}, which {file.name} does not list under it")
            tensors[name] = tensor
    for name, shard_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{file.parent / shard_name}: lacks tensor {shown(name)}, listed in {file.name}")
    return tensors, tuple(files)


def _load(file: Path) -> object:
    if torch.torch_version.TorchVersion(torch.__version__) < TORCH_NEEDED:
        raise CheckpointError(
            f"{file}: torch {torch.__version__} may run code from such a file; install torch {TORCH_NEEDED} or newer"
        )
    try:
        with open_regular(file) as opened:
            archive = opened.read(len(ARCHIVE_MAGIC)) == ARCHIVE_MAGIC
            named = _checked(file, opened, archive)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the file: {error.strerror or said(error)}") from error
    standins: list[Any] = [(_STANDINS[name], name) for name in sorted(named & _STANDINS.keys())]
    try:
        with torch.serialization.safe_globals(standins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read the file: {error.strerror or said(error)}") from error
    except Exception as error:  # damaged files make torch.load raise nearly anything
        reason = said(error)
        if "weights_only" in str(error) or "WeightsUnpickler" in str(error):
            reason = "holds more than tensors and plain values, which may run code when loaded; it is refused"
        raise _unusable(file, f"{reason}") from error


def _checked(file: Path, opened: BinaryIO, archive: bool) -> set[str]:
    """What the pickles of a torch.save file name. Raises CheckpointError for what torch would not have written."""
    opened.seek(0)
    start = opened.read(64)
    check_fetched(file, start)
    if not start.startswith(PICKLE_MAGIC):
        raise _unusable(file, f"it begins with {shown(start[:8])}")
    opened.seek(0)
    named: set[str] = set()
    try:
        for pickle in _pickles(file, opened, archive):
            named |= _named(file, pickle)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle raises nearly anything
        raise _unusable(file, f"{said(error)}") from error
    refused = sorted(name for name in named if not (name in _PLAIN or name in _STANDINS or _TORCH.fullmatch(name)))
    if refused:
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise _unusable(
            file,
            f"holds {shown(refused[0])}{more}, more than tensors and plain "
            "values, which may run code when loaded; save the state dict alone",
        )
    return named


def _pickles(file: Path, opened: BinaryIO, archive: bool) -> Iterator[BinaryIO]:
    """The pickles of a torch.save file, of whichever age, each to be read to its end."""
    if not archive:
        for _ in range(LEGACY_PARTS):  # each follows where the one before ended
            yield opened
        return
    size = os.fstat(opened.fileno()).st_size
    with zipfile.ZipFile(opened) as records_of:
        records = records_of.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise _unusable(
                    file,
                    f"{shown(record.filename)} in it is compressed, which "
                    "torch.save never does; unpack it and save it anew",
                )
        if sum(record.file_size for record in records) > size:
            raise _unusable(file, "its records are larger than the file")
        for record in records:
            if PurePath(record.filename).suffix == ".pkl":
                yield io.BytesIO(records_of.read(record))


def _unusable(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a usable torch.save file: {reason}")


def _named(file: Path, pickle: BinaryIO) -> set[str]:
    """What one pickle would import, as "module.name", found without importing it."""
    named, texts = set(), set()
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if number == OPERATIONS_LIMIT:
            raise _unusable(file, f"more than {OPERATIONS_LIMIT} instructions; save the weights alone")
        if operation.name in ("GLOBAL", "INST"):
            named.add(_python_3(*str(argument).split(" ", 1)))
        elif operation.name == "STACK_GLOBAL":  # torch writes an older form, and reads no other
            raise _unusable(file, "pickled in a form that torch does not write")
        elif isinstance(argument, str) and len(argument) < 24:
            texts.add(normalize_encoding(argument).lower())
    if "_codecs.encode" in named and texts & _GROWING:
        named.add("_codecs.encode, to more than it was given")
    return named


def _python_3(module: str, name: str = "") -> str:
    """The name of what torch takes a name of Python 2 for, in which its files are written."""
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, name])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"
