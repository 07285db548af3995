"""What README and the documentation link to is there, and every page can be found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.docs.reading import page, without_blocks

PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (REPOSITORY / "docs").glob("*.md"))]


def links(name: str) -> list[str]:
    """Return what a page links to, and shows, in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page(name)))
    return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name: str) -> None:
    folder = (REPOSITORY / name).parent
    assert [link for link in links(name) if not (folder / link).exists()] == []


def test_readme_links_every_page() -> None:
    assert {Path(name) for name in PAGES} - {Path(link) for link in links("README.md")} == {Path("README.md")}
