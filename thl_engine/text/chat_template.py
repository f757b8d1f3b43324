"""What published checkpoints keep beside `tokenizer.json`: the chat template, and the tokens that end an answer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from thl_engine.errors import TokenizerError

# Joined with tokenizer.json to one text by `join_files`, under their names.
COMPANIONS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_MAIN = "tokenizer.json"


def join_files(files: Mapping[str, str]) -> str:
    """One text for tokenizer.json and its companions, name -> text; a single file as it is."""
    return next(iter(files.values())) if len(files) == 1 else json.dumps(dict(files), ensure_ascii=False)


def split_files(data: Any) -> dict[str, str] | None:
    """The files that `join_files` joined, of its parsed text; None of any other JSON."""
    if not isinstance(data, dict) or not isinstance(data.get(_MAIN), str):
        return None
    if not all(isinstance(text, str) for text in data.values()) or not data.keys() <= {_MAIN, *COMPANIONS}:
        raise TokenizerError(f"expected texts of {_MAIN}, {', '.join(COMPANIONS)}, found {', '.join(map(repr, data))}")
    return data


class ChatTemplate:
    """A Jinja template that turns messages into the text of a prompt, rendered in Jinja's sandbox."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """tokens: texts that the template may name, such as bos_token. TokenizerError if it is no template."""
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise TokenizerError("a chat template needs the package `jinja2`: pip install jinja2") from None
        self._tokens = dict(tokens)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise TokenizerError(f"the chat template is no Jinja template: {_first_line(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that messages make, up to where the answer begins.

        messages: each with "role" ("user", "assistant", "system") and "content". TokenizerError where the template
        refuses them.
        """
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise TokenizerError(f"a message must have a role and a content, found {message!r}")
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template may fail in any way that Python code can
            raise TokenizerError(f"the chat template does not take these messages: {_first_line(error)}") from None


def chat_template(files: Mapping[str, str]) -> ChatTemplate | None:
    """The template among a checkpoint's files; of several named ones the default."""
    config = _object(files, "tokenizer_config.json")
    source = files.get("chat_template.jinja", config.get("chat_template"))
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return ChatTemplate(source, _tokens(config)) if isinstance(source, str) else None


def end_ids(files: Mapping[str, str], ids: Mapping[str, int]) -> list[int]:
    """Ids that end a text, the first one named first; none where the files do not say. ids: token -> id."""
    found = _object(files, "generation_config.json").get("eos_token_id")
    found = [found] if isinstance(found, int) else found
    if isinstance(found, list) and found:
        if any(isinstance(token, bool) or not isinstance(token, int) for token in found):
            raise TokenizerError(f"generation_config.json: eos_token_id is {found!r}; it must be one id or a list")
        return found
    named = _tokens(_object(files, "tokenizer_config.json")).get("eos_token")
    return [ids[named]] if named is not None and named in ids else []


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Fields such as bos_token: the token itself, or an object that describes it."""
    values = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: not valid JSON: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse(message: object) -> NoReturn:
    raise TokenizerError(str(message))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
