"""torch.save files as people have them: shards, training scripts' extras, and archives that torch never writes."""

import argparse
import datetime
import json
import logging
import os
import pathlib
import struct
import zipfile
from collections import Counter, defaultdict

import numpy
import pytest
import torch
from conftest import SMALL, random_weights

from thl_engine.checkpoint import pickled
from thl_engine.checkpoint.convert import convert_checkpoint
from thl_engine.checkpoint.index import read_index
from thl_engine.checkpoint.pickled import read_pickled
from thl_engine.checkpoint.store import open_store
from thl_engine.errors import MESSAGE_LIMIT, CheckpointError

CONFIG = SMALL.to_dict()
WEIGHTS = random_weights(SMALL)
INDEX = "pytorch_model.bin.index.json"


def refusal(call):
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert len(message) <= MESSAGE_LIMIT and message.isprintable()
    return message


def opened(path):
    store = open_store(path)
    assert all(torch.equal(store.read(name), tensor) for name, tensor in WEIGHTS.items())


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(WEIGHTS)
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for i, file in enumerate(files):
        torch.save({name: WEIGHTS[name] for name in names[i::2]}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards(shards, tmp_path):
    message = refusal(lambda: read_index(shards))
    assert f"convert it: thl convert {shards} OUT" in message  # and that works
    convert_checkpoint(shards, tmp_path / "out.safetensors")
    convert_checkpoint(shards / INDEX, tmp_path / "out")
    opened(tmp_path / "out.safetensors")
    opened(tmp_path / "out")
    shard = shards / "pytorch_model-00001-of-00002.bin"
    message = refusal(lambda: convert_checkpoint(shard, tmp_path / "out"))
    assert f"convert all of them: thl convert {shards} OUT" in message


def test_an_index_left_beside_a_whole_file(shards, tmp_path):
    torch.save(WEIGHTS, shards / "pytorch_model.bin")
    for file in shards.glob("*-of-*"):
        file.unlink()
    convert_checkpoint(shards, tmp_path / "out.safetensors")
    opened(tmp_path / "out.safetensors")


def test_shards_that_do_not_fit_their_index(shards, tmp_path):
    second = shards / "pytorch_model-00002-of-00002.bin"
    held = torch.load(second, weights_only=True)
    torch.save(held | {"more": torch.zeros(1)}, second)
    assert "'more', which" in refusal(lambda: read_pickled(shards / INDEX))
    torch.save(dict(list(held.items())[1:]), second)
    assert "lacks tensor" in refusal(lambda: read_pickled(shards / INDEX))
    torch.save([1], second)
    assert "expected a state dict" in refusal(lambda: read_pickled(shards / INDEX))
    (tmp_path / "elsewhere").write_bytes(second.read_bytes())
    second.unlink()
    second.symlink_to(tmp_path / "elsewhere")
    assert "a link out of the folder" in refusal(lambda: read_pickled(shards / INDEX))
    (shards / INDEX).unlink()
    message = refusal(lambda: read_index(shards))
    # Of a long path the message may keep the end alone.
    assert "holds 2 torch.save files" in message and "thl convert " in message
    assert f"{shards.name}/NAME OUT" in message


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_keep_beside_the_weights(tmp_path, legacy):
    extras = {
        "best": numpy.float64(1.5),
        "steps": numpy.int32(-7),
        "done": numpy.bool_(True),
        "curve": numpy.arange(3.0),
        "args": argparse.Namespace(lr=1, out=pathlib.Path("x")),
        "when": datetime.datetime(2026, 1, 1),
        "milestones": Counter([3]),
        "groups": defaultdict(list, a=[1]),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "seen": {1, 2}, "dtype": torch.bfloat16},
    }
    file = tmp_path / "last.pt"
    torch.save({"model": WEIGHTS, **extras}, file, _use_new_zipfile_serialization=not legacy)
    loaded, read = read_pickled(file)
    assert read == (file,) and all(torch.equal(loaded["model"][name], tensor) for name, tensor in WEIGHTS.items())
    assert (loaded["best"], loaded["steps"], loaded["done"]) == (1.5, -7, True)
    assert loaded["args"].fields["lr"] == 1 and isinstance(loaded["curve"], pickled.Omitted)
    assert loaded["milestones"] == {3: 1} and loaded["groups"] == {"a": [1]} and loaded["optimizer"]["seen"] == {1, 2}


def test_a_namespace_may_hold_the_configuration(tmp_path):
    torch.save({"model": WEIGHTS, "config": argparse.Namespace(**CONFIG)}, tmp_path / "last.pt")
    convert_checkpoint(tmp_path / "last.pt", tmp_path / "out.safetensors")
    opened(tmp_path / "out.safetensors")


class Ours:
    pass


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


class Buffer:
    def __reduce__(self):
        return bytearray, (10**12,)


@pytest.mark.parametrize(
    ("value", "name"),
    [(Ours(), "Ours"), (Harmful(), "posix.mkdir"), (Buffer(), "builtins.bytearray"), (print, "builtins.print")],
)
def test_what_is_refused_is_named(tmp_path, value, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "extra": value}, tmp_path / "last.pt")
    message = refusal(lambda: read_pickled(tmp_path / "last.pt"))
    assert name in message and "may run code" in message and not (tmp_path / "harmed").exists()


def archive(path, pickle, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", pickle)
        out.writestr("archive/version", "3\n")
    return path


def test_archives_and_pickles_without_bounds(tmp_path, monkeypatch):
    long = b"\x80\x02X" + struct.pack("<I", 50_000_000) + b"a" * 50_000_000 + b"."
    file = archive(tmp_path / "a.bin", long, zipfile.ZIP_DEFLATED)
    assert "'archive/data.pkl' in it is compressed" in refusal(lambda: read_pickled(file))
    monkeypatch.setattr(pickled, "OPERATIONS_LIMIT", 1000)
    assert "more than 1000 instructions" in refusal(
        lambda: read_pickled(archive(file, b"\x80\x02" + b"]" * 2000 + b"."))
    )
    (tmp_path / "old.bin").write_bytes(b"\x80\x02" + b"]" * 2000 + b".")
    assert "more than 1000 instructions" in refusal(lambda: read_pickled(tmp_path / "old.bin"))
    encode = b"c_codecs\nencode\n"
    doubled = b"\x80\x02" + encode + encode + b"X\x01\0\0\0aX\x06\0\0\0latin1\x86RX\x03\0\0\0hex\x86R."
    assert "to more than it was given" in refusal(lambda: read_pickled(archive(file, doubled)))


@pytest.mark.parametrize(
    "pickle",
    [b"", b".", b"\x80\x04\x95", b"\x80\x02c\n", b"\x80\x02cos\nsystem\n\x8c\x01a\x93.", b"\x80\x02X\xff\xff\xff\xff."],
)
def test_damaged_pickles(tmp_path, pickle):
    assert "not a usable torch.save file" in refusal(lambda: read_pickled(archive(tmp_path / "a.bin", pickle)))
    (tmp_path / "b.bin").write_bytes(pickle)
    assert "not a usable torch.save file" in refusal(lambda: read_pickled(tmp_path / "b.bin"))


def test_a_tensor_that_repeats_a_few_bytes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(WEIGHTS | {"embedding.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, folder / "pytorch_model.bin")
    message = refusal(lambda: convert_checkpoint(folder, tmp_path / "out"))
    assert "'embedding.weight' repeats fewer bytes to 4000000000000" in message


def test_an_older_vocabulary_is_not_taken_over(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    for name in ("tokenizer.json", "vocab.json", "continual_tokenizer.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("{}")
        assert f"holds '{name}' of another model" in refusal(lambda out=out: convert_checkpoint(folder, out))
        assert os.listdir(out) == [name]
        with caplog.at_level(logging.WARNING):
            convert_checkpoint(folder, out / "model.safetensors")
        assert f"{name} beside it will be used" in caplog.text
    (folder / "tokenizer.json").write_text('{"own": 1}')
    convert_checkpoint(folder, tmp_path / "tokenizer.json")
    assert open_store(tmp_path / "tokenizer.json").tokenizer_json == '{"own": 1}'
