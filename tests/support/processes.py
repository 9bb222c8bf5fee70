"""Processes that tests start and look at: `expert-pager` itself, Redis, and what runs below them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.files import ROOT
from tests.support.waiting import until


def command(*arguments: object) -> list[str]:
    """`expert-pager ARGUMENTS`, by this interpreter."""
    return [sys.executable, "-m", "pager.cli", *map(str, arguments)]


def program_of(distribution: str, name: str) -> Path:
    """A program that an installed distribution brings, whether it lies beside this interpreter or not."""
    files = importlib.metadata.files(distribution) or []
    [found] = [each for each in files if each.name == name and each.parent.name == "bin"]
    return Path(found.locate()).resolve()


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of the service, so that a test says all of them."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("EXPERT_PAGER_", "REDIS_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    return own | {"PYTHONPATH": path, "COLUMNS": "200"} | dict(extra or {})


def free_port() -> int:
    """A port that nothing listens on.

    It is none of those that the kernel gives to whoever asks for any: one of these could be taken before it is used.
    """
    for port in (*random.SystemRandom().sample(range(20_000, 30_000), 20), 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise AssertionError("no port is free")


def process_name(process: psutil.Process) -> str:
    """The command line of a process, as far as it has one; empty when the process has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()) or process.name()
    return ""


def worker_pids(owner: int | None = None) -> list[int]:
    """The worker actors of the Ray nodes that a process has started, itself or by the process that is connected to Ray
    on its behalf; this process, unless another is named.

    Those of a service that this process has started as a process of its own are not among them.
    """
    found: list[psutil.Process] = []
    own = psutil.Process(owner).children()
    for child in own:
        with contextlib.suppress(psutil.Error):  # it has ended since
            if "ray_process" in process_name(child):
                own += child.children()
            elif process_name(child).startswith("ray::WorkerActor"):  # it had waited for Ray to start it
                found.append(child)
            elif child.name() == "raylet":
                found += child.children(recursive=True)
    return [each.pid for each in found if process_name(each).startswith("ray::WorkerActor")]


def has_ended(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not waited for yet has ended, too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


@dataclass(frozen=True, slots=True)
class RedisProcess:
    """A redis-server of a test's own, on the loopback interface."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_redis(program: Path, directory: Path, port: int | None = None, *options: str) -> RedisProcess:
    """Returns when the server accepts connections."""
    port = free_port() if port is None else port
    place = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory))
    process = subprocess.Popen([str(program), *place, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, f"redis-server did not start on port {port}, status {process.returncode}"
        with socket.socket() as probe:
            return bool(probe.connect_ex(("127.0.0.1", port)) == 0)

    try:
        until(answers, 60)
    except AssertionError:
        process.kill()
        process.wait()
        raise
    return RedisProcess(process, port)
