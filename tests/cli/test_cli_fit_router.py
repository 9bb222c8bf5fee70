"""`expert-pager fit-router`: from files of documents to a small file beside the checkpoint."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pager.lab.corpus import sample_texts
from pager.models.open_model import OpenModel
from pager.predict.fitted import LexicalPredictor, PredictorFile

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents"
PATTERN = str(DOCUMENTS / "*.jsonl")
OPTIONS = ("--max-tokens", 64, "--dtype", "float32", "--device", "cpu")

Run = Callable[..., Any]


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder of its own, to write into."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_router_is_fitted_and_kept_beside_the_checkpoint(run: Run, model: Path) -> None:
    result = run("fit-router", model, "--documents", PATTERN, *OPTIONS, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    path = model / "router.safetensors"
    assert report["path"] == str(path)
    assert report["bytes"] == path.stat().st_size
    assert report["documents"] == 12
    assert (
        set(report["unseen_recall"])
        == set(report["recall_error"])
        == set(report["unseen_mass"])
        == {"lexical", "trunk", "fitted"}
    )
    with OpenModel.open(model).checkpoint as opened:
        file = PredictorFile.load(path, opened.fingerprint)
    assert [len(mean_R) for mean_R in LexicalPredictor(file).scores([1, 2, 3]).mean_LR] == [8, 8, 8]
    assert OpenModel.open(model).checkpoint.fingerprint == file.fingerprint, "the file changes nothing for the model"


def test_fewer_codewords_than_were_asked_for_are_said_to_be(run: Run, model: Path) -> None:
    result = run("fit-router", model, "--documents", PATTERN, *OPTIONS, "--codewords", 8, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["codewords"] == 3
    assert "8 codewords were asked for and 3 made, as each takes at least four documents" in result.stderr


def test_what_was_fitted_goes_along_into_a_packed_model(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("fit-router", model, "--documents", PATTERN, *OPTIONS).returncode == 0
    result = run("pack", model, tmp_path / "packed", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    with OpenModel.open(model).checkpoint as plain, OpenModel.open(tmp_path / "packed").checkpoint as packed:
        before, after = (PredictorFile.load(each.path, each.fingerprint) for each in (plain, packed))
        assert plain.fingerprint != packed.fingerprint
    assert before.weights.keys() == after.weights.keys()
    assert all((before.weights[name] == after.weights[name]).all() for name in before.weights)
    shutil.copy(tmp_path / "packed" / "router.safetensors", model)
    refused(run("pack", model, tmp_path / "again"), "was fitted to the model")
    assert not (tmp_path / "again").exists()


def test_the_same_seed_gives_the_same_bytes(run: Run, model: Path, tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        result = run("fit-router", model, "--documents", PATTERN, *OPTIONS, "--output", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert "fitted to 12 documents" in result.stdout
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert not (model / "router.safetensors").exists()


def test_every_file_gives_as_many_documents(tmp_path: Path) -> None:
    files = []
    for name, count in (("many", 50), ("few", 3), ("some", 20)):
        files.append(tmp_path / f"{name}.jsonl.gz")
        with gzip.open(files[-1], "wt") as lines:
            lines.writelines(json.dumps({"text": f"{name} {number}"}) + "\n\n" for number in range(count))
    patterns = [str(file) for file in files]
    texts = sample_texts(patterns, 30, seed=1)
    kinds = [text.split()[0] for text in texts]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"many": 10, "few": 3, "some": 10}
    assert len(set(texts)) == 23
    assert texts == sample_texts(patterns, 30, seed=1)
    assert texts != sample_texts(patterns, 30, seed=2)
    assert kinds != sorted(kinds), "kinds are mixed, so that a fold of documents holds all of them"


@pytest.mark.parametrize(
    ("line", "named"),
    [('{"text": 3}', 'line 2 of .*docs.jsonl has no "text"'), ("[1]", "line 2"), ("{", "line 2")],
)
def test_a_bad_line_is_named(run: Run, model: Path, tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    refused(run("fit-router", model, "--documents", path), named)


def test_what_can_not_be_read_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    refused(run("fit-router", model, "--documents", tmp_path / "none-*.jsonl"), "no file matches '.*none-")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    refused(run("fit-router", model, "--documents", cut), "cut.jsonl.gz cannot be read")


def test_too_few_documents_are_refused_and_nothing_is_written(run: Run, model: Path) -> None:
    code = DOCUMENTS / "code.jsonl"
    refused(run("fit-router", model, "--documents", code, *OPTIONS), "at least 8 documents")
    assert not (model / "router.safetensors").exists()


def test_a_checkpoint_without_a_tokenizer(run: Run, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    refused(run("fit-router", model, "--documents", PATTERN), "no tokenizer.json")


def refused(result: Any, named: str) -> None:
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert re.search(named, result.stderr), result.stderr
