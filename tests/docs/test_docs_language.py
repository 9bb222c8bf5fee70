"""The language of what users read: spelling that a reader would trip over is found by pattern."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "pager", "router_service", "demo")
SUFFIXES = {".md", ".py", ".toml", ".html", ".js"}
# The words may lie on two lines, of a string, a comment or a paragraph.
TWO_WORDS = re.compile(r"\bcan(?:\s|[#\"'>])+not\b", re.IGNORECASE)


@pytest.mark.parametrize("name", TEXTS)
def test_cannot_is_one_word(name: str) -> None:
    path = ROOT / name
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    assert files
    found = []
    for file in files:
        text = file.read_text()
        lines = (text.count("\n", 0, match.start()) + 1 for match in TWO_WORDS.finditer(text))
        found += [f"{file.relative_to(ROOT)}:{line}" for line in lines]
    assert not found, f'"can not" reads "cannot": {", ".join(found)}'
