"""Chat templates: rendered as transformers does, in bounded time and memory, and never before they are used."""

import json
import resource
import time
from pathlib import Path

import pytest

from thl_engine import TokenizerError
from thl_engine.text import chat_rendering
from thl_engine.text.chat_rendering import ChatTemplate
from thl_engine.text.chat_template import chat_template

# Written by transformers 5.24 (render_jinja_template).
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "chat_templates.json").read_text())
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_templates_give_what_transformers_gives(case):
    template = ChatTemplate(case["source"], RECORDED["tokens"])
    messages = case.get("messages", RECORDED["messages"])
    assert template.render(messages, case["tools"], **case["values"]) == case["text"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9**(9**9) }}",
        "{{ 'a'*(4*10**9) }}",
        "{{ [1]*(3*10**8) }}",
        "{{ 'x'|center(3*10**9) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(t='xxxxxxxx') %}{% for a in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
        "{{ 'x' * 10**7 }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "1" * 5000 + " }}",
        "{% if a %}" * 200 + "{% endif %}" * 200,
        "{% for a in x %}" * 25 + "{% endfor %}" * 25,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('\x1b[31mred\x00' + 'x' * 10**6) }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.__class__ }}{{ ''.__class__.__mro__[1] }}",
    ],
    ids=range(15),
)
def test_hostile_templates_end_in_one_line(source):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    template = ChatTemplate(source, {})
    assert time.monotonic() - started < 1
    with pytest.raises(TokenizerError, match="the chat template") as error:
        template.render(HELLO)
    assert time.monotonic() - started < 10
    assert len(str(error.value)) <= 300 and str(error.value).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB, of this process


def test_several_named_templates():
    config = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    files = {"tokenizer_config.json": json.dumps(config)}
    listed, mapped = chat_template(files), {"tokenizer_config.json": json.dumps({"chat_template": {"default": "M"}})}
    assert listed.render(HELLO) == "D" and listed.render(HELLO, tools=[{}]) == "T"
    assert listed.render(HELLO, name="tool_use") == "T" and chat_template(mapped).render(HELLO) == "M"
    # Files of templates take the place of all of these.
    files |= {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"}
    of_files = chat_template(files)
    assert of_files.render(HELLO, tools=[{}]) == "F" and of_files.render(HELLO, name="rag") == "R"
    with pytest.raises(TokenizerError, match="no chat template 'tool_use', only .*rag"):
        of_files.render(HELLO, name="tool_use")


@pytest.mark.parametrize("odd", [[], {}, 3, None, ["x"], [{"name": [], "template": "x"}], {"default": 3}, {"a": "x"}])
def test_templates_that_are_none(odd):
    found = chat_template({"tokenizer_config.json": json.dumps({"chat_template": odd})})
    if found is not None:
        with pytest.raises(TokenizerError, match="no chat template 'default'"):
            found.render(HELLO)


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": object()}], [{"role": "user", "content": {1, 2}}], [3], [{"role": "x"}]]
)
def test_messages_must_be_plain(messages):
    with pytest.raises(TokenizerError, match="messages? must"):
        ChatTemplate("{{ messages }}", {}).render(messages)


@pytest.mark.parametrize(("version", "message"), [("3.1.5", "too old"), (None, "needs the package")])
def test_jinja_is_there_and_safe(version, message, monkeypatch):
    def found(name):
        if version is None:
            raise chat_rendering.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(chat_rendering.metadata, "version", found)
    with pytest.raises(TokenizerError, match=f"{message}.*pip install 'jinja2>=3.1.6'"):
        ChatTemplate("x", {}).render(HELLO)
