"""Runs damaged files of every kind; a process of its own, which forks one for each stretch of cases.

A case is an EngineError of one short line, or success, within ten seconds and little memory. It is made from a number,
so that `python tests/fuzz/worker.py --case NUMBER KIND` repeats it. A stretch is 2,000 cases, the same each time; one
that crashes or hangs names its case.

    python tests/fuzz/worker.py [--cases N] [--seconds S] [KIND ...]
"""

import argparse
import json
import logging
import mmap
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as the tests have it; here for when it is run by itself

import fuzz.model_files
import fuzz.other_files
import fuzz.text_files
import fuzz.training_files  # noqa: F401  these list their kinds
import torch
from fuzz.kinds import KINDS
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from thl_engine.errors import MESSAGE_LIMIT, EngineError
from thl_engine.memory import peak_bytes, reset_peak, resident_bytes

STRETCH = 2000  # cases
SECONDS, WAITING = 10, 60  # of a processor; in all
MIB = 1 << 20
LIMIT = 64 * MIB  # growth; every file is far smaller, and so is four times its size
ADDRESSES = 8 << 30  # bytes beyond what the process has mapped: a case that asks for more fails there
PANIC = (
    b"panicked at "  # what the tokenizers library says before its panic is an exception: no one can keep it from that
)
DISTINCT = 10  # failures told of a stretch


def checked(check: Callable[[Any], object], case: Any) -> None:
    """Raises what is a failure of the case."""
    reset_peak()
    before = resident_bytes()
    with limited():
        try:
            check(case)
        except EngineError as error:
            assert len(str(error)) <= MESSAGE_LIMIT and str(error).isprintable(), "the message is no short line"
    if os.fstat(2).st_size:
        written = os.pread(2, 1000, 0)
        os.ftruncate(2, 0)
        assert PANIC in written, f"wrote to stderr: {written!r}"
    grown = peak_bytes() - before
    assert grown < LIMIT, f"grew by {grown // MIB} MiB"


class Notes(logging.Handler):
    """What is logged has to be as clean as messages are."""

    def emit(self, record: logging.LogRecord) -> None:
        note = record.getMessage()
        assert len(note) <= 2 * MESSAGE_LIMIT and note.isprintable(), f"logged: {note!r}"


@contextmanager
def limited() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of a processor: others may keep it busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def prepared(kind: str, folder: Path) -> tuple[Callable[[Random], Any], Callable[[Any], object]]:
    """The cases of a kind, in a process that runs nothing else."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("thl_engine").addHandler(Notes())
    return KINDS[kind].prepare(folder)


def run_stretch(kind: str, first: int, count: int, board: mmap.mmap) -> dict[str, Any]:
    """How many cases of a stretch ran, and failures: the number of a case and what happened, one of each sort.

    board: eight bytes that tell the number of the case that runs, eight how many have run.
    """
    failures: dict[str, dict[str, Any]] = {}
    ran = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        make, check = prepared(kind, Path(folder))
        os.dup2(os.open(folder, os.O_RDWR | os.O_TMPFILE), 2)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, resource.RLIM_INFINITY))

        @seed(first)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(st.binary(min_size=8, max_size=8))  # of whole numbers it prefers small ones, which would recur
        def run(drawn: bytes) -> None:
            nonlocal ran
            ran, number = ran + 1, int.from_bytes(drawn, "little")
            board[:16] = drawn + ran.to_bytes(8, "little")
            try:
                checked(check, make(Random(number)))
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {error}"[:300]
                sort = f"{type(error).__name__} {last.filename} {last.lineno}"
                if len(failures) < DISTINCT:
                    failures.setdefault(sort, {"number": number, "what": what, "trace": traceback.format_exc()[-3000:]})

        run()
    return {"ran": ran, "failures": list(failures.values())}


def stretch(kind: str, first: int, count: int) -> dict[str, Any]:
    """`run_stretch` in a child, which may crash or hang."""
    board = mmap.mmap(-1, 16)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with open(writing, "w") as answer:
                json.dump(run_stretch(kind, first, count, board), answer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    content, before, what = b"", b"", ""
    with open(reading, "rb", buffering=0) as answer:
        while True:
            if select.select([answer], [], [], WAITING)[0]:
                got = answer.read(1 << 16)
                content += got
                if not got:
                    break
            elif board[:16] == before:  # it waits, or does not come back to Python, which answers the signal
                what = f"no answer in {WAITING} s"
                os.kill(child, signal.SIGKILL)
            before = board[:16]
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) or not content:
        signalled = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "did not begin"
        number, ran = int.from_bytes(board[:8], "little"), int.from_bytes(board[8:16], "little")
        return {"ran": ran, "failures": [{"number": number, "what": what or signalled, "trace": ""}]}
    return json.loads(content)


def serve() -> None:
    """Answers lines of [kind, cases] on stdin."""
    for line in sys.stdin:
        kind, cases = json.loads(line)
        print(json.dumps(run(kind, cases)), flush=True)


def run(kind: str, cases: int) -> dict[str, Any]:
    """So many cases of a kind: those of its stretches from the first on."""
    found: dict[str, Any] = {"ran": 0, "failures": []}
    cases = max(1, cases // KINDS[kind].share)
    for first in range(-(-cases // STRETCH)):
        one = stretch(kind, first, min(STRETCH, cases - first * STRETCH))
        found = {"ran": found["ran"] + one["ran"], "failures": found["failures"] + one["failures"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--case", type=int, help="the one with this number")
    parser.add_argument("--cases", type=int, default=STRETCH, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="stretch to begin with")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no stretch begins")
    given = parser.parse_args()
    if given.serve:
        serve()
    elif given.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            make, check = prepared(given.kinds[0], Path(folder))
            case = make(Random(given.case))
            print(repr(case)[:2000])
            checked(check, case)
    else:
        _run_all(given.kinds or list(KINDS), given.first, given.cases, given.seconds)


def _run_all(kinds: list[str], first: int, cases: int, seconds: float) -> None:
    started, ran = time.monotonic(), dict.fromkeys(kinds, 0)
    for number in range(first, first + -(-cases // STRETCH)):
        for kind in kinds:
            if time.monotonic() - started > seconds:
                continue
            begun = time.monotonic()
            count = max(1, min(STRETCH, cases - (number - first) * STRETCH) // KINDS[kind].share)
            found = stretch(kind, number, count)
            ran[kind] += found["ran"]
            spent = time.monotonic() - begun
            print(f"{kind}, stretch {number}: {found['ran']} cases in {spent:.1f} s", flush=True)
            for failure in found["failures"]:
                print(f"  FAILED {kind} --case {failure['number']}: {failure['what']}\n{failure['trace']}", flush=True)
    for kind in kinds:
        print(f"{ran[kind]:9} {kind}")
    print(f"{sum(ran.values()):9} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
