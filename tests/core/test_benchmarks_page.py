"""docs/benchmarks.md says what the benchmarks' files say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import page as module

    return module


def test_the_page_is_what_its_files_make(page: ModuleType) -> None:
    told = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert told == page.page(), "a file in docs/benchmarks has changed; make the page anew: python benchmarks/page.py"


def test_every_file_with_a_section_is_there(page: ModuleType) -> None:
    assert all(page.read(name) is not None for name in page.SECTIONS)


def test_paragraphs_are_filled_and_tables_and_code_are_left(page: ModuleType) -> None:
    long = "word " * 60
    made = page.wrapped(f"# A title {long}\n\n{long}\n\n| a | {long}|\n|---|---|\n\n```\ncode  {long}\n\n  more {long}\n```\n")
    lines = made.splitlines()
    assert max(len(line) for line in lines[2:5]) <= page.WIDTH < len(lines[0])
    assert f"code  {long}" in made and f"  more {long}" in made and "|---|---|" in made
