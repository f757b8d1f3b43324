"""Regular expressions of foreign files: which ones are matched in bounded time.

The library's engine searches by trying: a repetition inside of a repetition has exponentially many ways to fail, and a
counted repetition is copied so many times. Published tokenizers use neither.
"""

import re
from collections.abc import Iterator

from thl_engine.errors import TokenizerError, shown

LENGTH_LIMIT = 10_000  # characters
COUNT_LIMIT = 1000  # repetitions by number
_COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")


def check_pattern(where: str, pattern: str) -> None:
    """TokenizerError for a pattern that may take time or memory without bounds."""
    if len(pattern) > LENGTH_LIMIT:
        raise TokenizerError(f"{where}: a pattern of {len(pattern)} characters, allowed are {LENGTH_LIMIT}")
    open_groups: list[bool] = []  # whether each holds a repetition whose number is open
    inside = False  # the same of what was read last
    for part in _parts(pattern):
        if part == "(":
            open_groups.append(False)
            inside = False
        elif part == ")":
            inside = bool(open_groups) and open_groups.pop()
            if open_groups:
                open_groups[-1] |= inside
        elif part in ("*", "+", "?") or len(part) > 1:
            _check_repetition(where, pattern, part, inside)
            if part != "?" and not _fixed(part) and open_groups:
                open_groups[-1] = True
            inside = part != "?" and not _fixed(part)
        else:
            inside = False


def _check_repetition(where: str, pattern: str, part: str, inside: bool) -> None:
    numbers = [int(number[:9]) for number in re.findall(r"\d+", part)]
    if any(number > COUNT_LIMIT for number in numbers):
        raise TokenizerError(f"{where}: the pattern {shown(pattern)} repeats over {COUNT_LIMIT} times")
    many = part in ("*", "+") or (len(part) > 1 and part != "{1}")
    if many and inside:
        raise TokenizerError(f"{where}: the pattern {shown(pattern)} repeats a repetition, which may take for ever")


def _fixed(part: str) -> bool:
    found = _COUNTED.fullmatch(part)
    return found is not None and not found[2]


def _parts(pattern: str) -> Iterator[str]:
    """Parentheses, repetitions, and any other one character for what stands for itself, escapes and classes."""
    i, depth = 0, 0  # depth: of character classes, which may lie in one another
    previous = ""
    while i < len(pattern):
        char = pattern[i]
        i += 1
        if char == "\\":
            i += 1
            part = "x"
        elif depth or char == "[":
            depth += (char == "[") - (char == "]")
            if char == "[":
                i += pattern[i : i + 1] == "^"
                i += pattern[i : i + 1] == "]"
            if depth:
                continue
            part = "x"
        elif char == "(":
            i += pattern[i : i + 1] == "?"  # the head of a group is no repetition
            part = char
        elif char == "{" and (counted := _COUNTED.match(pattern, i - 1)) and counted[0] not in ("{}", "{,}"):
            i = counted.end()
            part = counted[0]
        else:
            part = char
        if part in ("?", "+") and previous in ("*", "+", "?"):
            previous = ""  # lazy or possessive: of the same repetition
            continue
        previous = part
        yield part
