"""serve as a process: ready, calls from the command line, a clean stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pager.config import load_config
from pager.errors import PortInUse
from router_service.app import serve

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def serving(checkpoint: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and what its ready line says. Killed if it is still there at the end."""
    arguments = [
        str(checkpoint),
        "--port",
        "0",
        "--http-port",
        "0",
        "--metrics-port",
        "0",
        "--device",
        "cpu",
        "--json",
        *options,
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pager.cli", "serve", *arguments],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        assert line, log.read_text()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def service(ray_runtime: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ("--dtype", "float32", "--expert-memory", "50%", "--pool", "4", "--name", "tiny")
    with serving(checkpoint, log, *options) as (process, ready):
        yield ready
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()


def test_ready_says_what_and_where(service: dict[str, Any]) -> None:
    assert (service["model"], service["workers"]) == ("tiny", 1)
    assert service["plan"]["num_slots"] == 12
    with urllib.request.urlopen(service["metrics_url"], timeout=10) as reply:
        assert b"expert_pager_router_requests_in_flight 0.0" in reply.read()


def test_the_service_answers_as_the_library_does(run: Run, checkpoint: Path, service: dict[str, Any]) -> None:
    options = ("--pool", 4, "--max-tokens", 10, "--ignore-eos", "--json")
    remote = run("generate", "def f(x):", "--server", service["address"], *options)
    local = run("generate", "def f(x):", "--model", checkpoint, "--dtype", "float32", "--device", "cpu", *options)
    assert remote.returncode == 0, remote.stderr
    here, there = json.loads(local.stdout), json.loads(remote.stdout)
    assert there["token_ids"] == here["token_ids"]
    assert there["text"] == here["text"]
    assert there["usage"]["pool"]["digest"] == here["usage"]["pool"]["digest"]
    assert there["usage"]["predicted_recall"] is not None


def test_the_default_pool_and_length_are_the_services(run: Run, service: dict[str, Any]) -> None:
    done = run("generate", "x" * 120, "--server", service["address"], "--ignore-eos", "--json")
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)["usage"]
    assert usage["pool"]["num_experts"] == 12
    assert usage["completion_tokens"] == 8  # what is left of a context of 128


def test_a_pool_is_asked_for_again_by_its_digest(run: Run, service: dict[str, Any]) -> None:
    options = ("--server", service["address"], "--max-tokens", 2, "--ignore-eos", "--json")
    first = json.loads(run("generate", "select a from b", *options).stdout)["usage"]["pool"]
    done = run("generate", "a quite different prompt", "--pool-digest", first["digest"], *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["pool"]["layers"] == first["layers"]


def test_route_names_a_worker(run: Run, service: dict[str, Any]) -> None:
    done = run("route", "def f(x):", "--server", service["address"], "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [len(layer) for layer in found["pool"]["layers"]] == [4, 4, 4]
    assert found["placement"]["worker"]


def test_a_pool_made_from_examples_is_named(run: Run, service: dict[str, Any], tmp_path: Path) -> None:
    examples = tmp_path / "sql.jsonl"
    examples.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("SELECT a", "FROM b")))
    at = ("--server", service["address"], "--tenant", "t")
    make = ("calibrate", "--name", "sql", "--examples", examples, *at)
    done = run(*make, "--pool", 3, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["method"], made["num_examples"], made["num_tokens"]) == ("trunk", 2, 14)
    used = run("generate", "hello", "--pool-name", "sql", "--max-tokens", 2, "--ignore-eos", *at, "--json")
    assert used.returncode == 0, used.stderr
    assert json.loads(used.stdout)["usage"]["pool"]["layers"] == made["pool"]["layers"]
    assert json.loads(run("pools", "list", *at, "--json").stdout)["pools"] == [made]
    for arguments, message in {
        make: "[ALREADY_EXISTS]",
        ("generate", "hello", "--pool-name", "sql", "--server", service["address"]): "[NOT_FOUND]",
        (*make, "--method", "greedy", "--replace"): "these are: trunk",
    }.items():
        done = run(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr
    assert run("pools", "delete", "sql", *at).returncode == 0
    assert json.loads(run("pools", "list", *at, "--json").stdout)["pools"] == []


def test_bytes_counts_and_drift_reach_the_worker(run: Run, service: dict[str, Any]) -> None:
    options = ("--server", service["address"], "--max-tokens", 6, "--ignore-eos", "--json")
    for size, num_experts in (("54KiB", 9), ("2,3,4", 9)):
        done = run("generate", "hello", "--pool", size, *options)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["usage"]["pool"]["num_experts"] == num_experts
    done = run("generate", "hello", "--pool", 3, "--drift", "0.01:exact:1", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["drift"]["exact_from"] is not None


def test_refusals_are_one_line_and_the_next_request_works(run: Run, service: dict[str, Any]) -> None:
    for options, message in {
        ("x" * 200,): "[INVALID_ARGUMENT]",
        ("hi", "--pool", "1"): "smaller than the 2",
        ("hi", "--pool-digest", "0" * 24): "[NOT_FOUND]",
        ("hi", "--timeout", "0.000001"): "[DEADLINE_EXCEEDED]",
        ("hi", "--tenant", "no spaces"): "x-tenant-id",
    }.items():
        done = run("generate", *options, "--server", service["address"])
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr
    assert run("generate", "hi", "--max-tokens", 1, "--server", service["address"]).returncode == 0


@pytest.mark.parametrize(
    "key", ["router.port", "router.metrics_port", "router.health_port", "workers.metrics_port", "the second worker's"]
)
def test_a_port_that_another_program_has_is_named_before_ray_starts(checkpoint: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"router.port": 0, "router.http_port": 0, "router.metrics_port": 0}
        if key == "the second worker's":
            key, ports = "workers.metrics_port", ports | {"workers.metrics_port": port - 1, "workers.count": 2}
        else:
            ports[key] = port
        config = load_config(overrides={"model.path": str(checkpoint), **ports})
        named = f"({port - 1}|{port})"  # somebody may have the first worker's
        with pytest.raises(PortInUse, match=rf"port {named} on 127\.0\.0\.1 is in use; choose another \({key}\)"):
            asyncio.run(serve(config, {}, lambda ready: pytest.fail("it is ready")))
    assert not ray.is_initialized()


def test_a_start_that_can_not_be_is_one_line(process: Run, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = process("serve", checkpoint, "--port", port, "--http-port", 0, "--metrics-port", 0)
        assert (done.returncode, done.stderr.count("error:")) == (1, 1), done.stderr
        assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    config = tmp_path / "service.toml"
    config.write_text("[router]\nprot = 1\n")
    done = run("serve", checkpoint, "--config", config)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "did you mean 'router.port'?" in done.stderr
    for arguments, message in {
        (tmp_path / "absent",): "is not a directory",
        (checkpoint, "--predictor", "fitted"): "make it with `expert-pager fit-router",
        (checkpoint, "--router", "best"): "one of auto, lexical, trunk, fitted, prefill, not 'best'",
        (checkpoint, "--predictor", "prefill", "--pool", "32KiB"): "would have no effect",
        (checkpoint, "--pools", checkpoint / "config.json"): "cannot be written",
    }.items():
        done = run("serve", *arguments, "--device", "cpu", "--port", 0, "--http-port", 0, "--metrics-port", 0)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr


@pytest.mark.usefixtures("ray_runtime")
def test_a_default_pool_that_no_worker_has_room_for_is_one_line(process: Run, checkpoint: Path) -> None:
    ports = ("--port", 0, "--http-port", 0, "--metrics-port", 0)
    done = process("serve", checkpoint, "--expert-memory", "25%", "--pool", "4", "--device", "cpu", *ports)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs 12 expert slots and this worker has 6" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("ray_runtime")
def test_interrupting_serve_is_clean(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(checkpoint, log, "--expert-memory", "50%", "--predictor", "prefill") as (process, _):
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert not [name for name in ("libtorch", "_raylet.so") if name in mapped], "this router runs no trunk"
        assert psutil.Process(process.pid).memory_info().rss < 120 * 2**20
        processes = psutil.Process(process.pid).children(recursive=True)
        [worker] = [each for each in processes if "ray::WorkerActor" in " ".join(each.cmdline())]
        mapped = Path(f"/proc/{worker.pid}/maps").read_text()
        assert ("libtorch" in mapped, "/scipy/" in mapped) == (True, False)
        commands = [" ".join(each.cmdline()) for each in processes]
        assert "ray_process" in " ".join(psutil.Process(worker.ppid()).cmdline()), "it had waited for Ray to start it"
        assert not [each for each in commands if "NodeControl" in each or "log_monitor" in each], "both are in one"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert "Traceback" not in log.read_text()
