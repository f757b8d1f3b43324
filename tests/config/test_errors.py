"""Messages: one printable line, short, whatever they were made from."""

import pytest

from thl_engine.errors import MESSAGE_LIMIT, SAID_LIMIT, SHOWN_LIMIT, CheckpointError, EngineError, said, shown

FOREIGN = [
    "",
    "plain",
    "a\nb\r\nc\td",
    "\x1b[2J\x00\x9b\u202e\ud800\udcff",
    "long " * 1_000_000,
    "x" * 20_000_000,
    10**10_000,
    [10**5000] * 1000,
    {"a": {"b": {"c": {"d": {"e": "f" * 1000}}}}},
    [[]] * 1_000_000,
    b"\x00" * 1000,
    None,
]


class Mute:
    def __repr__(self):
        raise RuntimeError

    __str__ = __repr__


@pytest.mark.parametrize("value", [*FOREIGN, Mute()], ids=range(len(FOREIGN) + 1))
def test_foreign_values(value):
    for text, limit in ((shown(value), SHOWN_LIMIT), (said(value), SAID_LIMIT), (str(EngineError(shown(value))), 300)):
        assert len(text) <= limit and text.isprintable()


@pytest.mark.parametrize("value", [value for value in FOREIGN if isinstance(value, str)], ids=range(6))
def test_messages_of_errors(value):
    error = CheckpointError(f"{value}: damaged; fetch it again")
    assert len(str(error)) <= MESSAGE_LIMIT and str(error).isprintable()
    assert str(error).endswith("; fetch it again") and error.args == (str(error),)


def test_long_paths_are_cut_before_what_would_work():
    path = "/folder" * 30 + "/model.safetensors"
    message = str(CheckpointError(f"{path}: is a torch.save file; convert it: thl convert {path} OUT"))
    assert "is a torch.save file; convert it: thl convert" in message and message.count("/model.safetensors") == 2


def test_names_keep_both_ends():
    assert shown("model.layers.0.weight") == "'model.layers.0.weight'"
    assert shown([2, 3]) == "[2, 3]"
    name = shown("begin" + "x" * 500 + "end")
    assert name.startswith("'begin") and name.endswith("end'") and "..." in name
