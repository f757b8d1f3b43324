"""Damaged models: headers and data, packed metadata, shards, configurations, adapters, pickles."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz.kinds import GEMMA, SMALL, THL, Cases, any_of, kind, open_and_read, parts, plain, whole
from fuzz.mutations import damaged, edited
from safetensors.torch import save_file

from thl_engine.checkpoint.convert import convert_checkpoint, init_adapters, init_checkpoint
from thl_engine.checkpoint.index import read_index, read_tensor
from thl_engine.checkpoint.pack import metadata_checksum
from thl_engine.checkpoint.pickled import read_pickled
from thl_engine.config import CONFIGS, parse_config
from thl_engine.models import architecture

FIELDS = {name: [*(field.name for field in fields(config)), *config.ignored] for name, config in CONFIGS.items()}


@kind("safetensors")
def safetensors(folder: Path) -> Cases:
    file = plain(folder)
    content, (header, data) = file.read_bytes(), parts(file)

    def make(random: Random) -> bytes:
        if random.randrange(3):
            return whole(edited(random, header, [*header, "__metadata__", "dtype"]), data)
        return damaged(random, content, 600)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        for info in read_index(file).tensors.values():
            read_tensor(info)
        open_and_read(folder)

    return make, check


def packed(folder: Path, quantize: str) -> Cases:
    file = folder / "model.safetensors"
    init_checkpoint("thl", THL, file, quantize=quantize)
    content, (header, data) = file.read_bytes(), parts(file)
    metadata = header["__metadata__"]
    config, pages = json.loads(metadata["thl_engine.config"]), json.loads(metadata["thl_engine.pages"])

    def signed(**changes: Any) -> bytes:
        strings = metadata | {f"thl_engine.{name}": json.dumps(value) for name, value in changes.items()}
        strings["thl_engine.checksum"] = f"{metadata_checksum(strings):08x}"
        return whole(header | {"__metadata__": strings}, data)

    def make(random: Random) -> bytes:
        match random.randrange(4):
            case 0:
                return signed(config=edited(random, config, FIELDS["thl"]))
            case 1:
                return signed(pages=edited(random, pages, ["transposed", "group"]))
            case 2:
                return whole(edited(random, header, list(header)), data)
        return damaged(random, content)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        open_and_read(file)

    return make, check


kind("packed")(lambda folder: any_of(folder, {name: partial(packed, quantize=name) for name in ("none", "int8")}))


@kind("shards")
def shards(folder: Path) -> Cases:
    file = plain(folder)
    tensors = {name: read_tensor(info) for name, info in read_index(file).tensors.items()}
    file.unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, folder / f"{number}.safetensors")
        torch.save({name: tensors[name] for name in names}, folder / f"{number}.bin")
        weight_map |= dict.fromkeys(names, f"{number}")
    index = {"metadata": {}, "weight_map": weight_map}

    def make(random: Random) -> tuple[str, Any]:
        case = edited(random, index, ["weight_map", "0", "1", *tensors])
        return random.choice(["model.safetensors", "pytorch_model.bin"]), case

    def check(case: tuple[str, Any]) -> None:
        name, index = case
        path, suffix = folder / f"{name}.index.json", Path(name).suffix
        path.write_text(json.dumps(index).replace('"0"', f'"0{suffix}"').replace('"1"', f'"1{suffix}"'))
        try:
            open_and_read(folder) if suffix == ".safetensors" else read_pickled(path)
        finally:
            path.unlink()

    return make, check


def configurations(model_type: str) -> Cases:
    document = parse_config(SMALL[model_type], model_type).to_dict()  # all fields, for each to be edited
    names = [*FIELDS[model_type], "text_config", "quantization_config", "rope_parameters", "rope_scaling"]

    def make(random: Random) -> Any:
        return edited(random, document if random.randrange(2) else {"text_config": document}, names)

    def check(values: Any) -> None:
        config = parse_config(values, model_type) if isinstance(values, dict) else parse_config(values)
        model = architecture(config.model_type)
        assert sum(block.numel for block in model.blocks(config)) > 0
        model.aliases(config)
        model.walk(config)

    return make, check


for model_type in CONFIGS:
    kind(f"configuration {model_type}", share=2)(lambda folder, model_type=model_type: configurations(model_type))


@kind("config.json")
def config_files(folder: Path) -> Cases:
    plain(folder)
    file = folder / "config.json"
    content = file.read_bytes()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        open_and_read(folder)

    return lambda random: damaged(random, content), check


@kind("adapters")
def adapters(folder: Path) -> Cases:
    init_checkpoint("gemma3n", GEMMA, folder / "base.safetensors")
    model = folder / "adapters"
    init_adapters(folder / "base.safetensors", model, {"hrm": SMALL["hrm_gemma3n"]["hrm"]})
    files = [model / "config.json", model / "l_adapter/adapter_config.json", model / "h_adapter/adapter_config.json"]
    documents = {file: json.loads(file.read_text()) for file in files}
    tensors = model / "l_adapter/adapter_model.safetensors"
    header, data = parts(tensors)
    names = ["use_dora", "rank_pattern", "base_model", "hrm", "init_lora_weights"]

    def make(random: Random) -> tuple[Path, bytes]:
        if random.randrange(4) == 0:
            return tensors, whole(edited(random, header, list(header)), data)
        file = random.choice(files)
        return file, json.dumps(edited(random, documents[file], names)).encode()

    def check(case: tuple[Path, bytes]) -> None:
        file, content = case
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            open_and_read(model)
        finally:
            file.write_bytes(before)

    return make, check


def pickles(folder: Path, legacy: bool) -> Cases:
    file = plain(folder)
    tensors = {name: read_tensor(info) for name, info in read_index(file).tensors.items()}
    file.unlink()
    source = folder / "pytorch_model.bin"
    few = dict(list(tensors.items())[:3])
    torch.save({"model": few, "args": [1, 2.0, "x", {3}]}, source, _use_new_zipfile_serialization=not legacy)
    content = source.read_bytes()
    end = content.index(b"args") + 200  # the pickle; after it come the numbers, any of which are sound

    def make(random: Random) -> bytes:
        return damaged(random, content, random.choice([end, None]))

    def check(content: bytes) -> None:
        source.write_bytes(content)
        read_pickled(source)
        convert_checkpoint(source, folder / "out.safetensors")

    return make, check


kind("pickles")(
    lambda folder: any_of(folder, {"zip": partial(pickles, legacy=False), "bare": partial(pickles, legacy=True)})
)
