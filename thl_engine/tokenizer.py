"""Text to token ids and back, at once or piece by piece while a model writes.

Three kinds: a Hugging Face `tokenizer.json`, a character vocabulary in JSON, and bytes. They decode through
`StreamDecoder`, so text that is streamed and text that is decoded at once are the same by construction. It
works on the bytes that a token stands for and lets a character out when its last byte has come: the work
per token does not depend on how much was written before, and no character is ever cut in two.
"""

import codecs
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from thl_engine.chat_template import chat_template, end_ids, split_files
from thl_engine.errors import TokenizerError

REPLACEMENT = "\ufffd"


class Tokenizer(ABC):
    """What every tokenizer offers.

    vocab_size: the number of ids it defines, counted as its largest id + 1.
    id_limit:   the size of the model's vocabulary. Ids below it may be decoded, also those that the tokenizer
                does not define (models pad their tables); others are refused.
    eos_id:     the token that ends a text, or None.
    """

    vocab_size: int
    id_limit: int
    eos_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. TokenizerError where the text has no ids."""

    @abstractmethod
    def stream(self) -> "TokenStream":
        """A fresh decoder of this tokenizer's ids; `StreamDecoder` is what callers use."""

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a text: `eos_id`, and others where a checkpoint has several."""
        return frozenset() if self.eos_id is None else frozenset({self.eos_id})

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a prompt that asks for an answer to messages, each with "role" and "content".

        TokenizerError where the checkpoint has no chat template, or its template refuses the messages.
        """
        raise TokenizerError("the checkpoint has no chat template; put its chat_template.jinja or "
                             "tokenizer_config.json beside it, or give the prompt as text")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def check_id(self, token: int) -> int:
        """`token` as an int. TokenizerError when it is no integer or outside the model's vocabulary."""
        try:
            token = operator.index(token)
        except TypeError:
            raise TokenizerError(f"token id {token!r} is not an integer") from None
        if not 0 <= token < self.id_limit:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.id_limit} ids")
        return token


class TokenStream(Protocol):
    """Decodes one sequence of valid ids; `push` returns the text that has become complete."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StreamDecoder:
    """Text of a growing sequence of ids: the pieces and `flush` together are `tokenizer.decode(ids)`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character still lacks bytes."""
        return self._stream.push(self._tokenizer.check_id(token))

    def flush(self) -> str:
        """What is left at the end of the sequence; the decoder then starts anew.

        A character whose last bytes never came is U+FFFD here.
        """
        rest = self._stream.flush()
        self._stream = self._tokenizer.stream()
        return rest


# Bytes of a token, given whether it is the first with any text; None for tokens that have no text.
BytesOf = Callable[[int, bool], bytes | None]


class _ByteStream:
    """Decodes tokens that stand for known bytes; `strip` is dropped up to `count` times at the start."""

    def __init__(self, bytes_of: BytesOf, strip: str = "", count: int = 0):
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._strip = strip
        self._count = count

    def push(self, token: int) -> str:
        data = self._bytes_of(token, self._first)
        if data is None:
            return ""
        self._first = False
        return self._strip_start(self._utf8.decode(data))

    def flush(self) -> str:
        return self._strip_start(self._utf8.decode(b"", final=True))

    def _strip_start(self, text: str) -> str:
        while self._count and text:
            if text[0] != self._strip:
                self._count = 0
                break
            text = text[1:]
            self._count -= 1
        return text


def _table_bytes(table: dict[int, bytes], skipped: frozenset[int]) -> BytesOf:
    """Bytes of byte and character vocabularies. Ids that are in neither argument give U+FFFD.

    Untrained models write such ids; showing them is better than hiding them. The byte 0xFF is no part of any
    UTF-8 character, so it becomes one U+FFFD and also ends a character that lacks bytes.
    """
    return lambda token, first: table.get(token, None if token in skipped else b"\xff")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as THL 0.2.0 published them: id = byte + 13; 0 is padding, 1 ends a text, 2 is unknown.

    The published `decode` does not subtract the 13 and returns other bytes than were encoded; this one does.
    Ids 0-12 decode to nothing, ids above 268 to U+FFFD. TokenizerError if the model has fewer than 269 ids.
    """

    OFFSET = 13

    def __init__(self, vocab_size: int, eos_id: int | None = 1):
        self.vocab_size = 256 + self.OFFSET
        if vocab_size < self.vocab_size:
            raise TokenizerError(
                f"a vocabulary of {vocab_size} ids is too small for the byte tokenizer, which needs "
                f"{self.vocab_size}; put the model's tokenizer.json beside the checkpoint"
            )
        self.id_limit = vocab_size
        self.eos_id = eos_id
        table = {byte + self.OFFSET: bytes([byte]) for byte in range(256)}
        self._bytes_of = _table_bytes(table, frozenset(range(self.OFFSET)))

    def encode(self, text: str) -> list[int]:
        return [byte + self.OFFSET for byte in _utf8(text)]

    def stream(self) -> TokenStream:
        return _ByteStream(self._bytes_of)


class CharTokenizer(Tokenizer):
    """One id for each character, from a character vocabulary.

    ids:     character -> id.
    special: name -> id of tokens that no text encodes to ("<pad>", "<eos>", ...); they decode to nothing.
    unk_id:  stands for characters without an id and decodes to U+FFFD; None makes them a TokenizerError.
    """

    def __init__(self, ids: dict[str, int], special: dict[str, int], unk_id: int | None, eos_id: int | None,
                 id_limit: int):
        self.vocab_size = 1 + max([*ids.values(), *special.values()])
        self.id_limit = id_limit
        self.eos_id = eos_id
        self.unk_id = unk_id
        self._ids = ids
        self._bytes_of = _table_bytes({token: char.encode() for char, token in ids.items()},
                                      frozenset(special.values()) - {unk_id})

    def encode(self, text: str) -> list[int]:
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

    def stream(self) -> TokenStream:
        return _ByteStream(self._bytes_of)


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, encoded by the `tokenizers` library.

    `encode` adds the special tokens that the file's post-processor adds (a leading <bos>, say). Truncation
    and padding settings that a file may carry are for training batches and are switched off.
    Decoding differs from the library in one place: in a run of byte-fallback tokens with an invalid byte the
    library replaces the whole run, here the valid characters around it are kept, since they are out already.
    """

    def __init__(self, text: str, id_limit: int, eos_id: int | None = None,
                 companions: Mapping[str, str] | None = None):
        """companions: texts of files beside it, by name, as `chat_template.COMPANIONS` lists them."""
        try:
            import tokenizers
        except ImportError:
            raise TokenizerError(
                "reading a tokenizer.json needs the package `tokenizers`: pip install tokenizers") from None
        with _library_errors("not a tokenizer.json that `tokenizers` reads"):
            inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
        self.id_limit = id_limit
        special = {added.content: token for token, added in inner.get_added_tokens_decoder().items()
                   if added.special}
        named = next((special[name] for name in _HF_END if name in special), None)
        ends = end_ids(companions or {}, inner.get_vocab(with_added_tokens=True))
        self._end_ids = frozenset(ends)
        self.eos_id = (ends or [named])[0] if eos_id is None else eos_id
        self._template = chat_template(companions or {})
        self._special = frozenset(special.values())
        # The decoder as the library understood it: it accepts several spellings of one thing.
        decoder = inner.decoder
        self._steps = None if decoder is None else _byte_steps(json.loads(decoder.__getstate__()))

    @property
    def end_ids(self) -> frozenset[int]:
        return self._end_ids | super().end_ids

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self._template is None:
            return super().chat(messages)
        text = self._template.render(messages)  # with the special tokens that belong to it
        _utf8(text)
        with _library_errors("the messages cannot be encoded"):
            return self._inner.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        with _library_errors("the text cannot be encoded"):
            return self._inner.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        if self._steps is not None:
            return super().decode(ids)
        visible = [token for token in map(self.check_id, ids) if self.visible(token)]
        with _library_errors("the tokens cannot be decoded"):
            return self._inner.decode(visible, skip_special_tokens=False)

    def stream(self) -> TokenStream:
        if self._steps is None:
            return _WindowStream(self)
        last = self._steps[-1]  # never empty, see _byte_steps
        if last["type"] == "Strip":
            return _ByteStream(self._bytes_of, last["content"], last["start"])
        return _ByteStream(self._bytes_of)

    def visible(self, token: int) -> bool:
        """Whether `token` can have text: it is defined and not special."""
        return token not in self._special and self._inner.id_to_token(token) is not None

    def _bytes_of(self, token: int, first: bool) -> bytes | None:
        if not self.visible(token):
            return None
        text = self._inner.id_to_token(token)
        for step in self._steps or ():
            match step["type"]:
                case "ByteLevel":
                    if all(char in _BYTE_LEVEL for char in text):
                        return bytes([_BYTE_LEVEL[char] for char in text])
                case "Replace":
                    text = text.replace(step["pattern"]["String"], step["content"])
                case "Metaspace":
                    dropped = first and step["prepend_scheme"] != "never"
                    text = text.replace(step["replacement"], "" if dropped else " ")
                case "ByteFallback":
                    if _BYTE_FALLBACK.fullmatch(text):
                        return bytes([int(text[3:5], 16)])
        return text.encode()


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Errors of `tokenizers`, which are bare Exceptions and, for odd files, panics, as a TokenizerError."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {_first_line(error)}") from None


def _byte_steps(decoder: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The decoder of a tokenizer.json as steps from a token to its bytes, or None if it works otherwise.

    Covers byte-level BPE and the SentencePiece conversions: Replace, Metaspace and ByteFallback on each
    token, then Fuse, then Strip at the start of the text.
    """
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = "".join(_STEP_LETTERS.get(step["type"], "?") for step in steps)
    if not steps or not re.fullmatch(r"LF?|[RM]*B?M?(FS?)?", kinds):
        return None
    for step in steps:
        if step["type"] == "Replace" and not step["pattern"].get("String"):
            return None  # a regular expression may look at more than one token
        if step["type"] == "Strip" and step["stop"]:
            return None
    return steps


class _WindowStream:
    """Streams the decoders that are not bytes by token (WordPiece, BPE with a word-end suffix, plain words).

    There a token's text depends on its neighbours only (a space in between, a suffix), so the new text is the
    difference between decoding the tokens of the piece before with and without the new ones.
    """

    LONGEST = 32  # tokens held back at most for a character to become complete

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # tokens of the piece released last
        self._new: list[int] = []
        self._shown = ""  # the text of `_before`

    def push(self, token: int) -> str:
        if not self._tokenizer.visible(token):
            return ""
        self._new.append(token)
        text = self._tokenizer.decode(self._before + self._new)
        unsettled = text.endswith(REPLACEMENT) or not text.startswith(self._shown)
        if unsettled and len(self._new) < self.LONGEST:
            return ""
        piece = text[len(self._shown):]
        self._before, self._new = self._new, []
        self._shown = self._tokenizer.decode(self._before)
        return piece

    def flush(self) -> str:
        return self._tokenizer.decode(self._before + self._new)[len(self._shown):]


# The printable characters that byte-level vocabularies write for the 256 bytes: printable Latin-1 stands for
# itself, the others follow from U+0100 on, in order (GPT-2's table).
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_BYTE_LEVEL = {chr(byte): byte for byte in _PLAIN} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTE_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")
_STEP_LETTERS = {"ByteLevel": "L", "Replace": "R", "Metaspace": "M", "ByteFallback": "B", "Fuse": "F",
                 "Strip": "S"}

# Names under which tokenizer.json files keep the token that ends a text, likeliest first.
_HF_END = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "[EOS]")

_MAP_KEYS = ("char_to_id", "stoi", "vocab")
_ROLES = ("pad", "unk", "bos", "eos")
_ROLE_KEYS = {role + suffix: role for role in _ROLES for suffix in ("", "_id", "_token", "_token_id")}
_OTHER_KEYS = {"id_to_char", "itos", "vocab_size", "special_tokens", "level", "type"}
_SPECIAL_FORM = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")
_ROLE_NAMES = {"unk": "unk", "unknown": "unk", "eos": "eos", "/s": "eos", "endoftext": "eos", "end": "eos"}


def load_tokenizer(text: str, vocab_size: int, where: str, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer in `text`, the contents of a JSON file.

    text: a Hugging Face tokenizer.json, or a character vocabulary: {char: id}, such a map as "char_to_id",
      "stoi" or "vocab" of an object, or a list of characters. Names such as <pad> and [UNK] among the entries
      are special tokens. Beside the map may stand "unk", "eos", "pad", "bos" (also with _id, _token or
      _token_id; an id or an entry) and "special_tokens" (a list of entries, or {name: id}). Also several files in
      one text, as `chat_template.join_files` writes them.
    vocab_size: the model's vocabulary. where: the file's name, for messages.
    eos_id: the id that ends a text, where the model's configuration gives one; else it is looked up by name.
    Errors: TokenizerError for malformed JSON, a file of neither kind, and ids that the model does not have.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{where}: not valid JSON: {_first_line(error)}") from None
    try:
        files = split_files(data)
        if files is not None:
            tokenizer: Tokenizer = HFTokenizer(files["tokenizer.json"], vocab_size, eos_id, files)
        elif isinstance(data, dict) and isinstance(data.get("model"), dict):
            tokenizer = HFTokenizer(text, vocab_size, eos_id)
        else:
            tokenizer = _char_tokenizer(data, vocab_size, eos_id)
    except TokenizerError as error:
        raise TokenizerError(f"{where}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}; "
            "use the tokenizer that was saved with this checkpoint"
        )
    for end in tokenizer.end_ids:
        if not 0 <= end < vocab_size:
            raise TokenizerError(f"{where}: the end-of-text id {end} is outside the model's {vocab_size} ids")
    return tokenizer


def _char_tokenizer(data: Any, id_limit: int, eos_id: int | None) -> CharTokenizer:
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
                f"entry {char!r} has {len(char)} characters; a character vocabulary maps single characters, "
                "and special tokens written <name> or [name], to ids"
            )
        _utf8(char)
    if eos_id is None:
        eos_id = roles.get("eos")
    return CharTokenizer(chars, special, roles.get("unk"), eos_id, id_limit)


def _entries(data: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """The map from entry to id in a character vocabulary, and the fields beside it."""
    extra: dict[str, Any] = {}
    if isinstance(data, dict):
        key = next((k for k in _MAP_KEYS if isinstance(data.get(k), dict | list)), None)
        if key is not None:
            extra = {k: v for k, v in data.items() if k != key}
            data = data[key]
    unknown = sorted(set(extra) - set(_ROLE_KEYS) - _OTHER_KEYS)
    if unknown:
        raise TokenizerError(f"unknown field {unknown[0]!r} beside the character vocabulary; known are "
                             + ", ".join([*_ROLES, *sorted(_OTHER_KEYS)]))
    if extra.get("level", "char") != "char":
        raise TokenizerError(f"level is {extra['level']!r}; expected 'char', a character vocabulary")
    if isinstance(data, list) and all(isinstance(char, str) for char in data):
        entries = {char: token for token, char in enumerate(data)}
        if len(entries) != len(data):
            twice = next(char for token, char in enumerate(data) if entries[char] != token)
            raise TokenizerError(f"the list has the character {twice!r} twice")
    elif isinstance(data, dict):
        entries = {char: _checked_id(char, token) for char, token in data.items()}
    else:
        raise TokenizerError("neither a Hugging Face tokenizer.json nor a character vocabulary (a map from "
                             "character to id, or a list of characters)")
    if not entries:
        raise TokenizerError("the character vocabulary is empty")
    owner: dict[int, str] = {}
    for char, token in entries.items():
        if owner.setdefault(token, char) != char:
            raise TokenizerError(f"id {token} belongs to both {owner[token]!r} and {char!r}")
    return entries, extra


def _entry_id(key: str, value: Any, entries: dict[str, int]) -> int:
    """The id that a field such as "unk" names, by number or by entry."""
    if isinstance(value, str):
        if value not in entries:
            raise TokenizerError(f"{key} names {value!r}, which is not in the character vocabulary")
        return entries[value]
    return _checked_id(key, value)


def _checked_id(name: str, token: Any) -> int:
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise TokenizerError(f"{name!r} has {token!r} for an id; ids are integers from 0")
    return token


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise TokenizerError(f"position {error.start} of the text holds U+{code:04X}, half of a surrogate "
                             "pair; the text must be valid UTF-8") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
