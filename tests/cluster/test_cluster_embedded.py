"""The embedded Ray, without a model: what its processes are given, what it keeps, and what a killed one leaves."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from ray._private import services

from pager.cluster import ray_session
from pager.cluster.ray_process import secrets_in
from pager.cluster.ray_session import FOLDER_PREFIX, LOCK, find_cluster
from pager.errors import ConfigError

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
MIB = 2**20

# Answers a line of JSON to each word on its standard input.
PROGRAM = """
import json, sys
import ray
from pager.cluster.ray_session import RaySession

@ray.remote(max_restarts=0)
class Actor:  # with task events, unless the cluster has none
    def call(self):
        return None

def start():
    actor = Actor.remote()
    ray.get(actor.call.remote())
    return actor

session = RaySession.open(None, "embedded")
actor = start()
address = ray.get_runtime_context().gcs_address
answer = {"folder": str(session.folder.path), "daemons": session.daemons, "address": address}
while True:
    print(json.dumps(answer), flush=True)
    match sys.stdin.readline().split():
        case ["calls", count]:
            for _ in range(int(count) // 500):
                ray.get([actor.call.remote() for _ in range(500)])
        case ["replace", count]:
            for _ in range(int(count)):
                ray.kill(actor)
                actor = start()
        case _:
            break
    answer = {}
session.close()
"""

# Prints what `open` came to, a line for each address on its command line.
JOINS = """
import json, os, sys
import ray
from pager.cluster.ray_session import RaySession
from pager.config import load_config
from pager.errors import ConfigError

for given in sys.argv[1:]:
    setting, _, variable = given.partition(" ")
    os.environ["RAY_ADDRESS"] = variable
    overrides = {"model.path": "model", "cluster.ray_address": setting or None}
    try:
        session = RaySession.open(load_config(env=os.environ, overrides=overrides).cluster.joined, "joins")
    except ConfigError as error:
        print(json.dumps(error.message), flush=True)
        continue
    print(json.dumps([ray.get_runtime_context().gcs_address, session.folder is None]), flush=True)
    session.close()
"""


class Embedded:
    """A process with an embedded Ray."""

    def __init__(self, temp: Path, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONPATH": PATH, "TMPDIR": str(temp)} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started = self._answer()
        self.folder, self.daemons = Path(started["folder"]), started["daemons"]
        self.address: str = started["address"]

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()}"
        return dict(json.loads(line))

    def processes(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def kill(self) -> None:
        """SIGKILL, and returns when Ray's processes have followed."""
        left = self.processes()
        self.process.kill()
        self.process.communicate()
        _, alive = psutil.wait_procs(left, timeout=60)
        assert alive == []

    def end(self) -> None:
        self.process.communicate("end\n", timeout=60)
        assert self.process.returncode == 0


@pytest.fixture
def start(ray_runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Embedded]]:
    started: list[Embedded] = []

    def make(**env: str) -> Embedded:
        started.append(Embedded(Path("/tmp"), **env))
        return started[-1]

    yield make
    for each in started:
        if each.process.poll() is None:
            left = [psutil.Process(each.process.pid), *each.processes()]
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            each.process.communicate()


SECRETS = {
    "REDIS_URL": "redis://:s3cret@redis/0",
    "REDIS_URL_FILE": "/run/s3cret",
    "HF_TOKEN": "s3cret",
    "AWS_SECRET_ACCESS_KEY": "s3cret",
    "LEDGER_DSN": "postgres://ledger:s3cret@host/db",
}


def test_secrets_are_known_by_name_or_value_and_what_workers_need_is_none() -> None:
    needed = {
        "PATH": "/bin",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_TOKEN": "t",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=t",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317",
        "MONKEYS": "three",
        "HTTP_PROXY": "http://proxy:3128",
    }
    assert secrets_in(SECRETS | needed) == list(SECRETS)


def test_its_processes_get_no_secrets_and_its_folder_is_private_and_goes_with_it(
    start: Callable[..., Embedded],
) -> None:
    ray = start(**SECRETS)
    for process in ray.processes():
        with suppress(psutil.NoSuchProcess):
            assert "s3cret" not in " ".join(process.environ().values()), process.cmdline()
    environment = psutil.Process(ray.daemons["raylet"]).environ()  # that of the workers which it starts
    assert (environment["MALLOC_ARENA_MAX"], environment["RAY_worker_niceness"]) == ("1", "0")
    assert ray.folder.stat().st_mode & 0o777 == 0o700, "whatever is below it"
    assert ray.folder.stat().st_uid == os.geteuid()
    daemons = [" ".join(psutil.Process(pid).cmdline()) for pid in ray.daemons.values()]
    assert [name in line for name, line in zip(ray.daemons, daemons, strict=True)] == [True, True]
    ray.end()
    assert not ray.folder.exists()


def test_calls_leave_nothing_in_the_gcs_a_full_machine_kills_no_worker_and_a_dead_one_keeps_no_file_open(
    start: Callable[..., Embedded],
) -> None:
    """With a record of each call the GCS grows by 1 KiB a call."""
    ray = start(RAY_memory_usage_threshold="0.01")  # to Ray the machine is full
    gcs = psutil.Process(ray.daemons["gcs_server"])
    (config,) = (word for word in gcs.cmdline() if word.startswith("--config_list="))
    assert json.loads(base64.b64decode(config.partition("=")[2]))["local_fs_capacity_threshold"] == 1, "nor of disks"
    ray.do("calls 5000")
    before = gcs.memory_info().rss
    ray.do("calls 25000")
    time.sleep(2)  # workers report once a second what they have to report
    assert gcs.memory_info().rss - before < 8 * MIB
    assert gcs.memory_info().rss < 150 * MIB

    assert not [each for each in ray.processes() if "log_monitor" in " ".join(each.cmdline())]
    log_monitor = psutil.Process(ray.process.pid)  # in a thread
    ray.do("replace 16")
    most, end_s = 0, time.monotonic() + 3
    while time.monotonic() < end_s:  # it looks for files ten times a second
        open_logs = [each for each in log_monitor.open_files() if "/worker-" in each.path]
        most = max(most, len(open_logs))
        time.sleep(0.1)
    assert most <= 4, "of 17 workers, two files each"
    ray.end()


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_what_others_have_is_not(
    start: Callable[..., Embedded],
) -> None:
    killed, living = start(), start()
    killed.kill()
    assert killed.folder.is_dir()
    foreign = Path("/tmp") / f"{FOLDER_PREFIX}no-lock-{os.getpid()}"
    foreign.mkdir()
    try:
        third = start()
        assert not killed.folder.exists()
        assert living.folder.is_dir()
        assert foreign.is_dir(), "nothing says that it is ours"
        assert (third.folder / LOCK).is_file()
        living.do("calls 500")
        living.end()
        third.end()
    finally:
        foreign.rmdir()


def test_of_two_clusters_on_a_machine_the_one_that_is_named_is_joined_and_an_unnamed_one_never(
    start: Callable[..., Embedded],
) -> None:
    first, second = start(), start()
    ways = {
        first.address: first.address,
        second.address: second.address,
        f"localhost:{second.address.rpartition(':')[2]}": second.address,
        f" {first.address}": first.address,  # RAY_ADDRESS
        f"auto {second.address}": second.address,
        f"{first.address} {second.address}": first.address,
    }
    none = ["auto", "127.0.0.1:9", "", f"local {first.address}"]
    done = subprocess.run(
        [sys.executable, "-c", JOINS, *ways, *none],
        env=os.environ | {"PYTHONPATH": PATH, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    joined = [json.loads(line) for line in done.stdout.splitlines()]
    assert joined[: len(ways)] == [[address, True] for address in ways.values()], done.stderr
    ambiguous, absent, *own = joined[len(ways) :]
    assert "'auto' (cluster.ray_address) is ambiguous" in ambiguous
    assert first.address in ambiguous
    assert second.address in ambiguous
    assert "no Ray cluster answers at '127.0.0.1:9'" in absent
    assert [is_joined for _, is_joined in own] == [False, False]
    assert not {address for address, _ in own} & {first.address, second.address}
    first.end()
    second.end()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "finds no Ray cluster on this machine"),
        (
            ["127.0.0.1:9", "127.0.0.1:10"],
            "is ambiguous: 2 Ray clusters run on this machine, 127.0.0.1:10, 127.0.0.1:9",
        ),
    ],
)
def test_auto_names_the_only_cluster_of_the_machine_or_none(
    monkeypatch: pytest.MonkeyPatch, found: list[object] | list[str], message: str
) -> None:
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: set(found))
    with pytest.raises(ConfigError, match=message):
        find_cluster("auto")


def test_a_service_of_another_kind_is_no_cluster_and_neither_is_one_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: {f"127.0.0.1:{port}"})
    try:
        for address in (f"127.0.0.1:{port}", "auto"):
            with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.* is not a Ray cluster \(UNIMPLEMENTED\)"):
                find_cluster(address)
    finally:
        server.stop(0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(ray_session, "ANSWER_TIMEOUT_S", 0.5)
        with pytest.raises(ConfigError, match="no Ray cluster answers at"):
            find_cluster(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_start_without_room_for_ray_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for its processes for minutes."""
    ray_session._check_room(tmp_path)
    monkeypatch.setattr(ray_session, "ROOM_BYTES", 2**60)
    with pytest.raises(ConfigError, match=rf"{tmp_path} has .* free, and Ray needs .* there for .* set TMPDIR to"):
        ray_session._check_room(tmp_path)
