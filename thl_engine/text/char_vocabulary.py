"""Character vocabularies in JSON: what the forms of such files mean, and the tokenizer that they make."""

import re
from typing import Any

from thl_engine.errors import TokenizerError, shown
from thl_engine.text.token_stream import ByteStream, Tokenizer, TokenStream, table_bytes, utf8

_MAP_KEYS = ("char_to_id", "stoi", "vocab")
_ROLES = ("pad", "unk", "bos", "eos")
_ROLE_KEYS = {role + suffix: role for role in _ROLES for suffix in ("", "_id", "_token", "_token_id")}
INVERSE_KEYS = ("id_to_char", "itos")
_OTHER_KEYS = {*INVERSE_KEYS, "vocab_size", "special_tokens", "level", "type"}
_SPECIAL_FORM = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")
_ROLE_NAMES = {"unk": "unk", "unknown": "unk", "eos": "eos", "/s": "eos", "endoftext": "eos", "end": "eos"}


class CharTokenizer(Tokenizer):
    """One id for each character, from a character vocabulary.

    ids:     character -> id.
    special: name -> id of tokens that no text encodes to ("<pad>", "<eos>", ...); they decode to nothing.
    unk_id:  stands for characters without an id and decodes to U+FFFD; None makes them a TokenizerError.
    """

    def __init__(
        self, ids: dict[str, int], special: dict[str, int], unk_id: int | None, eos_id: int | None, id_limit: int
    ):
        self.vocab_size = 1 + max([*ids.values(), *special.values()])
        self._needed = 1 + max([*ids.values(), -1 if unk_id is None else unk_id])
        self.id_limit = id_limit
        self.eos_id = eos_id
        self.unk_id = unk_id
        self._ids = ids
        self._bytes_of = table_bytes(
            {token: char.encode() for char, token in ids.items()}, frozenset(special.values()) - {unk_id}
        )

    def encode(self, text: str, begins: bool = True) -> list[int]:
        ids = self._ids
        try:
            return [ids[char] for char in text]
        except KeyError:
            pass  # the common case stays fast; the message and the unknown id are worked out below
        if self.unk_id is not None:
            return [ids.get(char, self.unk_id) for char in text]
        position, char = next((i, c) for i, c in enumerate(text) if c not in ids)
        raise TokenizerError(
            f"character {char!r} (U+{ord(char):04X}) at position {position} is not in the model's character "
            f"vocabulary of {len(ids)} characters, which has no unknown token; leave it out of the text"
        )

    @property
    def needed_size(self) -> int:
        return self._needed

    def stream(self) -> TokenStream:
        return ByteStream(self._bytes_of)


def char_tokenizer(data: Any, id_limit: int, eos_id: int | None) -> CharTokenizer:
    """The tokenizer of a parsed vocabulary file, in any of the forms that `load_tokenizer` lists."""
    entries, extra = _entries(data)
    special = {name: token for name, token in entries.items() if _SPECIAL_FORM.fullmatch(name)}
    declared = extra.get("special_tokens", [])
    if isinstance(declared, list):
        declared = {str(name): name for name in declared}
    if not isinstance(declared, dict):
        raise TokenizerError("special_tokens must be a list of entries or a map from name to id")
    special |= {name: _entry_id(name, value, entries) for name, value in declared.items()}
    roles = {_ROLE_NAMES.get(name.strip("<|>[]").lower(), name): token for name, token in special.items()}
    for key, value in extra.items():
        if key in _ROLE_KEYS and value is not None:
            role = _ROLE_KEYS[key]
            roles[role] = special[f"<{role}>"] = _entry_id(key, value, entries)
    chars = {name: token for name, token in entries.items() if name not in special or len(name) == 1}
    for char in chars:
        if len(char) != 1:
            raise TokenizerError(
                f"entry {shown(char)} has {len(char)} characters; a character vocabulary maps single characters, "
                "and special tokens written <name> or [name], to ids"
            )
        utf8(char)
    if eos_id is None:
        eos_id = roles.get("eos")
    return CharTokenizer(chars, special, roles.get("unk"), eos_id, id_limit)


def entries_key(data: Any) -> str | None:
    """The field of a parsed vocabulary file that holds the entries; None where it is nothing but entries."""
    keys = _MAP_KEYS if isinstance(data, dict) else ()
    return next((key for key in keys if isinstance(data.get(key), dict | list)), None)


def _entries(data: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """The map from entry to id in a character vocabulary, and the fields beside it."""
    extra: dict[str, Any] = {}
    if isinstance(data, dict):
        key = entries_key(data)
        if key is not None:
            extra = {k: v for k, v in data.items() if k != key}
            data = data[key]
    unknown = sorted(set(extra) - set(_ROLE_KEYS) - _OTHER_KEYS)
    if unknown:
        raise TokenizerError(
            f"unknown field {shown(unknown[0])} beside the character vocabulary; known are "
            + ", ".join([*_ROLES, *sorted(_OTHER_KEYS)])
        )
    if extra.get("level", "char") != "char":
        raise TokenizerError(f"level is {shown(extra['level'])}; expected 'char', a character vocabulary")
    if isinstance(data, list) and all(isinstance(char, str) for char in data):
        entries = {char: token for token, char in enumerate(data)}
        if len(entries) != len(data):
            twice = next(char for token, char in enumerate(data) if entries[char] != token)
            raise TokenizerError(f"the list has the character {shown(twice)} twice")
    elif isinstance(data, dict):
        entries = {char: _checked_id(char, token) for char, token in data.items()}
    else:
        raise TokenizerError(
            "neither a Hugging Face tokenizer.json nor a character vocabulary (a map from "
            "character to id, or a list of characters)"
        )
    if not entries:
        raise TokenizerError("the character vocabulary is empty")
    owner: dict[int, str] = {}
    for char, token in entries.items():
        if owner.setdefault(token, char) != char:
            raise TokenizerError(f"id {shown(token)} belongs to both {shown(owner[token])} and {shown(char)}")
    return entries, extra


def _entry_id(key: str, value: Any, entries: dict[str, int]) -> int:
    """The id that a field such as "unk" names, by number or by entry."""
    if isinstance(value, str):
        if value not in entries:
            raise TokenizerError(f"{key} names {shown(value)}, which is not in the character vocabulary")
        return entries[value]
    return _checked_id(key, value)


def _checked_id(name: str, token: Any) -> int:
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise TokenizerError(f"{shown(name)} has {shown(token)} for an id; ids are integers from 0")
    return token
