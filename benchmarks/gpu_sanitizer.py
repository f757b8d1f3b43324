"""compute-sanitizer over the tests of the CUDA code: memcheck for bad accesses, racecheck for races.

python benchmarks/gpu_sanitizer.py [--rows FILE] [--rehearse]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu_report import Row, Rows, check, failure
from record import ROOT

TOOL = "compute-sanitizer"
TESTS = "tests/native/test_cuda_kernels.py"
FOUND = 9  # exit code for what the tool has found
SECONDS = 250.0  # for each of the two
# What pytest is run with: the folder that it starts in holds the sources, which are not what was built.
PYTEST = "import sys, pytest; sys.path[:] = filter(None, sys.path); sys.exit(pytest.main(sys.argv[1:]))"


def sanitize(kind: str, tool: list[str], tests: str) -> Row:
    """Runs the tests under the tool; the row says what it has found."""
    what = f"{TOOL} {kind} over {tests}"
    tests = [sys.executable, "-c", PYTEST, "-q", "-x", "-p", "no:cacheprovider", tests]
    with tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(
                [*tool, *tests], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return failure(what, f"out of time after {SECONDS:.0f} s")
        log.seek(0)
        lines = log.read().splitlines()
    print("\n".join(lines), flush=True)
    said = [line for line in lines if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    ran = next((line for line in reversed(lines) if " passed" in line or " failed" in line or " skipped" in line), "")
    if not said and tool and any("Device not supported" in line for line in lines):
        return Row(what, None, "refuses this machine's device", note="no check was made")
    if not said and tool:
        return failure(what, next((line for line in lines if "Error" in line or "error" in line), f"exit code {code}"))
    return check(what, code == 0, "; ".join([*said[:1], ran.strip("= ")]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="append each row as a line of JSON")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    rows = Rows(given.rows, given.rehearse)
    if given.rehearse:
        rows.add(sanitize("rehearsal", [], "tests/ops/test_ops_signatures.py"))
        return 0
    found = shutil.which(TOOL) or shutil.which(TOOL, path="/usr/local/cuda/bin")
    if found is None:
        rows.add(Row(TOOL, None, "is not installed here", note="no check was made"))
        return 0
    for kind in ("memcheck", "racecheck"):
        with rows.case(f"{TOOL} {kind}"):
            rows.add(sanitize(kind, [found, "--tool", kind, "--error-exitcode", str(FOUND)], TESTS))
    return int(rows.failed)


if __name__ == "__main__":
    sys.exit(main())
