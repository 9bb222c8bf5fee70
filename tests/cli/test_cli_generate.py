"""generate in this process, without ray, grpc or redis."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pager

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]

WITHOUT_SERVE_EXTRA = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "grpc", "redis"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from pager.cli import main
main()
"""


def test_a_budget_does_not_change_the_answer(run: Run, checkpoint: Path) -> None:
    answers = []
    for budget in ("100%", "12.5%"):
        done = run(
            "generate", "def f(x):", "--model", checkpoint, "--dtype", "auto", "--device", "cpu",
            "--expert-memory", budget, "--max-tokens", 12, "--ignore-eos", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    full, tight = answers
    assert full["token_ids"] == tight["token_ids"]
    assert len(full["token_ids"]) == 12
    assert (full["usage"]["mode"], full["usage"]["pool"]) == ("exact", None)
    assert tight["usage"]["bytes_from_disk"] > full["usage"]["bytes_from_disk"] > 0


def test_a_pooled_answer_says_its_pool(run: Run, checkpoint: Path) -> None:
    done = run("generate", "def f(x):", "--model", checkpoint, "--pool", 4, "--max-tokens", 4, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert "pool: 12 experts in pool " in done.stderr
    assert "9 + 4 tokens (length)" in done.stderr


def test_a_predicted_pool_is_the_routers(run: Run, checkpoint: Path) -> None:
    routed = json.loads(run("route", "def f(x):", "--model", checkpoint, "--pool", 4, "--json").stdout)
    options = ("--pool", 4, "--pool-source", "prediction", "--max-tokens", 2, "--ignore-eos", "--json")
    done = run("generate", "def f(x):", "--model", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["pool"]["layers"] == routed["pool"]["layers"]


def test_a_models_own_settings_hold_as_in_the_library(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Where an option does not say otherwise."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    options = ("--model", model, "--dtype", "auto", "--device", "cpu", "--max-tokens", 8, "--ignore-eos", "--json")
    prompt = [5, 6, 7, 5, 6]

    def answer(**settings: Any) -> list[int]:
        (model / "generation_config.json").write_text(json.dumps({"pad_token_id": 0, **settings}))
        done = run("generate", "--token-ids", "5,6,7,5,6", *options)
        assert done.returncode == 0, done.stderr
        found: list[int] = json.loads(done.stdout)["token_ids"]
        with pager.load_model(model) as loaded:
            ids = torch.tensor([prompt])
            output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        assert found == output[0, len(prompt) :].tolist()
        return found

    greedy = answer()
    assert set(answer(suppress_tokens=greedy)).isdisjoint(greedy)
    assert answer(suppress_tokens=[-1, 10**9]) == greedy
    assert answer(repetition_penalty=5.0) != greedy
    assert answer(do_sample=True, temperature=3.0, top_k=1) == greedy
    warm = ("generate", "--token-ids", "5,6,7,5,6", *options, "--seed", "1")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 50.0}))
    assert json.loads(run(*warm).stdout)["token_ids"] != greedy
    assert json.loads(run(*warm, "--temperature", "0").stdout)["token_ids"] == greedy
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1e6}))
    assert "generation_config.json is not valid: sampling.temperature = 1000000.0" in run(*warm).stderr


@pytest.mark.parametrize("value", ["5", ["5"], [1.5]])
def test_suppressed_tokens_that_are_none_are_refused(run: Run, checkpoint: Path, tmp_path: Path, value: Any) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"suppress_tokens": value}))
    done = run("inspect", model)
    assert done.returncode == 1
    assert "generation_config.json is malformed: its suppress_tokens" in done.stderr


def test_settings_that_the_engine_does_not_apply_are_said(
    run: Run, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    asked = ("generate", "--token-ids", "5,6", "--model", model, "--max-tokens", 1)
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0}
    (model / "generation_config.json").write_text(json.dumps(neutral))
    assert run(*asked).returncode == 0
    assert "generation_config.json" not in caplog.text
    (model / "generation_config.json").write_text(json.dumps({**neutral, "bad_words_ids": [[5]], "min_length": 3}))
    assert run(*asked).returncode == 0
    assert "generation_config.json has bad_words_ids, min_length, which" in caplog.text


def test_bad_requests_are_one_line(run: Run, checkpoint: Path) -> None:
    cases = {
        ("--temperature", "nan"): "sampling.temperature",
        ("--max-tokens", "0"): "sampling.max_tokens",
        ("--max-tokens", "500"): "context of 128",
        ("--pool", "9"): "",
        ("--expert-memory", "1%"): "at least",
        ("--pool", "4", "--expert-memory", "25%"): "needs 12 expert slots and this worker has 6",
    }
    for options, message in cases.items():
        done = run("generate", "hello", "--model", checkpoint, "--device", "cpu", *options)
        assert "Traceback" not in done.stderr
        if message:
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert message in done.stderr


@pytest.mark.slow
def test_it_runs_where_only_the_library_is_installed(checkpoint: Path) -> None:
    arguments = ["generate", "hi", "--model", str(checkpoint), "--max-tokens", "1"]
    done = _without_serve_extra(*arguments)
    assert done.returncode == 0, done.stderr
    done = _without_serve_extra("serve", str(checkpoint))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "pip install 'expert-pager[serve]'" in done.stderr


def test_no_service_is_one_line(run: Run) -> None:
    done = run("generate", "hi", "--server", "127.0.0.1:1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "no service answers at 127.0.0.1:1" in done.stderr


def test_interrupting_is_status_130(checkpoint: Path) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "pager.cli", "generate", "--prompt-file", "-", "--model", str(checkpoint)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write("x" * 2**20)  # more than a pipe holds: returns when the process has begun to read
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors


def _without_serve_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "protos")])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_SERVE_EXTRA, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_log_probabilities_are_shown_with_alternatives(run: Run, checkpoint: Path) -> None:
    options = ("--model", checkpoint, "--logprobs", 2, "--max-tokens", 3, "--ignore-eos")
    done = run("generate", "def f(x):", *options, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [token["token_id"] for token in answer["logprobs"]] == answer["token_ids"]
    assert all(token["top_ids"][0] == token["token_id"] and token["logprob"] < 0 for token in answer["logprobs"])
    shown = run("generate", "def f(x):", *options).stderr
    assert shown.count("log-probability -") == 3


@pytest.mark.slow
def test_an_answer_is_held_to_a_schema_in_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "customer.schema.json"
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    file.write_text(json.dumps({"type": "object", "properties": {"n": number}, "required": ["n"]}))
    model = Path(__file__).parents[2] / "models" / "emo-tiny"
    done = run("generate", "A record: ", "--model", model, "--json-schema", file, "--json")
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(json.loads(done.stdout)["text"])["n"] <= 99
    both = run("generate", "A record: ", "--model", model, "--json-schema", file, "--regex", "a")
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)
    absent = run("generate", "A record: ", "--model", model, "--json-schema", tmp_path / "absent.json")
    assert (absent.returncode, "absent.json cannot be read" in absent.stderr) == (2, True), absent.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.json", "model.gguf"])
def test_a_pointer_of_git_lfs_is_called_one(run: Run, checkpoint: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "model")
    if name == "vocab.json":
        (path / "tokenizer.json").unlink()
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3000000\n")
    done = run("generate", "SELECT", "--model", path / name if name == "model.gguf" else path)
    assert done.returncode == 1
    assert "a pointer of git-lfs and not the file itself, which `git lfs pull` fetches" in done.stderr


def test_what_is_no_model_is_not_said_to_lack_a_tokenizer(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    done = run("generate", "SELECT", "--model", tmp_path)
    assert f"{tmp_path} holds an adapter and no model" in done.stderr
    path = shutil.copytree(checkpoint, tmp_path / "model")
    (path / "tokenizer.json").unlink()
    assert (
        "has no tokenizer.json; give the prompt with --token-ids" in run("generate", "SELECT", "--model", path).stderr
    )
