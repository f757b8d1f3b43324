"""What the pages say about the project is said the same everywhere, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

import thl_engine
from thl_engine.config import CONFIGS

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
