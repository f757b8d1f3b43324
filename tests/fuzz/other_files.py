"""Damaged saved contexts and training runs, and folders of files that are not what their names say."""

import os
import shutil
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz.kinds import SMALL, Cases, any_of, kind, open_and_read, parts, plain, whole
from fuzz.mutations import damaged, edited, text
from safetensors.torch import load, save

from thl_engine.checkpoint.convert import convert_checkpoint, init_adapters, init_checkpoint
from thl_engine.checkpoint.index import config_beside
from thl_engine.checkpoint.store import tokenizer_beside
from thl_engine.config import CONFIGS
from thl_engine.engine.engine import Engine

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
DTYPES = [torch.float32, torch.int64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float64, torch.uint8]
DTYPES += [torch.complex64, torch.float8_e4m3fn, torch.uint16]
VALUES = [0, 1, -1, 7, 60, 2**31, 2**62, -(2**63), float("nan"), float("inf"), -1e30]


def other_tensor(random: Random, like: torch.Tensor) -> torch.Tensor:
    """A tensor of another type, shape or other values."""
    shape = list(like.shape)
    if random.randrange(2):
        for _ in range(random.randint(1, 2)):
            match random.randrange(3):
                case 0:
                    shape.insert(random.randint(0, len(shape)), random.choice([0, 1, 2, 3]))
                case 1 if shape:
                    del shape[random.randrange(len(shape))]
                case _ if shape:
                    shape[random.randrange(len(shape))] = random.choice([0, 1, 2, 9, 17, 65])
    dtype = random.choice(DTYPES) if random.randrange(2) else like.dtype
    return torch.full(shape, random.choice(VALUES), dtype=torch.float64).to(dtype)


def other_tensors(random: Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = dict(tensors)
    for _ in range(random.randint(1, 2)):
        name = random.choice(list(out) or [""])
        match random.randrange(8):
            case 0:
                out.pop(name, None)
            case 1:
                out[random.choice(["timestep", "memory", "x" * 300, "", "é\n"])] = torch.zeros(
                    random.choice([(), 1, 3])
                )
            case _ if name in out:
                out[name] = other_tensor(random, out[name])
    return out


def states(folder: Path, model_type: str) -> Cases:
    config, path = SMALL[model_type], folder / "model.safetensors"
    if model_type == "hrm_gemma3n":
        init_checkpoint("gemma3n", SMALL["gemma3n"], folder / "base.safetensors")
        path = folder / "adapters"
        init_adapters(folder / "base.safetensors", path, {"hrm": config["hrm"]})
    else:
        extra = dict(max_seq_len=8, max_answer_len=2, mem_slots=2) if model_type == "him" else {}
        init_checkpoint(model_type, config | extra, path)
    engine = Engine.from_pretrained(path, backend="reference", device="cpu", memory_budget="1GiB")
    file, again, state = folder / "state.safetensors", folder / "again.safetensors", engine.new_state()
    for token in (1, 2, 3):
        _, state = engine.step(torch.tensor([token]), state)
    engine.save_state(state, file)
    content, (header, data), tensors = file.read_bytes(), parts(file), load(file.read_bytes())
    metadata = header["__metadata__"]
    names = [*header, "dtype", "shape", "data_offsets"]

    def make(random: Random) -> bytes:
        match random.randrange(6):
            case 0:
                return damaged(random, content)
            case 1:
                return whole(edited(random, header, names), data)
            case 2:
                own = {"thl_engine.config": metadata["thl_engine.config"].replace("8", str(random.choice([9, "[", 8])))}
                return whole(header | {"__metadata__": metadata | own}, data)
        return save(other_tensors(random, tensors), metadata if random.randrange(2) else None)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        state = engine.load_state(file)
        _, state = engine.step(torch.ones(state.batch_size, dtype=torch.int64), state)
        engine.save_state(state, again)
        engine.load_state(again)

    return make, check


kind("contexts")(lambda folder: any_of(folder, {name: partial(states, model_type=name) for name in CONFIGS}))


@kind("folders")
def folders(folder: Path) -> Cases:
    """Folders as downloads, caches and mistakes leave them."""
    store, place = folder / "store", folder / "models--a--b"
    store.mkdir()
    plain(store)
    torch.save({"x": torch.zeros(3)}, store / "pytorch_model.bin")
    (store / "vocab.json").write_text('{"a": 0, "b": 1}')
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.json", "tokenizer.json", "l_adapter"]
    names += ["model.safetensors.index.json", "hrm.safetensors", "tokenizer_config.json", "additional_chat_templates"]
    names += ["chat_template.jinja", "generation_config.json", "other.safetensors", "\udcff.safetensors", ".x.partial"]
    real = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.json"]

    def make(random: Random) -> list[tuple[str, str, Any]]:
        out = [
            (name, random.choice(["copy", "copy", "link"]), None) for name in random.sample(real, random.randint(1, 4))
        ]
        for _ in range(random.randint(1, 3)):
            name = random.choice(names)
            sort = random.choice(["pointer", "loop", "dangling", "outside", "folder", "pipe", "empty", "bytes", "null"])
            cut = POINTER[: random.choice([9, 30, len(POINTER)])]
            given = {"pointer": cut, "bytes": damaged(random, POINTER), "dangling": text(random, 5) or "x"}.get(sort)
            given = "x" * 300 if sort == "dangling" and random.randrange(4) == 0 else given
            out.append((name, sort, given))
        return out

    def put(at: Path, sort: str, given: Any) -> None:
        blob = place / "blobs" / at.name
        match sort:
            case "copy" | "link" if (store / at.name).exists():
                shutil.copy(store / at.name, blob if sort == "link" else at)
                if sort == "link":
                    at.symlink_to(os.path.relpath(blob, at.parent))
            case "loop":
                at.symlink_to(at.name)
            case "dangling":
                at.symlink_to(given.replace("\0", "") or "x")
            case "outside":
                at.symlink_to("/etc/hostname")
            case "null":
                at.symlink_to("/dev/null")
            case "folder":
                at.mkdir()
                (at / "x.jinja").write_bytes(b"\xff")
            case "pipe":
                os.mkfifo(at)
            case _:
                at.write_bytes(given or b"")

    def check(case: list[tuple[str, str, Any]]) -> None:
        snapshot = place / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        (place / "blobs").mkdir()
        try:
            for name, sort, given in dict((name, (name, sort, given)) for name, sort, given in case).values():
                try:
                    put(snapshot / name, sort, given)
                except (OSError, UnicodeError):
                    pass  # names that this system does not have
            for reads in (open_and_read, config_beside, tokenizer_beside, convert):
                try:
                    reads(snapshot)
                except Exception as error:
                    if not is_clean(error):
                        raise
        finally:
            shutil.rmtree(place)

    def convert(snapshot: Path) -> None:
        convert_checkpoint(snapshot, folder / "out.safetensors")

    return make, check


def is_clean(error: Exception) -> bool:
    from thl_engine.errors import MESSAGE_LIMIT, EngineError

    return isinstance(error, EngineError) and len(str(error)) <= MESSAGE_LIMIT and str(error).isprintable()
