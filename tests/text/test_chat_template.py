"""Files beside tokenizer.json: chat templates, tokens that end a text, and their way through checkpoints."""

import json

import pytest
import tokenizers
from safetensors.torch import save_file
from tokenizers import AddedToken, models, pre_tokenizers, processors

from thl_engine import Engine, TokenizerError
from thl_engine.checkpoint.convert import quantize_checkpoint
from thl_engine.text.chat_rendering import ChatTemplate
from thl_engine.text.chat_template import COMPANIONS, join_files
from thl_engine.text.tokenizer import load_tokenizer

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- "[" + message.role + "]" + message.content | trim + "[end]" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "[assistant]" }}{% endif %}"""
NAMES = ["<unk>", "<bos>", "<eos>", "[user]", "[assistant]", "[end]", "hello", "world"]
MESSAGES = [
    {"role": "user", "content": " hello "},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "world"},
]
PROMPT = [1, 3, 6, 5, 4, 7, 5, 3, 7, 5, 4]


def tokenizer_json() -> str:
    inner = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(name, special=True) for name in NAMES[:6]])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return inner.to_str()


def files(**more: str) -> dict[str, str]:
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "model_max_length": 9, "pad_token": None}
    return {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": json.dumps(config), **more}


def load(given: dict[str, str]):
    return load_tokenizer(join_files(given), 110, "here")


def test_messages_become_ids_without_a_second_bos():
    tokenizer = load(files(**{"chat_template.jinja": TEMPLATE}))
    assert tokenizer.chat(MESSAGES) == PROMPT
    assert tokenizer.encode("hello world") == [1, 6, 7]


@pytest.mark.parametrize(
    "source", [TEMPLATE, [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]]
)
def test_a_template_may_stand_in_the_tokenizers_configuration(source):
    given = files()
    given["tokenizer_config.json"] = json.dumps({"bos_token": "<bos>", "chat_template": source})
    assert load(given).chat(MESSAGES) == PROMPT


def test_tokens_that_end_a_text():
    assert load({"tokenizer.json": tokenizer_json()}).end_ids == {2}  # by its name
    assert load(files()).end_ids == {2}
    assert load(files(**{"generation_config.json": '{"eos_token_id": 5}'})).end_ids == {5}
    several = load(files(**{"generation_config.json": '{"eos_token_id": [5, 2]}'}))
    assert several.end_ids == {2, 5} and several.eos_id == 5
    other = {**files(), "tokenizer_config.json": '{"eos_token": "[end]"}'}
    assert load(other).end_ids == {5}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"generation_config.json": '{"eos_token_id": [1, 110]}'}, "end-of-text id 110 is outside the model's 110 ids"),
        ({"generation_config.json": '{"eos_token_id": ["<eos>"]}'}, "eos_token_id is .* one id or a list"),
        ({"generation_config.json": "[]"}, "expected a JSON object"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"other.json": "{}"}, "found .*'other.json'"),
    ],
)
def test_files_that_cannot_be_used(more, message):
    with pytest.raises(TokenizerError, match=f"here: .*{message}"):
        load({**files(), **more})


def test_a_template_is_only_compiled_when_it_is_used():
    tokenizer = load(files(**{"chat_template.jinja": "{% for %}"}))
    assert tokenizer.encode("hello world") == [1, 6, 7]
    with pytest.raises(TokenizerError, match="no Jinja template"):
        tokenizer.chat(MESSAGES)


def test_messages_that_cannot_be_used():
    tokenizer = load(files(**{"chat_template.jinja": TEMPLATE}))
    for messages, message in (
        ([{"role": "system", "content": "x"}], "does not take these messages: no role system"),
        ([{"role": "user"}], "a role and a content"),
        (["hello"], "a role and a content"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.chat(messages)
    with pytest.raises(TokenizerError, match="no chat template; put its chat_template.jinja"):
        load(files()).chat(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(TokenizerError, match="does not take these messages"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_all_files_travel_with_the_checkpoint(small, tmp_path):
    config, weights = small
    save_file(weights, tmp_path / "model.safetensors")
    contents = {
        "config.json": json.dumps(config),
        "special_tokens_map.json": "{}",
        "chat_template.jinja": TEMPLATE,
        **files(**{"generation_config.json": '{"eos_token_id": [2, 5]}'}),
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    assert set(COMPANIONS) < set(contents)
    (tmp_path / "packed").mkdir()
    quantize_checkpoint(tmp_path, tmp_path / "packed" / "model.safetensors")
    for path, options in ((tmp_path, {}), (tmp_path, {"quantize": "int8"}), (tmp_path / "packed", {})):
        engine = Engine.from_pretrained(path, device="cpu", **options)
        assert engine.tokenizer.chat(MESSAGES) == PROMPT and engine.tokenizer.end_ids == {2, 5}
        ids = [piece.id for piece in engine.generate(engine.tokenizer.chat(MESSAGES), max_new_tokens=200, seed=1)]
        assert len(ids) < 200 and not {2, 5} & set(ids[:-1]) and ids[-1] in (2, 5)
