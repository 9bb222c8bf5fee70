"""Files and arguments that are none: every command says so in one line, at once, and exits with 1."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Run = Callable[..., CompletedProcess[str]]
HEADER = {
    "format": "expert-pager-trace", "version": 1, "fingerprint": "f", "expert_bytes": 5, "routed_per_layer": [4],
}  # fmt: skip


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    return path


def refusal(result: CompletedProcess[str]) -> str:
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "unexpected" not in result.stderr
    return result.stderr


def test_a_named_pipe_is_no_file_of_any_command(run: Run, checkpoint: Path, pipe: Path, tmp_path: Path) -> None:
    away = ("--server", "localhost:1", "--tls-ca", pipe)
    for arguments in (
        ("generate", "--prompt-file", pipe, "--model", checkpoint),
        ("generate", "hello", *away),
        ("calibrate", "--name", "p", "--examples", pipe, "--pool", 4, "--model", checkpoint, "--pools", tmp_path),
        ("config", "--check", checkpoint, "--config", pipe),
        ("serve", checkpoint, "--config", pipe),
        ("replay", pipe),
    ):
        assert "named pipe, not a regular file" in refusal(run(*arguments)), arguments
    assert "no file matches" in refusal(run("fit-router", checkpoint, "--documents", pipe))


@pytest.mark.parametrize("command", ["generate", "route"])
def test_an_argument_that_is_no_text(run: Run, checkpoint: Path, command: str) -> None:
    said = refusal(run(command, os.fsdecode(b"a\xff b"), "--model", checkpoint, "--pool", "50%"))
    assert "the prompt is not text: character 1" in said


def test_a_document_that_is_no_text(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "\\ud800 abc"}\n' * 10)
    for arguments in (
        ("eval", checkpoint, "--documents", path, "--out", tmp_path / "out"),
        ("clusters", checkpoint, "--documents", path, "--out", tmp_path / "page.html"),
        ("fit-router", checkpoint, "--documents", path),
        ("calibrate", "--name", "p", "--examples", path, "--pool", 4, "--model", checkpoint, "--pools", tmp_path),
    ):
        assert f"line 2 of {path} is not text" in refusal(run(*arguments)), arguments


def test_a_tokenizer_that_gives_up(
    process: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process: what the tokenizers library prints itself goes past Python."""
    monkeypatch.delenv("RUST_BACKTRACE", raising=False)
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    described = json.loads((model / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    (model / "tokenizer.json").write_text(json.dumps(described))
    result = process("generate", "a" * 40 + "!", "--model", model)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: the model's tokenizer fails on this text")
    assert "Traceback" not in result.stderr
    assert "stack backtrace" not in result.stderr


def test_a_folder_whose_name_is_no_text(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    model = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    shutil.copytree(checkpoint, model)
    for arguments in (("inspect", model), ("verify", "--record", model), ("verify", model)):
        result = run(*arguments)
        assert result.returncode == 0, result.stderr
    assert "caf\\udce9" in run("inspect", model).stdout


def test_a_trace_that_is_cut_or_has_a_hole_is_replayed_and_said(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    events = [["lease", 0, 1], ["lost", 3], ["lease", 0, 2]]
    whole = b"".join(json.dumps(line).encode() + b"\n" for line in (HEADER, *events))
    path.write_bytes(gzip.compress(whole) + gzip.compress(b'["lease", 0, 3]\n')[:-10])
    result = run("replay", path, "--budgets", "50%", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["cut"], found["lost_events"], found["results"][0]["misses"]) == (True, 3, 2)
    assert "is cut off: it is replayed up to its last complete event" in result.stderr
    assert "3 events of" in result.stderr


def test_a_trace_of_experts_without_bytes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(HEADER | {"expert_bytes": 0}) + "\n")
    assert "one of its experts has 0 bytes" in refusal(run("replay", path))
