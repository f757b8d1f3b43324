"""No code of an instruction set can be linked into that of another: its objects define nothing that others may take.

A function that several objects define, such as an inline one of a header or a template of the standard library, is a
weak symbol, of which the linker keeps one for all. If that is the copy in an object for AVX-512, a processor without it
ends in an illegal instruction. Without optimisation nothing is inlined that need not be, which shows all of them.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = {"portable": "kPortable", "avx2": "kAvx2", "avx512": "kAvx512", "avx512vnni": "kAvx512Vnni"}
# How the compiler names a word of data by which exceptions find their handler; where functions are called that throw.
DATA = {"DW.ref.__gxx_personality_v0"}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set"),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="g++ or nm is not installed"),
]


def symbols(name: str, level: str, folder: Path) -> dict[str, str]:
    """Of an instruction set's object that others see: name -> kind, in nm's letters."""
    made = folder / f"{name}{level}.o"
    options = ["-std=c++20", level, "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
    command = ["g++", *options, "-Wno-psabi", "-Icsrc", "-c", f"csrc/cpu/{name}.cpp", "-o", made]
    subprocess.run(command, check=True, cwd=ROOT)
    printed = subprocess.run(["nm", "-C", made], capture_output=True, text=True, check=True).stdout
    entries = [line[17:].split(" ", 1) for line in printed.splitlines()]
    return {symbol: kind for kind, symbol in entries if (kind.isupper() or kind in "uvw") and symbol not in DATA}


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_an_instruction_set_defines_its_table_alone(level, tmp_path):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(TABLES, pool.map(lambda name: symbols(name, level, tmp_path), TABLES), strict=True))
    for name, seen in found.items():
        defined = {symbol: kind for symbol, kind in seen.items() if kind != "U"}
        assert set(defined) == {f"thl::{TABLES[name]}"}, name
        assert defined.popitem()[1] in "DR", name  # data, filled in by the linker or the loader


def test_a_weak_function_would_be_seen(tmp_path):
    """What the other test relies on."""
    source = tmp_path / "weak.cpp"
    source.write_text("#include <algorithm>\nlong least(long a, long b) { return std::min(a, b); }\n")
    made = tmp_path / "weak.o"
    subprocess.run(["g++", "-std=c++20", "-O0", "-c", source, "-o", made], check=True)
    printed = subprocess.run(["nm", "-C", made], capture_output=True, text=True, check=True).stdout
    assert any(line.split()[1] == "W" and "std::min" in line for line in printed.splitlines())
