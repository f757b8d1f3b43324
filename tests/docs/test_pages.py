"""What the pages say about the project is said the same everywhere, and their links lead somewhere."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import thl_engine
from thl_engine.config import CONFIGS
from thl_engine.models.contract import Architecture

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_one_sentence_says_what_the_project_is():
    readme = (ROOT / "README.md").read_text().split("\n\n")[1]
    project = re.search(r'^description = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert readme == thl_engine.__doc__ == project[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {path}"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_architecture_has_a_page():
    assert {page.stem for page in (ROOT / "docs" / "models").glob("*.md")} == set(CONFIGS)


def test_files_that_pages_name_exist():
    """Those in code spans: below the root or the package, with `*` for several."""
    for page in (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "measurements.md"):
        for path in re.findall(r"`((?:[a-z0-9_*]+/)+[a-z0-9_*]+\.(?:py|cpp|h))`", page.read_text()):
            assert any(ROOT.glob(path)) or any((ROOT / "thl_engine").glob(path)), f"{page.name}: there is no {path}"


def test_the_page_of_the_architecture_has_every_hook():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## What an architecture provides")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in fields(Architecture)} - {"model_type"}


def test_types_ship_with_the_package():
    """A type checker follows the package where it is installed."""
    assert (ROOT / "thl_engine" / "py.typed").is_file()
    setup = (ROOT / "setup.py").read_text()
    assert '"py.typed"' in setup and '"*.pyi"' in setup
