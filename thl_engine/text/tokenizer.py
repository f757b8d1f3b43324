"""Text to token ids and back: a Hugging Face `tokenizer.json`, a character vocabulary in JSON, or bytes."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from thl_engine.errors import TokenizerError, said, shown
from thl_engine.files import parse_any_json
from thl_engine.text.char_vocabulary import CharTokenizer, char_tokenizer
from thl_engine.text.chat_template import (
    begin_token,
    chat_template,
    end_ids,
    published_sampling,
    split_files,
    tokenizer_config,
)
from thl_engine.text.conditions import conditioned
from thl_engine.text.sampler import Sampling
from thl_engine.text.token_stream import (
    REPLACEMENT,
    ByteStream,
    StreamDecoder,
    Tokenizer,
    TokenStream,
    table_bytes,
    utf8,
)
from thl_engine.text.tokenizer_limits import check_tokenizer

__all__ = ["ByteTokenizer", "CharTokenizer", "HFTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]


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
        self._bytes_of = table_bytes(table, frozenset(range(self.OFFSET)))

    def encode(self, text: str, begins: bool = True) -> list[int]:
        return [byte + self.OFFSET for byte in utf8(text)]

    def stream(self) -> TokenStream:
        return ByteStream(self._bytes_of)


class HFTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, encoded by the `tokenizers` library.

    `encode` adds the special tokens that the file's post-processor adds (a leading <bos>, say), but none that the text
    begins with already. Tokens that were added without growing the model (a [PAD]) are known, and a text with one of
    them is refused. The file is checked before the library reads it, see `tokenizer_limits`. Truncation and padding
    settings that a file may carry are for training batches and are switched off.
    Decoding differs from the library in one place: in a run of byte-fallback tokens with an invalid byte the
    library replaces the whole run, here the valid characters around it are kept, since they are out already.
    """

    def __init__(
        self, text: str, id_limit: int, eos_id: int | None = None, companions: Mapping[str, str] | None = None
    ):
        """companions: texts of files beside it, by name, as `chat_template.COMPANIONS` lists them."""
        try:
            import tokenizers
        except ImportError:
            raise TokenizerError(
                "reading a tokenizer.json needs the package `tokenizers`: pip install tokenizers"
            ) from None
        self._files = companions or {}
        data = _parsed(text)
        self._growth = check_tokenizer(data)
        with _library_errors("not a tokenizer.json that `tokenizers` reads"):
            inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        ids = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values(), default=-1)
        self._own_size = 1 + max(inner.get_vocab(with_added_tokens=False).values(), default=-1)
        self.id_limit = id_limit
        added = inner.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        named = next((special[name] for name in _HF_END if special.get(name, id_limit) < id_limit), None)
        ends = end_ids(self._files, ids)
        self._end_ids = frozenset(ends)
        self.eos_id = eos_id if eos_id is not None else ends[0] if ends else named
        begin = begin_token(self._files)
        self.bos_id = ids.get(begin) if begin else next((ids[name] for name in _HF_BEGIN if name in special), None)
        self._template = chat_template(self._files)
        self._special = frozenset(special.values())
        # The decoder as the library understood it: it accepts several spellings of one thing.
        decoder = inner.decoder
        self._steps = None if decoder is None else _byte_steps(json.loads(decoder.__getstate__()))

    @property
    def end_ids(self) -> frozenset[int]:
        return self._end_ids | super().end_ids

    @property
    def needed_size(self) -> int:
        return self._own_size

    @property
    def sampling(self) -> Sampling | None:
        return published_sampling(self._files)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **values: Any,
    ) -> list[int]:
        if self._template is None:
            return super().chat(messages)
        # With the special tokens that belong to it.
        return self._encoded(self._template.render(messages, tools, template, **values), False)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def conditioned(self, text: str, condition: str) -> list[int]:
        ids = self._inner.get_vocab(with_added_tokens=True)
        return self._encoded(conditioned(text, condition, tokenizer_config(self._files), ids), False)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        ids = self._encoded(text, begins)
        # Only a text that itself begins with the token can have it twice.
        if begins and self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            if len(ids) > len(own := self._encoded(text, False)) and own[:1] == ids[:1]:
                return ids[1:]
        return ids

    def _encoded(self, text: str, specials: bool) -> list[int]:
        self._check_growth(utf8(text), text)
        with _library_errors("the text cannot be encoded"):
            ids = self._inner.encode(text, add_special_tokens=specials).ids
        if ids and self.vocab_size > self.id_limit and max(ids) >= self.id_limit:
            token = max(ids)
            raise TokenizerError(
                f"the text has the token {shown(self._inner.id_to_token(token))}, id {token}, of which the model, with "
                f"{self.id_limit} ids, has no row; leave it out of the text"
            )
        return ids

    def _check_growth(self, encoded: bytes, text: str) -> None:
        """Refuses a text that the normalizer makes many times as long, by normalizing it in parts."""
        if len(encoded) * self._growth <= NORMALIZED_LIMIT or self._inner.normalizer is None:
            return
        part, total = max(1, int(NORMALIZED_LIMIT / 4 / self._growth)), 0
        limit = NORMALIZED_LIMIT + NORMALIZED_GROWTH * len(encoded)
        for start in range(0, len(text), part):
            with _library_errors("the text cannot be normalized"):
                total += len(self._inner.normalizer.normalize_str(text[start : start + part]).encode())
            if total > limit:
                raise TokenizerError(
                    f"the tokenizer's normalizer makes over {limit} bytes of a text of {len(encoded)}; give less text"
                )

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
            return ByteStream(self._bytes_of, last["content"], last["start"])
        return ByteStream(self._bytes_of)

    def visible(self, token: int) -> bool:
        """Whether `token` can have text: it is defined and not special."""
        return token not in self._special and self._inner.id_to_token(token) is not None

    def _bytes_of(self, token: int, first: bool) -> bytes | None:
        text = self._inner.id_to_token(token) if self.visible(token) else None
        if text is None:
            return None
        text = self._inner.id_to_token(token) or ""
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
        raise TokenizerError(f"{what}: {said(error)}") from None


def _parsed(text: str) -> Any:
    """Of a tokenizer of 262,000 tokens, published ones have 1.8 million values: a merge is a list of two texts."""
    return parse_any_json(text, "the file", TokenizerError, 1_000_000 + len(text) // 20)


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
        piece = text[len(self._shown) :]
        self._before, self._new = self._new, []
        self._shown = self._tokenizer.decode(self._before)
        return piece

    def flush(self) -> str:
        return self._tokenizer.decode(self._before + self._new)[len(self._shown) :]


# The printable characters that byte-level vocabularies write for the 256 bytes: printable Latin-1 stands for
# itself, the others follow from U+0100 on, in order (GPT-2's table).
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_BYTE_LEVEL = {chr(byte): byte for byte in _PLAIN} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTE_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")
_STEP_LETTERS = {"ByteLevel": "L", "Replace": "R", "Metaspace": "M", "ByteFallback": "B", "Fuse": "F", "Strip": "S"}

# Names under which tokenizer.json files keep the token that ends a text, likeliest first.
_HF_END = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "[EOS]")
_HF_BEGIN = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")

# Bytes that a normalizer may make of any text, and times a text's own length besides: published ones make 3 of a space.
NORMALIZED_LIMIT = 16 << 20
NORMALIZED_GROWTH = 16


def load_tokenizer(text: str, vocab_size: int, where: str, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer in `text`, the contents of a JSON file.

    text: a Hugging Face tokenizer.json, or a character vocabulary: {char: id}, such a map as "char_to_id",
      "stoi" or "vocab" of an object, or a list of characters. Names such as <pad> and [UNK] among the entries
      are special tokens. Beside the map may stand "unk", "eos", "pad", "bos" (also with _id, _token or
      _token_id; an id or an entry) and "special_tokens" (a list of entries, or {name: id}). Also several files in
      one text, as `chat_template.join_files` writes them.
    vocab_size: the model's vocabulary. where: the file's name, for messages.
    eos_id: the id that ends a text, where the model's configuration gives one; else it is looked up by name.
    Errors: TokenizerError for malformed JSON, a file of neither kind, ids that the model does not have, and what would
      take memory or time without bounds.
    """
    try:
        data = _parsed(text)
        files = split_files(data)
        if files is not None:
            tokenizer: Tokenizer = HFTokenizer(files["tokenizer.json"], vocab_size, eos_id, files)
        elif isinstance(data, dict) and isinstance(data.get("model"), dict):
            tokenizer = HFTokenizer(text, vocab_size, eos_id)
        else:
            tokenizer = char_tokenizer(data, vocab_size, eos_id)
    except TokenizerError as error:
        raise TokenizerError(f"{where}: {error}") from None
    if tokenizer.needed_size > vocab_size:
        raise TokenizerError(
            f"{where}: the tokenizer has {tokenizer.needed_size} ids, the model only {vocab_size}; "
            "use the tokenizer that was saved with this checkpoint"
        )
    for end in tokenizer.end_ids:
        if not 0 <= end < vocab_size:
            raise TokenizerError(f"{where}: the end-of-text id {end} is outside the model's {vocab_size} ids")
    return tokenizer
