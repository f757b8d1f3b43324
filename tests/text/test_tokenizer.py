import gc
import json
import re
import sys

import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from thl_engine.errors import TokenizerError
from thl_engine.text.tokenizer import ByteTokenizer, StreamDecoder, load_tokenizer

CORPUS = [
    "First Citizen: Before we proceed any further, hear me speak.",
    "Speak, speak. You are all resolved rather to die than to famish?",
    "naïve café, Ελληνικά, 東京タワー, 👍🏽 and 👩\u200d👩\u200d👧 with e\u0301",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "Hello, world!\n\n\tSpeak.",
    " leading",
    "\u00a0nbsp",
    "👍🏽👩\u200d👩\u200d👧 e\u0301\u0301",
    "日本語テキスト",
    "\U0010ffff\U00010000\x00\x7f",
    "\ufffd real replacement \ufffd",
    "▁ the metaspace ▁",
    "Ġ <0x41> </s>",
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["日本語", " plain added"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    return tokenizer


def byte_fallback(decoder, bos=True):
    """What SentencePiece models become: spaces as ▁, characters outside the vocabulary as byte tokens."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=tokens, show_progress=False)
    trained.train_from_iterator(CORPUS[:2], trainer)
    data = json.loads(trained.to_str())
    data["model"]["byte_fallback"] = True
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def trained(model, trainer, pre_tokenizer, decoder):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
PLAIN = {"special_tokens": SPECIAL, "vocab_size": 200, "show_progress": False}
BYTEWISE = {
    "byte_level": byte_level(),
    "llama": byte_fallback(decoders.Sequence(LLAMA)),
    "gemma": byte_fallback(decoders.Sequence(LLAMA[:3]), bos=False),
    "metaspace_fallback": byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace_never": byte_fallback(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()])
    ),
}
WINDOWED = {
    "wordpiece": trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(**PLAIN),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    ),
    "suffix": trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(end_of_word_suffix="</w>", **PLAIN),
        pre_tokenizers.Whitespace(),
        decoders.BPEDecoder(),
    ),
    "words": trained(
        models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**PLAIN), pre_tokenizers.Whitespace(), None
    ),
    "regex_fallback": byte_fallback(
        decoders.Sequence([decoders.Replace(tokenizers.Regex("▁"), " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "empty": byte_fallback(decoders.Sequence([])),
}
HF = {**BYTEWISE, **WINDOWED}
MODEL_VOCAB = 1000


def load(name):
    return load_tokenizer(HF[name].to_str(), MODEL_VOCAB, "tokenizer.json")


TOKENIZERS = {
    **{name: load(name) for name in HF},
    "bytes": ByteTokenizer(MODEL_VOCAB),
    "chars": load_tokenizer(json.dumps(["<pad>", "<unk>", *"abc Helo,é👍\u0301"]), MODEL_VOCAB, "c.json"),
}


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(token) for token in ids], decoder.flush()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_streaming_equals_decoding(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces, rest = stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    if name in HF:
        assert tokenizer.decode(ids) == HF[name].decode(ids)


@pytest.mark.parametrize("name", ["bytes", "byte_level", "llama", "gemma"])
@given(text=UNICODE)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_and_no_character_breaks(name, text):
    assume(not any(special in text for special in [*SPECIAL, "<|endoftext|>"]))  # those have ids of their own
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    pieces, rest = stream(tokenizer, ids)
    expected = (" " if name == "gemma" and text else "") + text  # gemma's decoder keeps the prepended space
    assert "".join(pieces) + rest == expected and rest == ""
    for piece in pieces:
        piece.encode()  # no half of a surrogate pair
        assert "\ufffd" not in piece or "\ufffd" in text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_random_ids(name, data):
    tokenizer = TOKENIZERS[name]
    top = tokenizer.vocab_size + 3
    ids = data.draw(st.lists(st.one_of(st.integers(0, top), st.integers(0, min(top, 270))), max_size=24))
    pieces, rest = stream(tokenizer, ids)
    text = tokenizer.decode(ids)
    assert text == tokenizer.decode(torch.tensor(ids, dtype=torch.int64))
    if name != "regex_fallback":  # there the library rewrites text that is out already, see below
        assert "".join(pieces) + rest == text
    if name not in HF:
        return
    library = HF[name].decode(ids)
    if not {"llama", "gemma", "metaspace_fallback", "metaspace_never"} & {name} or "\ufffd" not in library:
        assert text == library


def test_byte_fallback_keeps_the_valid_characters_of_a_damaged_run():
    inner, tokenizer = HF["llama"], TOKENIZERS["llama"]
    run = [inner.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode() + b"\xff" + "👍".encode()]
    assert stream(tokenizer, run) == (["", "é", "\ufffd", "", "", "", "👍"], "")
    assert inner.decode(run) == "\ufffd" * 7


@pytest.mark.parametrize("name", ["bytes", "byte_level", "llama"])
def test_a_character_that_never_ends(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("éꙮ🜚")
    whole = [i for i in range(len(ids) + 1) if "\ufffd" not in tokenizer.decode(ids[:i])]
    assert len(whole) < len(ids)
    for cut in range(len(ids)):
        pieces, rest = stream(tokenizer, ids[:cut])
        assert "\ufffd" not in "".join(pieces)
        assert (rest == "") == (cut in whole)
        assert set(rest) <= {"\ufffd"}


def test_the_library_agrees_while_streaming_regex_replacements():
    tokenizer = TOKENIZERS["regex_fallback"]
    for text in TEXTS + ["é👍 日本 speak 語" * 3]:
        ids = tokenizer.encode(text)
        pieces, rest = stream(tokenizer, ids)
        assert "".join(pieces) + rest == HF["regex_fallback"].decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_cost_of_a_token_does_not_grow(name):
    tokenizer = TOKENIZERS[name]
    decoder, ids = StreamDecoder(tokenizer), tokenizer.encode("Hello, Hello cab ") * 20
    text = "".join(map(decoder.push, ids))
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    totals = []
    for repeats in (1, 20):
        for _ in range(repeats):
            text = text + "".join(map(decoder.push, ids))
        gc.disable()  # a collection between two tokens calls what others have hung on it
        calls, previous = 0, sys.getprofile()
        sys.setprofile(count)
        for token in ids:
            decoder.push(token)
        sys.setprofile(previous)
        gc.enable()
        totals.append(calls)
    assert totals[0] == totals[1]
    held = [value for value in vars(decoder._stream).values() if isinstance(value, list | str)]
    assert sum(map(len, held)) < 50


def test_flush_starts_anew():
    decoder = StreamDecoder(TOKENIZERS["llama"])
    ids = TOKENIZERS["llama"].encode("speak")
    for _ in range(2):
        assert "".join(map(decoder.push, ids)) + decoder.flush() == "speak"


def test_special_tokens():
    llama = TOKENIZERS["llama"]
    assert llama.encode("a")[0] == 1 and llama.eos_id == 2
    assert llama.decode([1, *llama.encode("a b"), 2]) == "a b"
    assert TOKENIZERS["byte_level"].eos_id == 0 and TOKENIZERS["empty"].eos_id == 2
    assert load_tokenizer(HF["llama"].to_str(), MODEL_VOCAB, "t", eos_id=7).eos_id == 7
    marked = tokenizers.Tokenizer.from_str(HF["byte_level"].to_str())
    marked.add_special_tokens([AddedToken("<|user|>", special=True)])
    tokenizer = load_tokenizer(marked.to_str(), MODEL_VOCAB, "t")
    assert tokenizer.decode(tokenizer.encode("a<|user|>b")) == "ab"


def test_truncation_and_padding_of_the_file_are_off():
    tokenizer = TOKENIZERS["byte_level"]
    text = "a much longer text than five tokens, as a prompt may be"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


# Bytes


def test_bytes_as_published():
    tokenizer = ByteTokenizer(269)
    assert tokenizer.encode("Aé") == [78, 208, 182] and tokenizer.vocab_size == 269 and tokenizer.eos_id == 1
    assert tokenizer.decode([0, 78, 1, 208, 12, 182, 2]) == "Aé"
    assert ByteTokenizer(50257).decode([78, 208, 5000, 182, 269]) == "A" + "\ufffd" * 4
    with pytest.raises(TokenizerError, match="268 ids.*needs 269"):
        ByteTokenizer(268)


# Character vocabularies

CHARS = {"a": 2, "b": 3, "\n": 4, "é": 5}


@pytest.mark.parametrize(
    "data",
    [
        CHARS,
        {"char_to_id": CHARS},
        {"stoi": CHARS, "itos": {str(i): c for c, i in CHARS.items()}},
        {"level": "char", "vocab": CHARS, "vocab_size": 4},
        ["<pad>", "<eos>", "a", "b", "\n", "é"],
        {"char_to_id": ["[PAD]", "[EOS]", "a", "b", "\n", "é"]},
    ],
)
def test_character_vocabulary_forms(data):
    tokenizer = load_tokenizer(json.dumps(data), 6, "chars.json")
    assert tokenizer.encode("éa\nb") == [5, 2, 4, 3]
    assert tokenizer.decode([5, 2, 4, 3]) == "éa\nb"
    assert tokenizer.vocab_size == 6
    with pytest.raises(TokenizerError, match=r"'c' \(U\+0063\) at position 2"):
        tokenizer.encode("abc")


@pytest.mark.parametrize(
    "data",
    [
        {"<PAD>": 0, "<UNK>": 1, "<EOS>": 6, **CHARS},
        {"vocab": {"[PAD]": 0, "[UNK]": 1, "</s>": 6, **CHARS}},
        {"stoi": CHARS, "unk": 1, "eos_token_id": 6, "pad_id": 0, "bos": None},
        {
            "stoi": {"nothing": 1, "end": 6, "fill": 0, **CHARS},
            "unk_token": "nothing",
            "eos_token": "end",
            "special_tokens": ["fill", "nothing", "end"],
        },
        {"stoi": CHARS, "special_tokens": {"<pad>": 0, "<unk>": 1, "<eos>": 6}},
    ],
)
def test_character_vocabulary_special_tokens(data):
    tokenizer = load_tokenizer(json.dumps(data), 8, "chars.json")
    assert tokenizer.encode("aéx<") == [2, 5, 1, 1]
    assert tokenizer.eos_id == 6 and tokenizer.vocab_size == 7
    assert tokenizer.decode([0, 2, 1, 6, 5]) == "a\ufffdé"
    assert tokenizer.decode([7]) == "\ufffd", "in the model's table, but not in the vocabulary"


def test_a_character_may_itself_stand_for_the_unknown():
    tokenizer = load_tokenizer(json.dumps({"stoi": {"a": 0, "?": 1}, "unk": "?"}), 2, "chars.json")
    assert tokenizer.encode("ab?") == [0, 1, 1] and tokenizer.decode([0, 1]) == "a?"


# Bad input


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("3", "neither"),
        ("null", "neither"),
        ('["a", 2]', "neither"),
        ("[]", "empty"),
        ("{}", "empty"),
        ('["a", "a"]', "'a' twice"),
        ('{"a": 1, "b": 1}', "id 1 belongs to both 'a' and 'b'"),
        ('{"a": -1}', "'a' has -1"),
        ('{"a": 1.0}', "'a' has 1.0"),
        ('{"a": true}', "'a' has True"),
        ('{"the": 1}', "'the' has 3 characters"),
        ('{"": 1}', "'' has 0 characters"),
        ('{"\\ud800": 1}', "surrogate"),
        ('{"a": 0, "b": 10}', "11 ids, the model only 10"),
        ('{"stoi": {"a": 1}, "unk": "x"}', "unk names 'x'"),
        ('{"stoi": {"a": 1}, "unk": 99}', "100 ids, the model only 10"),
        ('{"stoi": {"a": 1}, "special_tokens": 3}', "special_tokens"),
        ('{"stoi": {"a": 1}, "special_tokens": ["x"]}', "'x'"),
        ('{"stoi": {"a": 1}, "unc": 3}', "unknown field 'unc'"),
        ('{"vocab": {"a": 1}, "level": "word"}', "level is 'word'"),
        ('{"model": {}}', "`tokenizers`"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "None"}}', "unknown kind of step"),
        (HF["llama"].to_str(), r"\d+ ids, the model only 10"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(text, 10, "some/tokenizer.json")
    assert str(error.value).startswith("some/tokenizer.json: ") and "\n" not in str(error.value)


def test_damaged_tokenizer_files_raise_nothing_else():
    text = HF["llama"].to_str()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        place, other = torch.randint(len(text), (2,), generator=generator).tolist()
        for damaged in (text[:place], text[:place] + text[other] + text[place + 1 :]):
            try:
                tokenizer = load_tokenizer(damaged, MODEL_VOCAB, "t")
                tokenizer.decode(tokenizer.encode("Hello 👍"))
            except TokenizerError:
                pass


def test_a_panic_of_the_library_is_an_error_line():
    data = json.loads(HF["llama"].to_str())
    data["post_processor"]["special_tokens"] = {}
    tokenizer = load_tokenizer(json.dumps(data), MODEL_VOCAB, "t")
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        tokenizer.encode("a")


def test_end_of_text_outside_the_vocabulary():
    with pytest.raises(TokenizerError, match="end-of-text id 9 is outside the model's 4 ids"):
        load_tokenizer('["a"]', 4, "t", eos_id=9)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_outside_the_vocabulary(name):
    tokenizer = TOKENIZERS[name]
    assert isinstance(tokenizer.decode([MODEL_VOCAB - 1]), str)
    for bad in (-1, MODEL_VOCAB, 10**30):
        with pytest.raises(TokenizerError, match=f"{bad} is outside the vocabulary of {MODEL_VOCAB}"):
            tokenizer.decode([bad])
        with pytest.raises(TokenizerError):
            StreamDecoder(tokenizer).push(bad)
    with pytest.raises(TokenizerError, match=re.escape("1.5 is not an integer")):
        tokenizer.decode([1.5])


@pytest.mark.parametrize("name", ["bytes", "byte_level", "llama"])
def test_text_that_is_not_unicode(name):
    with pytest.raises(TokenizerError, match=r"position 2 of the text holds U\+DCFF"):
        TOKENIZERS[name].encode("ab\udcff")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install tokenizers"):
        load_tokenizer(HF["llama"].to_str(), MODEL_VOCAB, "t")
    assert load_tokenizer('["a"]', 1, "t").encode("a") == [0]
