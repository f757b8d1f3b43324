"""Damaged files of text: tokenizers and what lies beside them, vocabularies, chat templates, prompts."""

import json
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
from fuzz.kinds import SMALL, Cases, kind
from fuzz.mutations import NAMES, damaged, edited, junk, recombined, text
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.checkpoint.store import tokenizer_beside
from thl_engine.cli.generate import _prompt_ids
from thl_engine.engine.engine import Engine
from thl_engine.engine.him_batch import answer_file
from thl_engine.text.chat_rendering import ChatTemplate
from thl_engine.text.chat_template import COMPANIONS, TEMPLATES
from thl_engine.text.hrm_tokenizer import CONTINUAL_FILE, INSIDE, extended, find_vocabulary, read_vocabulary
from thl_engine.text.tokenizer import Tokenizer, load_tokenizer

IDS = 300  # of the model
SPECIAL = ["<unk>", "<bos>", "<eos>", "[PAD]"]
TEXTS = ["", "hello world", "<bos>hello  world<eos>", "é😀\n\t[PAD]", "a" * 200, "\0\x1b\ufffd"]
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "wor\nld"}]


def byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["hello world, hello words"], trainer)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return inner


def pieces() -> tokenizers.Tokenizer:
    words = {name: i for i, name in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrd"])}
    inner = tokenizers.Tokenizer(
        models.BPE(words, [("h", "e")][:0], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return inner


def unigram() -> tokenizers.Tokenizer:
    scores = [(name, -float(i)) for i, name in enumerate([*SPECIAL, "▁hello", "▁wor", "ld", *"▁helowrd"])]
    inner = tokenizers.Tokenizer(models.Unigram(scores, 0, False))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return inner


def wordpiece() -> tokenizers.Tokenizer:
    words = {name: i for i, name in enumerate([*SPECIAL, "hello", "wor", "##ld", *"helowrd"])}
    inner = tokenizers.Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder, inner.post_processor = decoders.WordPiece(), processors.BertProcessing(("<eos>", 2), ("<bos>", 1))
    return inner


# Steps and models that may stand in each other's places, some of them with values that no one writes.
PARTS: list[Any] = [
    *({"type": name} for name in "NFC NFKD Nmt Lowercase StripAccents BertNormalizer Fuse ByteFallback".split()),
    *({"type": name} for name in "Whitespace WhitespaceSplit UnicodeScripts BertPreTokenizer Sequence".split()),
    {"type": "Strip", "strip_left": True, "strip_right": False},
    {"type": "Strip", "content": "\0", "start": 2**63, "stop": 2},
    {"type": "Replace", "pattern": {"String": "l"}, "content": "lll"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "ab"},
    {"type": "Replace", "pattern": {"Regex": "(l|o)*"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "(?:a+)+$"}, "content": "x"},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
    {"type": "Prepend", "prepend": ""},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////9hAA=="},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "first", "split": True},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "\\p{L}+|"}, "behavior": "MergedWithNext", "invert": True},
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "Digits", "individual_digits": True},
    {"type": "CharDelimiterSplit", "delimiter": "l"},
    {"type": "FixedLength", "length": 2},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": 1.0},
    {"type": "BPE", "vocab": {"a": 2**32 - 1, "": 1}, "merges": ["a "], "continuing_subword_prefix": "aaaa"},
    {"type": "Unigram", "vocab": [], "unk_id": 0},
    {"type": "Unigram", "vocab": [["", float("nan")], ["a", 1e308]], "unk_id": 5, "byte_fallback": True},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "b", "max_input_chars_per_word": 0},
    {"type": "RobertaProcessing", "sep": ["", 9], "cls": ["a", 2**32 - 1], "trim_offsets": True},
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9},
    {"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_token": ""},
    *([{"type": "Sequence", name: [{"type": "NFC"}] * 9} for name in ("normalizers", "pretokenizers", "decoders")]),
]
FIELDS = ["normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding", "type", "model", "vocab"]
FIELDS += ["merges", "unk_token", "dropout", "special", "normalized", "lstrip", "id", "content", "single", "pair"]


def use(tokenizer: Tokenizer) -> None:
    """All that an engine asks of a tokenizer."""
    for given in TEXTS:
        ids = tokenizer.encode(given)
        tokenizer.encode(given, begins=False)
        assert isinstance(tokenizer.decode(ids), str)
    stream = tokenizer.stream()
    for token in range(min(tokenizer.vocab_size, 12)):
        if token < tokenizer.id_limit:
            assert isinstance(stream.push(token), str)
    assert isinstance(stream.flush(), str)
    assert all(0 <= end < IDS for end in tokenizer.end_ids)
    assert tokenizer.eos_id is None or isinstance(tokenizer.eos_id, int)
    assert tokenizer.bos_id is None or isinstance(tokenizer.bos_id, int)
    _ = tokenizer.sampling


@kind("tokenizer.json")
def tokenizer_files(folder: Path) -> Cases:
    documents = [json.loads(made().to_str()) for made in (byte_level, pieces, unigram, wordpiece)]
    contents = [json.dumps(document).encode() for document in documents]

    def make(random: Random) -> bytes:
        which = random.randrange(len(documents))
        if random.randrange(6) == 0:
            return damaged(random, contents[which])
        document = documents[which]
        if random.randrange(3) == 0:  # a whole part, which edits of so many words would rarely meet
            parts = random.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor", "model", "added_tokens"])
            document = {**document, parts: random.choice(PARTS)}
        small = {name: value for name, value in document.items() if name != "model"}
        if random.randrange(2):  # likewise
            changed = edited(random, small, FIELDS, PARTS)
            document = {**changed, "model": document.get("model")} if isinstance(changed, dict) else changed
        else:
            document = edited(random, document, FIELDS, PARTS)
        return json.dumps(document).encode()

    def check(content: bytes) -> None:
        use(load_tokenizer(content.decode("utf-8", "replace"), IDS, "tokenizer.json"))

    return make, check


@kind("beside tokenizer.json")
def companions(folder: Path) -> Cases:
    added = {str(i): {"content": name, "special": True} for i, name in enumerate(SPECIAL)}
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": "{{ messages }}"}
    config |= {"added_tokens_decoder": added, "model_max_length": 10**30, "add_bos_token": True}
    generation = {"eos_token_id": [2, 3], "bos_token_id": 1, "do_sample": True, "temperature": 0.7, "top_k": 20}
    documents: dict[str, Any] = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": None},
        "generation_config.json": generation | {"top_p": 0.9, "repetition_penalty": 1.1},
        "config.json": {"model_type": "thl", "eos_token_id": 2, "text_config": {"eos_token_id": [2]}},
        "chat_template.jinja": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        f"{TEMPLATES}/tool_use.jinja": "{{ tools }}",
    }
    assert set(COMPANIONS) < documents.keys()
    names = ["eos_token_id", "chat_template", "do_sample", "temperature", "top_k", "top_p", "bos_token", "content"]
    values = [True, [], [[1]], [2**70], {"content": 1}, [{"name": "default", "template": "x"}], [{"name": 1}], "<bos>"]
    (folder / "tokenizer.json").write_text(byte_level().to_str())
    (folder / TEMPLATES).mkdir()

    def make(random: Random) -> dict[str, bytes]:
        files = {}
        for name in random.sample(list(documents), random.randint(1, 3)):
            document = documents[name]
            if isinstance(document, str):
                files[name] = damaged(random, document.encode())
            else:
                files[name] = json.dumps(edited(random, document, names, values)).encode()
                if random.randrange(6) == 0:
                    files[name] = damaged(random, files[name])
        return files

    def check(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            joined = tokenizer_beside(folder)
            assert joined is not None
            tokenizer = load_tokenizer(joined, IDS, "joined")
            use(tokenizer)
        finally:
            for name in files:
                (folder / name).unlink()

    return make, check


VOCABULARIES: list[Any] = [
    {char: i for i, char in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *"helo wrd\n"])},
    {"level": "char", "vocab": {"<PAD>": 0, "<UNK>": 1, "<BOS>": 2, "<EOS>": 3, "a": 4, "é": 5}, "vocab_size": 6},
    {"stoi": {"a": 0, "b": 1}, "itos": {"0": "a", "1": "b"}, "unk": 1, "eos_token": "b", "special_tokens": ["a"]},
    {"char_to_id": {"a": 0, "b": 1, "[UNK]": 2}, "unk_id": 2, "special_tokens": {"<x>": 3}, "type": "char"},
    list("helo wrd\n"),
]
VOCABULARY_FIELDS = "vocab stoi itos char_to_id unk eos pad_id bos_token special_tokens level vocab_size model".split()


@kind("vocabularies")
def vocabularies(folder: Path) -> Cases:
    file = folder / "vocab.json"

    def make(random: Random) -> bytes:
        content = json.dumps(edited(random, random.choice(VOCABULARIES), VOCABULARY_FIELDS, [[], ["a"], "a", {"a": 0}]))
        return damaged(random, content.encode()) if random.randrange(5) == 0 else content.encode()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        vocabulary = read_vocabulary(file)
        grown, size = extended(vocabulary.text, "hélo\n", "here")
        assert load_tokenizer(grown, size, "there").vocab_size == size >= vocabulary.size
        use(load_tokenizer(vocabulary.text, IDS, "here"))

    return make, check


@kind("vocabularies of HRM")
def hrm_vocabularies(folder: Path) -> Cases:
    names = [CONTINUAL_FILE, "vocab.json", "other.json", "tokenizer.json", "folder.json", "\udcff.json"]
    tokenizer = json.loads(wordpiece().to_str())
    (folder / "folder.json").mkdir()

    def make(random: Random) -> tuple[dict[str, bytes], Any, int]:
        files = {}
        for name in random.sample(names, random.randint(0, 3)):
            document = random.choice([*VOCABULARIES, tokenizer])
            if random.randrange(2):
                document = edited(random, document, VOCABULARY_FIELDS)
            files[name] = json.dumps(document).encode()
            if random.randrange(6) == 0:
                files[name] = damaged(random, files[name])
        inside: Any = {INSIDE: edited(random, random.choice(VOCABULARIES), VOCABULARY_FIELDS)}
        inside = random.choice([None, {}, inside, inside, {INSIDE: {1, 2}}, {INSIDE: {(1,): 2}}, {INSIDE: b"a"}])
        return files, inside, random.choice([6, 9, 13, 14, 40])

    def check(case: tuple[dict[str, bytes], Any, int]) -> None:
        files, inside, size = case
        written = [folder / name for name in files if not (folder / name).is_dir()]
        for file in written:
            file.write_bytes(files[file.name])
        try:
            found = find_vocabulary(size, folder, "checkpoint.pt", inside)
            if found is not None:
                assert found.size == size
                use(found.tokenizer())
        finally:
            for file in written:
                file.unlink()

    return make, check


PUBLISHED = Path(__file__).parents[1] / "fixtures/chat_templates.json"
FRAGMENTS = (
    "{{ }} {% %} {# #} {%- -%} endfor endif {%set%} namespace( ) [ ] | tojson strftime_now('%Y') messages[0]".split()
)
FRAGMENTS += [
    "{% for m in messages %}",
    "{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "loop.index",
]
FRAGMENTS += [
    "range(999999)",
    "'a' * 99999999",
    "9 ** 9 ** 9",
    "raise_exception('\\u001b[2J')",
    "{% generation %}",
    "(" * 300,
]
FRAGMENTS += [
    "{{ messages.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{% continue %}",
    "|map(attribute='a.b')",
    "\ud800",
]
FRAGMENTS += ["lipsum(n=9999)", "{{ '%0999999999d' | format(1) }}", "cycler('a').next()", "{% set ns.x = 1 %}", *NAMES]


@kind("chat templates", share=80)
def templates(folder: Path) -> Cases:
    sources = [case["source"] for case in json.loads(PUBLISHED.read_text())["cases"]]

    def make(random: Random) -> tuple[Any, Any, Any]:
        source = recombined(random, random.choice(sources), FRAGMENTS) if random.randrange(4) else text(random, 40)
        tools = random.choice([None, None, [{"type": "function"}], junk(random)])
        messages = edited(random, MESSAGES, ["content", "tool_calls", "thinking"]) if random.randrange(2) else MESSAGES
        return (
            source,
            messages if isinstance(messages, list) else [messages],
            tools if isinstance(tools, list) else None,
        )

    def check(case: tuple[Any, Any, Any]) -> None:
        source, messages, tools = case
        assert isinstance(ChatTemplate(source, {"bos_token": "<bos>"}).render(messages, tools), str)

    return make, check


@kind("prompts")
def prompts(folder: Path) -> Cases:
    file = folder / "prompts"

    def make(random: Random) -> bytes:
        ids = random.choice(["1,2,3", "[1, 2, 3]\n", "1 2 3", "", f"{2**64} -1", "١٢", "0x1", "1e3", "9" * 5000])
        return damaged(random, ids.encode())

    def check(content: bytes) -> None:
        file.write_bytes(content)
        assert all(0 <= token < 10**19 for token in _prompt_ids(f"@{file}"))

    return make, check


@kind("batches of prompts")
def batches(folder: Path) -> Cases:
    init_checkpoint(
        "him", SMALL["him"] | dict(max_seq_len=8, max_answer_len=2, mem_slots=2), folder / "him.safetensors"
    )
    characters = {char: i for i, char in enumerate(["<unk>", "<pad>", "<eos>", *"helo wrd\n"])}
    (folder / "vocab.json").write_text(json.dumps(characters))
    engine = Engine.from_pretrained(folder / "him.safetensors", backend="reference", device="cpu", memory_budget="1GiB")
    source, target = folder / "in.json", folder / "out.json"
    samples = [{"prompt": "hello", "id": 1}, {"input": "world", "output": "x", "ids": []}]

    def make(random: Random) -> bytes:
        content = json.dumps(edited(random, samples, ["prompt", "input", "output"], ["hello", "\ud800"])).encode()
        return damaged(random, content) if random.randrange(3) == 0 else content

    def check(content: bytes) -> None:
        source.write_bytes(content)
        count = answer_file(engine, source, target)
        assert len(json.loads(target.read_text())) == count

    return make, check
