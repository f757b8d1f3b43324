"""The ahead-of-time compilation of triton kernels works; `make gpu-compile` runs it over all launches and cards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


def test_launches_compile_for_a_card(tmp_path):
    found = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "kernels" / "compile_triton.py",
            "86",
            "altup_launches-width256",
            "--jobs",
            "1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout == "sm_86: 6 kernels, 0 with faults\n"
