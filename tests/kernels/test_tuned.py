"""Tables of measured choices: strict to read, and what is found in them."""

import json
from pathlib import Path

import pytest
import torch

from thl_engine.kernels import tuned
from thl_engine.kernels.tuned import Choice

CARD = "NVIDIA H100 80GB HBM3"
CHOICES = (
    Choice(1, 4096, 4096, "cuda", (4, 4)),
    Choice(1, 16384, 4096, "triton", ()),
    Choice(4, 4096, 4096, "triton", ()),
    Choice(4, 1000, 4096, "cuda", (2, 8)),
)


def table(**changed: object) -> str:
    entry = {"batch": 1, "rows": 64, "columns": 64, "use": "cuda", "launch": [2, 8], **changed}
    return json.dumps({"card": CARD, "measured": "today", "gemv_int8": [entry]})


def test_what_is_written_is_read():
    text = tuned.to_text(CARD, "today", {"gemv_int8": CHOICES})
    assert tuned.parse(text, "a.json", CARD) == {"gemv_int8": CHOICES}
    assert tuned.parse(tuned.to_text(CARD, "today", {}), "a.json", CARD) == {"gemv_int8": ()}


@pytest.mark.parametrize(
    "batch, rows, columns, expected",
    [
        (1, 4096, 4096, 0),
        (1, 7000, 3000, 0),
        (1, 9000, 4096, 1),
        (2, 4096, 4096, 2),
        (3, 1500, 4096, 3),
        (1, 4096, 8193, None),
        (5, 4096, 4096, None),
        (1, 1000, 4096, None),
    ],
)
def test_the_nearest_choice(batch, rows, columns, expected):
    assert tuned.nearest(CHOICES, batch, rows, columns) == (None if expected is None else CHOICES[expected])


def test_nothing_is_chosen_where_there_is_no_card_or_nothing_to_compute():
    assert tuned.find("gemv_int8", 1, 16384, 4096, torch.device("cpu")) is None
    for batch, rows, columns in ((0, 64, 64), (1, 0, 64), (1, 64, 0)):
        assert tuned.find("gemv_int8", batch, rows, columns, torch.device("cuda", 0)) is None


@pytest.mark.parametrize(
    "batch, rows, columns, expected",
    [
        (1, 8448, 512, ("cuda", (4, 1))),
        (1, 65536, 4096, ("cuda", (4, 1))),
        (1, 8447, 1024, ("cuda", (4, 2))),  # two warps a row fill the card
        (1, 4096, 4096, ("cuda", (4, 4))),
        (1, 1056, 4096, ("cuda", (4, 8))),
        (1, 1055, 4096, ("triton", ())),  # the card is not filled
        (1, 4096, 1024, ("triton", ())),  # nor here, with as many warps a row as have a chunk each
        (1, 8448, 496, ("triton", ())),  # no whole chunk
        (1, 65536, 4100, ("triton", ())),  # rows do not begin at multiples of 16 bytes
        (2, 65536, 4096, ("triton", ())),
    ],
)
def test_what_is_presumed_without_a_table(monkeypatch, batch, rows, columns, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card without a table")
    monkeypatch.setattr(tuned, "_of", tuned._of.__wrapped__)
    found = tuned.find.__wrapped__("gemv_int8", batch, rows, columns, torch.device("cuda", 0))
    assert found == (batch, rows, columns, *expected)


def test_the_rule_knows_the_kernels_sizes():
    source = (Path(__file__).parents[2] / "csrc" / "cuda" / "gemv_int8.cu").read_text()
    assert f"kWarps = {tuned.WARPS}," in source and f"kUnit = {tuned.UNIT};" in source
    assert f"kLanes = {tuned.CHUNK // tuned.UNIT}," in source and "kChunk = kLanes * kUnit;" in source


def test_a_card_finds_its_table(monkeypatch, tmp_path):
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(tuned.to_text(CARD, "today", {"gemv_int8": CHOICES}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(tuned, "_of", tuned._of.__wrapped__)
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "__init__.py"))
    assert tuned.find.__wrapped__("gemv_int8", 1, 4096, 5000, torch.device("cuda")) == CHOICES[0]
    assert tuned.find.__wrapped__("gemv_int8", 1, 16384, 4096, torch.device("cuda")).use == "triton"  # as measured
    assert tuned.find.__wrapped__("gemv_int8", 1, 65536, 4096, torch.device("cuda")).use == "cuda"  # nothing near


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "a.json: expected JSON"),
        ("[]", r"a.json: table: expected an object with card, measured, gemv_int8, found \[\]"),
        (json.dumps({"card": CARD, "gemm": []}), "a.json: table: expected an object with card, measured, gemv_int8"),
        (json.dumps({"card": "another"}), "a.json: card: expected 'NVIDIA H100 80GB HBM3', found 'another'"),
        (json.dumps({"card": CARD, "gemv_int8": {}}), "a.json: gemv_int8: expected a list"),
        (table(more=1), r"gemv_int8\[0\]: expected an object with batch, rows, columns, use, launch"),
        (table(rows=0), r"gemv_int8\[0\].rows: expected a positive integer, found 0"),
        (table(batch=True), r"gemv_int8\[0\].batch: expected a positive integer, found True"),
        (table(use="torch"), r"gemv_int8\[0\].use: expected cuda or triton, found 'torch'"),
        (table(launch=[4]), r"gemv_int8\[0\].launch: expected a list of 2 numbers, found \[4\]"),
        (table(launch=[4, 3]), r"gemv_int8\[0\].launch: split: expected one of 1, 2, 4, 8, found 3"),
    ],
)
def test_a_table_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tuned.parse(text, "a.json", CARD)


def test_stored_tables_are_tables():
    for file in (tuned.Path(tuned.__file__).parent).glob("*.json"):
        card = json.loads(file.read_text())["card"]
        assert tuned.file_name(card) == file.name
        tuned.parse(file.read_text(), file.name, card)
