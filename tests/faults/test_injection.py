"""The tests of injected.py, in a process whose reads and writes fail as a library that is preloaded says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something else is preloaded")
def test_with_faults_injected(tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    build = ["cc", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl", "-lpthread"]
    subprocess.run(build, check=True, timeout=60)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--basetemp", tmp_path / "inside"]
    found = subprocess.run(
        [*command, "--benchmark-disable", "--durations=5", HERE / "injected.py"],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=500,
    )
    print(found.stdout[-20_000:])
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
