"""Damaged files of every kind: an EngineError of one short line, or a model; within ten seconds and little memory.

The cases are the same each time. THL_FUZZ_CASES says how many there are of a kind (2,000 if it is not set).
"""

import json
import os
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from fuzz.mutations import damaged, edited
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from thl_engine.checkpoint.convert import convert_checkpoint, init_adapters, init_checkpoint
from thl_engine.checkpoint.index import read_index, read_tensor
from thl_engine.checkpoint.pack import metadata_checksum
from thl_engine.checkpoint.pickled import read_pickled
from thl_engine.checkpoint.store import open_store
from thl_engine.config import CONFIGS, parse_config
from thl_engine.errors import MESSAGE_LIMIT, EngineError
from thl_engine.memory import resident_bytes
from thl_engine.models import architecture

CASES = int(os.environ.get("THL_FUZZ_CASES", "2000"))
SECONDS, MIB = 10, 1 << 20
THL = dict(vocab_size=40, embedding_dim=8, num_tiers=2, tier_dims=[8, 8], tier_timescales=[1, 2], local_window=2)
THL |= dict(memory_slots=4, memory_dim=8, query_dim=4, value_dim=8, num_heads=2, head_dim=4, read_topk=2)
GEMMA = dict(vocab_size=40, vocab_size_per_layer_input=40, hidden_size=8, hidden_size_per_layer_input=4)
GEMMA |= dict(intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
GEMMA |= dict(layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, altup_num_inputs=2)
GEMMA |= dict(laurel_rank=2, activation_sparsity_pattern=[0.5, 0.0], max_position_embeddings=16, sliding_window=4)
SMALL: dict[str, dict] = {
    "thl": THL,
    "inl": dict(vocab_size=40, d_model=8, num_layers=2, num_heads=2, num_iterations_per_layer=2, max_seq_len=8),
    "him": dict(vocab_size=40, embed_dim=64, num_heads=4, num_kv_heads=2, num_encoder_layers=3, dim_feedforward=8),
    "hrm": dict(vocab_size=40, hidden_size=8, num_heads=2, L_layers=1, H_layers=1, expansion=1.0, halt_max_steps=2),
    "hrm_text": dict(vocab_size=40, hidden_size=8, intermediate_size=8, num_layers_per_stack=1, num_attention_heads=2)
    | dict(head_dim=4, max_position_embeddings=16),
    "gemma3n": GEMMA,
    "hrm_gemma3n": GEMMA | {"hrm": dict(L_size=4, H_size=4, cycles=2, L_steps=2, L_rank=2, H_rank=2)},
}
FIELDS = {name: [*(field.name for field in fields(config)), *config.ignored] for name, config in CONFIGS.items()}


def cases(strategy: st.SearchStrategy, check: Callable[[object], object]) -> None:
    """Runs `check` on the cases of a strategy: it succeeds, or raises an EngineError, within bounds."""

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(strategy)
    def run(case: object) -> None:
        before, peak = resident_bytes(), peak_kib()
        with limited():
            try:
                check(case)
            except EngineError as error:
                assert len(str(error)) <= MESSAGE_LIMIT and str(error).isprintable()
        if peak_kib() > peak:
            grown = (peak_kib() * 1024 - before) // MIB
            assert grown < 64, f"grew by {grown} MiB"

    run()


def peak_kib() -> int:
    """The most memory that the process has occupied. Every file is far smaller than what it may grow by."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def limited() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory where the system has such."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


def parts(file: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def plain(folder: Path) -> Path:
    """A tiny float checkpoint of THL with its config.json."""
    init_checkpoint("thl", THL, folder / "packed.safetensors")
    with open_store(folder / "packed.safetensors") as store:
        save_file({name: store.read(name) for name in store.tensors}, folder / "model.safetensors")
    (folder / "packed.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "thl", **THL}))
    return folder / "model.safetensors"


def open_and_read(path: Path) -> None:
    with open_store(path) as store:
        for name in store.tensors:
            store.read(name)


def test_safetensors(folder):
    file = plain(folder)
    content, (header, data) = file.read_bytes(), parts(file)

    def check(content):
        file.write_bytes(content)
        for info in read_index(file).tensors.values():
            read_tensor(info)
        open_and_read(folder)

    headers = edited(header, [*header, "__metadata__", "dtype"]).map(lambda header: whole(header, data))
    cases(st.one_of(headers, headers, damaged(content[:600]).map(lambda start: start + content[600:])), check)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_packed(folder, quantize):
    file = folder / "model.safetensors"
    init_checkpoint("thl", THL, file, quantize=quantize)
    content, (header, data) = file.read_bytes(), parts(file)
    metadata = header["__metadata__"]
    config, pages = json.loads(metadata["thl_engine.config"]), json.loads(metadata["thl_engine.pages"])

    def signed(changes):
        strings = metadata | changes
        strings["thl_engine.checksum"] = f"{metadata_checksum(strings):08x}"
        return whole(header | {"__metadata__": strings}, data)

    def check(content):
        file.write_bytes(content)
        open_and_read(file)

    inside = st.one_of(
        edited(config, FIELDS["thl"]).map(lambda config: signed({"thl_engine.config": json.dumps(config)})),
        edited(pages, ["transposed", "group"]).map(lambda pages: signed({"thl_engine.pages": json.dumps(pages)})),
        edited(header, list(header)).map(lambda header: whole(header, data)),
        damaged(content),
    )
    cases(inside, check)


def test_shards(folder):
    file = plain(folder)
    tensors = {name: read_tensor(info) for name, info in read_index(file).tensors.items()}
    file.unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, folder / f"{number}.safetensors")
        torch.save({name: tensors[name] for name in names}, folder / f"{number}.bin")
        weight_map |= dict.fromkeys(names, f"{number}")

    def check(index):
        for suffix, kind in ((".safetensors", "model"), (".bin", "pytorch_model")):
            path = folder / f"{kind}{suffix}.index.json"
            path.write_text(json.dumps(index).replace('"0"', f'"0{suffix}"').replace('"1"', f'"1{suffix}"'))
            try:
                open_and_read(folder) if kind == "model" else read_pickled(path)
            finally:
                path.unlink()

    cases(edited({"metadata": {}, "weight_map": weight_map}, ["weight_map", "0", "1", *tensors]), check)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_configurations(model_type):
    def check(values):
        config = parse_config(values, model_type) if isinstance(values, dict) else parse_config(values)
        model = architecture(config.model_type)
        assert sum(block.numel for block in model.blocks(config)) > 0
        model.aliases(config)
        model.walk(config)

    document = parse_config(SMALL[model_type], model_type).to_dict()  # all fields, for each to be edited
    names = [*FIELDS[model_type], "text_config", "quantization_config", "rope_parameters", "rope_scaling"]
    cases(st.one_of(edited(document, names), edited({"text_config": document}, names)), check)


def test_config_files(folder):
    plain(folder)
    content = (folder / "config.json").read_bytes()

    def check(content):
        (folder / "config.json").write_bytes(content)
        open_and_read(folder)

    cases(damaged(content), check)


def test_adapters(folder):
    init_checkpoint("gemma3n", GEMMA, folder / "base.safetensors")
    model = folder / "adapters"
    init_adapters(folder / "base.safetensors", model, {"hrm": SMALL["hrm_gemma3n"]["hrm"]})
    files = [model / "config.json", model / "l_adapter/adapter_config.json", model / "h_adapter/adapter_config.json"]
    documents = {file: json.loads(file.read_text()) for file in files}
    tensors = model / "l_adapter/adapter_model.safetensors"
    header, data = parts(tensors)

    def check(case):
        file, content = case
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            open_and_read(model)
        finally:
            file.write_bytes(before)

    names = ["use_dora", "rank_pattern", "base_model", "hrm", "init_lora_weights"]
    edits = [
        edited(document, names).map(lambda content, file=file: (file, json.dumps(content).encode()))
        for file, document in documents.items()
    ]
    edits.append(edited(header, list(header)).map(lambda header: (tensors, whole(header, data))))
    cases(st.one_of(edits), check)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles(folder, legacy):
    file = plain(folder)
    tensors = {name: read_tensor(info) for name, info in read_index(file).tensors.items()}
    file.unlink()
    source = folder / "pytorch_model.bin"
    few = dict(list(tensors.items())[:3])
    torch.save({"model": few, "args": [1, 2.0, "x", {3}]}, source, _use_new_zipfile_serialization=not legacy)
    content = source.read_bytes()
    end = content.index(b"args") + 200  # the pickle; after it come the numbers, any of which are sound

    def check(content):
        source.write_bytes(content)
        read_pickled(source)
        convert_checkpoint(source, folder / "out.safetensors")

    both = st.one_of(damaged(content[:end]).map(lambda start: start + content[end:]), damaged(content))
    cases(both, check)
