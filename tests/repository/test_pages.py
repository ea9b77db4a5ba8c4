"""The pages: links lead to files, limits of length hold, pictures parse."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
PAGES += (ROOT / "benchmarks" / "results").glob("*.md")
MAX_LINES = {"README.md": 120, "docs/performance.md": 110, "docs/scaling.md": 60}
MAX_ADR_LINES = 40

LINK = re.compile(r"\]\(([^)#:]+)\)")
FILE = re.compile(r"`([\w./-]+\.(?:md|py|svg))`")
DECISION = re.compile(r"ADR (\d{4})")


def named_files(page: Path) -> list[tuple[str, bool]]:
    """What a page names: links, and files in backticks whose path begins at the root."""
    text = page.read_text(encoding="utf-8")
    found = [(name, (page.parent / name).exists()) for name in LINK.findall(text)]
    for name in FILE.findall(text):
        if name.split("/")[0] in ("docs", "benchmarks", "tests", "clients", "gateway", "models"):
            inside = ROOT / "services" / "engine" / "nanoinfer_engine" / name
            found.append((name, (ROOT / name).exists() or inside.exists()))
    decisions = [path.name[:4] for path in (ROOT / "docs" / "adr").glob("*.md")]
    return found + [(f"ADR {each}", each in decisions) for each in DECISION.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    assert [name for name, exists in named_files(page) if not exists] == []


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](gone.md), `docs/gone.md`, `docs/gpu.md`, ADR 9999")
    missing = [name for name, exists in named_files(page) if not exists]
    assert missing == ["gone.md", "docs/gone.md", "ADR 9999"]


def test_pages_stay_short() -> None:
    limits = {ROOT / name: limit for name, limit in MAX_LINES.items()}
    limits |= dict.fromkeys((ROOT / "docs" / "adr").glob("*.md"), MAX_ADR_LINES)
    lengths = {page: len(page.read_text(encoding="utf-8").splitlines()) for page in limits}
    assert {page.name: n for page, n in lengths.items() if n > limits[page]} == {}


def test_pictures_parse_and_follow_the_colour_scheme() -> None:
    pictures = list((ROOT / "docs").glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8")
