"""Choices for a card: which implementation of an operation is the fastest, and how it is launched.

A table is a JSON file beside this one, named after its card (`file_name`):

    {"card": "NVIDIA H200", "measured": "2026-11-22, torch 2.11.0, triton 3.6.0",
     "gemv_int8": [{"batch": 1, "rows": 4096, "columns": 4096, "use": "cuda", "launch": [4, 4]},
                   {"batch": 8, "rows": 4096, "columns": 4096, "use": "triton", "launch": []}]}

`rows` and `columns` are those of the whole matrix, so that a choice, and with it the result's last bits, does not
depend on how the matrix is cut. `benchmarks/tune_kernels.py` writes tables; no engine does. Without a table, or where
nothing near was measured, a rule decides that nobody has measured (`presumed_gemv_int8`).
"""

import json
import re
from collections.abc import Callable
from functools import cache
from math import log2
from pathlib import Path
from typing import NamedTuple

import torch

# operation -> implementation -> what `launch` is made of, with the values that each may have; none: its own choice
FORMS: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "gemv_int8": {"cuda": {"rows": (2, 4), "split": (1, 2, 4, 8)}, "triton": {}}
}
NEAR = 1.0  # octaves that each of rows and columns may lie from what was measured

# Of the CUDA kernel (csrc/cuda/gemv_int8.cu), for the rule where nothing was measured.
WARPS, WARP_ROWS = 8, 4  # of a block; rows of the matrix that a warp reads at a time
UNIT, CHUNK = 16, 512  # columns that a lane and a warp read at once
FILLING = 264  # blocks: two on each of 132 multiprocessors, as an H100 or H200 has; most other cards have fewer


class Choice(NamedTuple):
    """The fastest form for one size: `batch` rows of activations at most, a matrix [rows, columns]."""

    batch: int
    rows: int
    columns: int
    use: str  # an implementation of FORMS
    launch: tuple[int, ...]


Table = dict[str, tuple[Choice, ...]]


@cache
def find(operation: str, batch: int, rows: int, columns: int, device: torch.device) -> Choice | None:
    """The choice measured nearest to a size on the card that `device` is, or presumed where none near was measured.

    None where there is nothing to compute or no card. Raises ValueError where the card's table is not one.
    """
    if not rows * columns * batch or device.type != "cuda":
        return None
    measured = nearest(_of(device.index or 0).get(operation, ()), batch, rows, columns)
    return measured or PRESUMED[operation](batch, rows, columns)


def presumed_gemv_int8(batch: int, rows: int, columns: int) -> Choice:
    """The form that should be the fastest, by reasoning alone: no card has been timed. A table overrules it.

    Reading the weights is all that should take time, so what counts is how many of them are under way. The CUDA kernel
    asks for a warp's next 4 x 512 bytes before it multiplies the last ones; triton's leaves such overlap to the number
    of programs. With one row of activations there are registers for that. Three conditions keep the warps busy:
    rows begin at multiples of 16 bytes, or they would be read byte by byte; each warp has a whole chunk of columns at
    least; the blocks fill a card, for which up to 8 warps share the columns of a row. All else is left to triton's
    kernel, whose tiles follow the size.
    """
    for split in FORMS["gemv_int8"]["cuda"]["split"] if batch == 1 and columns % UNIT == 0 else ():
        if columns >= CHUNK * split and rows >= FILLING * WARPS // split * WARP_ROWS:
            return Choice(batch, rows, columns, "cuda", (WARP_ROWS, split))
    return Choice(batch, rows, columns, "triton", ())


PRESUMED: dict[str, Callable[[int, int, int], Choice]] = {"gemv_int8": presumed_gemv_int8}


def nearest(choices: tuple[Choice, ...], batch: int, rows: int, columns: int) -> Choice | None:
    """Of the choices for the least batch that is enough, the one nearest in size, within NEAR octaves."""
    enough = min((choice.batch for choice in choices if choice.batch >= batch), default=None)
    found = [
        (max(far), sum(far), choice)
        for choice in choices
        if choice.batch == enough
        for far in [(abs(log2(choice.rows / rows)), abs(log2(choice.columns / columns)))]
        if max(far) <= NEAR
    ]
    return min(found)[2] if found else None


@cache
def _of(device: int) -> Table:
    card = torch.cuda.get_device_name(device)
    file = Path(__file__).parent / file_name(card)
    return parse(file.read_text(), file.name, card) if file.exists() else {}


def file_name(card: str) -> str:
    """Of a card's table: "NVIDIA H100 80GB HBM3" has nvidia-h100-80gb-hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json"


def parse(text: str, file: str, card: str) -> Table:
    """Operation -> choices of a table. Raises ValueError with file, place, what was expected and what was found."""

    def bad(place: str, expected: str, found: object) -> ValueError:
        return ValueError(f"{file}: {place}: expected {expected}, found {found!r}")

    def choice(place: str, entry: object, forms: dict[str, dict[str, tuple[int, ...]]]) -> Choice:
        if not isinstance(entry, dict) or set(entry) != set(Choice._fields):
            raise bad(place, f"an object with {', '.join(Choice._fields)}", entry)
        for name in ("batch", "rows", "columns"):
            if type(entry[name]) is not int or entry[name] < 1:
                raise bad(f"{place}.{name}", "a positive integer", entry[name])
        if entry["use"] not in forms:
            raise bad(f"{place}.use", " or ".join(forms), entry["use"])
        parameters, launch = forms[entry["use"]], entry["launch"]
        if not isinstance(launch, list) or len(launch) != len(parameters):
            raise bad(f"{place}.launch", f"a list of {len(parameters)} numbers", launch)
        for (name, allowed), value in zip(parameters.items(), launch, strict=True):
            if type(value) is not int or value not in allowed:
                raise bad(f"{place}.launch: {name}", f"one of {', '.join(map(str, allowed))}", value)
        return Choice(**{**entry, "launch": tuple(launch)})

    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    if not isinstance(table, dict) or not set(table) <= {"card", "measured", *FORMS}:
        raise bad("table", f"an object with card, measured, {', '.join(FORMS)}", table)
    if table.get("card") != card:
        raise bad("card", repr(card), table.get("card"))
    for name in FORMS:
        if not isinstance(table.get(name, []), list):
            raise bad(name, "a list", table[name])
    return {
        name: tuple(choice(f"{name}[{i}]", entry, forms) for i, entry in enumerate(table.get(name, [])))
        for name, forms in FORMS.items()
    }


def to_text(card: str, measured: str, table: Table) -> str:
    """A table as it is stored, a choice a line."""
    parts = [f'"card": {json.dumps(card)}', f'"measured": {json.dumps(measured)}']
    for name, choices in table.items():
        lines = ",\n".join(f"  {json.dumps({**entry._asdict(), 'launch': list(entry.launch)})}" for entry in choices)
        parts.append(f'"{name}": [\n{lines}\n ]')
    return "{" + ",\n ".join(parts) + "}\n"
