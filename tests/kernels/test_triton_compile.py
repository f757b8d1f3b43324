"""Triton kernels compile for the cards that are meant, within their shared memory and without spilling registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
CARDS = [75, 80, 86, 89, 90]


def test_all_launches_compile():
    """Some four minutes a card on one processor, unless triton's cache has the kernels; each launch for one of 86 and
    89, which `make gpu-compile` does not spare."""
    found = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "kernels" / "compile_triton.py",
            ",".join(map(str, CARDS)),
            "--share",
            "--jobs",
            "2",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(f"sm_{card}: " in found.stdout for card in CARDS)
