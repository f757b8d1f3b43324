"""The commands with models other than THL: modes and chat of HRM, the batch mode of HIM, what they report."""

import json
import random
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as models_of_tokenizers

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.cli import main
from thl_engine.config import PRESETS, parse_config
from thl_engine.engine.hrm_chat import chat
from thl_engine.errors import ConfigError, TokenizerError
from thl_engine.text.sampler import Sampling
from thl_engine.text.tokenizer import StreamDecoder, load_tokenizer

CHARACTERS = ["<PAD>", "<UNK>", "<BOS>", "<EOS>", "\n", *(chr(code) for code in range(32, 127))]
MODELS = list(CONFIGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A small random model of each kind with a character vocabulary."""
    out = {}
    for name, config in CONFIGS.items():
        out[name] = tmp_path_factory.mktemp(name)
        fields = {"model_type": name, "vocab_size": len(CHARACTERS), **config}
        init_checkpoint(name, fields, out[name] / "model.safetensors", seed=1)
        (out[name] / "vocab.json").write_text(json.dumps({char: i for i, char in enumerate(CHARACTERS)}))
    return out


@pytest.mark.parametrize("model, context", [("inl", "40 tokens"), ("him", "any length"), ("hrm", "any length")])
def test_inspect_tells_how_long_a_sequence_may_be(model, context, models, succeeds):
    assert f"for a sequence of {context}" in succeeds("inspect", models[model])
    assert "state_context" in json.loads(succeeds("inspect", models[model], "--json"))


def test_the_names_of_files_say_nothing_about_the_model(models, succeeds, tmp_path):
    shutil.copytree(models["hrm"], tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "folder" / "hrm.safetensors")
    assert json.loads(succeeds("inspect", tmp_path / "folder", "--json"))["model_type"] == "hrm"


def test_a_prompt_beyond_the_context(models, fails):
    argv = ["run", "--model", models["inl"], "--prompt", "x" * 41, "--max-new-tokens", 5]
    for prompts in ([], ["--prompt", "y"]):
        line = fails(*argv, *prompts)
        assert "a prompt of 41 tokens and 5 new ones" in line and "max_seq_len is 40" in line


@pytest.mark.parametrize("model", ["inl", "him"])
def test_run_writes_what_the_engine_generates(model, models, succeeds):
    with Engine.from_pretrained(models[model]) as engine:
        expected = list(engine.generate("To be", max_new_tokens=12, seed=3, top_k=20))
    found = json.loads(
        succeeds(
            "run",
            "--model",
            models[model],
            "--prompt",
            "To be",
            "--max-new-tokens",
            12,
            "--seed",
            3,
            "--top-k",
            20,
            "--json",
        )
    )
    assert found["ids"] == [piece.id for piece in expected]
    assert found["text"] == "".join(piece.text for piece in expected)


# --- HRM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, cycles", [([], (2, 2)), (["--mode", "fast"], (1, 1)), (["--mode", "3x1"], (3, 1))])
def test_hrm_chats_in_the_mode_asked_for(mode, cycles, models, succeeds):
    argv = ["run", "--model", models["hrm"], "--prompt", "x" * 70, "--max-new-tokens", 20, "--seed", 2, *mode]
    with Engine.from_pretrained(models["hrm"]) as engine:
        state = engine.new_state(cycles=cycles)
        sampling = Sampling(temperature=0.8, top_k=50, seed=2)
        expected = list(chat(engine, "x" * 70, max_new_tokens=20, sampling=sampling, state=state))
        assert state.timestep == 60 + len(expected) - (len(expected) == 20)
        plain = engine.generate("x" * 70, max_new_tokens=20, seed=2, state=engine.new_state(cycles=cycles))
        text = "".join(piece.text for piece in plain)
    assert succeeds(*argv) == "".join(piece.text for piece in expected) + "\n"
    assert succeeds(*argv, "--no-chat") == text + "\n"


def test_a_kept_context_goes_on_in_another_mode(models, succeeds, tmp_path):
    kept, after = tmp_path / "state.safetensors", tmp_path / "after.safetensors"
    argv = ["run", "--model", models["hrm"], "--max-new-tokens", 4, "--seed", 2]
    first = succeeds(*argv, "--prompt", "abc", "--save-state", kept, "--no-chat")
    assert load_file(kept)["cycles"].tolist() == [2, 2] and int(load_file(kept)["timestep"]) == 3 + 4
    succeeds(*argv, "--prompt", "d", "--state", kept, "--mode", "fast", "--save-state", after, "--no-chat")
    found = load_file(after)
    assert found["cycles"].tolist() == [1, 1] and int(found["timestep"]) == 3 + 4 + 1 + 4 and first


@pytest.fixture
def stubborn(models, tmp_path) -> Path:
    """An HRM model that writes "a" for ever."""
    tensors = {
        name: tensor
        for name, tensor in load_file(models["hrm"] / "model.safetensors").items()
        if not name.startswith("__padding__")
    }
    high = tensors["H_module.layers.0.norm2.weight"]  # z_H is this, or its negative, where the block adds nothing
    tensors["output_head.weight"] = torch.zeros_like(tensors["output_head.weight"])
    tensors["H_module.layers.0.norm2.weight"] = torch.zeros_like(high)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hrm", "vocab_size": 100, **CONFIGS["hrm"]}))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, **{chr(0x100 + i): i for i in range(1, 100)}}))
    return tmp_path


def test_a_chat_ends_at_the_eleventh_repetition(stubborn, succeeds, tmp_path):
    kept = tmp_path / "state.safetensors"
    argv = ["run", "--model", stubborn, "--prompt", "a", "--max-new-tokens", 30, "--temperature", 0]
    assert succeeds(*argv, "--save-state", kept) == "a" * 11 + "\n"  # id 0 is a letter here, and ends nothing
    assert int(load_file(kept)["timestep"]) == 12
    assert succeeds(*argv, "--no-chat") == "a" * 30 + "\n"
    assert succeeds(*argv, "--stop", "aab") == "a" * 11 + "\n"  # what might have begun the stop string comes out
    assert succeeds(*argv, "--stop", "aaa") == "\n"


def test_effort_is_reported(models, succeeds):
    argv = ["--prompt", "abc", "--max-new-tokens", 5, "--seed", 1]
    found = json.loads(succeeds("run", "--model", models["hrm"], *argv, "--no-chat", "--json", "--stats"))
    assert found["stats"]["segments_per_token"] == 3.0  # an untrained model never halts early
    assert "3.00 segments a token" in succeeds.err
    found = json.loads(succeeds("run", "--model", models["inl"], *argv, "--json", "--stats"))
    means = found["stats"]["iterations_per_layer"]
    assert len(means) == 2 and all(4 <= mean <= 6 for mean in means)
    assert " ".join(f"{mean:.2f}" for mean in means) + " by layer" in succeeds.err
    with Engine.from_pretrained(models["inl"]) as engine, engine.trace() as trace:
        engine.prefill(torch.tensor([engine.tokenizer.encode("abc")]), engine.new_state())
    assert len(trace.steps[0]["layer0.iterations_used"]) == 3
    found = json.loads(succeeds("run", "--model", models["him"], *argv, "--json"))
    assert not {"segments_per_token", "iterations_per_layer"} & found["stats"].keys()


def test_modes_of_plan_and_bench(models, succeeds, monkeypatch):
    from thl_engine.report import bandwidth

    given = ["plan", models["hrm"], "--disk-bandwidth", 2, "--memory-bandwidth", 20, "--json"]
    normal, fast, deep = (
        json.loads(succeeds(*given, *mode))["bytes_per_token"] for mode in ([], ["--mode", "fast"], ["--mode", "deep"])
    )
    assert fast < normal < deep
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 32 << 20)
    monkeypatch.setattr(bandwidth, "PRODUCT_SECONDS", 0.02)
    found = json.loads(succeeds("bench", models["hrm"], "--mode", "fast", "--tokens", 3, "--warmup", 1, "--json"))
    assert found["bytes_per_token"] == fast


@pytest.mark.parametrize("mode", ["slow", "0x1", "2x", "65x1", "1x1x1"])
def test_unknown_modes(mode, models, fails):
    line = fails("run", "--model", models["hrm"], "--prompt", "a", "--mode", mode)
    assert mode in line and "fast, normal, deep, thorough, extreme, or NxT" in line


def test_models_without_modes_or_chat(models, fails):
    for command in (["run", "--prompt", "a", "--model"], ["plan"], ["bench"]):
        assert "inl models have no such option; these have: hrm" in fails(*command, models["inl"], "--mode", "fast")
    assert "no chat template" in fails("run", "--model", models["him"], "--prompt", "a", "--chat")


# --- HIM's batch mode -------------------------------------------------------------------------------------------------


def test_a_file_of_prompts_is_answered(models, succeeds, tmp_path):
    samples, results = tmp_path / "samples.json", tmp_path / "results.json"
    samples.write_text(json.dumps([{"prompt": "abc", "id": 7}, {"input": "x" * 30}]))
    argv = ["run", "--model", models["him"], "--input", samples, "--output", results]
    assert succeeds(*argv, "--seed", 1) == f"{results}\n" and "2 prompts answered" in succeeds.err
    first = json.loads(results.read_text())
    assert [sample.get("id") for sample in first] == [7, None] and all(len(s["ids"]) <= 5 for s in first)
    succeeds(*argv, "--seed", 1, "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--stats")
    assert json.loads(results.read_text()) == first and "peak memory" in succeeds.err  # the published sampling
    succeeds(*argv, "--temperature", 0)
    greedy = json.loads(results.read_text())
    succeeds(*argv, "--top-k", 1, "--seed", 9)
    assert json.loads(results.read_text()) == greedy


def test_a_file_of_prompts_needs_a_model_that_answers(models, fails, tmp_path):
    samples = tmp_path / "samples.json"
    samples.write_text('[{"prompt": "a"}]')
    line = fails("run", "--model", models["inl"], "--input", samples, "--output", tmp_path / "out.json")
    assert "answer in one pass (him)" in line
    assert "absent.json" in fails(
        "run", "--model", models["him"], "--input", tmp_path / "absent.json", "--output", tmp_path / "out.json"
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--input", "a"], "go together"),
        (["--output", "a"], "go together"),
        (["--input", "a", "--output", "b", "--prompt", "c"], "--prompt does not go with --input"),
        (["--input", "a", "--output", "b", "--save-state", "c"], "--save-state does not go"),
        (["--input", "a", "--output", "b", "--json"], "--json does not go"),
    ],
)
def test_wrong_usage_of_the_batch_mode(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--model", "x", *argv])
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == "" and words in found.err and found.err.startswith("usage: thl run")


# --- what can be wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, change, words",
    [
        ("inl", {"model_type": "lni"}, ["'lni' is not supported", "inl"]),
        ("him", {"model_type": 3}, ["model_type must be a name"]),
        ("inl", {"num_heads": 5}, ["d_model is 24", "num_heads (5)"]),
        ("him", {"num_heads": 6}, ["embed_dim is 64", "num_heads (6)"]),
        ("him", {"num_kv_heads": 3}, ["num_heads is 4", "num_kv_heads (3)"]),
        ("hrm", {"num_heads": 7}, ["hidden_size is 24", "num_heads (7)"]),
        ("inl", {"d_model": -24}, ["d_model is -24", "at least 1"]),
        ("him", {"mem_slots": -3}, ["mem_slots is -3", "at least 1"]),
        ("hrm", {"L_layers": -1}, ["L_layers is -1", "from 1 to 4096"]),
        ("hrm", {"vocab_size": "many"}, ["vocab_size must be a whole number"]),
    ],
)
def test_configurations_that_cannot_work(model, change, words, models, fails, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": model, "vocab_size": 100, **CONFIGS[model], **change}))
    line = fails("init", "--config", config, tmp_path / "out.safetensors")
    assert "config.json" in line and all(word in line for word in words), line
    tensors = load_file(models[model] / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("__")}, tmp_path / "model.safetensors")
    for command in (["run", "--prompt", "a", "--model"], ["inspect"]):
        line = fails(*command, tmp_path)
        assert all(word in line for word in words), line


def test_published_sizes_by_name(succeeds, fails, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "inl-medium", parse_config({"vocab_size": 300, **CONFIGS["inl"]}))
    expected = None
    for config, argv in (("medium", ["--model-type", "inl"]), ("inl-medium", [])):
        out = tmp_path / f"{config}.safetensors"
        succeeds("init", *argv, "--config", config, out)
        expected = expected or out.read_bytes()
        assert out.read_bytes() == expected
    assert json.loads(succeeds("inspect", out, "--json"))["config"] == PRESETS["inl-medium"].to_dict()
    line = fails("init", "--model-type", "inl", "--config", "huge", tmp_path / "x.safetensors")
    assert "huge" in line and "inl-small, inl-medium" in line
    assert "inl-medium is a size of inl, not of thl" in fails(
        "init", "--model-type", "thl", "--config", "inl-medium", tmp_path / "x.safetensors"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medium").write_text(json.dumps({"model_type": "inl", "vocab_size": 100, **CONFIGS["inl"]}))
    succeeds("init", "--config", "medium", tmp_path / "file.safetensors")  # a file of that name comes first
    found = json.loads(succeeds("inspect", tmp_path / "file.safetensors", "--json"))
    assert found["config"]["vocab_size"] == 100


@pytest.mark.parametrize("model", MODELS)
def test_a_token_outside_the_vocabulary(model, models, fails, tmp_path):
    """A tokenizer with more ids than the model has, and ids given from Python."""
    for file in models[model].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    entries = {char: i + 5 for i, char in enumerate(CHARACTERS)}
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    assert "105 ids, the model only 100" in fails("run", "--model", tmp_path, "--prompt", "a")
    with Engine.from_pretrained(models[model]) as engine, pytest.raises(TokenizerError, match="id 100 is outside"):
        list(engine.generate([5, 100], max_new_tokens=1))


@pytest.mark.parametrize("model", MODELS)
def test_prompts_longer_than_the_model_takes(model, models, succeeds, fails):
    argv = ["run", "--model", models[model], "--prompt", "a" * 90, "--max-new-tokens", 2, "--seed", 1]
    if model == "inl":
        assert "max_seq_len is 40" in fails(*argv)
        with Engine.from_pretrained(models[model]) as engine, pytest.raises(ConfigError, match="would be 41 tokens"):
            list(engine.generate("a" * 39, max_new_tokens=3))
    else:  # these see the last tokens only
        window = {"him": 20, "hrm": 60}[model]
        assert succeeds(*argv) == succeeds(*argv[:4], "a" * window, *argv[5:])


# --- a tokenizer of the size that HIM is published with ---------------------------------------------------------------


@pytest.fixture(scope="module")
def large_vocabulary() -> str:
    """A byte-level BPE tokenizer.json of 32,000 entries, made of syllables: learning one would take long."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if left + right not in vocabulary and len(vocabulary) < 32_000:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))

    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiouy"]
    for syllable in syllables:
        merge(*syllable)
    for syllable in syllables:
        merge("Ġ", syllable)  # as begins a word
    for left, right in product(syllables, syllables):
        merge(left, right)
    for first, second in product(syllables, syllables):
        merge(f"Ġ{first}", second)
    for first, second in product(syllables, [a + b for a, b in product(syllables, syllables)]):
        merge(first, second)
    tokenizer = Tokenizer(models_of_tokenizers.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return tokenizer.to_str()


def test_a_vocabulary_of_32000(large_vocabulary, succeeds, tmp_path):
    tokenizer = load_tokenizer(large_vocabulary, 32_000, "large")
    assert tokenizer.vocab_size == 32_000 and tokenizer.eos_id == 2
    chosen = random.Random(0)
    texts = [
        "banana caramelo",
        "To be, or not to be?\n",
        "  two  spaces ",
        "naïve 東京 👍🏽",
        "",
        "</s> in text \x00\r\n",
        *("".join(chosen.choices("banecodu \n.é東", k=60)) for _ in range(50)),
    ]
    for text in texts[:5] + texts[6:]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= token < 32_000 for token in ids)
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert max(tokenizer.encode("banana caramelo")) > 1000 and len(tokenizer.encode("banana")) < 6
    assert tokenizer.decode(tokenizer.encode(texts[5])) == texts[5].replace("</s>", "")  # a special token, left out
    every = list(range(4, 32_000))
    assert tokenizer.decode(every).count("\ufffd") <= 256  # bytes alone are the only entries that are no text

    fields = {"model_type": "him", "vocab_size": 32_000, **CONFIGS["him"]}
    init_checkpoint("him", fields, tmp_path / "model.safetensors", seed=2)
    (tmp_path / "tokenizer.json").write_text(large_vocabulary)
    with Engine.from_pretrained(tmp_path) as engine:
        pieces = list(engine.generate("banana caramelo", max_new_tokens=12, seed=1))
        with_prompt = engine.tokenizer.decode([*engine.tokenizer.encode("banana caramelo"), *(p.id for p in pieces)])
    assert "banana caramelo" + "".join(piece.text for piece in pieces) == with_prompt
    argv = ["run", "--model", tmp_path, "--prompt", "banana caramelo", "--max-new-tokens", 12, "--seed", 1]
    assert succeeds(*argv) == "".join(piece.text for piece in pieces) + "\n"
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "banana"}, {"prompt": "caramelo " * 30}]))
    succeeds(
        "run", "--model", tmp_path, "--input", tmp_path / "samples.json", "--output", tmp_path / "out.json", "--seed", 0
    )
    results = json.loads((tmp_path / "out.json").read_text())
    assert [tokenizer.decode(result["ids"]) for result in results] == [result["output"] for result in results]
