"""What a tokenizer.json may ask for: growth, patterns, maps, repetition; and what published files ask stays allowed."""

import base64
import json
import struct
import time

import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from thl_engine.errors import TokenizerError
from thl_engine.text import tokenizer as tokenizer_module
from thl_engine.text.tokenizer import load_tokenizer

BASE = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"},
}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def load(**parts):
    return load_tokenizer(json.dumps(BASE | parts), 10, "here")


def sequence(*steps, inner="normalizers"):
    return {"type": "Sequence", inner: list(steps)}


def charsmap(data):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def nested(depth):
    return sequence(nested(depth - 1)) if depth else {"type": "NFC"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": sequence(*[DOUBLE] * 20)}, "normalizer: its steps together may make 1048576 bytes of one"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}}, "looks for the empty text"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"String": ""}}}, "looks for the empty text"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "a?"}, "content": "a" * 5000}}, "together may make"),
        ({"normalizer": sequence(*[{"type": "Prepend", "prepend": "a" * 99}] * 3)}, "together may make"),
        ({"normalizer": sequence(*[{"type": "NFKD"}, DOUBLE] * 4)}, "together may make"),
        ({"normalizer": sequence(*[{"type": "NFC"}] * 65)}, "more than 64 steps"),
        ({"normalizer": nested(20)}, "more than 8 sequences"),
        ({"decoder": sequence(*[DOUBLE] * 20, inner="decoders")}, "decoder: its steps together"),
        ({"normalizer": charsmap(b"\xff\xff\xff\xff\x00")}, "says 4294967295 bytes and has 1"),
        ({"normalizer": charsmap(b"\xff")}, "has 1 bytes, too few"),
        ({"normalizer": charsmap(b"\0\4\0\0" + bytes(1024) + b"a" * 5000)}, "together may make"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not base64"),
        ({"normalizer": {"type": "Precompiled"}}, "without a precompiled_charsmap"),
        ({"normalizer": {"pattern": {"String": "a"}, "content": "aa"}}, "unknown kind of step None"),
        ({"normalizer": {"type": ["x"]}}, "unknown kind of step"),
        ({"normalizer": [1]}, "expected an object, found list"),
        ({"normalizer": {"type": "Sequence"}}, "needs a list of normalizers"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "must be 1 or more"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "ab"}}, "one character"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5000,
                }
            },
            "post_processor: its steps together",
        ),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**6}}, "allowed are 1000"),
        (
            {
                "added_tokens": [{"id": 2, "content": "a" * 10**6, "normalized": True}],
                "normalizer": sequence(*[DOUBLE] * 8),
            },
            "added_tokens: 1000000 bytes",
        ),
    ],
)
def test_files_that_ask_for_too_much(parts, message):
    started = time.monotonic()
    with pytest.raises(TokenizerError, match=f"here: .*{message}") as error:
        load(**parts)
    assert time.monotonic() - started < 2
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_name_that_stands_twice():
    text = json.dumps(BASE)[:-1] + ', "normalizer": {"type": "NFC"}, "normalizer": null}'
    with pytest.raises(TokenizerError, match="here: the file: 'normalizer' occurs twice"):
        load_tokenizer(text, 10, "here")


def test_a_long_text_that_becomes_much_longer(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "NORMALIZED_LIMIT", 10_000)
    tokenizer = load(normalizer=sequence(*[DOUBLE] * 8))
    assert tokenizer.encode("c" * 9000) == [1]
    with pytest.raises(TokenizerError, match="normalizer makes over 154000 bytes of a text of 9000"):
        tokenizer.encode("a" * 9000)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "((a*)*)*b", "(a{0,1000}){0,1000}$"])
def test_patterns_that_take_for_ever(pattern):
    """The library gives up by itself; that it goes on doing so is what this holds."""
    tokenizer = load(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    )
    started = time.monotonic()
    try:
        tokenizer.encode("a" * 2000 + "!")
    except TokenizerError as error:
        assert len(str(error)) < 300
    assert time.monotonic() - started < 5


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
        (
            normalizers.Sequence(
                [
                    normalizers.Replace("``", '"'),
                    normalizers.NFKD(),
                    normalizers.StripAccents(),
                    normalizers.Lowercase(),
                    normalizers.Replace(Regex(" {2,}"), " "),
                ]
            ),
            pre_tokenizers.Metaspace(),
        ),
        (normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), "isolated"),
                                                     pre_tokenizers.ByteLevel(use_regex=False)])),
        (
            normalizers.Sequence([normalizers.Nmt(), normalizers.Strip(), normalizers.ByteLevel()]),
            pre_tokenizers.Sequence([
                pre_tokenizers.Digits(), pre_tokenizers.Punctuation(), pre_tokenizers.UnicodeScripts(),
                pre_tokenizers.WhitespaceSplit(), pre_tokenizers.CharDelimiterSplit("x"), pre_tokenizers.FixedLength(3),
            ]),
        ),
    ],
)  # fmt: skip
def test_chains_of_published_tokenizers(normalizer, pre_tokenizer):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    inner.normalizer, inner.pre_tokenizer = normalizer, pre_tokenizer
    assert load_tokenizer(inner.to_str(), 10, "here").encode("a Café é") == inner.encode("a Café é").ids


def trie(root=256 << 10, node=0x161 | (0x361 << 10), value=1 << 31, units=768, texts=b"b\0"):
    """A map of "a" to "b": unit 0 leads to units from 256 on, that of "a" to its value in unit 512."""
    words = [0] * 768
    words[0], words[0x161], words[512] = root, node, value
    return charsmap(struct.pack(f"<I{units}I", 4 * units, *words[:units]) + texts)


def test_maps_of_characters_stay_within_themselves():
    assert load(normalizer=trie()).encode("a") == [1]  # "b"
    for parts, message in [
        ({"units": 0}, "has 0 units"),
        ({"units": 1}, "leads out of it"),
        ({"root": 1024 << 10}, "leads out of it"),
        ({"node": 0x161 | (0x3FF << 20)}, "leads out of it"),
        ({"value": 1 << 31 | 9}, "names a place between its texts"),
        ({"texts": "é\0".encode(), "value": 1 << 31 | 1}, "names a place between its texts"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            load(normalizer=trie(**parts))


def test_merges_go_on_with_the_prefix(capfd):
    model = {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": [["a", "##b"]]}
    model["continuing_subword_prefix"] = "##"
    assert load(model=model).encode("ab") == [2]
    for merges, vocab in [([["a", "b"]], {"b": 3}), (["a é"], {"é": 3})]:
        with pytest.raises(TokenizerError, match="does not go on with '##'"):
            load(model=model | {"merges": merges, "vocab": model["vocab"] | vocab})
    assert capfd.readouterr().err == ""  # the library would panic, and say so


@pytest.mark.parametrize("kind", [["BertProcessing"], {"type": 1}, None])
def test_processors_of_no_kind(kind):
    with pytest.raises(TokenizerError, match="unknown kind of step"):
        load(post_processor={"type": kind})


def test_values_of_a_file_are_counted():
    with pytest.raises(TokenizerError, match="more than 1450001 values"):
        load_tokenizer('{"model": {}, "added_tokens": [' + "[]," * 3_000_000 + "[]]}", 10, "here")
    names = ",".join(f'"{i}": {i}' for i in range(200_000))
    start = time.process_time()
    with pytest.raises(TokenizerError, match="'199999' occurs twice"):
        load_tokenizer('{"model": {"vocab": {' + names + ', "199999": 1}}}', 10, "here")
    assert time.process_time() - start < 10  # not the square of the number of names
