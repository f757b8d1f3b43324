"""The index believes nothing: damage is one clear CheckpointError, and sound files are read exactly."""

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from thl_engine.checkpoint.index import DTYPES, config_beside, read_index, read_tensor
from thl_engine.errors import CheckpointError, ConfigError, EngineError


def raw(header, data=b"", prefix=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (struct.pack("<Q", len(text)) if prefix is None else prefix) + text + data


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def written(folder, content, name="model.safetensors"):
    (folder / name).write_bytes(content)
    return folder / name


def fails(path, *fragments):
    with pytest.raises(CheckpointError) as caught:
        read_index(path)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_reads_what_safetensors_wrote(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(15).reshape(5, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"key": "value"})
    index = read_index(tmp_path)
    assert index.metadata == {"key": "value"}
    assert set(index.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = read_tensor(index.tensors[name])
        assert read.dtype == dtype and read.shape == tensor.shape and torch.equal(read, tensor)
    assert torch.equal(read_tensor(index.tensors["matrix"], slice(1, 4)), tensors["matrix"][1:4])
    assert read_tensor(index.tensors["matrix"], slice(2, 2)).shape == (0, 3)


@pytest.mark.parametrize(
    "content, fragments",
    [
        (b"", ["is empty"]),
        (b"\x01\x02", ["2 bytes long"]),
        (raw(b"{}", prefix=struct.pack("<Q", 1 << 62)), ["over the limit"]),
        (raw(b"{}", prefix=struct.pack("<Q", 50)), ["header length 50", "10 bytes"]),
        (raw(b"not json"), ["not valid JSON"]),
        (raw(b"[" * 100_000), ["not valid JSON"]),
        (raw(b"\xff\xfe{}"), ["not valid JSON"]),
        (raw(b"[1]"), ["JSON list, expected an object"]),
        (raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), ["'dtype' occurs twice"]),
        (raw(b'{"__metadata__": {"a": 1}}'), ["metadata 'a' is a int"]),
        (raw(b'{"__metadata__": []}'), ["'__metadata__' is a list"]),
        (raw({"a": 7}), ["'a'", "expected an object"]),
        (raw({"a": {"dtype": "F32", "shape": [2]}}), ["dtype, shape and data_offsets"]),
        (raw({"a": entry("F8_E4M3", (8,))}, b"x" * 8), ["'F8_E4M3' is not supported", "F32"]),
        (raw({"a": entry("I7")}, b"x" * 8), ["'I7' is unknown"]),
        (raw({"a": entry(["F32"])}, b"x" * 8), ["dtype"]),
        (raw({"a": entry(shape=(-2,))}, b"x" * 8), ["shape [-2]"]),
        (raw({"a": entry(shape=(2.0,))}, b"x" * 8), ["shape"]),
        (raw({"a": entry(shape=(True, 2))}, b"x" * 8), ["shape"]),
        (raw({"a": entry(shape=(1 << 33, 1 << 33))}, b"x" * 8), ["overflows"]),
        (raw({"a": entry(shape=(1 << 62, 0))}, b"x" * 8), ["takes 0 bytes, data_offsets span 8"]),
        (raw({"a": entry(span=(8, 0))}, b"x" * 8), ["end before they begin"]),
        (raw({"a": entry(span=(0, 8, 9))}, b"x" * 8), ["data_offsets"]),
        (raw({"a": entry(span=(-8, 0))}, b"x" * 8), ["data_offsets"]),
        (raw({"a": entry()}, b"x" * 7), ["cut short"]),
        (raw({"a": entry(span=(0, 1 << 80))}, b"x" * 8), ["cut short"]),
        (raw({"a": entry(shape=(3,))}, b"x" * 8), ["takes 12 bytes", "span 8"]),
        (raw({"a": entry(), "b": entry(span=(4, 12))}, b"x" * 12), ["'b'", "overlaps tensor 'a'"]),
        (raw({"a": entry(), "b": entry(span=(9, 17))}, b"x" * 17), ["'b'", "leaves a hole after tensor 'a'"]),
        (raw({"a": entry(span=(4, 12))}, b"x" * 12), ["leaves a hole after the header"]),
        (raw({"a": entry()}, b"x" * 9), ["last tensor ends"]),
        (raw({"a\n" + "b" * 500: entry()}), ["..."]),
        (b"GGUF" + b"x" * 100, ["GGUF"]),
        (b"PK\x03\x04" + b"x" * 100, ["torch.save", "thl convert"]),
    ],
)
def test_damage_is_named(tmp_path, content, fragments):
    path = written(tmp_path, content)
    fails(path, str(path), *fragments)
    fails(tmp_path, str(path), *fragments)


def test_paths_that_hold_no_model(tmp_path):
    fails(tmp_path / "absent", "No such file")
    fails(tmp_path / "nul\0character", "cannot open")
    fails(tmp_path, "no .safetensors file")
    os.mkfifo(tmp_path / "model.safetensors")
    fails(tmp_path, "neither a file nor a folder")


def test_pickles_are_sent_to_convert(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    fails(tmp_path, "pytorch_model.bin", "thl convert")
    fails(tmp_path / "pytorch_model.bin", "thl convert")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = written(tmp_path, raw({"a": entry()}, b"x" * 8))
    path.chmod(0)
    fails(path, "Permission denied")


def test_folder_must_leave_no_doubt(tmp_path):
    good = raw({"a": entry()}, b"x" * 8)
    written(tmp_path, good, "weights.safetensors")
    assert read_index(tmp_path).files == (tmp_path / "weights.safetensors",)
    written(tmp_path, good, "io.safetensors")
    fails(tmp_path, "2 .safetensors files", "io.safetensors, weights.safetensors", "name the file")
    written(tmp_path, good, "model.safetensors")
    assert read_index(tmp_path).files == (tmp_path / "model.safetensors",)


def sharded(folder, weight_map, **shards):
    for name, tensors in shards.items():
        values = {tensor: torch.full((2,), float(len(name))) for tensor in tensors}
        save_file(values, folder / f"{name}.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return path


def test_shards(tmp_path):
    path = sharded(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"}, one=["a"], three=["b"])
    for given_path in (tmp_path, path):
        index = read_index(given_path)
        assert index.files == (tmp_path / "one.safetensors", tmp_path / "three.safetensors")
        assert read_tensor(index.tensors["b"]).tolist() == [5, 5]


@pytest.mark.parametrize(
    "weight_map, shards, fragments",
    [
        ({}, {}, ["weight_map"]),
        ([], {}, ["weight_map"]),
        ({"a": 3}, {}, ["'a' under 3"]),
        ({"a": "../one.safetensors"}, {}, ["expected a file name"]),
        ({"a": "/etc/passwd"}, {}, ["expected a file name"]),
        ({"a": ".."}, {}, ["expected a file name"]),
        ({"a": "none.safetensors"}, {}, ["none.safetensors", "No such file"]),
        ({"a": "one.safetensors", "b": "one.safetensors"}, {"one": ["a"]}, ["lacks tensor 'b'"]),
        ({"a": "one.safetensors", "b": "2.safetensors"}, {"one": ["a"], "2": ["a", "b"]}, ["'a' is in one"]),
        ({"a": "one.safetensors"}, {"one": ["a", "b"]}, ["'b'", "lists nowhere"]),
    ],
)
def test_broken_shards(tmp_path, weight_map, shards, fragments):
    fails(sharded(tmp_path, weight_map, **shards), *fragments)


def test_shards_may_link_inside_their_folder_and_the_hugging_face_cache_only(tmp_path):
    folder = tmp_path / "snapshots" / "revision"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    good = raw({"a": entry()}, b"x" * 8)
    path = sharded(folder, {"a": "one.safetensors"})
    for place, works in ((folder, True), (tmp_path / "blobs", True), (tmp_path, False)):
        (folder / "one.safetensors").unlink(missing_ok=True)
        (folder / "one.safetensors").symlink_to(written(place, good, "target"))
        if works:
            assert set(read_index(path).tensors) == {"a"}
        else:
            fails(path, "link out of the folder")


def test_truncation_after_opening_is_noticed(tmp_path):
    path = written(tmp_path, raw({"a": entry(shape=(1000,), span=(0, 4000))}, b"x" * 4000))
    info = read_index(path).tensors["a"]
    os.truncate(path, 3000)
    with pytest.raises(CheckpointError, match="'a'.*ends at 3000.*cut short"):
        read_tensor(info)
    path.unlink()
    with pytest.raises(CheckpointError, match="'a'.*No such file"):
        read_tensor(info)


def test_config_may_be_nested_and_must_be_sound(tmp_path):
    assert config_beside(tmp_path) is None
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "thl", "vocab_size": 3}')
    assert config_beside(tmp_path)[0] == {"model_type": "thl", "vocab_size": 3}
    file.write_text('{"config": {"vocab_size": 3}, "upstream": "x"}')
    assert config_beside(tmp_path)[0] == {"vocab_size": 3}
    for broken in ("", "[]", "{", '{"a": 1, "a": 2}', "\xff"):
        file.write_bytes(broken.encode("latin-1"))
        with pytest.raises(ConfigError, match="config.json"):
            config_beside(tmp_path)


SOUND = raw(
    {"__metadata__": {"k": "v"}, "a": entry(), "b": entry("I8", (3, 4), (8, 20)), "c": entry("BF16", (), (20, 22))},
    bytes(22),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


def only_engine_errors(content):
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), content)
        try:
            for info in read_index(path).tensors.values():
                read_tensor(info)
        except EngineError as error:
            assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(SOUND)))
def test_fuzz_bytes(changes, length):
    content = bytearray(SOUND)
    for position, value in changes:
        content[position] = value
    only_engine_errors(bytes(content[:length]))
    only_engine_errors(bytes(content))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "I8", "BOOL", "F4"]) | VALUES,
                "shape": st.lists(st.integers(-1, 4), max_size=3) | VALUES,
                "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | VALUES,
            }
        ),
    )
)
def test_fuzz_header(header):
    only_engine_errors(raw(header, bytes(8)))
