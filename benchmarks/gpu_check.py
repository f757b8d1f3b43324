"""Builds, tests and measures everything on this machine's GPU: `make gpu-check`, or

    python benchmarks/gpu_check.py [STAGE ...] [--seconds 570] [--out FOLDER] [--rehearse]

Stages: build, tests, sanitizer, tune, kernels, pager, engine-thl, engine-inl, engine-gemma, engine-gemma4,
engine-hrm-text, reference. Without names those are run that have no finished result of these sources on this card;
`all` runs every one. Each has a time limit, and a call ends within --seconds: stages that do not fit are left for the
next call. What a stage measured is merged
into benchmarks/results/gpu-CARD.json and .md at once; a stage that fails or runs out of time is a row there, and the
others go on. Exit code 0: all that was asked for is there and no target is missed; else 1.

The package is built into build/gpu-check/site and used from there, offline and beside whatever is installed; logs lie
in build/gpu-check. Checkpoints of 7 GB each are kept in $THL_SCRATCH, or else written to a temporary folder. The commit
is git's, or $THL_COMMIT where there is no repository. `--rehearse` runs all stages at tiny sizes on the CPU under
triton's interpreter, marked as such, and keeps results in build/gpu-rehearsal.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from gpu_report import Results, Row, check, failure, read_rows, rehearsed, row
from gpu_sanitizer import PYTEST
from record import ROOT, commit

BENCHMARKS, BUILD = ROOT / "benchmarks", ROOT / "build"
SOURCES = ["csrc", "kernels", "thl_engine", "tests", "benchmarks", "setup.py", "pyproject.toml"]
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".inc", ".toml"}
TABLES = ROOT / "kernels" / "tuned"
CALL_SECONDS = 570.0
ABOUT = """
import json, torch
from importlib.util import find_spec
found = {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__,
         "CUDA": torch.version.cuda, "triton": None}
if find_spec("triton"):
    import triton
    found["triton"] = triton.__version__
print(json.dumps(found))
"""

REHEARSED_TUNING = """
import sys; sys.path.append(sys.argv[1])
from pathlib import Path; import tune_kernels
tune_kernels.tune(Path(sys.argv[2]), "cpu", [(24, 136)], (1,))
"""


class Stage(NamedTuple):
    """A stage's time limit, and the least that it is begun with, in seconds."""

    limit: float
    least: float


STAGES = {
    "build": Stage(300, 60),
    "tests": Stage(540, 200),
    "sanitizer": Stage(540, 120),
    "tune": Stage(400, 60),
    "kernels": Stage(400, 90),
    "pager": Stage(200, 60),
    "engine-thl": Stage(540, 150),
    "engine-inl": Stage(540, 150),
    "engine-gemma": Stage(540, 150),
    "engine-gemma4": Stage(540, 150),
    "engine-hrm-text": Stage(540, 150),
    "reference": Stage(300, 60),
}
MODELS = {
    "engine-thl": "thl-7b",
    "engine-inl": "inl-5b",
    "engine-gemma": "gemma-e4b",
    "engine-gemma4": "gemma4-e4b",
    "engine-hrm-text": "hrm-text-1b",
}


class Check:
    """What the stages of a call share."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.rehearse, self.scratch = given.rehearse, scratch
        self.work = BUILD / ("gpu-rehearsal" if given.rehearse else "gpu-check")
        self.folder = given.out or (self.work if given.rehearse else BENCHMARKS / "results")
        self.work.mkdir(parents=True, exist_ok=True)
        self._ends = time.monotonic() + given.seconds

    def left(self) -> float:
        """Seconds of the call that are left."""
        return self._ends - time.monotonic()

    def run(self, stage: str, seconds: float) -> tuple[str, list[Row]]:
        """Runs a stage; "done" or what went wrong, and its rows."""
        rows, log, report = (self.work / f"{stage}.{suffix}" for suffix in ("rows", "log", "xml"))
        for stale in (rows, report):
            stale.unlink(missing_ok=True)
        with open(log, "w") as file:
            state = self._process(self._command(stage, rows, report), stage, file, seconds)
        found = read_rows(rows)
        if stage == "tests":
            found += test_rows(report)
        if stage == "build" and state == "done":
            found += self._built()
        if stage == "tune" and state == "done":
            found += self._tuned()
        if state != "done":
            lines = log.read_text(errors="replace").splitlines()
            found.append(failure(stage, f"{state}; {lines[-1][:200] if lines else 'it printed nothing'}"))
            print("".join(f"    {line}\n" for line in lines[-20:]), end="")
        return state, [rehearsed(one) for one in found] if self.rehearse else found

    def _process(self, command: list[str], stage: str, log, seconds: float) -> str:
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"out of time after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return "done" if code == 0 else f"failed with exit code {code}"

    def _environment(self, stage: str) -> dict[str, str]:
        """What was built comes before what is installed."""
        out = {**os.environ, "PYTHONPATH": str(ROOT if self.rehearse else self.work / "site"), "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            out["TRITON_INTERPRET"] = "1"
        if stage == "tests" and not self.rehearse:
            out["PYTHONSAFEPATH"] = "1"  # else what tests start would find the sources first, which are not built
        return out

    def _command(self, stage: str, rows: Path, report: Path) -> list[str]:
        tiny = ["--rehearse"] if self.rehearse else []
        if stage == "build":
            where = ["--dry-run"] if self.rehearse else ["--upgrade", "--target", str(self.work / "site")]
            return [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--no-index",
                "--no-build-isolation",
                "--no-deps",
                *where,
                ".",
            ]
        if stage == "tests":
            chosen = (
                ["tests/kernels/test_triton_elementwise.py"]
                if self.rehearse
                else [
                    "tests",
                    "--ignore=tests/kernels/test_triton_compile.py",
                    "--ignore=tests/benchmarks/test_gpu_check.py",
                    *workers(),
                ]
            )
            return [
                sys.executable,
                "-c",
                PYTEST,
                "-q",
                "-rs",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                *chosen,
            ]
        if stage == "tune" and self.rehearse:
            return [sys.executable, "-c", REHEARSED_TUNING, str(BENCHMARKS), str(self.work)]
        if stage == "tune":
            return [sys.executable, str(BENCHMARKS / "tune_kernels.py"), "--out", str(TABLES)]
        script = {"sanitizer": "gpu_sanitizer", "kernels": "gpu_kernels"}.get(stage, "gpu_engine")
        arguments = [MODELS.get(stage, stage), "--scratch", str(self.scratch)] if script == "gpu_engine" else []
        return [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments, "--rows", str(rows), *tiny]

    def _built(self) -> list[Row]:
        """Which extensions the build has brought, and the mark by which later calls know it."""
        program = (
            "from thl_engine.ops import native; from thl_engine.device import cuda\n"
            "print(native.isa() if native.available() else native.reason())\nprint(cuda.reason() or 'built')"
        )
        found = subprocess.run(
            [sys.executable, "-c", program],
            cwd=self.work,
            env=self._environment("build"),
            capture_output=True,
            text=True,
        )
        if found.returncode:
            return [failure("import of what was built", (found.stderr.splitlines() or ["no message"])[-1])]
        (self.work / "built").write_text(digest())
        host, device = found.stdout.splitlines()
        return [
            check("thl_engine._native", not host.startswith("the "), host),
            check("thl_engine._cuda", device == "built" or self.rehearse, device),
        ]

    def _tuned(self) -> list[Row]:
        """The table that was written, which what was built is to use from now on."""
        tables = list((self.work if self.rehearse else TABLES).glob("*.json"))
        newest = max(tables, key=lambda path: path.stat().st_mtime)
        choices = json.loads(newest.read_text())["gemv_int8"]
        if not self.rehearse:
            shutil.copy(newest, self.work / "site" / "thl_engine" / "kernels" / "tuned")
        return [
            row(
                "int8 GEMV: sizes at which the CUDA twin is the fastest",
                sum(c["use"] == "cuda" for c in choices),
                f"of {len(choices)}",
                note=newest.name,
            )
        ]

    def built(self) -> bool:
        """Whether a build of these very sources is there."""
        mark = self.work / "built"
        return mark.exists() and mark.read_text() == digest()


def digest() -> str:
    """Of all sources, so that a result is known to be theirs; not of the tables, which a stage writes."""
    total = hashlib.sha256()
    for top in SOURCES:
        files = [ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*"))
        for file in files:
            written = BENCHMARKS / "results" in file.parents or file.parent == TABLES and file.suffix == ".json"
            if file.is_file() and file.suffix in SUFFIXES and not written:
                total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:12]


def workers() -> list[str]:
    """Tests side by side, where pytest can: compiling kernels is most of their time."""
    return ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []


def test_rows(report: Path) -> list[Row]:
    """What pytest's report says: one row, and one for each test that failed."""
    if not report.exists():
        return [failure("tests", "no report was written")]
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    out = [check(f"{len(cases) - len(failed) - skipped} tests", not failed, f"{skipped} skipped, {len(failed)} failed")]
    for case in failed[:50]:
        element = next(case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None)
        reason = (element.get("message") or "").splitlines() or [""]
        out.append(failure(f"{case.get('classname')}::{case.get('name')}", reason[0][:200]))
    return out


def about(rehearse: bool) -> dict[str, str | None]:
    """Card, driver and versions; card None where there is no usable GPU."""
    found = subprocess.run([sys.executable, "-c", ABOUT], capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.splitlines() or ["no message"])[-1]
        sys.exit(f"gpu-check: torch cannot be used with {sys.executable}: {reason}")
    out = json.loads(found.stdout.splitlines()[-1])
    driver = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        if shutil.which("nvidia-smi")
        else ""
    )
    out["driver"] = driver or None
    return {**out, "card": "rehearsal"} if rehearse else out


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Where checkpoints lie: for good where $THL_SCRATCH names a folder. /tmp may be memory; /var/tmp is not."""
    if "THL_SCRATCH" in os.environ:
        yield Path(os.environ["THL_SCRATCH"])
        return
    disk = Path("/var/tmp")
    with tempfile.TemporaryDirectory(prefix="gpu-check", dir=disk if disk.is_dir() else None) as folder:
        yield Path(folder)


def run_stages(call: Check, results: Results, names: list[str], circumstances: dict) -> list[str]:
    """Runs stages in their order; the names of those for which no time was left."""
    for number, name in enumerate(names):
        limit = min(STAGES[name].limit, call.left())
        if limit < STAGES[name].least:
            return names[number:]
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        state, rows = call.run(name, limit)
        results.put(name, state, time.monotonic() - started, rows, circumstances)
        for found in rows:
            print("  ".join(cell for cell in found.cells() if cell))
        print(f"== {name}: {state}, {time.monotonic() - started:.0f} s", flush=True)
        if name == "build" and state != "done":
            print("gpu-check: without a build nothing else can be run")
            return names[number + 1 :]
    return []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", choices=[*STAGES, "all", []])
    parser.add_argument("--seconds", type=float, default=CALL_SECONDS, help="of the whole call (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--rehearse", action="store_true", help="all stages, tiny, on the CPU")
    given = parser.parse_args(argv)

    found = about(given.rehearse)
    if found["card"] is None:
        print(
            f"gpu-check: torch {found['torch']} finds no CUDA device on this machine; nothing was run, nothing written",
            file=sys.stderr,
        )
        return 1
    with scratch_folder() as scratch:
        call = Check(given, scratch)
        results = Results(call.folder, found["card"], [*STAGES])
        sources = digest()
        wanted = [
            name
            for name in STAGES
            if "all" in given.stages
            or name in given.stages
            or not given.stages
            and (results.stages.get(name, {}).get("sources") != sources or results.stages[name]["status"] != "done")
        ]
        if wanted and "build" not in wanted and not given.rehearse and not call.built():
            wanted.insert(0, "build")
        versions = ", ".join(f"{name} {found[name]}" for name in ("driver", "torch", "triton", "CUDA"))
        circumstances = {
            "date": date.today().isoformat(),
            "commit": commit() or os.environ.get("THL_COMMIT", "unknown"),
            "sources": sources,
            "on": f"{found['card']}, {versions}",
        }
        print(f"gpu-check: {circumstances['on']}; commit {circumstances['commit']}", flush=True)
        left = run_stages(call, results, wanted, circumstances)
    good = not left and all(results.good(name) for name in wanted)
    print(f"results: {results.path.with_suffix('.md')}")
    if left:
        print(f"no time was left for: {' '.join(left)}; run it again")
    if not good:
        print("gpu-check: not all is well; the rows that say no or failed are in the results")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
