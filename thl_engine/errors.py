"""Errors that a user can mend. Each message is one line: what is wrong, where, and what would work.

Names and reasons come out of files and libraries that nobody has checked. `shown` and `said` quote them, and
`EngineError` bounds every message as a whole, so that no file can flood a terminal or send it control characters.
"""

import reprlib
from math import log10

MESSAGE_LIMIT = 300  # characters of a message
SHOWN_LIMIT = 120  # of a value in it
SAID_LIMIT = 160  # of a reason that a library gives
WORD_LIMIT = 48  # of a path in a message that is too long
DIGITS = 40  # a longer whole number is told by its length


class EngineError(Exception):
    """Base of every error that the engine raises on purpose; commands print it and exit with code 1.

    Its message is one line of at most MESSAGE_LIMIT printable characters, whatever it was made from. Of a longer one
    the beginnings of long paths go first, then its middle, since it ends with what would work.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_line(_with_short_words(str(message)), MESSAGE_LIMIT))


class CheckpointError(EngineError):
    """A model file is missing, damaged, or does not hold the tensors its architecture needs."""


class ConfigError(EngineError):
    """A configuration or an option has an unknown field or a value that cannot work."""


class BudgetError(EngineError):
    """The memory budget is smaller than the least that the model runs with."""


class TokenizerError(EngineError):
    """A tokenizer is missing or damaged, or text or token ids do not fit its vocabulary."""


class DeviceError(EngineError):
    """The compute device, its driver, or what it needs of the host's memory has failed."""


def shown(value: object) -> str:
    """A name or value out of a file, quoted and shortened, so that no message spans lines or pages."""
    return _line(_BRIEF.repr(value), SHOWN_LIMIT)


def said(reason: object) -> str:
    """What a library or a foreign file says of a failure: the beginning of its first line."""
    try:
        lines = str(reason)[: 8 * SAID_LIMIT].strip().splitlines()
    except Exception:  # a foreign exception may fail to describe itself
        lines = []
    return _line(lines[0] if lines else type(reason).__name__, SAID_LIMIT)


class _Brief(reprlib.Repr):
    """`repr` that never costs more than a few hundred characters, however large the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 3, 8
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 16
        self.maxstring = self.maxother = SHOWN_LIMIT

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() < DIGITS * 3.3:
            return repr(value)
        return f"a number of about {1 + int(value.bit_length() * log10(2))} digits"


_BRIEF = _Brief()


def _with_short_words(text: str) -> str:
    """A message that is too long with the ends of its longest words alone, as many of them as it needs."""
    excess = len(text) - MESSAGE_LIMIT
    if not 0 < excess < 20 * MESSAGE_LIMIT:
        return text
    words = text.split(" ")
    for number in sorted(range(len(words)), key=lambda number: -len(words[number])):
        if excess <= 0 or len(words[number]) <= WORD_LIMIT:
            break
        excess -= len(words[number]) - WORD_LIMIT
        words[number] = "..." + words[number][3 - WORD_LIMIT :]
    return " ".join(words)


def _line(text: str, limit: int) -> str:
    """One line of at most `limit` printable characters; the middle of a longer one goes."""
    if len(text) > 4 * limit:
        text = text[: 2 * limit] + text[-2 * limit :]
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    if len(text) <= limit:
        return text
    end = limit * 2 // 5
    return f"{text[: limit - end - 3]}...{text[-end:]}"
