"""Run by test_injection.py: reads and writes that fail, come short, are interrupted, or find the file cut short.

Whatever happens, a reader gives the right values or an EngineError, and a writer leaves the old file or the new one.
"""

import ctypes
import errno
import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from thl_engine import Engine
from thl_engine.checkpoint.convert import convert_checkpoint, init_adapters, init_checkpoint, quantize_checkpoint
from thl_engine.checkpoint.growth import grow_checkpoint
from thl_engine.checkpoint.store import open_store
from thl_engine.checkpoint.tensors import load_tensors
from thl_engine.errors import CheckpointError, ConfigError, EngineError
from thl_engine.files import write_file
from thl_engine.paging import reader
from thl_engine.train import TrainOptions, train

SHORT, CUT, ALWAYS = -1, -2, -1  # as in faults.c
FAILURES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
THL = dict(vocab_size=61, embedding_dim=40, num_tiers=8, tier_dims=[64] * 8, tier_timescales=[1] * 8, local_window=2)
THL |= dict(memory_slots=4, memory_dim=8, query_dim=4, value_dim=8, num_heads=2, head_dim=4, read_topk=2)
HRM = dict(vocab_size=40, hidden_size=8, num_heads=2, L_layers=1, H_layers=1, expansion=1.0, halt_max_steps=2)
GEMMA = dict(vocab_size=40, vocab_size_per_layer_input=40, hidden_size=8, hidden_size_per_layer_input=4)
GEMMA |= dict(intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
GEMMA |= dict(layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, altup_num_inputs=2)
GEMMA |= dict(laurel_rank=2, activation_sparsity_pattern=[0.5, 0.0], max_position_embeddings=16, sliding_window=4)

library = ctypes.CDLL(None)


def inject(call: str, kind: int, path: Path, after: int = 0, times: int = 1) -> None:
    library.faults_set(call.encode(), kind, after, times, os.fsencode(path))


def calm() -> None:
    inject("", 0, Path("nowhere"), times=0)


@pytest.fixture(autouse=True)
def calm_afterwards() -> Iterator[None]:
    yield
    calm()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# Reading.


@pytest.fixture(params=["native", "python"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reader; both with chunks of a block, so that a page takes several."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 4096)
    defaults = list(reader.Reader.__init__.__defaults__ or ())
    monkeypatch.setattr(reader.Reader.__init__, "__defaults__", (*defaults[:-1], 4096))
    if request.param == "python":
        monkeypatch.setattr(reader, "_native", None)
    elif reader._native is None:
        pytest.skip("the native reader is not built")
    return request.param


@pytest.fixture(params=["int8", "none"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    init_checkpoint("thl", THL, tmp_path / "model.safetensors", quantize=request.param)
    return tmp_path / "model.safetensors"


def streaming(model: Path) -> Engine:
    """An engine with the least memory."""
    with Engine.from_pretrained(model, device="cpu", stream=True) as engine:
        least = engine.plan().least_budget
    return Engine.from_pretrained(model, device="cpu", stream=True, memory_budget=least, verify="always")


def written(engine: Engine) -> torch.Tensor:
    """The logits of a few steps: float32 [6, vocab_size]."""
    state, out, token = engine.new_state(), [], torch.tensor([3])
    for _ in range(6):
        logits, state = engine.step(token, state)
        out.append(logits[0])
        token = logits.argmax(dim=-1)
    return torch.stack(out)


def sampled(count: int, most: int = 6) -> list[int]:
    """Some of range(count), its beginning and end among them."""
    return sorted({0, 1, count // 2, count - 1, *range(0, count, max(1, count // most))} & set(range(count)))


def reads_of(model: Path, action: Callable[[], object]) -> int:
    inject("read", 0, model, times=0)
    action()
    count: int = library.faults_seen()
    calm()
    return count


def test_a_read_that_fails_is_told(implementation: str, model: Path) -> None:
    with streaming(model) as engine:
        expected = written(engine)
        count = reads_of(model, lambda: written(engine))
    assert count > 20
    for after in sampled(count):
        with streaming(model) as engine:
            inject("read", errno.EIO, model, after)
            with pytest.raises(CheckpointError, match=r"model\.safetensors: .*Input/output error"):
                written(engine)
                written(engine)  # at the latest: the read may have been made ahead
            assert library.faults_done() == 1
            calm()
            try:  # what was not read is not computed with; a row of a table is read again
                assert torch.equal(written(engine), expected)
            except CheckpointError as error:
                assert "Input/output error" in str(error)
    with streaming(model) as engine:
        assert torch.equal(written(engine), expected)


@pytest.mark.parametrize("kind", [SHORT, errno.EINTR])
def test_short_and_interrupted_reads_are_gone_on_with(implementation: str, model: Path, kind: int) -> None:
    with streaming(model) as engine:
        expected = written(engine)
    if kind == SHORT:
        inject("read", SHORT, model, times=ALWAYS)
    else:
        inject("read", kind, model, after=3, times=50)
    with streaming(model) as engine:
        assert torch.equal(written(engine), expected)
        assert library.faults_done() > 10


def test_opening_fails_as_a_whole_or_not_at_all(implementation: str, model: Path) -> None:
    def opened(stream: bool) -> None:
        Engine.from_pretrained(model, device="cpu", stream=stream).close()

    for stream in (True, False):
        count = reads_of(model, lambda stream=stream: opened(stream))
        before = descriptors()
        refused = 0
        for after in sampled(count):
            inject("read", errno.EIO, model, after)
            try:  # it opens where a read failed that finds out how to read
                opened(stream)
            except CheckpointError as error:
                assert "Input/output error" in str(error)
                refused += 1
            assert library.faults_done() == 1
        assert refused > 2
        calm()
        assert descriptors() == before


def test_a_file_that_is_cut_short_meanwhile(implementation: str, model: Path) -> None:
    whole = model.read_bytes()
    with streaming(model) as engine:
        count = reads_of(model, lambda: written(engine))
    for after in sampled(count):
        with streaming(model) as engine:
            inject("read", CUT, model, after)
            with pytest.raises(CheckpointError, match="truncated|changed while it was in use"):
                written(engine)
                written(engine)  # at the latest: the read may have been made ahead
            assert library.faults_seen() > after
        calm()
        model.write_bytes(whole)


def test_a_context_is_read_whole_or_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "context"
    with streaming(model) as engine:
        state = engine.new_state()
        for _ in range(3):
            _, state = engine.step(torch.tensor([3]), state)
        engine.save_state(state, file)
        whole = file.read_bytes()
        for kind in (errno.EIO, CUT):
            for after in sampled(reads_of(file, lambda: engine.load_state(file))):
                inject("read", kind, file, after)
                with pytest.raises(CheckpointError, match="Input/output error|cut short|ends"):
                    engine.load_state(file)
                calm()
                file.write_bytes(whole)
        inject("read", SHORT, file, times=ALWAYS)
        fields = engine.load_state(file).to_dict()
        assert library.faults_done() and all(
            torch.equal(fields[name], value) for name, value in state.to_dict().items()
        )


# Writing. Each writes into an empty folder, or over what it wrote there before; `seed` makes another content.


def quantized(source: Path, folder: Path, seed: int) -> None:
    quantize_checkpoint(source / f"thl{seed}.safetensors", folder / "out.safetensors")


def converted(source: Path, folder: Path, seed: int) -> None:
    convert_checkpoint(source / f"thl{seed}.bin", folder / "out.safetensors", config=THL)


def converted_folder(source: Path, folder: Path, seed: int) -> None:
    convert_checkpoint(source / f"thl{seed}.bin", folder / "out", config=THL)


def initialised(source: Path, folder: Path, seed: int) -> None:
    init_checkpoint("thl", THL, folder / "out.safetensors", seed)


def adapted(source: Path, folder: Path, seed: int) -> None:
    init_adapters(source / "gemma.safetensors", folder / "out", dict(hrm=dict(L_size=4, H_size=4, L_rank=2, H_rank=2)))


def grown(source: Path, folder: Path, seed: int) -> None:
    grow_checkpoint(source / "hrm.safetensors", folder / "out.safetensors", vocab_size=44, seed=seed)


def saved(source: Path, folder: Path, seed: int) -> None:
    with Engine.from_pretrained(source / "thl0.safetensors", device="cpu", stream=False) as engine:
        _, state = engine.step(torch.tensor([seed]), engine.new_state())
        engine.save_state(state, folder / "out.safetensors")


def reported(source: Path, folder: Path, seed: int) -> None:
    write_file(folder / "out.json", json.dumps([seed] * 5000).encode())


def trained(source: Path, folder: Path, seed: int) -> None:
    train(
        TrainOptions(
            "hrm",
            source / "hrm.json",
            source / "text.txt",
            folder,
            steps=2 + seed,
            batch_size=1,
            chunk=4,
            evaluate_every=1,
            save_every=1,
            sample_tokens=0,
            resume=(folder / "training.safetensors").exists(),
        )
    )


WRITERS = [quantized, converted, converted_folder, initialised, adapted, grown, saved, reported, trained]
ONCE = (adapted,)  # refuses a folder that is there


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for seed in (0, 1):
        init_checkpoint("thl", THL, folder / f"thl{seed}.safetensors", seed)
        with open_store(folder / f"thl{seed}.safetensors") as store:
            torch.save(
                {name: one.rows(0, one.shape[0]) for name, one in store.sources().items()}, folder / f"thl{seed}.bin"
            )
    init_checkpoint("hrm", HRM, folder / "hrm.safetensors")
    init_checkpoint("gemma3n", GEMMA, folder / "gemma.safetensors")
    (folder / "text.txt").write_text("hello world, said the king. " * 10)
    (folder / "hrm.json").write_text(json.dumps({name: value for name, value in HRM.items() if name != "vocab_size"}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_leaves_the_old_or_the_new(writer: Callable, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    versions: list[dict[str, bytes]] = [{}]  # what may lie there, from the first to the last
    for seed in (0,) if writer in ONCE else (0, 1):
        old = versions[-1]
        calls = {}
        for call in ("write", "sync", "rename"):
            inject(call, 0, folder, times=0)
            writer(source, folder, seed)
            calls[call] = library.faults_seen()
            new = contents(folder)
            restore(folder, old)
        assert all(calls.values())
        versions.append(new)
        for call, count in calls.items():
            for number, after in enumerate(sampled(count, most=1 if writer is trained else 3)):
                inject(call, FAILURES[number % len(FAILURES)], folder, after)
                with pytest.raises(EngineError, match="cannot write: (No space left|Input/output error|Disk quota)"):
                    writer(source, folder, seed)
                assert library.faults_done() == 1
                calm()
                check(folder, writer, versions)
                if writer is trained:
                    go_on(source, folder, seed)
                restore(folder, old)
        inject("write", SHORT, folder, times=ALWAYS)
        writer(source, folder, seed)
        assert library.faults_done() > 0
        inject("write", errno.EINTR, folder, times=20)
        restore(folder, old)
        writer(source, folder, seed)
        calm()
        assert contents(folder) == new


@pytest.mark.parametrize("writer", WRITERS)
def test_a_source_that_cannot_be_read_is_told(writer: Callable, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    inject("read", 0, source, times=0)
    writer(source, folder, 0)
    count = library.faults_seen()
    assert count or writer in (initialised, reported)
    new = contents(folder)
    for after in sampled(count):
        restore(folder, {})
        inject("read", errno.EIO, source, after)
        try:  # it goes on where a read failed that finds out how to read
            writer(source, folder, 0)
            assert contents(folder) == new
        except EngineError as error:
            assert re.search("Input/output error|not a usable torch.save file", str(error))  # zipfile says no more
            check(folder, writer, [{}, new])
        assert library.faults_done() == 1
        calm()
    restore(folder, {})
    inject("read", SHORT, source, times=ALWAYS)
    writer(source, folder, 0)
    assert contents(folder) == new and (library.faults_done() or not count)


def go_on(source: Path, folder: Path, seed: int) -> None:
    """The run that failed goes on, or is complete."""
    try:
        trained(source, folder, seed)
    except ConfigError as error:
        assert "updates already" in str(error)


def check(folder: Path, writer: Callable, versions: list[dict[str, bytes]]) -> None:
    for name, content in contents(folder).items():
        assert not re.search("partial", name)
        if writer is not trained:  # which has several versions of a file, each saved in its turn
            assert content in [version.get(name) for version in versions], name
        elif name.endswith(".safetensors"):
            load_tensors(folder / name)


def restore(folder: Path, version: dict[str, bytes]) -> None:
    for name in contents(folder).keys() - version.keys():
        (folder / name).unlink()
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not os.listdir(below):
            below.rmdir()
    for name, content in version.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
