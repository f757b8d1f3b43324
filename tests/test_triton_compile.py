"""Triton kernels compile for the cards that are meant, within their shared memory and without spilling registers.

All launches of `triton_launches` are compiled by `make gpu-compile`; here one size of each, for the oldest and the
newest card.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
SOME = ["linear_launches-batch1", "linear_launches-batch32", "linear_transposed_launches-batch1", "slot_launches-small",
        "attention_launches-heads64", "integrator_launches-units64", "elementwise_launches-width768"]


@pytest.mark.parametrize("card", [75, 90])
def test_kernels_compile(card):
    found = subprocess.run([sys.executable, ROOT / "tests" / "compile_triton.py", str(card), *SOME], cwd=ROOT,
                           capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"sm_{card}: " in found.stdout and "0 with faults" in found.stdout
