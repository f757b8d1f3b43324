"""Sound files with something wrong in them: edits of JSON documents and of bytes."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

_NAMES = st.sampled_from(
    ["", "\0", "\x1b[2J", "\ud800", "a" * 300, "../../etc/passwd", "weight", "NaN", "1", "é\n", "/"]
)
_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 63, 255, 4096, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**400, 10**4299, -(10**400)]
    + [0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
)
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, st.integers(-5, 100), _NAMES, st.text(max_size=8))
JUNK = st.one_of(
    _LEAVES,
    st.lists(_LEAVES, max_size=3),
    st.dictionaries(_NAMES, _LEAVES, max_size=2),
    st.sampled_from([[], {}, [[]], [[[[[[]]]]]], [{}] * 50, [1] * 5000]),
)


@st.composite
def edited(draw: st.DrawFn, document: Any, others: Sequence[str] = ()) -> Any:
    """A JSON document after one to three edits: a value replaced, taken away, added under another name, or moved.

    others: names that an edit may introduce.
    """
    names = st.one_of(st.sampled_from(list(others)), _NAMES) if others else _NAMES
    for _ in range(draw(st.integers(1, 3))):
        document = _edit(draw, document, names)
    return document


def _edit(draw: st.DrawFn, document: Any, names: st.SearchStrategy[str]) -> Any:
    if not isinstance(document, (dict, list)) or not document or draw(st.integers(0, 19)) == 0:
        return draw(JUNK)
    keys = list(document) if isinstance(document, dict) else list(range(min(len(document), 64)))
    key = draw(st.sampled_from(keys))
    copy = document.copy()
    how = draw(st.integers(0, 9))
    if how < 5 and isinstance(copy[key], (dict, list)) and copy[key]:
        copy[key] = _edit(draw, copy[key], names)
    elif how < 7:
        copy[key] = draw(JUNK)
    elif how < 8:
        del copy[key]
    elif isinstance(copy, dict):
        copy[draw(names)] = draw(JUNK) if how < 9 else copy[key]
    else:
        copy.insert(key, draw(JUNK))
    return copy


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are changed, taken away, repeated or put in."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        how = draw(st.integers(0, 5))
        if how < 3:
            out[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how < 4:
            del out[at : None if draw(st.booleans()) else at + draw(st.integers(1, 64))]
        elif how < 5:
            out[at:at] = out[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 3))
        else:
            out[at:at] = draw(st.binary(max_size=12))
    return bytes(out)
