"""The language of what users read: spelling that a reader would trip over is found by pattern."""

from __future__ import annotations

import ast
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


# Words of the glossary that have been called otherwise: the gate a router, the prefill's choice fused.
WRONG_WORDS = re.compile(r"\brouter(?:'s)? (?:probabilit|mass\b|logits\b)|\bfused\b", re.IGNORECASE)
RENAMED = re.compile(r'"fused": "prefill"')  # settings and methods read the earlier name


def test_the_gate_is_no_router_and_the_prefill_is_not_fused() -> None:
    files = [*(ROOT / "pager").rglob("*.py"), *(ROOT / "router_service").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    files += [ROOT / "README.md", ROOT / "protos/expert_pager/v1/expert_pager.proto"]
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files
        if file.name != "log.md"
        for match in WRONG_WORDS.finditer(RENAMED.sub("", file.read_text(encoding="utf-8")))
    ]
    assert not found, "docs/concepts.md has other words for " + ", ".join(found)


PLAIN = ("pager/memory", "pager/models", "pager/observe", "pager/predict", "pager/store", "training", "demo")
# What begins so is a fragment that makes sense only with the name above it, or says only what is raised.
FRAGMENT = re.compile(r"(?:Of|Whether|Raises|As|With|Without|From|That of|For)\b")


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    found = []
    for folder in PLAIN:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if FRAGMENT.match(text):
                        found.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


# A noun clause in place of a sentence: what a function does, or what a thing is, has to be guessed from its name.
CLAUSE = re.compile(r"(?:What|Who|Whose|Whoever|Whether|How|Where|That of)\b")


def test_functions_say_what_they_do_and_classes_what_they_are() -> None:
    found = []
    for folder in ("pager", "router_service"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if CLAUSE.match(text):
                        found.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


RIDDLES = re.compile(
    r"\b(?:nobody is (?:asked|told)|whoever asks|let go of longest|is told of every|as asked for)\b", re.I
)


def test_nothing_is_personified_in_docstrings_and_comments() -> None:
    files = [*(ROOT / "pager").rglob("*.py"), *(ROOT / "router_service").rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files
        for match in RIDDLES.finditer(file.read_text(encoding="utf-8"))
    ]
    assert not found, "in plain words, please: " + ", ".join(found)
