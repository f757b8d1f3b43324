"""The commands of README.md and docs/ run as they are written.

A page's blocks of shell and Python run in their order in one shell, in a folder that looks like a checkout to them. A
block is left out where a comment right before it says `<!-- not run: why -->`: it downloads, installs, or needs
gigabytes or a GPU. Blocks of other languages show output or files, never commands.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"sh", "python", "text", "json"}
BLOCK = re.compile(r"(?:^<!-- not run:(?P<why>.*?)-->\n+)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^(thl|thl-run|make|pip|python|pytest|git)\s", re.M)
SECONDS = 300  # of a page, on a machine that does other work


@dataclass(frozen=True)
class Block:
    """A fenced block: `why` is what keeps it from being run here, if anything does."""

    language: str
    code: str
    why: str | None


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found = [Block(m["language"], m["code"], m["why"]) for m in BLOCK.finditer(page.read_text())]
    assert 2 * len(found) == len(re.findall("^```", page.read_text(), re.M)), f"{page}: a fence is not closed"
    return found


def script_of(blocks: list[Block]) -> str:
    """One shell script of the blocks that are run; empty where there are none."""
    run = [block for block in blocks if block.language in ("sh", "python") and block.why is None]
    return "\n".join(
        block.code if block.language == "sh" else f"python - <<'END OF PYTHON'\n{block.code}END OF PYTHON\n"
        for block in run
    )


def run(script: str, folder: Path) -> tuple[int, str]:
    """Runs a script in a folder that has what a checkout has; its exit code, and the end of what it wrote."""
    bin_ = Path(sys.executable).parent
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{bin_}:$PATH"\n')
    found = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
    )
    return found.returncode, found.stdout.decode(errors="replace")[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Page -> its run. All pages run when the first is asked for, two at a time."""
    if not (Path(sys.executable).parent / "thl").exists():
        pytest.skip("the package's commands are not installed beside this python")
    scripts = {name: script_of(blocks_of(page)) for name, page in zip(NAMES, PAGES, strict=True)}
    with ThreadPoolExecutor(2) as pool:
        started: dict[str, Future] = {
            name: pool.submit(run, script, tmp_path_factory.mktemp("page"))
            for name, script in scripts.items()
            if script
        }
        yield started


@pytest.mark.parametrize("name", [name for name, page in zip(NAMES, PAGES, strict=True) if script_of(blocks_of(page))])
def test_commands_run_as_written(runs, name):
    code, output = runs[name].result()
    assert code == 0, f"{name}: exit code {code} of the last command below\n{output}"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_name_their_language_and_why_they_are_not_run(name):
    for block in blocks_of(ROOT / name):
        assert block.language in LANGUAGES, f"{name}: a block of {block.language or 'no language'}\n{block.code}"
        assert block.why is None or block.why.strip(), f"{name}: not run, but why?\n{block.code}"
        if block.language in ("text", "json"):
            assert not COMMAND.search(block.code), f"{name}: commands belong in a block of sh\n{block.code}"


def test_most_blocks_are_run():
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language in ("sh", "python")]
    assert sum(block.why is None for block in blocks) > len(blocks) / 2
