"""Paths that the documentation names exist, links lead somewhere, and every module it names can be found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = (
    "architecture", "concepts", "contributing", "deploy", "examples", "http", "index", "runbook", "slices", "tutorial",
)  # fmt: skip
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", *(f"docs/{name}.md" for name in SITE))
FOLDERS = "pager|router_service|protos|tests|docs|deploy|benchmarks|training|demo|examples|models"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*\w/?)`")
MODULE = re.compile(r"`((?:pager|router_service)(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
MADE = {"docs/images", "models/my-model"}  # written by a command that the page names


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    missing = [path for path in PATH.findall(text_of(page)) if not (ROOT / path).exists() and path not in MADE]
    assert not missing, f"{page} names {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = [link for link in LINK.findall(text_of(page)) if "://" not in link and not link.startswith("mailto:")]
    generated = {"reference/cli.md", "reference/grpc.md", "reference/config.md"}
    missing = [link for link in links if link not in generated and not ((ROOT / page).parent / link).exists()]
    assert not missing, f"{page} links to {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_exist(page: str) -> None:
    missing = [name for name in MODULE.findall(text_of(page)) if not _is_there(name)]
    assert not missing, f"{page} names {', '.join(missing)}"


def _is_there(name: str) -> bool:
    """`pager.cache.ledger.Ledger`: the longest part of it that is a module exists and has the rest."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        module = next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()), None)
        if module is not None:
            rest = parts[end:]
            return not rest or re.search(rf"\b{re.escape(rest[0])}\b", module.read_text(encoding="utf-8")) is not None
    return False


def test_every_path_in_the_readme_is_a_link() -> None:
    assert not PATH.findall(text_of("README.md"))


@pytest.mark.parametrize(
    "what", ["the eviction policy", "a predictor", "a field of the answer", "a model family", "an alert"]
)
def test_a_newcomer_finds_which_file_to_change(what: str) -> None:
    row = next(line for line in text_of("docs/concepts.md").splitlines() if line.startswith(f"| {what} |"))
    assert len(PATH.findall(row)) >= 2, "the file to change, and its tests"
