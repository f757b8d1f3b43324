"""What nvcc made of csrc/cuda: code for every card that is meant, without spilled registers, within its shared memory.

Reads the extension that is installed, which setup.py builds with the options that a user's build has. One that was
built for fewer cards (THL_CUDA_ARCH) is held to those.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a block may have
# What the compiler counts beside what a kernel asks for: 1 KiB that sm_80 and newer keep for the system.
RESERVED = 1024


def cuobjdump() -> str | None:
    """Of triton, which brings one."""
    triton = find_spec("triton")
    path = None if triton is None else Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path is not None and path.exists() else None


@pytest.fixture(scope="module")
def kernels() -> dict[int, list[tuple[str, dict[str, int]]]]:
    """Card -> its kernels: name, and what each wants."""
    if nvcc.find() is None:
        pytest.skip("nvcc is not installed")
    if cuobjdump() is None:
        pytest.skip("cuobjdump is not installed")
    from thl_engine import _cuda

    printed = subprocess.run([cuobjdump(), "-res-usage", _cuda.__file__], capture_output=True, text=True, check=True)
    found: dict[int, list[tuple[str, dict[str, int]]]] = {}
    for line in printed.stdout.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            card = int(match[1])
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif "REG:" in line:
            found.setdefault(card, []).append((name, {what: int(n) for what, n in re.findall(r"([A-Z]+):(\d+)", line)}))
    return found


def test_code_for_every_card(kernels):
    if "THL_CUDA_ARCH" not in os.environ:
        assert set(kernels) == set(nvcc.ARCHITECTURES)
    assert len({tuple(sorted(name for name, _ in made)) for made in kernels.values()}) == 1


def test_nothing_spills(kernels):
    spilled = [
        (card, name, wants)
        for card, made in kernels.items()
        for name, wants in made
        if wants["STACK"] or wants["LOCAL"]
    ]
    assert not spilled


def test_shared_memory_fits(kernels):
    for card, made in kernels.items():
        for name, wants in made:
            # A kernel that asks for no more at its launch has 48 KiB at most.
            assert wants["SHARED"] <= min(SHARED[card], 48) * 1024 + RESERVED, (card, name)


@pytest.mark.parametrize("named, expected", [(None, nvcc.ARCHITECTURES), ("89", (89,)), ("90,80", (80, 90))])
def test_cards_can_be_named(monkeypatch, named, expected):
    monkeypatch.delenv("THL_CUDA_ARCH", raising=False) if named is None else monkeypatch.setenv("THL_CUDA_ARCH", named)
    assert nvcc.architectures() == expected
    assert f"arch=compute_{expected[-1]},code=compute_{expected[-1]}" in nvcc.targets(expected)


def test_a_name_that_is_no_card_is_refused(monkeypatch):
    monkeypatch.setenv("THL_CUDA_ARCH", "sm_89")
    with pytest.raises(ValueError, match="THL_CUDA_ARCH: expected capabilities such as 80,90, found 'sm_89'"):
        nvcc.architectures()


def test_an_object_is_kept_while_nothing_that_it_was_made_of_changes(tmp_path):
    source, header, made, used = (tmp_path / name for name in ("a.cu", "a.h", "a.o", "a.d"))
    for age, file in enumerate((made, source, header)):
        file.touch()
        os.utime(file, (2e9 - age, 2e9 - age))
    assert not nvcc.newer(made, used)
    used.write_text(f"{made} : {source} \\\n    {header}\n")
    assert nvcc.newer(made, used)
    os.utime(header, (2e9 + 1, 2e9 + 1))
    assert not nvcc.newer(made, used)
    header.unlink()
    assert not nvcc.newer(made, used)
