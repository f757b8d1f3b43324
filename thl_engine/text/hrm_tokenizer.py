"""The character vocabulary of an HRM checkpoint: reading it, finding a lost one, and saying why one does not fit.

The published trainer numbers characters in order of their first appearance, so a vocabulary of another run gives
fluent-looking nonsense. Its size is the only thing that a checkpoint's tensors tell about it: a vocabulary is taken
only where it has exactly as many ids as the model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from thl_engine.errors import TokenizerError, said, shown
from thl_engine.files import read_text
from thl_engine.text.char_vocabulary import INVERSE_KEYS, entries_key
from thl_engine.text.tokenizer import Tokenizer, load_tokenizer

CONTINUAL_FILE = "continual_tokenizer.json"
INSIDE = "tokenizer_vocab"  # key under which the published trainer puts the vocabulary into its checkpoints
SPECIAL = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")  # ids 0 to 3
TEXT_LIMIT = 500_000  # characters of each training text that the published trainer reads
SHOWN_CANDIDATES = 6  # in messages
_ANY_SIZE = 1 << 31


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as JSON text that `load_tokenizer` reads, its number of ids, and where it was found."""

    text: str
    size: int
    where: str

    def tokenizer(self) -> Tokenizer:
        """Text to ids and back with this vocabulary."""
        return load_tokenizer(self.text, self.size, self.where)


def read_vocabulary(path: Path) -> Vocabulary:
    """A `continual_tokenizer.json`, another character vocabulary, or a Hugging Face `tokenizer.json`.

    Raises TokenizerError where the file is none, or states another number of ids than it has.
    """
    return _vocabulary(read_text(path, TokenizerError), str(path))


def vocabulary_inside(loaded: Any, where: str) -> Vocabulary | None:
    """The vocabulary that a checkpoint carries beside its weights; None where it carries none.

    loaded: what `torch.load(..., weights_only=True)` returned.
    """
    entries = loaded.get(INSIDE) if isinstance(loaded, Mapping) else None
    if entries is None:
        return None
    where = f"{where}: {INSIDE!r}"
    try:
        text = json.dumps(entries)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{where}: not a character vocabulary: {said(error)}") from None
    return _vocabulary(text, where)


def vocabulary_of_texts(texts: Iterable[str]) -> Vocabulary:
    """The vocabulary that the published trainer builds from its training texts, given in the order of training."""
    entries = {name: token for token, name in enumerate(SPECIAL)}
    for char in chain.from_iterable(text[:TEXT_LIMIT] for text in texts):
        entries.setdefault(char, len(entries))
    text = json.dumps({"level": "char", "vocab": entries, "vocab_size": len(entries)})
    return _vocabulary(text, "vocabulary of the training texts")


def extended(vocabulary: str, text: str, where: str) -> tuple[str, int]:
    """A character vocabulary, JSON text, with the characters of `text` that it lacks, and its number of ids then.

    New characters follow the old ids in the order of their first appearance; old ids stay. Raises TokenizerError for
    text that is no character vocabulary.
    """
    size = _vocabulary(vocabulary, where).size
    data = json.loads(vocabulary)
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        raise TokenizerError(f"{where}: the tokenizer is no character vocabulary; only these can be extended by a text")
    key = entries_key(data)
    entries = data if key is None else data[key]
    missing = list(dict.fromkeys(char for char in text if char not in entries))
    if isinstance(entries, list):  # as a map: special tokens beside it may have ids beyond its own
        entries = {char: i for i, char in enumerate(entries)}
    entries |= {char: size + i for i, char in enumerate(missing)}
    if key is None:
        data = entries
    else:
        data[key] = entries
        for inverse in INVERSE_KEYS:  # would be out of date, and says nothing of its own
            data.pop(inverse, None)
        if "vocab_size" in data:
            data["vocab_size"] = size + len(missing)
    return json.dumps(data, ensure_ascii=False), size + len(missing)


def check_fits(vocabulary: Vocabulary, vocab_size: int, checkpoint: str) -> None:
    """Raises TokenizerError, with both sizes and what to do, unless the vocabulary has as many ids as the model."""
    if vocabulary.size == vocab_size:
        return
    reason = f"{vocabulary.where}: the vocabulary has {vocabulary.size} ids, the model in {checkpoint} {vocab_size}"
    if vocabulary.size > vocab_size:
        raise TokenizerError(
            f"{reason}: it belongs to a later or another training run; use the {CONTINUAL_FILE} saved "
            f"with this checkpoint, or grow the model to {vocabulary.size} and train it on"
        )
    raise TokenizerError(
        f"{reason}: ids {vocabulary.size} to {vocab_size - 1} have no text, so it belongs to an "
        f"earlier or another training run; use the {CONTINUAL_FILE} saved with this checkpoint"
    )


def find_vocabulary(vocab_size: int, folder: Path, checkpoint: str, loaded: Any = None) -> Vocabulary | None:
    """The vocabulary of a checkpoint: the one inside it, else `continual_tokenizer.json`, else any that fits.

    vocab_size: rows of the checkpoint's embedding. folder: its JSON files are the candidates. checkpoint: its name,
    for messages. loaded: as for `vocabulary_inside`. None where there is no vocabulary at all. Raises TokenizerError
    that lists what was found where nothing of it, or more than one different vocabulary, fits.
    """
    inside = vocabulary_inside(loaded, checkpoint)
    if inside is not None:
        check_fits(inside, vocab_size, checkpoint)
        return inside
    found = _candidates(folder)
    if not found:
        return None
    named = next((vocabulary for vocabulary in found if Path(vocabulary.where).name == CONTINUAL_FILE), None)
    fitting = [vocabulary for vocabulary in found if vocabulary.size == vocab_size]
    if named in fitting:
        return named
    if len({_meaning(vocabulary) for vocabulary in fitting}) == 1:
        return fitting[0]
    if fitting:
        raise TokenizerError(
            f"{checkpoint}: {len(fitting)} different vocabularies of {vocab_size} ids in {folder}: "
            f"{_listed(fitting)}; rename the one saved with this checkpoint to {CONTINUAL_FILE}"
        )
    if len(found) == 1:
        check_fits(found[0], vocab_size, checkpoint)
    raise TokenizerError(
        f"{checkpoint}: needs a vocabulary of {vocab_size} ids, found {_listed(found)}; put the "
        f"{CONTINUAL_FILE} saved with this checkpoint there"
    )


def _vocabulary(text: str, where: str) -> Vocabulary:
    size = load_tokenizer(text, _ANY_SIZE, where).vocab_size
    stated = json.loads(text)
    stated = stated.get("vocab_size") if isinstance(stated, dict) and "vocab" in stated else None
    if stated is not None and stated != size:
        raise TokenizerError(
            f"{where}: states vocab_size {shown(stated)}, but its ids end at {size - 1}; the file is "
            "damaged or was edited"
        )
    return Vocabulary(text, size, where)


def _candidates(folder: Path) -> list[Vocabulary]:
    """Vocabularies among a folder's JSON files, by name. What is no vocabulary is passed over."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".json" and file.is_file())
    except OSError as error:
        raise TokenizerError(f"{folder}: cannot list the folder: {error.strerror}") from None
    found = []
    for file in files:
        try:
            found.append(read_vocabulary(file))
        except TokenizerError:
            if file.name == CONTINUAL_FILE:
                raise  # this one says that it is the vocabulary: its damage must not pass for its absence
    return found


def _meaning(vocabulary: Vocabulary) -> str:
    """The same for files that differ in spelling only."""
    return json.dumps(json.loads(vocabulary.text), sort_keys=True)


def _listed(found: list[Vocabulary]) -> str:
    names = [f"{shown(Path(v.where).name)} ({v.size} ids)" for v in found[:SHOWN_CANDIDATES]]
    return ", ".join(names) + (f" and {len(found) - len(names)} more" if len(found) > len(names) else "")
