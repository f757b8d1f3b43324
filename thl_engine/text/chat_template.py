"""What published checkpoints keep beside `tokenizer.json`: chat templates, special tokens, how text is generated."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thl_engine.errors import ConfigError, TokenizerError, said, shown
from thl_engine.files import read_text
from thl_engine.text.chat_rendering import ChatTemplate
from thl_engine.text.sampler import Sampling

# Joined with tokenizer.json to one text by `join_files`, under their names.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
TEMPLATES = "additional_chat_templates"  # folder of further templates, NAME.jinja
TEMPLATES_LIMIT = 64  # files of it
_MAIN, _CONFIG, _GENERATION, _DEFAULT = "tokenizer.json", "tokenizer_config.json", COMPANIONS[3], COMPANIONS[2]
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def companions_beside(folder: Path) -> dict[str, str]:
    """Name -> text of what a folder has beside its tokenizer.json.

    Where there is no generation_config.json, the end tokens of config.json make one, as in transformers.
    """
    files = {name: read_text(folder / name, TokenizerError) for name in COMPANIONS if (folder / name).is_file()}
    templates = sorted(file for file in (folder / TEMPLATES).glob("*.jinja") if file.is_file())
    if len(templates) > TEMPLATES_LIMIT:
        raise TokenizerError(f"{folder / TEMPLATES}: {len(templates)} templates, expected at most {TEMPLATES_LIMIT}")
    files |= {f"{TEMPLATES}/{file.name}": read_text(file, TokenizerError) for file in templates}
    if _GENERATION not in files and (folder / "config.json").is_file():
        config = _parsed(read_text(folder / "config.json", TokenizerError), str(folder / "config.json"))
        inner = config.get("text_config")
        found = config.get("eos_token_id")
        if found is None and isinstance(inner, dict):
            found = inner.get("eos_token_id")
        if found is not None:
            files[_GENERATION] = json.dumps({"eos_token_id": found})
    return files


def join_files(files: Mapping[str, str]) -> str:
    """One text for tokenizer.json and its companions, name -> text; a single file as it is."""
    return next(iter(files.values())) if len(files) == 1 else json.dumps(dict(files), ensure_ascii=False)


def split_files(data: Any) -> dict[str, str] | None:
    """The files that `join_files` joined, of its parsed text; None of any other JSON."""
    if not isinstance(data, dict) or not isinstance(data.get(_MAIN), str):
        return None
    for name, text in data.items():
        known = name in (_MAIN, *COMPANIONS) or (name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja"))
        if not known or not isinstance(text, str):
            raise TokenizerError(f"expected texts of {_MAIN}, {', '.join(COMPANIONS)}, found {shown(name)}")
    return data


def chat_template(files: Mapping[str, str]) -> ChatTemplate | None:
    """The templates among a checkpoint's files; None where there are none. None of them is compiled.

    Files of templates take the place of all that tokenizer_config.json has.
    """
    sources = {
        name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja"): text
        for name, text in files.items()
        if name.startswith(f"{TEMPLATES}/")
    }
    if _DEFAULT in files:
        sources["default"] = files[_DEFAULT]
    config = _object(files, _CONFIG)
    if not sources:
        given = config.get("chat_template")
        if isinstance(given, list):
            entries = [entry for entry in given if isinstance(entry, dict)]
            given = {e["name"]: e.get("template") for e in entries if isinstance(e.get("name"), str)}
        elif not isinstance(given, dict):
            given = {"default": given}
        sources = {name: text for name, text in given.items() if isinstance(text, str)}
    tokens = _tokens(_object(files, "special_tokens_map.json")) | _tokens(config)
    return ChatTemplate(sources, tokens) if sources else None


def tokenizer_config(files: Mapping[str, str]) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    return _object(files, _CONFIG)


def begin_token(files: Mapping[str, str]) -> str | None:
    """The token that begins a text, where the files name it."""
    return _tokens(_object(files, _CONFIG)).get("bos_token")


def end_ids(files: Mapping[str, str], ids: Mapping[str, int]) -> list[int]:
    """Ids that end a text, the first one named first; none where the files do not say. ids: token -> id."""
    found = _object(files, _GENERATION).get("eos_token_id")
    found = [found] if isinstance(found, int) else found
    if isinstance(found, list) and found:
        if any(isinstance(token, bool) or not isinstance(token, int) for token in found):
            raise TokenizerError(f"{_GENERATION}: eos_token_id is {shown(found)}; it must be one id or a list")
        return found
    if found not in (None, []):
        raise TokenizerError(f"{_GENERATION}: eos_token_id is {shown(found)}; it must be one id or a list")
    named = _tokens(_object(files, _CONFIG)).get("eos_token")
    return [ids[named]] if named is not None and named in ids else []


def published_sampling(files: Mapping[str, str]) -> Sampling | None:
    """How generation_config.json says that tokens are chosen; None where it does not. What it leaves out is off.

    TokenizerError for values that cannot work.
    """
    config = _object(files, _GENERATION)
    given = {name: config[name] for name in _SAMPLING if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0.0
    elif not given:
        return None
    try:
        return Sampling(**given)
    except ConfigError as error:
        raise TokenizerError(f"{_GENERATION}: {error}; mend it, or give --temperature and the like") from None


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Fields such as bos_token: the token itself, or an object that describes it."""
    values = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    return _parsed(files.get(name, "{}"), name)


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: not valid JSON: {said(error)}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value
