"""The documents: what they link and name is there. Their commands and messages have tests of their own."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(page: Path, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    assert list(broken(page, page.read_text(encoding="utf-8"))) == []


def test_a_broken_link_is_seen():
    text = "[a](docs/nowhere.md) [b](README.md#nowhere) [c](README.md#start) [d](https://example.org/none)"
    assert list(broken(ROOT / "README.md", text)) == ["docs/nowhere.md", "README.md#nowhere"]


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.parent == ROOT / "docs"}
    assert pages | {"CONTRIBUTING.md", "SECURITY.md"} <= set(re.findall(r"\]\(([^)#\s]+)", readme))


def test_what_contributors_are_sent_to_is_there():
    named = re.findall(r"`((?:reasoner|tests|conf|benchmarks)/[\w/.]+|\w+\.(?:toml|txt))`", CONTRIBUTING)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []
    tables = re.findall(r"`([A-Z_]+)` of\s+`([\w/.]+)`", CONTRIBUTING)
    assert {table for table, _ in tables} > {"FAMILIES", "BUILTINS", "VERBS", "READERS", "SHAPES", "TRACKERS", "LEVELS"}
    assert [
        (table, file)
        for table, file in tables
        if not re.search(rf"^{table}\b.* = ", (ROOT / file).read_text(), re.MULTILINE)
    ] == []


def test_the_markers_and_options_that_are_told_are_pytests_and_makes():
    pyproject, makefile = ((ROOT / name).read_text() for name in ("pyproject.toml", "Makefile"))
    assert re.findall(r'markers = \["(\w+):', pyproject) == ["gpu"]
    assert "workers ?= 2" in makefile
