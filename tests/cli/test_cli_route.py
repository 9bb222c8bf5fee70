"""route in this process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.checkpoints import saved
from tests.support.quantised import deepseek_v3

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_route_names_a_pool_without_loading_experts(run: Run, checkpoint: Path) -> None:
    done = run("route", "def f(x):", "--model", checkpoint, "--pool", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["source"] == "trunk"
    assert found["num_tokens"] == 9
    assert [len(layer) for layer in found["pool"]["layers"]] == [4, 4, 4]
    for chosen, mean in zip(found["pool"]["layers"], found["scores"], strict=True):
        best = sorted(range(len(mean)), key=lambda expert: (-mean[expert], expert))[:4]
        assert chosen == sorted(best)


def test_route_reads_the_prompt_from_stdin(process: Run, checkpoint: Path) -> None:
    done = process("route", "--prompt-file", "-", "--model", checkpoint, "--pool", "mass:0.5:4", stdin="héllo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 tokens scored by the trunk pass: ")


def test_bad_prompts_and_pools_are_one_line(run: Run, checkpoint: Path) -> None:
    cases = {
        ("--pool", "1", "hi"): "smaller than the 2",
        ("--pool", "lots", "hi"): "is not a pool size",
        ("--token-ids", "1,x"): "whole numbers",
        ("--token-ids", "999"): "outside the vocabulary of 260",
        ("",): "the prompt is empty",
        ("--prompt-file", "/does/not/exist"): "No such file",
    }
    for arguments, message in cases.items():
        done = run("route", *arguments, "--model", checkpoint)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr


@pytest.mark.parametrize(
    "asked",
    [
        ("route", "abc", "--pool", "50%"),
        ("generate", "abc", "--pool", "50%", "--pool-source", "prediction"),
        ("generate", "abc", "--pool", "1MiB"),
    ],
)
def test_gates_that_nothing_reads_are_not_predicted(
    run: Run, checkpoint: Path, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    path = saved(deepseek_v3(), tmp_path / "model")
    (path / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    done = run(*asked, "--model", path)
    assert done.returncode == 1
    assert "no predictor reads the gates of deepseek_v3, which pick in ways of their own; let the" in done.stderr
