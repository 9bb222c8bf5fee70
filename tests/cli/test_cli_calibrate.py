"""calibrate, pools, and requests that name a pool, in this process."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXTS = ["SELECT a FROM b WHERE c = 1", "SELECT d FROM e", "INSERT INTO f"]


@pytest.fixture(autouse=True)
def no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "REDIS_URL_FILE", "EXPERT_PAGER_POOLS_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    return written(tmp_path / "sql.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    return done.stderr


def test_a_pool_is_made_used_listed_and_deleted(run: Run, checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    kept = ("--pools", tmp_path / "pools")
    make = ("calibrate", "--name", "sql", "--examples", examples, "--model", checkpoint, *kept)
    made = answer(run(*make, "--pool", 4, "--json"))
    assert (made["name"], made["method"], made["num_examples"]) == ("sql", "mean", 3)
    assert made["num_tokens"] == sum(map(len, TEXTS))
    options = ("--model", checkpoint, "--pool-name", "sql", *kept, "--json")
    used = answer(run("generate", "hello", *options, "--max-tokens", 2, "--ignore-eos"))["usage"]
    assert (used["mode"], used["pool"]["layers"]) == ("pool", made["pool"]["layers"])
    assert answer(run("route", "hello", *options))["pool"]["layers"] == made["pool"]["layers"]
    assert "a pool 'sql' exists already" in refusal(run(*make, "--pool", 5))
    again = answer(run(*make, "--pool", 5, "--replace", "--json"))
    assert answer(run("pools", "list", *kept, "--json")) == {"pools": [again], "damaged": []}
    assert again["pool"]["digest"] in run("pools", "list", *kept).stdout
    assert answer(run("pools", "list", *kept, "--tenant", "other", "--json"))["pools"] == []
    assert run("pools", "delete", "sql", *kept).returncode == 0
    assert "no pool 'sql'" in refusal(run("pools", "delete", "sql", *kept))
    assert "no pool 'sql'" in refusal(run("generate", "hello", *options))


@pytest.mark.parametrize("method", ["trunk", "prefill", "mean", "greedy", "easy-ep", "random", "frequency"])
def test_every_selection_method_makes_one(
    run: Run, checkpoint: Path, examples: Path, tmp_path: Path, method: str
) -> None:
    sample = ("--sample", examples) if method == "frequency" else ()
    made = answer(
        run(
            "calibrate", "--name", method, "--examples", examples, "--model", checkpoint, "--pool", "50%",
            "--method", method, *sample, "--pools", tmp_path, "--json",
        )
    )  # fmt: skip
    assert (made["method"], [len(layer) for layer in made["pool"]["layers"]]) == (method, [3, 3, 3])


def test_what_examples_may_be(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    plain = written(tmp_path / "a.txt", "SELECT a\nFROM b\n")
    zipped = tmp_path / "b.jsonl.gz"
    zipped.write_bytes(gzip.compress(json.dumps({"text": "x", "id": 1}).encode()))
    sniffed = written(tmp_path / "lines", '{"text": "SELECT"}\n\n{"text": "FROM"}\n')
    for file, count, tokens in ((plain, 1, 16), (zipped, 1, 1), (sniffed, 2, 10)):
        made = answer(
            run(
                "calibrate", "--name", "p", "--examples", file, "--model", checkpoint, "--pool", 4, "--replace",
                "--method", "trunk", "--pools", tmp_path / "pools", "--json",
            )
        )  # fmt: skip
        assert (made["num_examples"], made["num_tokens"]) == (count, tokens)


def test_what_can_not_be_made_is_one_line(run: Run, checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    many = written(tmp_path / "many.jsonl", '{"text": "x"}\n' * 101)
    bad = written(tmp_path / "bad.jsonl", '{"text": "x"}\n{"txt": "y"}\n')
    long = written(tmp_path / "long.txt", "x" * 129)
    binary = tmp_path / "binary"
    binary.write_bytes(b"abc\xff")
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(b"hello" * 100)[:20])
    for options, says in {
        ("--examples", many): "1 to 100 examples, not from 101",
        ("--examples", bad): "line 2 of",
        ("--examples", long): "example 1 has 129 tokens and the model's context 128; cut it",
        ("--examples", binary): "is not UTF-8: byte 3",
        ("--examples", cut): "cannot be read",
        ("--examples", written(tmp_path / "empty", "\n")): "has no examples",
        ("--examples", tmp_path / "absent"): "No such file",
        ("--method", "best"): "known are prefill, trunk",
        ("--method", "lexical"): "fit-router",
        ("--method", "frequency"): "over a sample of documents",
        ("--name", "a/b"): "1 to 64",
        ("--pool", "1"): "smaller than the 2",
        ("--pool", "full"): "needs no examples",
        ("--tenant", "../x"): "--tenant has 1 to 64",
        ("--pools", written(tmp_path / "file", "")): "cannot be written",
    }.items():
        base = {"--examples": examples, "--name": "p", "--pool": 4, "--pools": tmp_path / "pools"}
        choices = [each for pair in (base | {options[0]: options[1]}).items() for each in pair]
        assert says in refusal(run("calibrate", *choices, "--model", checkpoint))
    nowhere = run("calibrate", "--name", "p", "--examples", examples, "--pool", 4, "--model", checkpoint)
    assert "there is no store of named pools" in refusal(nowhere)


def test_a_pool_of_another_model_is_refused(run: Run, checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    kept = ("--pools", tmp_path / "pools")
    made = answer(
        run("calibrate", "--name", "p", "--examples", examples, "--pool", 4, "--model", other, *kept, "--json")
    )
    for command in (("generate", "hello"), ("route", "hello")):
        said = refusal(run(*command, "--model", checkpoint, "--pool-name", "p", *kept))
        assert made["model_fingerprint"] in said
        assert "calibrate it again" in said


def test_options_that_exclude_each_other_are_wrong_usage(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    here = ("--model", checkpoint)
    for options in (
        ("--pool", "4", "--pool-name", "p", *here),
        ("--pool-name", "p", "--pool-source", "prediction", *here),
        ("--pool-digest", "0" * 24, *here),
        ("--pool", "4", "--pool-digest", "0" * 24, "--server", "localhost:1"),
        ("--timeout", "3", *here),
        ("--expert-memory", "25%", "--server", "localhost:1"),
        ("--device", "cpu", "--server", "localhost:1"),
        ("--server", "localhost:1", *here),
        (),
    ):
        done = run("generate", "hello", *options)
        assert done.returncode == 2, (options, done.stderr)


def test_bytes_and_drift_in_this_process(run: Run, checkpoint: Path) -> None:
    options = ("--model", checkpoint, "--dtype", "float32", "--max-tokens", 6, "--ignore-eos", "--json")
    # 9 experts of 3 * 32 * 16 weights in float32.
    for source in ("prefill", "prediction"):
        used = answer(run("generate", "hello", "--pool", f"{9 * 3 * 32 * 16 * 4}b", "--pool-source", source, *options))
        assert used["usage"]["pool"]["num_experts"] == 9
        assert used["usage"]["drift"] is None
    used = answer(run("generate", "hello", "--pool", 3, "--drift", "0.01:widen:1", *options))
    assert used["usage"]["drift"]["peak_mass"] > 0.01
    assert used["usage"]["drift"]["widenings"] >= 1
    exact = answer(run("generate", "hello", "--pool", 3, "--drift", "0.01:exact:1", *options))
    assert exact["usage"]["drift"]["exact_from"] is not None
    assert "no pool that it could leave" in refusal(run("generate", "hello", "--drift", "0.3", *options))
    assert "says nothing about drift" in refusal(run("generate", "hello", "--pool", 3, "--drift", "lots", *options))


# --- in Redis -------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_url(redis_server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """At a path, which nobody else takes as they may a port."""
    folder = tmp_path_factory.mktemp("redis")  # a socket's path is short
    path = str(folder / "socket")
    command = [str(redis_server), "--port", "0", "--unixsocket", path, "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.02)
        yield f"unix://{path}"
        process.kill()


def test_pools_are_kept_in_redis_where_there_is_one(
    run: Run, checkpoint: Path, examples: Path, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    make = ("calibrate", "--name", "p", "--examples", examples, "--pool", 4, "--model", checkpoint)
    made = answer(run(*make, "--method", "trunk", "--tenant", "t", "--json"))
    assert answer(run("pools", "list", "--tenant", "t", "--json"))["pools"] == [made]
    routed = answer(run("route", "hello", "--model", checkpoint, "--pool-name", "p", "--tenant", "t", "--json"))
    assert routed["pool"]["digest"] == made["pool"]["digest"]
    assert "keep one of the two" in refusal(run(*make, "--pools", tmp_path))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    assert "cannot be reached" in refusal(run(*make))
