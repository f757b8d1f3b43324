"""What `thl run` makes of prompts: ids, chats, one <bos>, a missing tokenizer, a context smaller than the default."""

import json
from dataclasses import replace

import pytest
import tokenizers
import torch
from conftest import FIXTURES
from inl_small import ODD as INL
from inl_small import random_tensors as inl_tensors
from safetensors.torch import save_file
from tokenizers import AddedToken, models, pre_tokenizers, processors

from thl_engine import ConfigError, Engine
from thl_engine.checkpoint import convert, pickled
from thl_engine.engine import answering
from thl_engine.errors import CheckpointError

NAMES = ["<unk>", "<bos>", "<eos>", "hello", "world"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def model(tmp_path):
    """An INL model of 300 ids and a context of 40, with a tokenizer and a chat template."""
    config = replace(INL, vocab_size=300, max_seq_len=40)
    save_file(inl_tensors(config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    inner = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(name, special=True) for name in NAMES[:3]])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "do_sample": false}')
    return tmp_path


def written(succeeds, model, *options):
    return json.loads(succeeds("run", "--model", model, "--seed", 1, "--json", *options))


def test_prompts_as_ids(model, succeeds, fails, tmp_path):
    text = written(succeeds, model, "--prompt", "hello world", "--max-new-tokens", 3)
    (tmp_path / "ids.txt").write_text("[1, 3,\n 4]\n")
    for given in ("1,3,4", "1 3 4", f"@{tmp_path / 'ids.txt'}"):
        assert written(succeeds, model, "--prompt-ids", given, "--max-new-tokens", 3)["ids"] == text["ids"]
    two = written(succeeds, model, "--prompt-ids", "1,3,4", "--prompt-ids", "1", "--max-new-tokens", 3)
    assert two[0]["ids"] == text["ids"] and len(two) == 2
    run = ("run", "--model", model, "--prompt-ids")
    for given, message in (
        ("1,x", "'x' is no token id"),
        ("-1", "'-1' is no token id"),
        ("9" * 5000, "no token id"),
        ("", "the prompt is empty"),
        ("300", "300 is outside the vocabulary of 300"),
        ("@nowhere", "nowhere: cannot read the file"),
    ):
        line = fails(*run, given)
        assert message in line and len(line) < 330


def test_ids_go_without_a_prompt(model):
    from thl_engine.cli import main

    for other in (["--prompt", "x"], ["--chat"]):
        with pytest.raises(SystemExit, match="2"):
            main(["run", "--model", str(model), "--prompt-ids", "1", *other])


def test_a_model_without_a_tokenizer_asks_for_it(model, succeeds, fails):
    (model / "tokenizer.json").unlink()
    assert "put its tokenizer.json there" in fails("run", "--model", model, "--prompt", "hello")
    written(succeeds, model, "--prompt-ids", "1,3", "--max-new-tokens", 1)


def test_the_default_number_of_tokens_fits_the_context(model, succeeds, fails):
    (model / "generation_config.json").write_text('{"eos_token_id": 299}')
    with Engine.from_pretrained(model, device="cpu") as engine:
        pieces = list(engine.generate([1] * 10, seed=1))
        assert len(pieces) == 31 or pieces[-1].id == 299
        assert len(list(engine.generate([1] * 40, seed=1))) == 1
        both = list(engine.generate_batch([[1] * 10, [3]], seed=1))
        assert max(sum(i == row for i, _ in both) for row in (0, 1)) <= 31
        for prompt, count in (([1] * 10, 32), ([1] * 41, None)):
            with pytest.raises(ConfigError, match="the context ends at 40|max_seq_len"):
                engine.generate(prompt, max_new_tokens=count)
    written(succeeds, model, "--prompt", "hello", "--context", 8)
    assert "context" in fails("run", "--model", model, "--prompt", "hello", "--context", 8, "--max-new-tokens", 100)


def test_a_chat_is_sampled_as_its_author_says(model, succeeds):
    chat = ("--prompt", "hello", "--chat", "--max-new-tokens", 6)
    greedy = written(succeeds, model, "--prompt-ids", "1,3", "--max-new-tokens", 6, "--temperature", 0)
    assert written(succeeds, model, *chat)["ids"] == greedy["ids"]
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    usual = written(succeeds, model, "--prompt-ids", "1,3", "--max-new-tokens", 6, "--temperature", 0.8, "--top-k", 50)
    assert written(succeeds, model, *chat)["ids"] == usual["ids"]


@pytest.mark.parametrize("how", [(), ("--chat",)])
def test_a_context_has_one_bos(model, succeeds, how):
    saved = model / "context.safetensors"
    options = ("--max-new-tokens", 2, "--temperature", 0, *how)
    first = written(succeeds, model, "--prompt", "hello", "--save-state", saved, *options)
    assert first["stats"]["prompt_tokens"] == 2
    second = written(succeeds, model, "--prompt", "world", "--state", saved, *options)
    assert second["stats"]["prompt_tokens"] == 1


GEMMA4 = next(
    case["source"]
    for case in json.loads((FIXTURES / "chat_templates.json").read_text())["cases"]
    if case["name"] == "gemma4"
)


def test_a_second_turn_continues_the_first(tmp_path):
    """As if the whole conversation were written by Gemma 4's template, its newline behind an answer included."""
    config = replace(INL, vocab_size=300, max_seq_len=40)
    special = ["<unk>", "<bos>", "<eos>", "<|turn>", "<turn|>"]
    words = [*special, "\n", "user", "model", "hello", "world"]
    inner = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    inner.add_special_tokens([AddedToken(name, special=True) for name in special])
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    (tmp_path / "chat_template.jinja").write_text(GEMMA4)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(inl_tensors(config), tmp_path / "model.safetensors")
    engine = Engine.from_pretrained(tmp_path, device="cpu")
    first, state = answering._asked(engine, "hello", engine.new_state(), None), engine.new_state()
    assert [words[i] for i in first] == "<bos> <|turn> user \n hello <turn|> \n <|turn> model \n".split(" ")
    engine.prefill(torch.tensor([[*first, words.index("world"), words.index("<turn|>")]]), state)
    second = answering._asked(engine, "world", state, None)
    turns = [("user", "hello"), ("assistant", "world"), ("user", "world")]
    whole = engine.tokenizer.chat([{"role": role, "content": text} for role, text in turns])
    assert [*first, words.index("world"), words.index("<turn|>"), *second] == whole
    # A template that leaves earlier answers out is asked anew, without a second <bos>.
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}\n{{ messages|length }}")
    with Engine.from_pretrained(tmp_path, device="cpu") as other:
        assert words[answering._asked(other, "world", state, None)[0]] == "world"


def test_an_old_torch_does_not_read_pickles(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "TORCH_NEEDED", "99.0")
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="torch .* may run code from such a file; install torch 99.0"):
        convert.convert_checkpoint(tmp_path / "model.bin", tmp_path / "out.safetensors")
