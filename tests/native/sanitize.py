"""Everything native under the sanitizers of gcc: what `make sanitize` does.

    python tests/native/sanitize.py [programs] [extension] [-- pytest's arguments]

programs: C++ that drives thread pool, reader and copy engine at random, for races (ThreadSanitizer), bad accesses,
undefined behaviour and leaks. extension: the tests that call the C++ extension, with one built for AddressSanitizer
(leaks included) and UndefinedBehaviorSanitizer, in build/address; the tests of the kernels once more for AVX2. Without
names both. What is undefined or out of bounds ends the process that did it.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
LIBRARY = BUILD / "address" / "lib"
MODEL = ROOT / "examples" / "shakespeare.safetensors"
MEMORY = "address,undefined"
IO = sorted(str(path) for path in (ROOT / "csrc" / "io").glob("*.cpp"))
CPU = sorted(str(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
# Of each: the sources, the sanitizers, the arguments before the seed. Memory of the kernels is the tests' matter.
PROGRAMS: dict[str, tuple[list[str], tuple[str, ...], list[str]]] = {
    "pool_stress": ([*CPU, str(ROOT / "csrc/io/arena.cpp")], ("thread",), []),
    "reader_stress": (IO, ("thread", MEMORY), [str(MODEL)]),
    "copy_engine_stress": ([*IO, str(ROOT / "tests/native/host_copy_device.cpp")], ("thread", MEMORY), [str(MODEL)]),
}
SEEDS = range(1, 9)
LEFT_OUT = (
    # These compile and look at code, but run none of the extension's, and would take minutes.
    "tests/native/test_symbols.py",
    "tests/native/test_cuda_compile.py",
    "tests/ops/test_triton_ops.py",
    "tests/ops/test_triton_models.py",
    # It forks while threads allocate. gcc 12's sanitizer does not see its own allocator's locks through that.
    "tests/engine/test_forks.py::test_children_end_whatever_the_engine_is_doing",
)
# Tests; the instruction set, where the tests themselves do not try all and it is not to be the best; whether leaks are
# looked for at the end, which takes longer than the tests where these have held whole models.
RUNS: tuple[tuple[list[str], str | None, bool], ...] = (
    (["tests/native", "tests/ops", "tests/paging"], None, True),
    (["tests/models", "tests/engine"], None, False),
    (["tests/models", "tests/engine/test_streaming.py"], "avx2", False),
)


def programs() -> None:
    folder = BUILD / "stress"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (sources, kinds, arguments) in PROGRAMS.items():
        for kind in kinds:
            made = folder / f"{name}-{kind}"
            options = ["-std=c++20", "-O1", "-g", "-pthread", "-Wno-psabi", "-ffp-contract=off", f"-fsanitize={kind}"]
            includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/native'}"]
            source = ROOT / "tests" / "native" / f"{name}.cpp"
            command = ["g++", *options, "-fno-sanitize-recover=all", *includes, source, *sources, "-ldl", "-o", made]
            subprocess.run(command, check=True)
            for seed in SEEDS:
                subprocess.run([made, *arguments, str(seed)], check=True, stdout=subprocess.DEVNULL)
            print(f"{name}, {kind}: {len(SEEDS)} seeds without a find", flush=True)


def build() -> None:
    """The extension for the sanitizers, in a copy of the package as it is in the working tree."""
    flags = f"-g -fno-omit-frame-pointer -fsanitize={MEMORY} -fno-sanitize-recover=undefined"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", LIBRARY.parent / "temp"]
    command += ["--build-lib", LIBRARY]
    # Which variable holds the options of C++ depends on the version of setuptools.
    given = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": f"-fsanitize={MEMORY}", "THL_CUDA_ARCH": "80"}
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **given})
    package = LIBRARY / "thl_engine"
    made = next(package.glob("_native.*.so")).read_bytes()
    if not (b"__asan_report_load" in made and b"__ubsan_handle" in made):
        sys.exit("the extension was compiled without the sanitizers' checks")
    aside = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "thl_engine", package, ignore=aside, dirs_exist_ok=True)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=aside, dirs_exist_ok=True)


def environment(reports: Path, leaks: bool) -> dict[str, str]:
    """In which Python runs the extension so built, and writes what is found to files that begin with `reports`."""

    def library(name: str) -> str:
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    return {
        **os.environ,
        # The second for the sanitizer to find the throwing of exceptions before torch brings it.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": f"abort_on_error=1:detect_stack_use_after_return=1:log_path={reports}"
        f":detect_leaks={int(leaks)}:malloc_context_size=30",
        "LSAN_OPTIONS": "exitcode=0",  # Python itself leaves memory behind; `leaks` tells which is ours
        "UBSAN_OPTIONS": f"print_stacktrace=1:abort_on_error=1:log_path={reports}",
        "PYTHONPATH": str(LIBRARY),
        "PYTHONSAFEPATH": "1",  # else the working tree's own extension comes first, since Python 3.11
        "PYTHONMALLOC": "malloc",  # so that each of Python's objects is watched too
        "OMP_NUM_THREADS": "1",
        "CXXFLAGS": f"-g -fsanitize={MEMORY} -fno-sanitize-recover=undefined",  # of C++ that tests compile themselves
    }


def leaks(reports: Path) -> list[str]:
    """Reports of memory that the extension has taken and lost.

    Of many that Python's own start and end leave, ours are those with the extension in the stack, except for what its
    import makes once: pybind11 keeps its records of functions and types for the life of the process.
    """
    found = []
    for file in reports.parent.glob(f"{reports.name}.*"):
        for report in re.split(r"\n\s*\n", file.read_text(errors="replace")):
            if "leak of" in report and "/_native." in report and "PyInit__native" not in report:
                found.append(report)
    return found


def extension(arguments: Sequence[str] = ()) -> None:
    build()
    reports = LIBRARY.parent / "reports" / "asan"
    reports.parent.mkdir(exist_ok=True)
    for old in reports.parent.iterdir():
        old.unlink()
    env = environment(reports, leaks=False)
    where = [sys.executable, "-c", "from thl_engine import _native; print(_native.__file__)"]
    used = subprocess.run(where, env=env, check=True, capture_output=True, text=True, cwd=BUILD).stdout
    assert used.startswith(str(LIBRARY)), used
    pytest = [Path(sys.executable).parent / "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    failed = []
    for tests, isa, leaking in RUNS:
        chosen = ["--isa", isa] if isa else []
        left_out = [f"--deselect={path}" for path in LEFT_OUT]
        env = environment(reports, leaking)
        print(f"{MEMORY}, instruction set {isa or 'as it is here'}: {' '.join(arguments or tests)}", flush=True)
        done = subprocess.run([*pytest, *chosen, *left_out, *(arguments or tests)], cwd=ROOT, env=env)
        if done.returncode:
            failed.append(" ".join(arguments or tests))
    lost = leaks(reports)
    print("\n\n".join(lost))
    print(f"leaks of the extension: {len(lost)}", flush=True)
    for file in reports.parent.iterdir():
        text = file.read_text(errors="replace")
        if "ERROR: AddressSanitizer" in text or "runtime error" in text:
            print(text)
            failed.append(file.name)
    if failed or lost:
        sys.exit(f"failed: {failed}; leaks: {len(lost)}")


if __name__ == "__main__":
    given = sys.argv[1:]
    names, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    if not names or "programs" in names:
        programs()
    if not names or "extension" in names:
        extension(rest)
