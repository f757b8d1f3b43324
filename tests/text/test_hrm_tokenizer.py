"""HRM's character vocabularies: reading, recovery of a lost one, and messages for one that does not fit."""

import json

import pytest
import torch
from conftest import entries

from thl_engine.errors import TokenizerError
from thl_engine.text.hrm_tokenizer import (
    CONTINUAL_FILE,
    check_fits,
    extended,
    find_vocabulary,
    read_vocabulary,
    vocabulary_inside,
    vocabulary_of_texts,
)
from thl_engine.text.tokenizer import load_tokenizer

TEXTS = ("hello, world", "a new text\n")


def write(path, text: str, **changes) -> int:
    vocab = entries(text)
    path.write_text(json.dumps({"level": "char", "vocab": vocab, "vocab_size": len(vocab), **changes}))
    return len(vocab)


def test_the_published_file_is_read(tmp_path):
    size = write(tmp_path / CONTINUAL_FILE, "hello, world")
    vocabulary = read_vocabulary(tmp_path / CONTINUAL_FILE)
    assert vocabulary.size == size == 13
    tokenizer = vocabulary.tokenizer()
    assert tokenizer.encode("hello") == [4, 5, 6, 6, 7]
    assert tokenizer.encode("hZ") == [4, 1]  # <UNK>
    assert tokenizer.decode([2, 4, 5, 6, 6, 7, 3]) == "hello"
    assert tokenizer.eos_id == 3


def test_the_vocabulary_of_training_texts_is_rebuilt(tmp_path):
    rebuilt = vocabulary_of_texts(TEXTS)
    assert json.loads(rebuilt.text)["vocab"] == entries("".join(TEXTS))
    assert rebuilt.tokenizer().decode(rebuilt.tokenizer().encode("a new world\n")) == "a new world\n"
    assert vocabulary_of_texts(["x" * 600_000 + "y"]).size == 5  # the trainer reads 500,000 characters


def test_a_vocabulary_inside_the_checkpoint_comes_first(tmp_path):
    write(tmp_path / CONTINUAL_FILE, "abc")
    file = tmp_path / "hrm_latest.pt"
    torch.save({"model_state_dict": {}, "tokenizer_vocab": entries("xyz")}, file)
    loaded = torch.load(file, weights_only=True)
    found = find_vocabulary(7, tmp_path, str(file), loaded)
    assert found.tokenizer().encode("xyz") == [4, 5, 6]
    assert vocabulary_inside({"model_state_dict": {}}, "f") is None
    assert vocabulary_inside(torch.zeros(2), "f") is None
    with pytest.raises(TokenizerError, match="'tokenizer_vocab'.*not a character vocabulary"):
        vocabulary_inside({"tokenizer_vocab": {"a": torch.zeros(1)}}, "f.pt")


def test_the_candidate_that_fits_is_found(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hrm", "vocab_size": 9}')
    (tmp_path / "notes.json").write_text("no JSON at all")
    write(tmp_path / "old.json", "abc")
    write(tmp_path / "run2.json", "abcde")
    assert find_vocabulary(9, tmp_path, "model").where.endswith("run2.json")
    write(tmp_path / "copy.json", "abcde")
    assert find_vocabulary(9, tmp_path, "model").size == 9  # two copies of one vocabulary are one
    write(tmp_path / "other.json", "edcba")
    with pytest.raises(TokenizerError, match="3 different vocabularies of 9 ids.*'copy.json' .9 ids.*rename"):
        find_vocabulary(9, tmp_path, "model")
    write(tmp_path / CONTINUAL_FILE, "abcde")
    assert find_vocabulary(9, tmp_path, "model").where.endswith(CONTINUAL_FILE)


def test_a_mismatch_is_explained_in_one_line(tmp_path):
    assert find_vocabulary(9, tmp_path, "m.pt") is None
    write(tmp_path / CONTINUAL_FILE, "abc")
    with pytest.raises(TokenizerError, match="has 7 ids, the model in m.pt 9: ids 7 to 8 have no text") as caught:
        find_vocabulary(9, tmp_path, "m.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenizerError, match="has 7 ids, the model in m.pt 6: .* grow the model to 7"):
        find_vocabulary(6, tmp_path, "m.pt")
    write(tmp_path / "b.json", "abcd")
    with pytest.raises(TokenizerError, match="found 'b.json' .8 ids., 'continual_tokenizer.json' .7 ids."):
        find_vocabulary(9, tmp_path, "m.pt")
    check_fits(read_vocabulary(tmp_path / "b.json"), 8, "m.pt")
    with pytest.raises(TokenizerError, match="cannot list"):
        find_vocabulary(9, tmp_path / "absent", "m.pt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 9}, "states vocab_size 9, but its ids end at 6"),
        ({"level": "word"}, "level is 'word'"),
        ({"vocab": {"a": 0, "b": 0}}, "belongs to both"),
        ({"vocab": {"ab": 0}}, "single characters"),
        ({"vocab": []}, "empty"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, changes, message):
    write(tmp_path / CONTINUAL_FILE, "abc", **changes)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_vocabulary(tmp_path / CONTINUAL_FILE)
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenizerError, match=message):
        find_vocabulary(7, tmp_path, "m.pt")


def test_a_list_with_special_tokens_beyond_it_grows_behind_them():
    text, size = extended('{"char_to_id": ["a"], "special_tokens": {"<x>": 3}, "unk_id": 2}', "bac", "here")
    grown = load_tokenizer(text, size, "there")
    assert size == 6 and grown.encode("abc") == [0, 4, 5] and grown.decode([0, 3, 4, 5]) == "abc"
