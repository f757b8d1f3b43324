"""Tokens around a text: one that begins it, those that end it, and ones that the model has no row for."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from thl_engine.errors import TokenizerError
from thl_engine.text.chat_template import companions_beside, join_files
from thl_engine.text.sampler import Sampling
from thl_engine.text.tokenizer import load_tokenizer

NAMES = ["<unk>", "<bos>", "<eos>", "hello", "world"]


def written(single="<bos> $A", added=()):
    inner = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(name, special=True) for name in NAMES[:3]])
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    inner.add_special_tokens(list(added))
    return inner.to_str()


@pytest.mark.parametrize("config", [None, {"bos_token": "<bos>"}])
def test_a_text_has_one_bos(config):
    files = {"tokenizer.json": written()}
    if config:
        files["tokenizer_config.json"] = json.dumps(config)
    tokenizer = load_tokenizer(join_files(files), 5, "here")
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("hello") == tokenizer.encode("<bos>hello") == tokenizer.encode("<bos> hello") == [1, 3]
    assert tokenizer.encode("") == tokenizer.encode("<bos>") == [1]
    assert tokenizer.encode("hello<bos>world") == [1, 3, 1, 4]
    assert tokenizer.encode("hello", begins=False) == [3]
    own = load_tokenizer(written(single="$A"), 5, "here")
    assert own.encode("<bos><bos>hello") == [1, 1, 3]  # all of them are the text's
    both = load_tokenizer(written(single="<bos> $A <eos>"), 5, "here")
    assert both.encode("<bos>hello") == [1, 3, 2]


def test_added_tokens_beyond_the_model():
    tokenizer = load_tokenizer(written(added=["[PAD]", "[MORE]"]), 5, "here")
    assert tokenizer.vocab_size == 7 and tokenizer.needed_size == 5
    assert tokenizer.encode("hello world") == [1, 3, 4]
    with pytest.raises(TokenizerError, match=r"token '\[PAD\]', id 5, of which the model, with 5 ids, has no row"):
        tokenizer.encode("hello [PAD]")
    with pytest.raises(TokenizerError, match="id 5 is outside the vocabulary of 5"):
        tokenizer.decode([5])
    with pytest.raises(TokenizerError, match="the tokenizer has 5 ids, the model only 4"):
        load_tokenizer(written(), 4, "here")
    # One that ends a text and has no row is none that the model writes.
    assert load_tokenizer(written(added=["<|endoftext|>"]), 5, "here").end_ids == {2}


def test_a_character_vocabulary_with_a_pad_beyond_the_model():
    tokenizer = load_tokenizer('{"a": 0, "b": 1, "<pad>": 2}', 2, "here")
    assert tokenizer.encode("ab") == [0, 1] and tokenizer.vocab_size == 3
    with pytest.raises(TokenizerError, match="has 2 ids, the model only 1"):
        load_tokenizer('{"a": 0, "b": 1, "<pad>": 2}', 1, "here")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": [2, 3]}, None, {2, 3}),
        ({"eos_token_id": 3}, None, {3}),
        ({"text_config": {"eos_token_id": [4, 2]}}, None, {2, 4}),
        ({"eos_token_id": 3, "text_config": {"eos_token_id": 4}}, None, {3}),
        ({"eos_token_id": None, "text_config": {}}, None, {2}),  # by its name
        ({"eos_token_id": 3}, {"eos_token_id": 4}, {4}),
        ({"eos_token_id": 3}, {}, {2}),
        ({"text_config": [1]}, None, {2}),
    ],
)
def test_end_tokens_of_the_configuration(config, generation, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    files = {"tokenizer.json": written(), **companions_beside(tmp_path)}
    assert load_tokenizer(join_files(files), 5, "here").end_ids == expected


@pytest.mark.parametrize("odd", ['"x"', "{}", "1.5", "[true]", '["<eos>"]'])
def test_end_tokens_that_are_none(odd):
    files = {"tokenizer.json": written(), "generation_config.json": f'{{"eos_token_id": {odd}}}'}
    with pytest.raises(TokenizerError, match="eos_token_id is .*; it must be one id or a list"):
        load_tokenizer(join_files(files), 5, "here")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, Sampling(top_k=64, top_p=0.95)),
        ({"temperature": 0.6}, Sampling(temperature=0.6)),
        ({"do_sample": False, "temperature": 0.6}, Sampling(temperature=0.0)),
        ({"temperature": None, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
    ],
)
def test_sampling_of_the_author(fields, expected):
    files = {"tokenizer.json": written(), "generation_config.json": json.dumps(fields)}
    assert load_tokenizer(join_files(files), 5, "here").sampling == expected


def test_sampling_that_cannot_work_is_refused_when_it_is_used():
    files = {"tokenizer.json": written(), "generation_config.json": '{"temperature": "hot"}'}
    tokenizer = load_tokenizer(join_files(files), 5, "here")
    with pytest.raises(TokenizerError, match="generation_config.json: temperature is 'hot'"):
        _ = tokenizer.sampling


def test_templates_of_a_folder(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    (tmp_path / "chat_template.jinja").write_text("D")
    files = {"tokenizer.json": written(), **companions_beside(tmp_path)}
    tokenizer = load_tokenizer(join_files(files), 5, "here")
    hello = [{"role": "user", "content": "x"}]
    assert tokenizer.chat(hello) == [0] and tokenizer.chat(hello, template="rag") == [0]
    for number in range(65):
        (tmp_path / "additional_chat_templates" / f"{number}.jinja").write_text("x")
    with pytest.raises(TokenizerError, match="66 templates, expected at most 64"):
        companions_beside(tmp_path)


def test_answers_asked_for_by_tags():
    """HRM-Text's instructions, with the published tokens or those that the tokenizer's files name."""
    tags = [
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
    ]
    text = written(added=[AddedToken(tag, special=True) for tag in tags])
    tokenizer = load_tokenizer(text, 11, "here")
    assert not tokenizer.has_template
    assert tokenizer.conditioned("hello", "synth,cot") == [5, 10, 8, 3, 6]
    assert tokenizer.conditioned("hello", " direct ") == [5, 7, 3, 6]
    assert tokenizer.conditioned("hello", "") == [5, 3, 6]
    with pytest.raises(TokenizerError, match="condition 'loud' is unknown; there are direct, cot, noisy, synth"):
        tokenizer.conditioned("hello", "loud")
    named = {"condition_mapping": {"loud": "<|quad_end|>"}, "boq": "<bos>", "eoq": "<eos>"}
    files = join_files({"tokenizer.json": text, "tokenizer_config.json": json.dumps(named)})
    assert load_tokenizer(files, 11, "here").conditioned("hello", "loud") == [1, 10, 3, 2]
    with pytest.raises(TokenizerError, match="the vocabulary lacks '<|im_start|>'"):
        load_tokenizer(written(), 5, "here").conditioned("hello", "direct")
