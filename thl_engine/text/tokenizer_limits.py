"""What a tokenizer.json may ask of the `tokenizers` library, checked before the library sees it.

The library trusts its files: what allocates too much aborts the process, which nothing can catch. A step of its chains
may lengthen a text, and chains multiply: the bound is on their product. Files are read by the names of their steps;
what has no known name is refused. Regular expressions are let through: the library's engine (Oniguruma) bounds
repetitions and ends a search after 10 million tries.
"""

import base64
import binascii
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from thl_engine.errors import TokenizerError, shown

STEPS_LIMIT = 64  # steps of one chain
DEPTH_LIMIT = 8  # sequences in sequences
GROWTH_LIMIT = 4096  # bytes that chains may make of one byte at worst; published files reach some hundreds
ADDED_LIMIT = 64 << 20  # bytes that the added tokens may become at worst, which are normalized when the file is read
TRIE_LIMIT = 1 << 20  # units of a map of characters; published files have up to 100,000
TRIE_NODES = 4096  # looked at together
WORD_LIMIT = 1000  # characters of a word that WordPiece takes time for; published files have 100

# What a step makes of one byte at worst. Compatibility forms make 33 bytes of the 3 of U+FDFA.
_NORMALIZERS: dict[str, float] = {
    "BertNormalizer": 6,
    "ByteLevel": 2,
    "Lowercase": 1.5,
    "NFC": 3,
    "NFD": 3,
    "NFKC": 11,
    "NFKD": 11,
    "Nmt": 1,
    "Strip": 1,
    "StripAccents": 1,
}
_PRE_TOKENIZERS: dict[str, float] = {
    "BertPreTokenizer": 1,
    "ByteLevel": 2,
    "CharDelimiterSplit": 1,
    "Digits": 1,
    "Metaspace": 4,
    "Punctuation": 1,
    "UnicodeScripts": 1,
    "Whitespace": 1,
    "WhitespaceSplit": 1,
}
_DECODERS: dict[str, float] = {
    "BPEDecoder": 1,
    "ByteFallback": 1,
    "ByteLevel": 1,
    "CTC": 1,
    "Fuse": 1,
    "Metaspace": 1,
    "Strip": 1,
    "WordPiece": 2,
}
_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing"}
_PARTS = {
    "normalizer": (_NORMALIZERS, "normalizers"),
    "pre_tokenizer": (_PRE_TOKENIZERS, "pretokenizers"),
    "decoder": (_DECODERS, "decoders"),
}


def check_tokenizer(data: dict[str, Any]) -> float:
    """Bytes that a normalizer may make of one byte of text. TokenizerError for a parsed file that asks for too much."""
    growths = {part: _chain(part, data.get(part), *known) for part, known in _PARTS.items()}
    growths["post_processor"] = _processed(data.get("post_processor"))
    for part, growth in growths.items():
        if growth > GROWTH_LIMIT:
            raise TokenizerError(
                f"{part}: its steps together may make {growth:.0f} bytes of one, allowed are {GROWTH_LIMIT}"
            )
    _check_model(data.get("model"))
    added = data.get("added_tokens")
    added = added if isinstance(added, list) else []
    contents = [token.get("content") for token in added if isinstance(token, dict) and token.get("normalized", True)]
    total = sum(len(content.encode("utf-8", "replace")) for content in contents if isinstance(content, str))
    if total * growths["normalizer"] > ADDED_LIMIT:
        raise TokenizerError(f"added_tokens: {total} bytes that the normalizer may make over {ADDED_LIMIT} of")
    return growths["normalizer"]


def _chain(part: str, step: Any, known: dict[str, float], inner: str) -> float:
    growth, count = 1.0, 0
    for found in _steps(part, step, inner, 0):
        count += 1
        if count > STEPS_LIMIT:
            raise TokenizerError(f"{part}: more than {STEPS_LIMIT} steps")
        growth *= _growth(part, found, known)
    return growth


def _steps(part: str, step: Any, inner: str, depth: int) -> Iterator[dict[str, Any]]:
    """The steps of a chain, in order, without the sequences around them."""
    if step is None:
        return
    if not isinstance(step, dict):
        raise TokenizerError(f"{part}: expected an object, found {type(step).__name__}")
    if step.get("type") != "Sequence":
        yield step
        return
    if depth == DEPTH_LIMIT:
        raise TokenizerError(f"{part}: more than {DEPTH_LIMIT} sequences in one another")
    members = step.get(inner)
    if not isinstance(members, list):
        raise TokenizerError(f"{part}: a Sequence needs a list of {inner}")
    for member in members:
        yield from _steps(part, member, inner, depth + 1)


def _growth(part: str, step: dict[str, Any], known: dict[str, float]) -> float:
    kind = step.get("type")
    if kind == "Replace" and part != "pre_tokenizer":
        pattern, content = _pattern(part, step), _text(part, step, "content")
        # A regular expression may match the empty text before each character.
        return 1.0 + len(content) if pattern is None else max(1.0, len(content) / len(pattern))
    if kind == "Prepend" and part == "normalizer":
        return 1.0 + len(_text(part, step, "prepend"))
    if kind == "Precompiled" and part == "normalizer":
        return _charsmap(step.get("precompiled_charsmap"))
    if kind == "Split" and part == "pre_tokenizer":
        _pattern(part, step)
        return 1.0
    if kind == "FixedLength" and part == "pre_tokenizer":
        length = step.get("length", 5)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise TokenizerError(f"{part}: FixedLength of {shown(length)}; it must be 1 or more")
        return 1.0
    if not isinstance(kind, str) or kind not in known:
        raise TokenizerError(f"{part}: unknown kind of step {shown(kind)}")
    if kind == "Metaspace" and isinstance(step.get("replacement"), str) and len(step["replacement"]) > 1:
        raise TokenizerError(f"{part}: Metaspace replaces by one character, found {shown(step['replacement'])}")
    return known[kind]


def _pattern(part: str, step: dict[str, Any]) -> bytes | None:
    """What a step looks for, some text; None for a regular expression."""
    pattern = step.get("pattern")
    pattern = pattern if isinstance(pattern, dict) else {}
    if isinstance(pattern.get("Regex"), str) and len(pattern) == 1:
        return None
    if not (text := _text(part, pattern, "String")):
        raise TokenizerError(f"{part}: a step looks for the empty text")
    return text


def _text(part: str, step: dict[str, Any], field: str) -> bytes:
    value = step.get(field)
    if not isinstance(value, str):
        raise TokenizerError(f"{part}: expected a text as {field}, found {type(value).__name__}")
    return value.encode("utf-8", "replace")


def _charsmap(encoded: Any) -> float:
    """Growth by a map of characters: base64 of a length, so many bytes of a trie, and texts that end in a NUL."""
    if not isinstance(encoded, str):
        raise TokenizerError("normalizer: Precompiled without a precompiled_charsmap")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise TokenizerError("normalizer: precompiled_charsmap is not base64") from None
    if len(blob) < 4:
        raise TokenizerError(f"normalizer: precompiled_charsmap has {len(blob)} bytes, too few for its length")
    (size,) = struct.unpack("<I", blob[:4])
    if size % 4 or size > len(blob) - 4:
        raise TokenizerError(f"normalizer: precompiled_charsmap says {size} bytes and has {len(blob) - 4}")
    texts = blob[4 + size :]
    _check_trie(np.frombuffer(blob, np.uint32, size // 4, 4), texts)
    return 1.0 + max(map(len, texts.split(b"\0")), default=0)


def _check_trie(units: np.ndarray, texts: bytes) -> None:
    """Refuses a trie in which a search may leave it or its texts, which the library does not look after.

    A double array: from a node with the base b, byte c leads to unit b ^ c, if the unit's lowest eight bits and its
    highest are those of c; its base is its place ^ its offset, and a leaf's value, a place in texts, stands there.
    """
    if not 0 < len(units) <= TRIE_LIMIT:
        raise TokenizerError(
            f"normalizer: the trie of precompiled_charsmap has {len(units)} units, from 1 to {TRIE_LIMIT}"
        )
    leaves_it = TokenizerError("normalizer: the trie of precompiled_charsmap leads out of it")
    starts = np.frombuffer(b"\0" + texts + b"\0", np.uint8)[1:] & 0xC0 != 0x80  # of characters, and the end

    def base(places: np.ndarray) -> np.ndarray:
        offsets = (units[places] >> 10) << ((units[places] & 0x200) >> 6)
        bases: np.ndarray = places ^ offsets.astype(np.int64)
        return bases

    seen, waiting = np.zeros(len(units), bool), base(np.zeros(1, np.int64))
    while len(waiting):
        some, waiting = waiting[:TRIE_NODES], waiting[TRIE_NODES:]
        places = some[:, None] ^ np.arange(1, 256)
        if (places >= len(units)).any():
            raise leaves_it
        places = places[units[places] & 0x800000FF == np.arange(1, 256)]
        places = places[~seen[places]]
        seen[places] = True
        leaves = base(places[units[places] & 0x100 != 0])
        if (leaves >= len(units)).any():
            raise leaves_it
        values = units[leaves] & 0x7FFFFFFF
        if (values >= len(starts)).any() or not starts[values].all():
            raise TokenizerError("normalizer: precompiled_charsmap names a place between its texts")
        waiting = np.concatenate([waiting, base(places)])


def _processed(step: Any) -> float:
    """How often a post-processor repeats what it is given."""
    growth = 1.0
    for count, found in enumerate(_steps("post_processor", step, "processors", 0)):
        if count == STEPS_LIMIT:
            raise TokenizerError(f"post_processor: more than {STEPS_LIMIT} steps")
        kind = found.get("type")
        if kind == "TemplateProcessing":
            pieces = found.get("single")
            pieces = pieces if isinstance(pieces, list) else str(pieces).split()
            growth *= max(1, sum("Sequence" in piece if isinstance(piece, dict) else True for piece in pieces))
        elif not isinstance(kind, str) or kind not in _PROCESSORS:
            raise TokenizerError(f"post_processor: unknown kind of step {shown(kind)}")
    return growth


def _check_model(model: Any) -> None:
    model = model if isinstance(model, dict) else {}
    words = model.get("max_input_chars_per_word")
    if isinstance(words, int) and words > WORD_LIMIT:
        raise TokenizerError(f"model: max_input_chars_per_word is {shown(words)}, allowed are {WORD_LIMIT}")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and isinstance(merges, list):
        for merge in merges:  # the library cuts so many bytes off the second part, whatever they are
            parts = merge.split(" ") if isinstance(merge, str) else merge
            second = parts[1] if isinstance(parts, list) and len(parts) == 2 else None
            if isinstance(second, str) and not second.startswith(prefix):
                raise TokenizerError(f"model: the merge {shown(merge)} does not go on with {shown(prefix)}")
