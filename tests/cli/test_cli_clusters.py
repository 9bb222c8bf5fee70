"""`expert-pager clusters` on a small random checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    for domain in ("code", "law"):
        lines = [{"text": f"{domain} says {n} things, and {n + 1} more", "id": f"{domain}-{n}"} for n in range(4)]
        (tmp_path / f"{domain}.valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "*.jsonl")


def test_one_page_of_two_models(run: Run, checkpoint: Path, corpus: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = ("--documents", corpus, "--clusters", 4, "--max-documents", 3, "--max-tokens", 20, "--out", page)
    done = run("clusters", checkpoint, "--compare", checkpoint, *options, "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["models"]
    assert first == second
    assert (first["documents"], first["tokens"], first["clusters"]) == (6, 120, 4)
    assert [layer["layer"] for layer in first["pool_overlap"]] == [0, 1, 2]
    once = page.read_text()
    assert "How random-emo and random-emo route tokens" in once
    # The same seed draws the same documents and makes the same page.
    again = run("clusters", checkpoint, "--compare", checkpoint, *options)
    assert f"{page}: " in again.stdout
    assert f"expert-pager slice {checkpoint} OUT --examples FILE --size 12.5%" in again.stdout
    assert "expert-pager slice MODEL OUT --examples FILE --size 12.5%" in once
    assert page.read_text() == once
    # Paged or not, it is the same forward but for rounding, by which a token between two clusters may change sides.
    paged = json.loads(run("clusters", checkpoint, *options, "--expert-memory", "25%", "--json").stdout)["models"][0]
    assert paged["pool_overlap"] == [pytest.approx(layer, abs=1e-4) for layer in first["pool_overlap"]]


def test_what_can_not_be_shown_is_said(run: Run, checkpoint: Path, corpus: str, tmp_path: Path) -> None:
    nowhere = run("clusters", checkpoint, "--documents", corpus, "--out", tmp_path / "no" / "page.html")
    assert (nowhere.returncode, "is not a directory" in nowhere.stderr) == (1, True)
    nothing = run("clusters", checkpoint, "--documents", str(tmp_path / "*.txt"))
    assert (nothing.returncode, "no file matches" in nothing.stderr) == (1, True)
    silent = tmp_path / "silent"
    shutil.copytree(checkpoint, silent)
    (silent / "tokenizer.json").unlink()
    wordless = run("clusters", silent, "--documents", corpus, "--out", tmp_path / "page.html")
    assert (wordless.returncode, "has no tokenizer.json" in wordless.stderr) == (1, True)
