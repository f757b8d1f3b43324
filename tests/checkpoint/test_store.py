"""Packed and plain checkpoints: exact contents, layout, checksums, and one clear error for each damage."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, random_weights, read_float
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from thl_engine.checkpoint import pack
from thl_engine.checkpoint.checksum import crc32c
from thl_engine.checkpoint.pack import page_rows, write_store
from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.checkpoint.spool import spool_store, spool_tensors, tensor_sources
from thl_engine.checkpoint.store import open_store
from thl_engine.config import parse_config
from thl_engine.errors import CheckpointError, ConfigError, EngineError
from thl_engine.files import ALIGNMENT, lies_in_memory
from thl_engine.models import thl

MODEL = replace(SMALL, embedding_dim=150)  # rows longer than a group of scales, and no multiple of one
CONFIG = MODEL.to_dict()
WEIGHTS = random_weights(MODEL)
UNUSED = "writer.W_r.weight"


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of a few rows, so that small tensors have several."""
    monkeypatch.setattr(pack, "PAGE_BYTES", 4096)
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", 1)


def packed(path, quantize="int8", weights=WEIGHTS, config=CONFIG, **options):
    write_store(path, parse_config(config), tensor_sources(weights, "weights"), quantize=quantize, **options)
    return path


def plain(folder, weights=WEIGHTS, config=CONFIG, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def fails(path, *fragments, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_store(path)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("group", [None, 128])
def test_int8_file_holds_what_the_quantiser_gives(tmp_path, small_pages, group):
    store = open_store(packed(tmp_path / "packed.safetensors", group=group))
    assert (store.format, store.model_type, store.config.to_dict()) == ("packed", "thl", CONFIG)
    for block in thl.blocks(MODEL):
        stored = store.tensors[block.name]
        assert (stored.kind, stored.shape) == (block.kind, block.shape)
        if block.kind == "vector":
            assert stored.scales is None
            assert torch.equal(store.read(block.name), WEIGHTS[block.name])
            continue
        quantized, scales = quantize_rows(WEIGHTS[block.name], group)
        assert stored.group == group and store.tensors[stored.scales].dtype == torch.float32
        assert torch.equal(store.read(block.name), quantized)
        assert torch.equal(store.read(stored.scales), scales)
        part = read_float(store, block.name, 3, 9)
        assert torch.equal(part, read_float(store, block.name)[3:9]) and part.dtype == torch.float32
    vectors = [t for t in store.tensors.values() if t.kind == "vector"]
    assert store.vector_bytes == sum(t.nbytes for t in vectors)


def test_any_tool_opens_a_packed_file(tmp_path):
    path = packed(tmp_path / "packed.safetensors")
    tensors = load_file(path)
    name = "router.W_q.weight"
    quantized, scales = quantize_rows(WEIGHTS[name])
    assert torch.equal(tensors[name], quantized) and torch.equal(tensors[name + ".scale"], scales)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["thl_engine.config"]) == CONFIG


@pytest.mark.parametrize("quantize", ["int8", "none"])
def test_layout(tmp_path, small_pages, quantize):
    path = packed(tmp_path / "packed.safetensors", quantize)
    store = open_store(path)
    content = path.read_bytes()
    assert len(content) % ALIGNMENT == 0
    assert (8 + int.from_bytes(content[:8], "little")) % ALIGNMENT == 0
    assert [page.index for page in store.pages] == list(range(len(store.pages)))
    assert [page.offset for page in store.pages] == sorted(page.offset for page in store.pages)
    used = [b.name for b in thl.blocks(MODEL) if b.kind in ("matrix", "table")]
    assert [n for n, t in store.tensors.items() if t.kind in ("matrix", "table")] == used
    assert max(len(t.pages) for t in store.tensors.values()) > 2
    for tensor in store.tensors.values():
        row = 0
        for page in tensor.pages:
            assert page.start == row and page.tensor == tensor.name
            row = page.stop
            assert page.nbytes == (page.stop - page.start) * tensor.row_bytes
            assert page.crc == crc32c(content[page.offset : page.offset + page.nbytes])
            assert page.offset == tensor.pages[0].offset + page.start * tensor.row_bytes
        assert row == tensor.rows
        if tensor.kind in ("matrix", "table"):
            assert tensor.pages[0].offset % ALIGNMENT == 0


@pytest.mark.parametrize("kind, limit", [("matrix", 4 * pack.PAGE_BYTES), ("table", 16 * pack.TABLE_PAGE_BYTES)])
@pytest.mark.parametrize("row_bytes", [1, 16, 768, 1001, 4096, 8960, 12288, 36864, 50_000_001])
def test_page_rows(kind, limit, row_bytes):
    rows = page_rows(kind, 1 << 40, row_bytes)
    assert rows == 1 or rows * row_bytes <= limit
    if row_bytes % 2 == 0:
        assert rows * row_bytes % ALIGNMENT == 0
    if kind == "table" and row_bytes <= limit:
        assert rows * row_bytes >= pack.TABLE_PAGE_BYTES - row_bytes
    assert page_rows(kind, 3, row_bytes) <= 3
    assert page_rows("vector", 1 << 40, row_bytes) == 1 << 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_files_keep_the_dtype_of_matrices(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    store = open_store(packed(tmp_path / "packed.safetensors", "none", weights))
    direct = open_store(plain(tmp_path / "plain", weights))
    assert direct.format == "plain" and all(page.crc is None for page in direct.pages)
    for block in thl.blocks(MODEL):
        stored = store.read(block.name)
        assert stored.dtype == (torch.float32 if block.kind == "vector" else dtype)
        assert torch.equal(stored.float(), weights[block.name].float())
        assert torch.equal(direct.read(block.name), weights[block.name])
        assert torch.equal(read_float(direct, block.name, 1, 3), weights[block.name].float()[1:3])


def test_plain_checkpoints_in_shards(tmp_path):
    names = sorted(WEIGHTS)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        plain(tmp_path, {name: WEIGHTS[name] for name in part}, name=f"part{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    store = open_store(tmp_path)
    assert len(store.files) == 2
    for name, tensor in WEIGHTS.items():
        page = store.tensors[name].pages[-1]
        with open(store.files[page.file], "rb") as file:
            file.seek(page.offset)
            assert file.read(page.nbytes) == tensor[page.start : page.stop].numpy().tobytes()


def test_int8_weights_saved_again_by_another_tool_still_open(tmp_path):
    for group in (None, 128):
        path = packed(tmp_path / "packed.safetensors", group=group)
        store, again = open_store(path), open_store(plain(tmp_path / "again", load_file(path)))
        assert again.format == "plain"
        for name in WEIGHTS:
            assert torch.equal(read_float(again, name), read_float(store, name))
            assert again.tensors[name].group == group or not again.tensors[name].scales


def test_published_layout_of_configuration(tmp_path):
    folder = plain(tmp_path, config={"config": CONFIG, "upstream": "x", "notes": {}})
    assert open_store(folder).config.to_dict() == CONFIG


@pytest.mark.parametrize("in_memory", [True, False])
def test_spooled_stores(tmp_path, in_memory):
    expected = open_store(packed(tmp_path / "packed.safetensors"))
    folder = plain(tmp_path / "plain")
    (folder / "tokenizer.json").write_text("{}")
    with open_store(folder) as source, spool_store(source, in_memory=in_memory) as store:
        assert store.tokenizer_json == "{}"
        descriptor = store.descriptor
        for name in expected.tensors:
            assert torch.equal(store.read(name), expected.read(name))
        with open(store.files[0], "rb") as file:
            file.seek(store.pages[0].offset)
            assert crc32c(file.read(store.pages[0].nbytes)) == store.pages[0].crc
    with pytest.raises(OSError):
        os.fstat(descriptor)
    fields = {name: value for name, value in CONFIG.items() if name != "model_type"}
    with spool_tensors("thl", fields, WEIGHTS, in_memory=in_memory) as store:
        assert all(torch.equal(store.read(name), WEIGHTS[name]) for name in WEIGHTS)


def test_a_copy_that_lies_in_memory_is_told_of(tmp_path, monkeypatch, caplog):
    """A temporary folder may be memory, which a budget does not see."""
    shared = Path("/dev/shm")
    if not lies_in_memory(shared):
        pytest.skip("no /dev/shm here")
    with open_store(plain(tmp_path / "plain")) as source:
        monkeypatch.setattr("tempfile.tempdir", str(shared))
        with spool_store(source):
            assert len(caplog.messages) == 1 and "lies in /dev/shm, which is memory" in caplog.messages[0]
        caplog.clear()
        with spool_store(source, in_memory=True):
            assert not caplog.messages  # asked for


def changed(**tensors):
    weights = WEIGHTS | tensors
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


NAME = "router.W_q.weight"
WRONG = [
    (changed(**{NAME: None}), ["'router.W_q.weight' [24, 223] is missing"]),
    (changed(**{NAME: None, "router.W_k.weight": None}), ["(and 1 more) is missing"]),
    (changed(**{NAME: None, "router.W_Q.weight": WEIGHTS[NAME]}), ["'router.W_Q.weight'", "nearest", NAME]),
    (changed(extra=torch.zeros(2)), ["'extra' is no part of this thl model"]),
    (changed(**{NAME: WEIGHTS[NAME][:5]}), [NAME, "shape [5, 223]", "needs [24, 223]"]),
    (changed(**{NAME: WEIGHTS[NAME].to(torch.int32)}), [NAME, "dtype I32"]),
    (changed(**{NAME: WEIGHTS[NAME].to(torch.int8)}), [NAME, "dtype I8"]),
]


@pytest.mark.parametrize("weights, fragments", WRONG)
def test_wrong_tensors(tmp_path, weights, fragments):
    fails(plain(tmp_path / "plain", weights), *fragments)
    with pytest.raises(CheckpointError) as caught:
        spool_tensors("thl", CONFIG, weights)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_wrong_plain_dtypes_and_scales(tmp_path):
    fails(plain(tmp_path / "wide", {n: t.double() for n, t in WEIGHTS.items()}), "F64", "save it as F32")
    quantized, scales = quantize_rows(WEIGHTS[NAME])
    for wrong in (scales[:3], scales.double(), scales[:, None].repeat(1, 7)):
        weights = changed(**{NAME: quantized, NAME + ".scale": wrong})
        fails(plain(tmp_path / "scales", weights), NAME + ".scale")


@pytest.mark.parametrize(
    "config, fragments",
    [
        (None, ["config.json", "no such file"]),
        (CONFIG | {"vocab_sise": 5}, ["vocab_sise"]),
        (CONFIG | {"model_type": "nothing"}, ["nothing"]),
        ([], ["config.json", "expected an object"]),
    ],
)
def test_wrong_configuration(tmp_path, config, fragments):
    fails(plain(tmp_path / "plain", config=config), *fragments, error=ConfigError)


def test_wrong_tensors_of_a_state_dict():
    shape = WEIGHTS[NAME].shape
    sparse, complex_ = torch.zeros(shape).to_sparse(), torch.zeros(shape, dtype=torch.cfloat)
    for wrong in (3, sparse, complex_, torch.empty(shape, device="meta")):
        with pytest.raises(CheckpointError, match="router.W_q.weight"):
            spool_tensors("thl", CONFIG, changed(**{NAME: wrong}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_cannot_be_quantised(tmp_path, small_pages, bad):
    for name in (NAME, "output_head.bias"):
        weights = changed(**{name: WEIGHTS[name].clone()})
        weights[name][21] = bad
        with pytest.raises(CheckpointError, match=f"'{name}' cannot be quantised: NaN or infinity in row 21"):
            packed(tmp_path / "packed.safetensors", weights=weights)
        assert os.listdir(tmp_path) == []
        packed(tmp_path / "float.safetensors", "none", weights)  # a copy is a copy
        os.unlink(tmp_path / "float.safetensors")


def test_wrong_options(tmp_path):
    wrong = [{"quantize": "int4"}, {"quantize": "none", "group": 128}, {"quantize": "int8", "group": 64}]
    for options in wrong:
        with pytest.raises(ConfigError):
            packed(tmp_path / "packed.safetensors", **options)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path, small_pages):
    path = packed(tmp_path / "packed.safetensors")
    sound, content = open_store(path), path.read_bytes()
    expected = {name: sound.read(name) for name in sound.tensors}
    data = min(page.offset for page in sound.pages)
    chooser = random.Random(0)
    positions = chooser.sample(range(data), 150) + chooser.sample(range(data, len(content)), 150)
    noticed = 0
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        try:
            store = open_store(path)
            same = all(torch.equal(store.read(name), tensor) for name, tensor in expected.items())
            assert same and store.config.to_dict() == CONFIG
        except EngineError as error:
            noticed += 1
            assert "\n" not in str(error)
    assert noticed > 150


def test_checksum_error_names_the_place(tmp_path):
    path = packed(tmp_path / "packed.safetensors")
    page = open_store(path).tensors[NAME].pages[0]
    with open(path, "r+b") as file:
        file.seek(page.offset + 5)
        file.write(b"\x99")
    store = open_store(path)
    with pytest.raises(CheckpointError, match=f"{path}.*'{NAME}', rows 0 to 24 at byte {page.offset}: CRC"):
        store.read(NAME)


def edited(path, **changes):
    """The packed file with other metadata; `thl_engine.checksum` is made to fit."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"] | {f"thl_engine.{key}": value for key, value in changes.items()}
    metadata["thl_engine.checksum"] = f"{pack.metadata_checksum(metadata):08x}"
    text = json.dumps(header | {"__metadata__": metadata}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return json.loads(metadata["thl_engine.pages"]) if "pages" not in changes else None


def test_wrong_metadata(tmp_path):
    path = packed(tmp_path / "packed.safetensors")
    fails_with = {"format": ("2", "packed format '2'"), "pages": ("nonsense", "not valid JSON")}
    table = edited(path)
    open_store(path)
    for key, (value, fragment) in fails_with.items():
        packed(path)
        edited(path, **{key: value})
        fails(path, fragment)
    good = table[NAME]
    wrong = [7, {}, good | {"rows": 0}, good | {"rows": True}, good | {"rows": 5}, good | {"crc": "0123456"}]
    wrong += [good | {"crc": "xyz12345"}, good | {"group": 64}, good | {"group": "x"}, good | {"group": [128]}]
    for entry in wrong:
        packed(path)
        edited(path, pages=json.dumps(table | {NAME: entry}))
        fails(path, NAME)
    packed(path)
    edited(path, config="[]")
    fails(path, "thl_engine.config", error=ConfigError)


def test_writing_is_all_or_nothing(tmp_path, small_pages, monkeypatch):
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"precious")

    def interrupted(start, stop):
        raise KeyboardInterrupt

    sources = tensor_sources(WEIGHTS, "weights")
    with pytest.raises(KeyboardInterrupt):
        write_store(path, MODEL, sources | {NAME: replace(sources[NAME], rows=interrupted)}, quantize="int8")
    calls = iter(range(1000))
    write = os.pwrite

    def full(*arguments):
        if next(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="No space left on device; it needs about "):
            packed(path)
        with pytest.raises(CheckpointError, match="state dict.*No space left on device"):
            spool_tensors("thl", CONFIG, WEIGHTS)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match=r"needs about 14\d\.\d+ KiB, 1000 B are free"):
            packed(path)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["packed.safetensors"]
    packed(path)
    assert open_store(path).format == "packed"
    with pytest.raises(CheckpointError, match="is a folder"):
        packed(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        packed(tmp_path / "absent" / "packed.safetensors")


def test_a_killed_writer_leaves_nothing_that_looks_like_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    script = (
        "import os, sys, signal; from test_store import *; from thl_engine.checkpoint import pack, spool\n"
        "def stop(done, total): os.kill(os.getpid(), signal.SIGKILL) if done > total / 2 else None\n"
        "sources = spool.tensor_sources(WEIGHTS, 'x')\n"
        "pack.write_store(sys.argv[1], MODEL, sources, progress=stop)\n"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((here, os.path.dirname(here)))}
    ended = subprocess.run([sys.executable, "-c", script, path], env=environment, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".partial")
    fails(tmp_path, "no .safetensors file")
    fails(tmp_path / left, left)


def test_progress_reaches_the_end(tmp_path, small_pages):
    seen = []
    path = packed(tmp_path / "packed.safetensors", progress=lambda done, total: seen.append((done, total)))
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done) and set(total) == {done[-1]} and 0 < done[-1] <= path.stat().st_size


def test_tokenizer_travels_inside_or_lies_beside(tmp_path):
    text = '{"é": 1}\n'
    path = packed(tmp_path / "packed.safetensors", tokenizer=text)
    assert open_store(path).tokenizer_json == text
    packed(path)
    assert open_store(path).tokenizer_json is None
    (tmp_path / "vocab.json").write_text("vocabulary")
    assert open_store(path).tokenizer_json == "vocabulary"
    (tmp_path / "tokenizer.json").write_text("tokenizer")
    assert open_store(path).tokenizer_json == "tokenizer"
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    fails(path, "tokenizer.json", "not UTF-8")


def test_a_device_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="is no ordinary file"):
        packed(pipe)
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
