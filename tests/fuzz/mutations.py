"""Sound files with something wrong in them: edits of JSON documents, of texts and of bytes."""

from collections.abc import Sequence
from random import Random
from typing import Any

NAMES = ["", "\0", "\x1b[2J", "\ud800", "a" * 300, "../../etc/passwd", "weight", "NaN", "1", "é\n", "/", "😀"]
NUMBERS = [0, -1, 1, 2, 3, 63, 255, 4096, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**400, 10**4299, -(10**400)]
NUMBERS += [0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
BULK: list[Any] = [[], {}, [[]], [[[[[[]]]]]], [{}] * 50, [1] * 5000]


def leaf(random: Random) -> Any:
    """A number, a text, true, false or null that may be out of place."""
    kind = random.randrange(10)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.randint(-5, 100)
    if kind < 8:
        return random.choice(NAMES)
    if kind < 9:
        return text(random, 8)
    return random.choice([None, True, False])


def text(random: Random, longest: int) -> str:
    """Any characters, halves of surrogate pairs among them."""
    highest = random.choice([0x7F, 0xFF, 0xFFFF, 0x10FFFF])
    return "".join(chr(random.randint(0, highest)) for _ in range(random.randint(0, longest)))


def junk(random: Random) -> Any:
    """A JSON value that may be out of place."""
    kind = random.randrange(8)
    if kind < 5:
        return leaf(random)
    if kind < 6:
        return [leaf(random) for _ in range(random.randint(0, 3))]
    if kind < 7:
        return {random.choice(NAMES): leaf(random) for _ in range(random.randint(0, 2))}
    return random.choice(BULK)


def edited(random: Random, document: Any, others: Sequence[str] = (), values: Sequence[Any] = ()) -> Any:
    """A JSON document after one to three edits: a value replaced, taken away, added under another name, or moved.

    others: names that an edit may introduce. values: what it may put in a value's place, beside junk.
    """
    for _ in range(random.randint(1, 3)):
        document = _edit(random, document, others, values)
    return document


def _edit(random: Random, document: Any, others: Sequence[str], values: Sequence[Any]) -> Any:
    def value() -> Any:
        return random.choice(values) if values and random.random() < 0.5 else junk(random)

    if not isinstance(document, (dict, list)) or not document or random.randrange(20) == 0:
        return value()
    key = random.choice(list(document) if isinstance(document, dict) else range(min(len(document), 64)))
    copy, how = document.copy(), random.randrange(10)
    if how < 5 and isinstance(copy[key], (dict, list)) and copy[key]:
        copy[key] = _edit(random, copy[key], others, values)
    elif how < 7:
        copy[key] = value()
    elif how < 8:
        del copy[key]
    elif isinstance(copy, dict):
        name = random.choice(others if others and random.random() < 0.5 else NAMES)
        copy[name] = value() if how < 9 else copy[key]
    else:
        copy.insert(key, value() if how < 9 else copy[random.randrange(len(copy))])
    return copy


def damaged(random: Random, content: bytes, end: int | None = None) -> bytes:
    """Bytes of which some are changed, taken away, repeated or put in. end: none of those from there on are."""
    end = len(content) if end is None else min(end, len(content))
    out = bytearray(content[:end])
    for _ in range(random.randint(1, 3)):
        at, how = random.randrange(max(1, len(out))), random.randrange(6)
        if how < 3:
            out[at : at + 1] = bytes([random.randrange(256)])
        elif how < 4:
            del out[at : None if random.random() < 0.5 else at + random.randint(1, 64)]
        elif how < 5:
            out[at:at] = out[at : at + random.randint(1, 64)] * random.randint(1, 3)
        else:
            out[at:at] = random.randbytes(random.randint(0, 12))
    return bytes(out) + content[end:]


def recombined(random: Random, content: str, pieces: Sequence[str]) -> str:
    """A text some stretches of which are taken away, repeated, or replaced by pieces."""
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(content))
        stop, how = min(len(content), at + random.choice([0, 1, 4, 16, 64])), random.randrange(4)
        new = {0: "", 1: content[at:stop] * random.randint(2, 3)}.get(how, random.choice(pieces))
        content = content[:at] + new + content[stop:]
    return content
