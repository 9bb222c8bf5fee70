"""`expert-pager config`: all that is wrong at once, what is in force, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pager.config import load_config

PASSWORD = "only-in-the-environment"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "service.toml"
    path.write_text(text)
    return path


def test_a_good_configuration_is_said_to_be_good(run: Any, checkpoint: Path) -> None:
    done = run("config", "--check", checkpoint, "--workers", 2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the configuration is good\n", "")


def test_everything_that_is_wrong_is_said_with_its_place_and_what_to_do(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(
        tmp_path,
        "[workers]\ncuont = 1\nkv_memory = 'much'\n[router]\nport = 9464\ntls_cert = 'absent.crt'\n"
        "[pools]\ndefault_size = 'huge'\n",
    )
    monkeypatch.setenv("EXPERT_PAGER_ROUTER_DRAIN_S", "soon")
    monkeypatch.setenv("REDIS_URL", f"redis://:{PASSWORD}@nowhere")
    done = run("config", "--config", path, "--device", "tpu", tmp_path / "no-model")
    assert (done.returncode, done.stdout) == (1, "")
    assert PASSWORD not in done.stderr
    problems = done.stderr.splitlines()
    assert all(problem.startswith("error: ") for problem in problems)
    for expected in (
        f"unknown key in {path}: 'workers.cuont'; did you mean 'workers.count'?",
        f"workers.kv_memory in {path} must be bytes or a size such as '64MiB', not 'much'",
        "EXPERT_PAGER_ROUTER_DRAIN_S must be a number, not 'soon'",
        "--device must be auto, cpu, cuda or cuda:N, not 'tpu'",
        "router.tls_cert is set and router.tls_key is not; TLS takes both",
        f"router.tls_cert 'absent.crt' (from {path}) is not a file that can be read",
        f"model.path '{tmp_path / 'no-model'}' (from MODEL) is not a checkpoint folder",
        "'huge' is not a pool size; write a number of routed experts (32)",
        "router.port and router.metrics_port are both 9464; choose another for one",
    ):
        assert any(expected in problem for problem in problems), (expected, problems)
    assert len(problems) == 9


def test_a_start_names_the_first_problem_and_how_to_see_the_others(run: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "[workers]\ncuont = 1\n[zzz]\n")
    done = run("serve", "--config", path, "model")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "did you mean 'workers.count'?; and 1 more, which `expert-pager config --check` lists" in done.stderr


def test_what_is_printed_says_where_it_comes_from_and_is_itself_a_configuration(
    run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "[workers]\ncount = 3\nmax_waiting = 4\n[model]\nname = 'say \"tiny\"'\n")
    monkeypatch.setenv("EXPERT_PAGER_WORKERS_COUNT", "2")
    monkeypatch.setenv("EXPERT_PAGER_ROUTER_TLS_KEY", "-----BEGIN KEY-----\nprivate\n-----END KEY-----")
    monkeypatch.setenv("REDIS_URL", f"redis://:{PASSWORD}@nowhere")
    done = run("config", "--print", "--config", path, checkpoint, "--max-running", 5)
    assert done.returncode == 1  # half of TLS
    for secret in (PASSWORD, "private"):
        assert secret not in done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for expected in (
        "count = 2 # EXPERT_PAGER_WORKERS_COUNT",
        f"max_waiting = 4 # {path}",
        "max_running = 5 # --max-running",
        f'path = "{checkpoint}" # MODEL',
        'device = "auto" # default',
        "# kv_memory is not set",
        "# REDIS_URL is set in the environment (a secret, not shown)",
    ):
        assert expected in lines

    monkeypatch.delenv("EXPERT_PAGER_ROUTER_TLS_KEY")
    printed = tmp_path / "printed.toml"
    done = run("config", "--print", "--config", path, checkpoint, "--max-running", 5)
    assert (done.returncode, done.stderr) == (0, "")
    printed.write_text(done.stdout)
    overrides = {"model.path": str(checkpoint), "workers.max_running": 5}
    assert load_config(printed) == load_config(path, {"EXPERT_PAGER_WORKERS_COUNT": "2"}, overrides)


def test_options_are_those_of_serve(run: Any, checkpoint: Path) -> None:
    done = run("config", checkpoint, "--wrokers", 2)
    assert done.returncode == 2
    assert "--wrokers" in done.stderr
