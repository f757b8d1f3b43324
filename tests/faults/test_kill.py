"""Writers that are killed at any moment: the last good file opens, and nothing half-written has its name.

THL_KILLS says how often each is killed (12 if it is not set), THL_KILL_SEED when (0).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = os.environ.get("THL_KILLS", "12")
SEED = os.environ.get("THL_KILL_SEED", "0")


@pytest.mark.parametrize("what", ["quantize", "train"])
def test_killed_at_any_moment(what: str, tmp_path: Path) -> None:
    command = [sys.executable, HERE / "killed.py", what, tmp_path, KILLS, SEED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    print(found.stdout)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
