"""Compiles csrc/cuda with nvcc, for setup.py and for the test of what the compiler says.

THL_CUDA_ARCH names the compute capabilities to compile for, "89" or "80,90"; without it all of ARCHITECTURES. Cards
newer than the newest one named compile its PTX when the extension is loaded.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURES = (75, 80, 86, 89, 90)
ROOT = Path(__file__).resolve().parents[2]
# Sums are fused where the source says so: kernels for other sizes must round alike.
FLAGS = ("-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wno-psabi,-pthread")


def find() -> str | None:
    """Path of nvcc: in $CUDA_HOME, on the PATH, or where toolkits are installed; None where there is none."""
    places = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"),) if home]
    found = [path for path in (shutil.which("nvcc", path=str(place)) for place in places) if path]
    return next(iter(found), None) or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architectures() -> tuple[int, ...]:
    """Compute capabilities to compile for, ascending. Raises ValueError where THL_CUDA_ARCH is no list of them."""
    named = os.environ.get("THL_CUDA_ARCH")
    if not named:
        return ARCHITECTURES
    try:
        return tuple(sorted({int(name) for name in named.split(",")}))
    except ValueError:
        raise ValueError(f"THL_CUDA_ARCH: expected capabilities such as 80,90, found {named!r}") from None


def sources() -> list[Path]:
    """All that the extension is made of."""
    here = ROOT / "csrc" / "cuda"
    return sorted([*here.glob("*.cu"), *here.glob("*.cpp")])


def targets(capabilities: Sequence[int]) -> list[str]:
    """Options that ask for machine code of each capability, and PTX of the last."""
    codes = [f"arch=compute_{card},code=sm_{card}" for card in capabilities]
    return [
        option
        for code in [*codes, f"arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}"]
        for option in ("-gencode", code)
    ]


def compile_all(nvcc: str, folder: Path, includes: Iterable[str]) -> list[Path]:
    """Objects of all sources, in a folder beneath `folder`; those newer than all that they come from are kept.

    Raises RuntimeError naming the first file that does not compile; nvcc has then said why.
    """
    capabilities = architectures()
    folder = folder / ("cuda-" + "-".join(map(str, capabilities)))
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        *FLAGS,
        *targets(capabilities),
        "--threads",
        "0",
        "-I",
        str(ROOT / "csrc"),
        *(option for path in includes for option in ("-I", path)),
    ]

    def compile_one(source: Path) -> Path:
        made, used = folder / (source.name + ".o"), folder / (source.name + ".d")
        if not newer(made, used):
            run([nvcc, *options, "-MMD", "-MF", str(used), "-c", str(source), "-o", str(made)], source.name)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources()))


def newer(made: Path, used: Path) -> bool:
    """Whether an object is newer than this file and all that it was made of, which `used` lists as make would."""
    if not made.exists() or not used.exists():
        return False
    files = [Path(name) for name in used.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    return all(file.exists() and file.stat().st_mtime < made.stat().st_mtime for file in [*files, Path(__file__)])


def link(nvcc: str, objects: Iterable[Path], library: Path) -> None:
    """A shared library that holds the CUDA runtime, and shows only what asks to be seen."""
    library.parent.mkdir(parents=True, exist_ok=True)
    run(
        [
            nvcc,
            "-shared",
            "-cudart",
            "static",
            "-Xlinker",
            "--exclude-libs,ALL",
            "-Xcompiler",
            "-pthread",
            *map(str, objects),
            "-o",
            str(library),
        ],
        library.name,
    )


def run(command: list[str], name: str) -> None:
    if subprocess.run(command).returncode:
        raise RuntimeError(f"nvcc failed on {name}")
