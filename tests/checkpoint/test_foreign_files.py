"""Checkpoints as they lie about: caches of links, pointers, pipes, leftovers; and what small files may cost."""

import json
import os
import tracemalloc

import pytest
import torch
from conftest import SMALL, random_weights
from safetensors.torch import save_file

from thl_engine.checkpoint.convert import convert_checkpoint, init_checkpoint
from thl_engine.checkpoint.index import read_index
from thl_engine.checkpoint.spool import spool_tensors
from thl_engine.checkpoint.store import open_store
from thl_engine.config import CONFIGS
from thl_engine.errors import MESSAGE_LIMIT, EngineError
from thl_engine.files import VALUES_LIMIT, parse_json, read_text

CONFIG = SMALL.to_dict()
WEIGHTS = random_weights(SMALL)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"


def refusal(call):
    with pytest.raises(EngineError) as caught:
        call()
    message = str(caught.value)
    assert len(message) <= MESSAGE_LIMIT and message.isprintable()
    return message


def sharded(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, files = sorted(WEIGHTS), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, file in enumerate(files):
        save_file({name: WEIGHTS[name] for name in names[i::2]}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("depth", [".", "text", "a/b/c"])
@pytest.mark.parametrize("blobs", ["blobs", "../disk"])
def test_the_hugging_face_cache(tmp_path, depth, blobs):
    plain, repository = sharded(tmp_path / "plain"), tmp_path / "hub" / "models--someone--some"
    repository.mkdir(parents=True)
    (repository / blobs).mkdir()
    if blobs != "blobs":
        (repository / "blobs").symlink_to(blobs)
    places = [repository / "snapshots" / "0123abc" / depth]
    if blobs == "blobs":
        places.append(tmp_path / "downloads" / depth)  # filled with links by older versions of the library
    for place in places:
        place.mkdir(parents=True)
        for file in plain.iterdir():
            blob = repository / "blobs" / file.name.replace(".", "")
            blob.write_bytes(file.read_bytes())
            (place / file.name).symlink_to(os.path.relpath(blob, place.resolve()))
        assert set(open_store(place).tensors) == set(WEIGHTS)
    (tmp_path / "secret").write_bytes(b"")
    (places[0] / "model-00001-of-00002.safetensors").unlink()
    (places[0] / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "secret")
    assert "is a link out of the folder" in refusal(lambda: open_store(places[0]))


def test_an_index_left_beside_a_whole_file(tmp_path):
    folder = sharded(tmp_path / "in")
    save_file(WEIGHTS, folder / "model.safetensors")
    for file in folder.glob("*-of-*"):
        file.unlink()
    assert open_store(folder).files == (folder / "model.safetensors",)
    (folder / "model.safetensors").rename(folder / "merged.safetensors")
    assert open_store(folder).files == (folder / "merged.safetensors",)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if name.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    assert f"{name}: a Git LFS pointer, not the file itself; fetch that: git lfs pull" in refusal(
        lambda: open_store(tmp_path)
    )
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    assert "pytorch_model.bin: a Git LFS pointer" in refusal(lambda: convert_checkpoint(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "loop"])
def test_only_ordinary_files_are_opened(tmp_path, name, kind):
    from socket import AF_UNIX, socket

    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).unlink(missing_ok=True)
    if name.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    elif kind == "socket":
        here = os.open(tmp_path, os.O_RDONLY)
        socket(AF_UNIX).bind(f"/proc/self/fd/{here}/{name}")
        os.close(here)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(name)
    if name == "tokenizer.json":  # there may be none, so what is no file is passed over
        assert open_store(tmp_path).tokenizer_json is None
        assert refusal(lambda: read_text(tmp_path / name))
    else:
        assert name in refusal(lambda: open_store(tmp_path))


@pytest.mark.parametrize("path", ["x" * 300, "x" * 5000, "a\0b", "\ud800", "\udcff", "\x1b[2J\n" * 30, "/" * 5000])
def test_names_that_no_file_can_have(path, tmp_path):
    refusal(lambda: open_store(path))
    refusal(lambda: convert_checkpoint(path, tmp_path / "out"))
    refusal(lambda: read_text(tmp_path / path))
    weight_map = {"a": path, path: "model.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refusal(lambda: open_store(tmp_path))


def peak(call):
    tracemalloc.start()
    try:
        refusal(call)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("part", ["[]", "{}", '{"":0}', "0", '""', '"ab"', "[[[]]]", '"\\"["'])
def test_json_takes_memory_in_proportion(part, tmp_path):
    text = '{"a":[' + ",".join([part] * (VALUES_LIMIT + 1)) + "]}"
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    assert peak(lambda: read_index(file)) < 4 * len(text) + (64 << 20)


def test_values_in_strings_do_not_count():
    inside = json.dumps({"key": ["[{,"] * VALUES_LIMIT + ['\\"']})[:VALUES_LIMIT]
    assert parse_json(json.dumps({"text": inside}), "text") == {"text": inside}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_counts_are_compared_with_the_file(model_type):
    for field in CONFIGS[model_type].layers:
        config = {field: 4000}
        if model_type == "thl":
            config |= {"tier_dims": [8] * 4000, "tier_timescales": [1] * 4000}
        if model_type in ("gemma3n", "hrm_gemma3n"):
            config |= {"layer_types": ["full_attention"] * 4000, "intermediate_size": 8, "num_kv_shared_layers": 0}
            config |= {"activation_sparsity_pattern": 0.0}
        message = refusal(lambda config=config: spool_tensors(model_type, config, {"a": torch.zeros(1)}))
        assert f"holds 1 tensors, too few for the configuration's 4000 {field}" in message


def test_repeated_tensors_must_be_equal(tmp_path):
    config = json.loads(
        json.dumps(dict(vocab_size=300, embed_dim=64, num_heads=4, num_kv_heads=2, num_encoder_layers=3))
    )
    init_checkpoint("him", config, tmp_path / "him.safetensors")
    store = open_store(tmp_path / "him.safetensors")
    tensors = {name: store.read(name) for name in store.tensors}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "him", **config}))
    tied = store.architecture.aliases(store.config)["decoder_projection.weight"]
    repeats = {"decoder_projection.weight": tensors[tied]}
    (tmp_path / "him.safetensors").unlink()

    def saved(**more):
        save_file(
            {name: value.clone() for name, value in (tensors | repeats | more).items()}, tmp_path / "model.safetensors"
        )
        return tmp_path

    assert set(open_store(saved()).tensors) == set(tensors)
    other = {"decoder_projection.weight": tensors[tied].clone()}
    other["decoder_projection.weight"][-1, -1] += 1
    message = refusal(lambda: open_store(saved(**other)))
    assert f"tensor 'decoder_projection.weight' differs from '{tied}'" in message
    message = refusal(lambda: open_store(saved(**{"decoder_projection.weight": torch.zeros(1)})))
    assert "differs from" in message
    message = refusal(lambda: spool_tensors("him", config, tensors | other))
    assert "differs from" in message
    torch.save(tensors | other, tmp_path / "pytorch_model.bin")
    assert "differs from" in refusal(lambda: convert_checkpoint(tmp_path, tmp_path / "out"))
    del tensors[tied]  # two repeats, and not what they repeat
    layer = {f"transformer_encoder.{i}.memory.read_key.weight": torch.ones(16, 64) * i for i in (1, 2)}
    del tensors["memory.read_key.weight"]
    assert "differs from 'transformer_encoder.1.memory" in refusal(lambda: open_store(saved(**layer)))
