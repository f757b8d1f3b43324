"""Damaged files of every kind: an EngineError of one short line, or a model; within ten seconds and little memory.

The cases are the same each time. THL_FUZZ_CASES says how many there are of a kind (2,000 if it is not set; kinds that
start a process for each have a share of that).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz import worker

CASES = int(os.environ.get("THL_FUZZ_CASES", "2000"))


@pytest.fixture(scope="module")
def cases() -> Iterator[Callable[[str], dict]]:
    """Runs the cases of a kind in a process that has nothing of the other tests in it, which forks would inherit."""
    with subprocess.Popen(
        [sys.executable, worker.__file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def run(kind: str) -> dict:
            print(json.dumps([kind, CASES]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.parametrize("kind", worker.KINDS)
def test_damaged(kind, cases):
    found = cases(kind)
    repeat = f"python {Path(worker.__file__).relative_to(Path.cwd())} --case"
    for failure in found["failures"]:
        print(f'{failure["what"]}: {repeat} {failure["number"]} "{kind}"\n{failure["trace"]}')
    assert not found["failures"]
    assert found["ran"] == max(1, CASES // worker.KINDS[kind].share)
