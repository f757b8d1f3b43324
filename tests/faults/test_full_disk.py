"""A disk that is full, or that fills while it is written to; injected.py does the same to every writer without one."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint, quantize_checkpoint
from thl_engine.errors import CheckpointError
from thl_engine.train import TrainOptions, train

THL = dict(vocab_size=4000, embedding_dim=200, num_tiers=1, tier_dims=[200], tier_timescales=[1], local_window=2)
THL |= dict(memory_slots=3000, memory_dim=100, query_dim=4, value_dim=8, num_heads=2, head_dim=4, read_topk=2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(params=["seen", "unseen"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the system tells how little room there is; where others write too, it was more a moment before."""
    if request.param == "unseen":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    return request.param


def test_contexts_and_models(disk: Path, tmp_path: Path, room: str) -> None:
    source = tmp_path / "model.safetensors"
    init_checkpoint("thl", THL, source)
    (disk / "small").write_text("precious")
    (disk / "model.safetensors").write_text("precious too")
    before = {file.name: file.read_bytes() for file in disk.iterdir()}
    message = "No space left on device" if room == "unseen" else "no space on the device"
    with Engine.from_pretrained(source, device="cpu") as engine:
        _, state = engine.step(torch.tensor([1, 2]), engine.new_state(2))
        with pytest.raises(CheckpointError, match=message):
            engine.save_state(state, disk / "small")
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, disk / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        init_checkpoint("thl", THL, disk / "new.safetensors")
    assert {file.name: file.read_bytes() for file in disk.iterdir()} == before


def test_a_run_stops_and_goes_on_when_there_is_room(disk: Path, tmp_path: Path, room: str) -> None:
    config = dict(hidden_size=16, num_heads=2, L_layers=1, H_layers=1, expansion=1.0, halt_max_steps=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("hello world, said the king. " * 20)
    places = ("hrm", tmp_path / "config.json", tmp_path / "text.txt", disk / "run")
    train(TrainOptions(*places, steps=1, batch_size=1, chunk=4, sample_tokens=0))
    before = {file.name: file.read_bytes() for file in places[3].iterdir()}
    filler = disk / "filler"
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 8192))
    with pytest.raises(CheckpointError, match="(no space on|No space left on)"):
        train(TrainOptions(*places, steps=2, resume=True))
    assert before.items() <= {file.name: file.read_bytes() for file in places[3].iterdir()}.items()
    filler.unlink()
    train(TrainOptions(*places, steps=2, resume=True))
    assert not [name for name in os.listdir(places[3]) if name.endswith(".partial")]
