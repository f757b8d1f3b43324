"""What tokenizers have in common, and text that comes piece by piece while a model writes.

Text that is streamed and text that is decoded at once are the same by construction: `decode` goes through
`StreamDecoder`. It works on the bytes that a token stands for and lets a character out when its last byte has come:
the work per token does not depend on how much was written before, and no character is ever cut in two.
"""

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from thl_engine.errors import TokenizerError, shown
from thl_engine.text.sampler import Sampling

REPLACEMENT = "\ufffd"


class Tokenizer(ABC):
    """What every tokenizer offers.

    vocab_size: the number of ids it defines, counted as its largest id + 1.
    id_limit:   the size of the model's vocabulary. Ids below it may be decoded, also those that the tokenizer
                does not define (models pad their tables); others are refused.
    eos_id:     the token that ends a text, or None.
    bos_id:     the token that begins a text, where the tokenizer has one.
    """

    vocab_size: int
    id_limit: int
    eos_id: int | None
    bos_id: int | None = None

    @abstractmethod
    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Token ids of `text`. begins: with the special tokens around a whole text, where the tokenizer has such;
        without, it goes on with what was read before. TokenizerError where the text has no ids."""

    @property
    def needed_size(self) -> int:
        """Ids that a model must have for this tokenizer: of `vocab_size` those that texts encode to."""
        return self.vocab_size

    @abstractmethod
    def stream(self) -> "TokenStream":
        """A fresh decoder of this tokenizer's ids; `StreamDecoder` is what callers use."""

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a text: `eos_id`, and others where a checkpoint has several."""
        return frozenset() if self.eos_id is None else frozenset({self.eos_id})

    @property
    def sampling(self) -> Sampling | None:
        """How the checkpoint's author has answers chosen, where that is said. TokenizerError if it cannot work."""
        return None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **values: Any,
    ) -> list[int]:
        """Token ids of a prompt that asks for an answer to messages, as `ChatTemplate.render` takes them.

        TokenizerError where the checkpoint has no chat template, or its template refuses the messages.
        """
        raise TokenizerError(
            "the checkpoint has no chat template; put its chat_template.jinja or "
            "tokenizer_config.json beside it, or give the prompt as text"
        )

    @property
    def has_template(self) -> bool:
        """Whether `chat` has a template to follow."""
        return False

    def conditioned(self, text: str, condition: str) -> list[int]:
        """Token ids of a prompt that asks for an answer under tags, as `conditions.conditioned` writes it.

        TokenizerError where the tags or their tokens are unknown.
        """
        return self.chat([{"role": "user", "content": text}])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def check_id(self, token: int) -> int:
        """`token` as an int. TokenizerError when it is no integer or outside the model's vocabulary."""
        try:
            token = operator.index(token)
        except TypeError:
            raise TokenizerError(f"token id {shown(token)} is not an integer") from None
        if not 0 <= token < self.id_limit:
            raise TokenizerError(f"token id {shown(token)} is outside the vocabulary of {self.id_limit} ids")
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


class ByteStream:
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


def table_bytes(table: dict[int, bytes], skipped: frozenset[int]) -> BytesOf:
    """Bytes of byte and character vocabularies. Ids that are in neither argument give U+FFFD.

    Untrained models write such ids; showing them is better than hiding them. The byte 0xFF is no part of any
    UTF-8 character, so it becomes one U+FFFD and also ends a character that lacks bytes.
    """
    return lambda token, first: table.get(token, None if token in skipped else b"\xff")


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text. TokenizerError for half a surrogate pair, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise TokenizerError(
            f"position {error.start} of the text holds U+{code:04X}, half of a surrogate "
            "pair; the text must be valid UTF-8"
        ) from None
