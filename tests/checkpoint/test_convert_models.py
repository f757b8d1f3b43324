"""Published checkpoints of INL, HIM and HRM through `thl convert` and `thl grow`, as their trainers leave them."""

import json

import pytest
import torch
from conftest import CONFIGS, entries

from thl_engine import Engine
from thl_engine.checkpoint.store import open_store
from thl_engine.config import parse_config
from thl_engine.models import architecture

TEXT = "to be, or not to be"
VOCABULARY = entries(TEXT)


def published(model: str, vocab_size: int = len(VOCABULARY)) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and state dict of a small random model, repeated tensors included."""
    fields = {"vocab_size": vocab_size, **CONFIGS[model]}
    config, module = parse_config(fields, model), architecture(model)
    generator = torch.Generator().manual_seed(0)
    tensors = {block.name: module.initial(config, block, slice(None), generator) for block in module.blocks(config)}
    repeated = getattr(module, "aliases", lambda config: {})(config)
    return fields, {**tensors, **{alias: tensors[name] for alias, name in repeated.items()}}


def continual(vocabulary: dict[str, int]) -> str:
    return json.dumps({"level": "char", "vocab": vocabulary, "vocab_size": len(vocabulary)})


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
@pytest.mark.parametrize("place", ["inside", "beside"])
def test_trainers_files(model, key, place, succeeds, tmp_path):
    fields, tensors = published(model)
    saved = (
        tensors
        if key is None
        else {
            key: {f"module.{name}": value for name, value in tensors.items()},
            "epoch": 3,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]},
        }
    )
    if place == "inside" and key is not None:
        saved["model_config"] = (
            {**fields, "dropout": 0.1} if model != "hrm" else {**fields, "forward_dtype": torch.float32}
        )
    else:
        (tmp_path / "config.json").write_text(json.dumps(fields))
    torch.save(saved, tmp_path / "last.pt")
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    succeeds("convert", tmp_path / "last.pt", tmp_path / "out")
    store = open_store(tmp_path / "out")
    for name, tensor in tensors.items():
        assert name not in store.tensors or torch.equal(store.read(name), tensor)
    assert succeeds("run", "--model", tmp_path / "out", "--prompt", "to be", "--max-new-tokens", 3, "--seed", 0)


def test_a_configuration_can_be_named(succeeds, fails, tmp_path):
    fields, tensors = published("inl")
    torch.save(tensors, tmp_path / "weights.bin")
    assert "holds no configuration" in fails("convert", tmp_path / "weights.bin", tmp_path / "out.safetensors")
    (tmp_path / "sizes.json").write_text(json.dumps({"model_type": "inl", **fields}))
    succeeds("convert", tmp_path / "weights.bin", tmp_path / "out.safetensors", "--config", tmp_path / "sizes.json")
    assert open_store(tmp_path / "out.safetensors").config.d_model == 24
    line = fails("convert", tmp_path / "weights.bin", tmp_path / "x.safetensors", "--config", "inl-small")
    assert "is missing" in line


def test_memory_that_was_saved_in_use_is_emptied(succeeds, tmp_path):
    fields, tensors = published("him")
    used = torch.randn(4, fields["mem_slots"], fields["embed_dim"])
    tensors |= {name: used for name in tensors if name.endswith("memory.memory")}
    torch.save({"model_state_dict": tensors, "config": fields}, tmp_path / "him.pt")
    succeeds("convert", tmp_path / "him.pt", tmp_path / "out.safetensors")
    assert "[4, 3, 64], and is emptied" in succeeds.err and succeeds.err.count("\n") == 1
    assert not open_store(tmp_path / "out.safetensors").read("memory.memory").any()


# --- HRM's vocabularies -----------------------------------------------------------------------------------------------


@pytest.fixture
def hrm(tmp_path):
    fields, tensors = published("hrm")
    torch.save({"model_state_dict": tensors, "config": fields}, tmp_path / "hrm_latest.pt")
    return tmp_path


def test_the_continual_vocabulary_comes_along(hrm, succeeds):
    (hrm / "continual_tokenizer.json").write_text(continual(VOCABULARY))
    for target in (hrm / "out", hrm / "out.safetensors"):
        succeeds("convert", hrm / "hrm_latest.pt", target)
        assert succeeds.err == ""
        with Engine.from_pretrained(target) as engine:
            assert engine.tokenizer.encode("to") == [4, 5] and engine.tokenizer.eos_id == 3
    assert {path.name for path in (hrm / "out").iterdir()} == {
        "config.json",
        "continual_tokenizer.json",
        "model.safetensors",
    }


def test_a_lost_vocabulary_is_recovered(hrm, succeeds, fails):
    (hrm / "run1.json").write_text(continual(entries("abc")))
    assert "has 7 ids, the model" in fails("convert", hrm, hrm / "out")
    (hrm / "run2.json").write_text(continual(VOCABULARY))
    succeeds("convert", hrm, hrm / "out")
    assert "the vocabulary is" in succeeds.err and "run2.json" in succeeds.err
    assert json.loads((hrm / "out" / "continual_tokenizer.json").read_text())["vocab"] == VOCABULARY
    (hrm / "run3.json").write_text(continual(entries(TEXT[::-1])))
    assert "2 different vocabularies" in fails("convert", hrm, hrm / "other")
    fields, tensors = published("hrm")
    torch.save({"model": tensors, "config": fields, "tokenizer_vocab": VOCABULARY}, hrm / "hrm_latest.pt")
    succeeds("convert", hrm, hrm / "out.safetensors")
    assert "'tokenizer_vocab'" in succeeds.err


def test_a_vocabulary_that_does_not_fit_is_explained(hrm, succeeds, fails):
    succeeds("convert", hrm, hrm / "ids.safetensors")
    assert "no vocabulary in it or beside it" in succeeds.err
    for text, words in ((TEXT + "!", "grow the model to"), ("abc", "have no text")):
        (hrm / "continual_tokenizer.json").write_text(continual(entries(text)))
        line = fails("convert", hrm, hrm / "out")
        assert words in line and f"{len(VOCABULARY)}" in line
    assert not (hrm / "out").exists()


# --- growth -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_hrm(hrm, succeeds):
    (hrm / "continual_tokenizer.json").write_text(continual(VOCABULARY))
    succeeds("convert", hrm, hrm / "small")
    return hrm / "small"


def test_growing_by_a_text(small_hrm, succeeds, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "grown.safetensors"
    text.write_text("zebra be")
    assert succeeds("grow", small_hrm, out, "--text", text, "--layers", 2) == f"{out}\n"
    before, after = open_store(small_hrm), open_store(out)
    size = len(VOCABULARY)
    assert after.config.vocab_size == size + 2 and after.config.L_layers == after.config.H_layers == 2
    for name, tensor in before.tensors.items():
        assert torch.equal(after.read(name)[: tensor.rows], before.read(name))
    with Engine.from_pretrained(out) as engine:
        assert engine.tokenizer.encode("za to") == [size, size + 1, 6, 4, 5]
        assert engine.tokenizer.decode([size, size + 1]) == "za"
    assert succeeds("run", "--model", out, "--prompt", "zebra", "--max-new-tokens", 2)
    again = tmp_path / "again.safetensors"
    succeeds("grow", small_hrm, again, "--text", text, "--layers", 2)
    assert again.read_bytes() == out.read_bytes()


def test_growing_by_numbers(small_hrm, succeeds, tmp_path):
    out = tmp_path / "grown.safetensors"
    succeeds("grow", small_hrm, out, "--vocabulary", 40)
    assert "40 tokens, 1 + 1 layers" in succeeds.err
    ids = [4, 5, 6]
    with Engine.from_pretrained(small_hrm) as old, Engine.from_pretrained(out) as new:
        assert new.tokenizer.encode("to") == [4, 5]
        one, other = (engine.forward(torch.tensor([ids]))[0] for engine in (old, new))
    torch.testing.assert_close(other[..., : one.shape[-1]], one)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--vocabulary", 5], "vocab_size is 5"),
        (["--layers", 0], "L_layers is 0"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_growth_that_cannot_work(argv, words, small_hrm, fails, tmp_path):
    assert words in fails("grow", small_hrm, tmp_path / "out.safetensors", *argv)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_does_not_grow(small_hrm, plain, packed, succeeds, fails, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "thl models do not grow; hrm models do" in fails("grow", plain, out, "--layers", 3)
    succeeds("quantize", small_hrm, out)
    assert "stored as int8" in fails("grow", out, tmp_path / "x.safetensors", "--layers", 3)
    assert "being read" in fails("grow", small_hrm, small_hrm / "model.safetensors", "--layers", 3)
    (tmp_path / "continual_tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text("x")
    succeeds("convert", tmp_path, out)
    assert "no vocabulary in or beside" in fails(
        "grow", out, tmp_path / "y.safetensors", "--text", tmp_path / "text.txt"
    )
    with pytest.raises(SystemExit) as stop:
        succeeds("grow", small_hrm, out)
    assert stop.value.code == 2
