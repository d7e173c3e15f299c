"""docs/architecture.md shows the parts as they are now, and names files that exist."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPT = runpy.run_path(str(DOCS / "draw_architecture.py"))
AGAIN = "run: python docs/draw_architecture.py"


def test_the_picture_is_drawn_from_the_imports_of_today() -> None:
    assert SCRIPT["draw"]() == (DOCS / "architecture.svg").read_text(), AGAIN


def test_the_tables_of_parts_and_lives_are_those_of_the_code() -> None:
    page = (DOCS / "architecture.md").read_text()
    assert SCRIPT["with_tables"](page) == page, AGAIN


def test_every_file_that_a_page_links_to_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS.glob("*.md")]
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert missing == []


def test_every_file_that_a_page_names_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    named = re.compile(
        r"\b((?:broker|codecs|algorithms|nodes|tests|benchmarks)/[a-z0-9_/]+\.(?:py|json))"
    )
    missing = [
        f"{page.name}: {name}"
        for page in pages
        for name in named.findall(page.read_text())
        if not (ROOT / name).exists()
    ]
    assert missing == []
