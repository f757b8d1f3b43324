"""Everything that can be wrong with what a command is given: exit code 1, one clear line, nothing left behind."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file

from thl_engine import Engine
from thl_engine.cli import main


def _edited(plain: Path, target: Path, change: Callable[[dict], object]) -> Path:
    """A copy of a plain checkpoint with its tensors changed."""
    shutil.copytree(plain, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _flipped(packed: Path, target: Path) -> Path:
    """A copy with one bit of the first matrix's data changed."""
    data = bytearray(packed.read_bytes())
    size = int.from_bytes(data[:8], "little")
    span = json.loads(data[8 : 8 + size])["router.W_q.weight"]["data_offsets"]
    data[8 + size + span[0] + 3] ^= 4
    return _file(target, bytes(data))


def _config(plain: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(plain, target)
    (target / "config.json").write_text(json.dumps({**SMALL.to_dict(), **changes}))
    return target


def _without(plain: Path, target: Path, name: str) -> Path:
    shutil.copytree(plain, target)
    (target / name).unlink()
    return target


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


# What is wrong with a checkpoint: (how to make it from a sound one, what the message must say).
DAMAGED = {
    "empty": (lambda plain, packed, tmp: _file(tmp / "x.safetensors", b""), ["x.safetensors", "empty"]),
    "truncated": (
        lambda plain, packed, tmp: _file(tmp / "x.safetensors", packed.read_bytes()[:-5000]),
        ["x.safetensors", "ends"],
    ),
    "truncated header": (
        lambda plain, packed, tmp: _file(tmp / "x.safetensors", packed.read_bytes()[:100]),
        ["x.safetensors", "header"],
    ),
    "bit flipped": (
        lambda plain, packed, tmp: _flipped(packed, tmp / "x.safetensors"),
        ["x.safetensors", "router.W_q.weight", "checksum"],
    ),
    "wrong dtype": (
        lambda plain, packed, tmp: _edited(
            plain, tmp / "x", lambda t: t.update({"router.W_q.weight": t["router.W_q.weight"].to(torch.int32)})
        ),
        ["router.W_q.weight", "I32", "F32"],
    ),
    "wrong shape": (
        lambda plain, packed, tmp: _edited(plain, tmp / "x", lambda t: t.update({"layer_norm.bias": torch.zeros(5)})),
        ["layer_norm.bias", "[5]", "[101]"],
    ),
    "missing tensor": (
        lambda plain, packed, tmp: _edited(plain, tmp / "x", lambda t: t.pop("layer_norm.bias")),
        ["layer_norm.bias", "missing"],
    ),
    "extra tensor": (
        lambda plain, packed, tmp: _edited(plain, tmp / "x", lambda t: t.update({"router.W_z.weight": torch.zeros(1)})),
        ["router.W_z.weight"],
    ),
    "absurd header": (
        lambda plain, packed, tmp: _file(tmp / "x.safetensors", b"\xff" * 8 + b"{}"),
        ["x.safetensors", "header"],
    ),
    "not a checkpoint": (
        lambda plain, packed, tmp: _file(tmp / "x.safetensors", b"once upon a time, long ago"),
        ["x.safetensors", "header"],
    ),
    "config typo": (
        lambda plain, packed, tmp: _config(plain, tmp / "x", memory_slot=3),
        ["config.json", "memory_slot", "memory_slots"],
    ),
    "config value": (
        lambda plain, packed, tmp: _config(plain, tmp / "x", num_heads="four"),
        ["config.json", "num_heads", "'four'"],
    ),
    "config missing": (lambda plain, packed, tmp: _without(plain, tmp / "x", "config.json"), ["config.json"]),
    "weights missing": (lambda plain, packed, tmp: _without(plain, tmp / "x", "model.safetensors"), ["safetensors"]),
    "absent": (lambda plain, packed, tmp: tmp / "x.safetensors", ["x.safetensors", "No such file"]),
    "unreadable": (lambda plain, packed, tmp: Path("/proc/self/mem"), ["/proc/self/mem"]),
    "pipe": (lambda plain, packed, tmp: _pipe(tmp / "x.safetensors"), ["x.safetensors"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_checkpoints(damage, plain, packed, fails, tmp_path):
    make, words = DAMAGED[damage]
    path = make(plain, packed, tmp_path)
    line = fails("run", "--model", path, "--prompt", "x", "--max-new-tokens", 3)
    assert all(word in line for word in words), line
    if damage == "bit flipped":  # what does not read the data does not find it
        line = fails("inspect", path, "--verify")
        assert all(word in line for word in words), line
        return
    for command in (
        ["inspect", path],
        ["plan", path, "--disk-bandwidth", 1, "--memory-bandwidth", 1],
        ["bench", path, "--tokens", 1],
        ["quantize", path, tmp_path / "out.safetensors"],
    ):
        line = fails(*command)
        assert all(word in line for word in words), line
    assert not list(tmp_path.glob("*out*"))


def test_a_damaged_page_ends_the_text(packed, tmp_path, capsys):
    """Found only when the page is first read: by then the line may have begun."""
    path = _flipped(packed, tmp_path / "x.safetensors")
    assert main(["run", "--model", str(path), "--prompt", "x", "--stream"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_tokenizer(plain, fails, tmp_path):
    path = _without(plain, tmp_path / "x", "vocab.json")
    assert "tokenizer" in fails("run", "--model", path, "--prompt", "x")


def test_text_outside_the_vocabulary(packed, fails):
    assert "U+4E2D" in fails("run", "--model", packed, "--prompt", "中")
    assert "empty" in fails("run", "--model", packed, "--prompt", "")


def test_budget_too_small(packed, fails):
    line = fails("run", "--model", packed, "--prompt", "x", "--memory-budget", "5KiB")
    assert "needs at least" in line and "bytes)" in line
    assert "4 elephants" in fails("plan", packed, "--memory-budget", "4 elephants")
    assert "stream" in fails("run", "--model", packed, "--prompt", "x", "--memory-budget", "5KiB", "--no-stream")


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda:99"], "CUDA"),
        (["--backend", "fortran"], "fortran"),
        (["--threads", "0"], "threads"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--top-k", "-1"], "top_k"),
        (["--max-new-tokens", "-1"], "max_new_tokens"),
        (["--seed", "-1"], "seed"),
        (["--quantize", "none"], "int8"),
        (["--state", "/nowhere/x"], "/nowhere/x"),
        (["--save-state", "/nowhere/x", "--max-new-tokens", "0"], "/nowhere/x"),
    ],
)
def test_bad_options(argv, word, packed, capsys):
    assert main(["run", "--model", str(packed), "--prompt", "x", *argv]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and word in lines[0], lines


def test_full_disk(plain, fails, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for line in (fails("quantize", plain, out), fails("init", "--config", plain / "config.json", out)):
            assert "No space left" in line and "out.safetensors" in line
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    assert "no space" in fails("quantize", plain, out)
    assert not list(tmp_path.iterdir())


def test_a_really_full_disk(plain, fails, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        assert "no space" in fails("quantize", plain, small / "out.safetensors").lower()
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_quantize_twice_and_onto_itself(plain, packed, fails, tmp_path):
    assert "quantised already" in fails("quantize", packed, tmp_path / "out.safetensors")
    assert "being read" in fails("quantize", plain, plain / "model.safetensors")
    assert "cannot write" in fails("quantize", plain, "/nowhere/out.safetensors")
    assert not list(tmp_path.iterdir())


def test_unexpected_errors_are_one_line(packed, fails, monkeypatch):
    for error, word in (
        (MemoryError("cannot allocate 5 bytes"), "allocate 5 bytes"),
        (MemoryError(), "memory"),
        (OSError(errno.EIO, "Input/output error", "disk"), "Input/output error"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"), "allocate memory"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(Engine, "from_pretrained", fail)
        assert word in fails("run", "--model", packed, "--prompt", "x")
