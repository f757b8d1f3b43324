"""Contexts that are no contexts: fields of another kind of number, files that are something else, absurd batches."""

import os

import pytest
import torch
from conftest import MODELS, configured
from safetensors.torch import save_file

from thl_engine import CheckpointError, Engine, EngineError


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    config, weights = configured(request.param)
    with Engine.from_state_dict(request.param, config, weights, backend="reference", device="cpu") as opened:
        yield opened


def stepped(engine):
    _, state = engine.step(torch.ones(1, dtype=torch.int64), engine.new_state())
    return state.to_dict()


def test_whole_numbers_are_no_floats(engine, tmp_path):
    fields, file = stepped(engine), tmp_path / "state.safetensors"
    whole = [name for name, value in fields.items() if value.dtype == torch.int64]
    assert "timestep" in whole
    for name in whole:
        for value in (float("nan"), float("inf"), 0.5):
            like = torch.full_like(fields[name], value, dtype=torch.float32)
            save_file({**fields, name: like}, file)
            with pytest.raises(CheckpointError, match=f"'{name}' is (torch.float32|missing or not two whole numbers)"):
                engine.load_state(file)
    for other in (torch.bool, torch.complex64):
        with pytest.raises(CheckpointError, match=f"'timestep' is {other}, expected torch.int64"):
            engine.state_from_dict({**fields, "timestep": fields["timestep"].to(other)})
    engine.state_from_dict({**fields, "timestep": fields["timestep"].to(torch.int32)})


def test_files_that_are_no_contexts(engine, tmp_path):
    file = tmp_path / "state.safetensors"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torch.save({}, tmp_path / "saved")
    (tmp_path / "empty").write_bytes(b"")
    for name, message in [
        ("pipe", "neither a file nor a folder"),
        ("pointer", "a Git LFS pointer"),
        ("saved", "a torch.save file"),
        ("empty", "the file is empty"),
        ("missing", "No such file"),
        ("", "found a folder"),
        ("a\0b", "embedded null"),
    ]:
        with pytest.raises(EngineError, match=message):
            engine.load_state(tmp_path / name)
    # Written over while it is in use: what was read of it stays.
    save_file(stepped(engine), file)
    state = engine.load_state(file)
    before = {name: value.clone() for name, value in state.to_dict().items()}
    os.truncate(file, 0)
    assert all(torch.equal(value, before[name]) for name, value in state.to_dict().items())


@pytest.mark.parametrize("model", ["inl", "gemma3n", "him"])
def test_sequences_without_a_byte(model):
    """Tensors of no elements take none in a file, whatever their other sizes are."""
    config, weights = configured(model)
    with Engine.from_state_dict(model, config, weights, backend="reference", device="cpu") as engine:
        fields, many = engine.new_state().to_dict(), 1 << 40
        empty = {n: torch.empty(many, *v.shape[1:]) for n, v in fields.items() if v.dim() == 4} or {
            "memory": torch.empty(many, 0, 0),
            "reasoning_embeddings": fields["reasoning_embeddings"],
        }
        with pytest.raises(CheckpointError, match="no memory|has shape"):
            engine.state_from_dict({**(fields if model != "him" else {}), **empty})
        with pytest.raises(EngineError, match="a state of batch_size"):
            engine.new_state(many)
