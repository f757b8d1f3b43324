"""thl quantize, convert and init as functions: what comes out, what is carried along, what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, random_weights
from safetensors.torch import save_file

from thl_engine.checkpoint import convert, pack
from thl_engine.checkpoint.convert import convert_checkpoint, init_checkpoint, quantize_checkpoint
from thl_engine.checkpoint.growth import grow_checkpoint
from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.checkpoint.store import open_store
from thl_engine.config import THLConfig
from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.models import thl

MODEL = replace(SMALL, embedding_dim=150)  # rows longer than a group of scales, and no multiple of one
CONFIG = MODEL.to_dict()
WEIGHTS = random_weights(MODEL)


def published(folder, saved=WEIGHTS, name="pytorch_model.bin", config=CONFIG, **options):
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / name, **options)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def checkpoint(folder, weights=WEIGHTS):
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def fails(call, *fragments, error=CheckpointError):
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("group", [None, 128])
def test_quantize(tmp_path, group):
    source = checkpoint(tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    quantize_checkpoint(source, tmp_path / "out.safetensors", group=group)
    store = open_store(tmp_path / "out.safetensors")
    assert store.tokenizer_json == "{}" and store.config.to_dict() == CONFIG
    for block in thl.blocks(MODEL):
        if block.kind != "vector":
            assert torch.equal(store.read(block.name), quantize_rows(WEIGHTS[block.name], group)[0])
    # From a packed float file the result is the same file.
    pack.write_store(
        tmp_path / "float.safetensors", MODEL, open_store(source).sources(), tokenizer="{}", quantize="none"
    )
    quantize_checkpoint(tmp_path / "float.safetensors", tmp_path / "again.safetensors", group=group)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_quantize_refuses(tmp_path):
    source, out = checkpoint(tmp_path / "in"), tmp_path / "out.safetensors"
    fails(lambda: quantize_checkpoint(source, out, bits=4), "bits is 4", error=ConfigError)
    fails(lambda: quantize_checkpoint(source, source / "model.safetensors"), "is the file being read")
    fails(lambda: quantize_checkpoint(tmp_path / "absent", out), "No such file")
    fails(lambda: quantize_checkpoint(source, tmp_path), "is a folder")
    assert not out.exists()
    quantize_checkpoint(source, out)
    fails(lambda: quantize_checkpoint(out, tmp_path / "twice.safetensors"), "quantised already")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_convert_to_a_folder_and_to_a_file(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    source = published(tmp_path / "in", weights)
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    convert_checkpoint(source, tmp_path / "folder")
    convert_checkpoint(source, tmp_path / "file.safetensors")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(tmp_path / "folder")) == names
    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == CONFIG
    for result in ("folder", "file.safetensors"):
        store = open_store(tmp_path / result)
        assert store.config.to_dict() == CONFIG
        assert json.loads(store.tokenizer_json) == {
            name: (source / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")
        }
        for block in thl.blocks(MODEL):
            kept = dtype if block.kind != "vector" and dtype != torch.float64 else torch.float32
            assert torch.equal(store.read(block.name), weights[block.name].to(kept))


def test_convert_in_place(tmp_path):
    source = published(tmp_path / "in")
    (source / "vocab.json").write_text("{}")
    convert_checkpoint(source, source)
    assert open_store(source).tokenizer_json == "{}"


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_training_checkpoints(tmp_path, key, prefix, options):
    saved = {key: {prefix + name: tensor for name, tensor in WEIGHTS.items()}, "epoch": 3, "config": CONFIG}
    folder = published(tmp_path / "in", saved, "last.pt", config=None, **options)
    convert_checkpoint(folder / "last.pt", tmp_path / "out.safetensors")
    store = open_store(tmp_path / "out.safetensors")
    assert all(torch.equal(store.read(name), tensor) for name, tensor in WEIGHTS.items())


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_convert_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    number = iter(range(100))

    def refused(saved, *fragments, error=CheckpointError, **options):
        folder = published(tmp_path / str(next(number)), saved, **options)
        fails(lambda: convert_checkpoint(folder, out), *fragments, error=error)

    refused({"a": Harmful()}, "pytorch_model.bin", "may run code")
    assert not (tmp_path / "harmed").exists()
    refused([1, 2], "expected a state dict")
    refused({}, "expected a state dict")
    refused({"model": {"a": 1}}, "expected a state dict")
    refused(WEIGHTS, "config.json", "no such file", error=ConfigError, config=None)
    refused(WEIGHTS, "vocab", error=ConfigError, config=CONFIG | {"vocab": 3})
    refused(WEIGHTS | {"more": torch.zeros(1)}, "'more'")
    refused({name: tensor[:1] for name, tensor in WEIGHTS.items()}, "shape")
    good = published(tmp_path / "good")
    for content in (b"", b"garbage", (good / "pytorch_model.bin").read_bytes()[:-200]):
        (good / "pytorch_model.bin").write_bytes(content)
        fails(lambda: convert_checkpoint(good, out), "pytorch_model.bin", "not a usable torch.save file")
    fails(lambda: convert_checkpoint(checkpoint(tmp_path / "plain"), out), "found none")
    fails(lambda: convert_checkpoint(tmp_path / "plain" / "model.safetensors", out), "needs no conversion")
    fails(lambda: convert_checkpoint(tmp_path / "absent", out), "No such file")
    several = published(published(tmp_path / "several", name="a.pt"), name="b.pt")
    fails(lambda: convert_checkpoint(several, out), "found 2 ('a.pt, b.pt')")
    fails(lambda: convert_checkpoint(several / "a.pt", several / "a.pt"), "is the file being read")
    fails(lambda: convert_checkpoint(several / "a.pt", several / "b.pt"), "cannot write", "exists")
    assert not out.exists()


def test_init_depends_on_the_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "DRAW_ELEMENTS", 100)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    init_checkpoint("thl", tmp_path / "config.json", tmp_path / "a.safetensors", seed=7)
    monkeypatch.setattr(pack, "PAGE_BYTES", 4096)
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    init_checkpoint(None, CONFIG, tmp_path / "b.safetensors", seed=7)
    init_checkpoint(None, {"config": CONFIG}["config"], tmp_path / "c.safetensors", seed=8, quantize="int8")
    a, b, c = (open_store(tmp_path / f"{name}.safetensors") for name in "abc")
    assert len(b.pages) > len(a.pages)
    for block in thl.blocks(MODEL):
        first = a.read(block.name)
        assert torch.equal(first, b.read(block.name))
        if block.kind != "vector":
            assert first.unique().numel() > 0.99 * first.numel()  # no stretch is drawn twice
            assert not torch.equal(quantize_rows(first)[0], c.read(block.name))
    assert abs(a.read("embedding.weight").std() - 1) < 0.1


def test_a_vocabulary_beside_the_result_is_told_of(tmp_path, caplog):
    source, out = checkpoint(tmp_path / "in"), tmp_path / "out"
    hrm = dict(vocab_size=9, hidden_size=8, num_heads=2, L_layers=1, H_layers=1)
    init_checkpoint("hrm", hrm, tmp_path / "hrm.safetensors")
    out.mkdir()
    caplog.set_level("WARNING")
    writers = {
        "quantize": lambda: quantize_checkpoint(source, out / "quantize.safetensors"),
        "init": lambda: init_checkpoint("thl", CONFIG, out / "init.safetensors"),
        "grow": lambda: grow_checkpoint(tmp_path / "hrm.safetensors", out / "grow.safetensors", vocab_size=12),
    }
    for write in writers.values():
        write()
    assert not caplog.messages
    (out / "vocab.json").write_text("{}")
    for name, write in writers.items():
        write()
        expected = f"{out}/{name}.safetensors: has no vocabulary in it; vocab.json beside it will be used"
        assert len(caplog.messages) == 1 and caplog.messages[0].startswith(expected)
        caplog.clear()
    (source / "vocab.json").write_text("{}")
    writers["quantize"]()  # brings its own
    assert not caplog.messages


def test_init_refuses(tmp_path):
    out = tmp_path / "out.safetensors"
    fails(lambda: init_checkpoint("thl", tmp_path / "absent.json", out), "absent.json", error=ConfigError)
    fails(lambda: init_checkpoint("thl", CONFIG | {"tier_dim": 3}, out), "tier_dim", error=ConfigError)
    fails(lambda: init_checkpoint("lht", {}, out), "lht", error=ConfigError)
    fails(lambda: init_checkpoint("thl", CONFIG, out, quantize="int4"), "int4", error=ConfigError)
    assert os.listdir(tmp_path) == []


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """With small chunks, a model of 160 MB, one tensor being 120 MB, is written and quantised in far less."""
    for name, vocabulary in (("tiny", 2_000), ("large", 40_000)):
        config = THLConfig(
            embedding_dim=256, tier_dims=(256, 256, 256), vocab_size=vocabulary, memory_dim=256, value_dim=256
        )
        (tmp_path / f"{name}.json").write_text(json.dumps(config.to_dict()))
    script = (
        "import resource; from thl_engine.checkpoint import convert, pack\n"
        "def run(name):\n"
        "    convert.init_checkpoint('thl', name + '.json', 'float.safetensors')\n"
        "    convert.quantize_checkpoint('float.safetensors', 'int8.safetensors')\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "pack.PAGE_BYTES, pack.CHUNK_ELEMENTS = 1 << 20, 1 << 18\n"
        "before = run('tiny')\n"  # code, threads and buffers
        "print(run('large') - before)\n"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True)
    size = (tmp_path / "float.safetensors").stat().st_size
    assert size > 160e6 and (tmp_path / "int8.safetensors").stat().st_size < 0.26 * size
    assert int(ended.stdout) < 40, ended.stdout


def test_a_limit_on_file_sizes_is_one_clear_line(tmp_path):
    source = checkpoint(tmp_path / "in")
    script = (
        "import resource, sys; from thl_engine.checkpoint import convert\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: convert.quantize_checkpoint(*sys.argv[1:])\n"
        "except convert.CheckpointError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, source, tmp_path / "out.safetensors"]
    ended = subprocess.run(command, capture_output=True, check=True, text=True)
    assert "File too large; it needs about" in ended.stdout and ended.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["in"]
