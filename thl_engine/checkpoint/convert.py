"""Checkpoints to packed files: `thl quantize`, `thl convert` (from torch.save files) and `thl init`.

All three go through the one writer, chunk by chunk, so memory does not grow with the checkpoint.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from thl_engine.checkpoint.adapter_folder import FOLDERS, adapted_config, layout, write_adapters
from thl_engine.checkpoint.contents import Source
from thl_engine.checkpoint.index import config_beside, read_config
from thl_engine.checkpoint.pack import Progress, write_store
from thl_engine.checkpoint.pickled import Omitted, pickled_checkpoint, read_pickled
from thl_engine.checkpoint.spool import tensor_sources
from thl_engine.checkpoint.store import note_vocabulary_beside, open_store, tokenizer_files
from thl_engine.config import Config, named_config, parse_config
from thl_engine.config.base import check_seed
from thl_engine.errors import CheckpointError, ConfigError, shown
from thl_engine.files import write_file
from thl_engine.models import architecture
from thl_engine.schedule import Block
from thl_engine.text.chat_template import join_files
from thl_engine.text.hrm_tokenizer import CONTINUAL_FILE, find_vocabulary

_log = logging.getLogger("thl_engine")
CONFIGS_INSIDE = ("config", "model_config", "model_args")  # keys under which they keep the configuration
WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which training scripts keep the weights
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
DRAW_ELEMENTS = 1 << 20  # drawn from one random stream; part of what `thl init --seed` means


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    bits: int = 8,
    group: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the int8 packed file of a float checkpoint, with its configuration and tokenizer.

    group is the number of inputs that share a scale, 128; None means one scale a row.
    """
    if bits != 8:
        raise ConfigError(f"bits is {bits}, only 8 is supported")
    with open_store(src) as store:
        _refuse_overwriting(Path(dst), store.files)
        note_vocabulary_beside(Path(dst), store.tokenizer_json)
        write_store(
            dst,
            store.config,
            store.sources(),
            quantize="int8",
            group=group,
            tokenizer=store.tokenizer_json,
            progress=progress,
        )


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    progress: Progress | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> None:
    """Converts a published folder (config.json + pytorch_model.bin) or a torch.save file to safetensors.

    config, as for `init_checkpoint`, takes the place of what is beside the file or in it. dst is one .safetensors
    file that holds configuration and tokenizer too, or else a folder for model.safetensors, config.json and the
    tokenizer's files. Matrices keep their dtype, except that float64 becomes float32; vectors become float32. Nothing
    in the file is run: it is read with weights_only=True. An HRM checkpoint brings the vocabulary that it holds or
    that fits it; TokenizerError where there are only others.
    """
    file, dst = pickled_checkpoint(Path(src)), Path(dst)
    loaded, read = read_pickled(file)
    _refuse_overwriting(dst, read)
    parsed = parse_config(*_configuration(file, loaded)) if config is None else _open_config(config, None)
    sources = tensor_sources(_adopted(file, parsed, _state_dict(file, loaded)), str(file))
    files = _tokenizer_files(file, parsed, loaded)
    tokenizer = join_files(files) if files else None
    _check_left_over(dst, file.parent, files)
    if dst.suffix == ".safetensors":
        note_vocabulary_beside(dst, tokenizer)
        write_store(dst, parsed, sources, tokenizer=tokenizer, progress=progress)
        return
    created = not os.path.exists(dst)
    try:
        dst.mkdir(exist_ok=True)
        write_store(dst / "model.safetensors", parsed, sources, tokenizer=tokenizer, progress=progress)
        for name, text in {"config.json": json.dumps(parsed.to_dict(), indent=1) + "\n", **files}.items():
            if _same(dst / name, file.parent / name):
                continue  # converted in place
            (dst / name).parent.mkdir(exist_ok=True)
            write_file(dst / name, text.encode())
    except BaseException as error:
        if created and os.path.isdir(dst) and not os.listdir(dst):
            dst.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{dst}: cannot write: {error.strerror}") from error
        raise


def init_checkpoint(
    model_type: str | None,
    config: str | os.PathLike[str] | Mapping[str, Any],
    dst: str | os.PathLike[str],
    seed: int = 0,
    quantize: str = "none",
    group: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a freshly initialised model of any size; config is a JSON file, its fields, or a published size's name.

    The weights depend on model_type, config and seed alone.
    """
    parsed = _open_config(config, model_type)
    note_vocabulary_beside(Path(dst), None)
    with _fresh_sources(parsed, architecture(parsed.model_type).blocks(parsed), seed) as sources:
        write_store(dst, parsed, sources, quantize=quantize, group=group, progress=progress)


def init_adapters(
    base: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Writes the folder of a fresh HRM-Gemma on an existing base, which it equals until it is trained.

    config is a JSON file, or fields, with "hrm"; None for the defaults. A relative path of the base is kept relative to
    the folder.
    """
    given: Mapping[str, Any] = {}
    where = "config"
    if config is not None:
        given, where = (config, where) if isinstance(config, Mapping) else read_config(Path(config))
    base, dst = Path(base), Path(dst)
    with open_store(base) as store:
        parsed = adapted_config(given, store.config, where)
    if os.path.exists(dst) and (not os.path.isdir(dst) or os.listdir(dst)):
        raise CheckpointError(f"{dst}: exists and is not an empty folder; adapters are written to a new one")
    adapters = layout()
    blocks = [block for side in FOLDERS for block in adapters.blocks(parsed, side)] + [*adapters.own(parsed)]
    path = str(base) if base.is_absolute() else os.path.relpath(base, dst)
    with _fresh_sources(parsed, blocks, seed) as sources:
        write_adapters(dst, parsed, path, sources, progress)


@contextmanager
def _fresh_sources(config: Config, blocks: Iterable[Block], seed: int) -> Iterator[dict[str, Source]]:
    """Freshly initialised tensors of a model, drawn as their rows are asked for.

    Stretches are drawn side by side, so torch shares none of its operations among threads meanwhile: those that wait
    for work take the processors from those that draw.
    """
    check_seed(seed)
    module = architecture(config.model_type)
    with ThreadPoolExecutor(os.cpu_count() or 1, "init") as pool, _one_thread():
        sources = {}
        for block in blocks:

            def draw(rows: slice, generator: torch.Generator, block: Block = block) -> torch.Tensor:
                return module.initial(config, block, rows, generator)

            sources[block.name] = Source("F32", block.shape, RandomRows(block, seed, draw, pool))
        yield sources


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _open_config(config: str | os.PathLike[str] | Mapping[str, Any], model_type: str | None) -> Config:
    if isinstance(config, Mapping):
        return parse_config(config, model_type)
    name = os.fspath(config)
    if not os.path.exists(name) and not os.path.dirname(name) and not os.path.splitext(name)[1]:
        return named_config(name, model_type)
    fields, where = read_config(Path(config))
    return parse_config(fields, model_type, where)


@dataclass
class RandomRows:
    """Rows of a freshly initialised tensor, the same however they are asked for.

    The tensor is drawn in fixed stretches of rows of about DRAW_ELEMENTS elements, each from a random stream
    of its own, seeded by (seed, tensor name, stretch). So they can be drawn in parallel and in any order.
    """

    block: Block
    seed: int
    draw: Callable[[slice, torch.Generator], torch.Tensor]
    pool: ThreadPoolExecutor
    last: dict[int, torch.Tensor] = field(default_factory=dict)  # a stretch that the next rows may begin in

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        shape = self.block.shape
        if not shape:
            return self._stretch(0, slice(0, 1))
        size = max(1, DRAW_ELEMENTS // max(1, prod(shape[1:])))
        numbers = range(start // size, -(-stop // size))
        spans = {n: slice(n * size, min((n + 1) * size, shape[0])) for n in numbers}
        missing = [n for n in numbers if n not in self.last]
        stretches = self.pool.map(self._stretch, missing, [spans[n] for n in missing])
        drawn = self.last | dict(zip(missing, stretches, strict=True))
        self.last = {numbers[-1]: drawn[numbers[-1]]}
        rows = torch.empty(stop - start, *shape[1:])
        for n, span in spans.items():
            low, high = max(start, span.start), min(stop, span.stop)
            rows[low - start : high - start] = drawn[n][low - span.start : high - span.start]
        return rows

    def _stretch(self, number: int, span: slice) -> torch.Tensor:
        key = f"{self.seed}/{self.block.name}/{number}".encode()
        stream = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        return self.draw(span, torch.Generator().manual_seed(stream))


def _same(one: Path, other: Path) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _refuse_overwriting(dst: Path, sources: tuple[Path, ...]) -> None:
    for file in sources:
        if _same(dst, file):
            raise CheckpointError(f"{dst}: is the file being read; write to another name")


def _check_left_over(dst: Path, source: Path, files: Mapping[str, str]) -> None:
    """Refuses a folder with files of a tokenizer that do not come with the result: they would be taken for its own."""
    if dst.suffix == ".safetensors" or not os.path.isdir(dst) or _same(dst, source):
        return
    left = [name for name in tokenizer_files(dst) if name not in files and os.path.exists(dst / name)]
    if left:
        raise CheckpointError(
            f"{dst}: holds {shown(left[0])} of another model, and {source} has none; take it away, or convert to "
            "a new folder"
        )


def _configuration(file: Path, loaded: object) -> tuple[dict[str, Any], None, str]:
    """From config.json beside the checkpoint, or else from the checkpoint itself, as `parse_config` takes it."""
    found = config_beside(file.parent)
    if found is not None:
        return found[0], None, found[1]
    for key in CONFIGS_INSIDE:
        inside = loaded.get(key) if isinstance(loaded, dict) else None
        inside = inside.fields if isinstance(inside, Omitted) else inside
        if isinstance(inside, dict):
            return inside, None, f"{file}: {key!r}"
    raise ConfigError(
        f"{file.parent / 'config.json'}: no such file, and the checkpoint holds no configuration; put the model's "
        "there, a JSON object of its fields, or name one with --config"
    )


def _tokenizer_files(file: Path, config: Config, loaded: object) -> dict[str, str]:
    """Name -> text of the tokenizer's files that go with a checkpoint."""
    files = tokenizer_files(file.parent)
    if config.model_type != "hrm" or "tokenizer.json" in files:
        return files
    found = find_vocabulary(config.vocab_size, file.parent, str(file), loaded)
    if found is None:
        _log.warning("%s: no vocabulary in it or beside it; text needs its %s", file, CONTINUAL_FILE)
        return {}
    if found.where != str(file.parent / CONTINUAL_FILE):
        _log.warning("%s: the vocabulary is %s", file, found.where)
    return {CONTINUAL_FILE: found.text}


def _adopted(file: Path, config: Config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as the model defines them, where published checkpoints have them otherwise."""
    adopted = architecture(config.model_type).adopt(config, tensors)
    for name in [name for name in tensors if adopted[name] is not tensors[name]][:1]:
        _log.warning("%s: %s was saved in use, of shape %s, and is emptied", file, name, list(tensors[name].shape))
    return adopted


def _state_dict(file: Path, loaded: object) -> dict[str, torch.Tensor]:
    """The weights under their published names."""
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    weights = loaded if isinstance(loaded, dict) else {}
    values = weights.values()
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise CheckpointError(f"{file}: expected a state dict of tensors, or one under {' '.join(map(repr, WRAPPERS))}")
    names = {str(name): tensor for name, tensor in weights.items()}
    for name, tensor in names.items():
        if (
            tensor.layout == torch.strided
            and not tensor.is_meta
            and tensor.nbytes > max(tensor.untyped_storage().nbytes(), 8)
        ):
            raise CheckpointError(
                f"{file}: tensor {shown(name)} repeats fewer bytes to {tensor.nbytes}; save a copy of it"
            )
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names
