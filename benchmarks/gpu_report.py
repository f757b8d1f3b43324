"""What `make gpu-check` reports: rows, the targets they are held to, and the two files that keep them.

A row is a rate beside a ceiling that was measured in the same run, or a check. Results are kept by stage, so that
stages can be run in several calls; a stage that is run again replaces its rows. Needs nothing that has to be built.
"""

import json
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from record import rounded


class Target(NamedTuple):
    """A bound of a row's ratio."""

    bound: float
    most: bool = False

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.bound:g}"


GIB = 1 << 30
BUDGET = 4 * GIB
PUBLISHED_TOKENS = 42.0  # a second, of THL-7B on a card of 12 GB, as its authors published
CODE_BYTES = 64 << 20  # of kernels, which the driver loads beside the budget when they are first used
# Ratios: to the ceiling of the same card in the same run, or to what else the row names.
TARGETS = {
    "int8 GEMV": Target(0.80),
    "slots": Target(0.6),
    "slots beside torch": Target(10.0),
    "GQA decode": Target(0.75),
    "pager": Target(0.95),
    "plan": Target(0.7),
    "published figure": Target(1.0),
    "published implementation": Target(20.0),
    "memory": Target(1.0, most=True),
    "flat": Target(1.1, most=True),  # the last quarter's time of a token over the first's
    "agreement": Target(1e-4, most=True),  # of logits, relative to the largest
    "check": Target(1.0),
}


@dataclass(frozen=True)
class Row:
    """One line of the report. `ratio` is measured / ceiling; `met` is None where there is no target."""

    what: str
    measured: float | None
    unit: str
    ceiling: float | None = None
    of: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""

    def cells(self) -> list[str]:
        shown = ["" if value is None else f"{value:.4g}" for value in (self.measured, self.ceiling, self.ratio)]
        met = {None: "", True: "yes", False: "no"}[self.met]
        return [
            self.what,
            f"{shown[0]} {self.unit}".strip(),
            f"{shown[1]} {self.of}".strip(),
            shown[2],
            self.target,
            met,
            self.note,
        ]


def row(
    what: str,
    measured: float,
    unit: str,
    *,
    ceiling: float | None = None,
    of: str = "",
    target: str | None = None,
    note: str = "",
) -> Row:
    """A measured value; `target` is a key of TARGETS, and bounds the ratio, or the value where there is no ceiling."""
    ratio = None if ceiling is None else measured / ceiling
    bound = None if target is None else TARGETS[target]
    value = measured if ratio is None else ratio
    return Row(
        what,
        rounded(measured),
        unit,
        None if ceiling is None else rounded(ceiling),
        of,
        None if ratio is None else rounded(ratio),
        "" if bound is None else str(bound),
        None if bound is None else bound.met(value),
        note,
    )


def check(what: str, passed: bool, note: str = "") -> Row:
    """Something that holds or does not."""
    return Row(what, None, "holds" if passed else "does not hold", met=passed, target="holds", note=note)


def failure(what: str, reason: str) -> Row:
    """Something that could not be measured."""
    return Row(what, None, "failed", met=False, note=reason)


def rehearsed(found: Row) -> Row:
    """The row of a rehearsal, whose figures say nothing: only what fails counts."""
    if found.note.startswith("rehearsal"):
        return found
    timed = found.ratio is not None or found.unit == "times as fast"
    return replace(found, note="; ".join(filter(None, ("rehearsal", found.note))), met=None if timed else found.met)


class Rows:
    """The rows of a stage, appended to a file as they come, so that what was measured outlives the process."""

    def __init__(self, path: Path | None, rehearsal: bool = False) -> None:
        self._path, self._rehearsal = path, rehearsal
        self.failed = False

    def add(self, found: Row) -> None:
        if self._rehearsal:
            found = rehearsed(found)
        print("  ".join(cell for cell in found.cells() if cell), flush=True)
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps(asdict(found)) + "\n")

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """Turns an error into a row that says so; the stage goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            lines = str(error).splitlines() or [""]
            self.add(failure(what, f"{type(error).__name__}: {lines[0][:300]}"))


def read_rows(path: Path) -> list[Row]:
    """Rows that a stage has written; a last line that is cut off is left out."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Results:
    """Results of a card, by stage, in FOLDER/gpu-CARD.json and .md."""

    def __init__(self, folder: Path, card: str, order: list[str]) -> None:
        name = "gpu-" + "-".join("".join(c if c.isalnum() else " " for c in card.lower()).split())
        self.path, self._card, self._order = folder / f"{name}.json", card, order
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.stages = json.loads(self.path.read_text())["stages"]

    def put(self, stage: str, status: str, seconds: float, rows: list[Row], circumstances: Mapping[str, Any]) -> None:
        """Replaces a stage's results and writes both files. `status`: "done", or what went wrong."""
        self.stages[stage] = {
            "status": status,
            "seconds": rounded(seconds),
            **circumstances,
            "rows": [asdict(found) for found in rows],
        }
        _write(self.path, json.dumps({"card": self._card, "stages": self._ordered()}, indent=1) + "\n")
        _write(self.path.with_suffix(".md"), self.table())

    def _ordered(self) -> dict[str, dict[str, Any]]:
        return {name: self.stages[name] for name in self._order if name in self.stages}

    def good(self, stage: str) -> bool:
        """Whether a stage is done and no row of it misses a target."""
        found = self.stages[stage]
        return found["status"] == "done" and all(one["met"] is not False for one in found["rows"])

    def table(self) -> str:
        """All results as Markdown."""
        lines = [
            f"# {self._card}",
            "",
            "Written by `make gpu-check`. Ratios are to ceilings measured in the same run on the same card.",
            "",
            "| stage | state | seconds | date | commit | on |",
            "|---|---|---|---|---|---|",
        ]
        for name, found in self._ordered().items():
            lines.append(
                _line([name, found["status"], f"{found['seconds']:.0f}", found["date"], found["commit"], found["on"]])
            )
        for name, found in self._ordered().items():
            lines += [
                "",
                f"## {name}",
                "",
                "| what | measured | ceiling | ratio | target | met | note |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [_line(Row(**one).cells()) for one in found["rows"]]
        return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)
