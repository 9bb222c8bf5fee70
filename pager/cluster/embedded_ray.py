"""An embedded Ray without what a service has no use for, without its secrets, and with patience on a busy machine.

`ray.init` starts a dashboard process, even without a dashboard, an autoscaler, and two agents of the raylet: one
measures its node for the dashboard, one makes environments for jobs. The raylet dies when an agent is not up within
15 s, and `ray.init` gives up on the raylet after 30 s. None of this is a setting. What starts the processes are methods
of a class of Ray's own, which another one replaces while Ray starts, and a function, which is replaced as well: each
process would inherit the whole environment, and pass it on to the workers.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

import psutil
import ray
from ray._private import node, services

from pager.errors import NotReady

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
# Settings of Ray's own, unless the environment sets them. Its memory monitor kills a worker when the machine is full,
# whoever filled it; what a worker takes is bounded by its plan. Task events are a record of every call of an actor,
# which the GCS keeps. A GCS that was lost ends the service in an orderly way, instead of each process by itself. Ray
# reads a message before it looks at its token, so messages are bounded: those of actors are small.
SYSTEM_CONFIG = {
    "memory_monitor_refresh_ms": 0,
    "task_events_report_interval_ms": 0,
    "gcs_rpc_server_reconnect_timeout_s": 86_400,
    "max_grpc_message_size": 16 * 2**20,
}
LOG_MONITOR_FILES = "RAY_LOG_MONITOR_MAX_OPEN_FILES"  # it keeps those of dead workers open until it has so many
# Names of variables that hold a secret; Ray's own and OpenTelemetry's are for its processes and the workers.
SECRET_NAME = re.compile(r"(?!RAY_|OTEL_)(.*_)?(PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIALS?|KEY)(_.*)?", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\w+://[^/\s]*:[^/\s]*@")  # a URL with a password
REDIS = ("REDIS_URL", "REDIS_URL_FILE")
DAEMONS = ("gcs_server", "raylet")
AGENTS = ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT")
AGENT_FLAGS = ("--dashboard_agent_command=", "--runtime_env_agent_command=")
STAND_IN = "cat"  # the raylet dies with an agent and holds the pipe to its standard input: this ends with the raylet


class _EmbeddedNode(node.Node):  # type: ignore[misc]
    def start_monitor(self) -> None:
        """No autoscaler: there is one node."""

    def start_api_server(self, **_: Any) -> None:
        """No dashboard."""

    def start_raylet(self, *arguments: Any, **options: Any) -> None:
        """No agents. Where the raylet looks for their ports it finds what Ray writes for one that is not in use."""
        raylet: Any = ray._raylet
        for agent in AGENTS:
            raylet.persist_port(self._session_dir, self._node_id, getattr(raylet, f"{agent}_PORT_NAME"), -1)
        with _starting_processes(without_agents=True):
            super().start_raylet(*arguments, **options)

    def start_ray_processes(self) -> None:
        """Returns when the raylet has registered, so that Ray's own 30 s begin when there is nothing to wait for."""
        try:
            super().start_ray_processes()
            self._await_raylet()
        except BaseException:
            self.kill_all_processes(check_alive=False, wait=True)  # Ray would leave them behind
            raise

    def _await_raylet(self) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                services.get_node(self.gcs_address, self._node_id)
                return
            except RuntimeError as error:
                if time.monotonic() > end_s or not self.remaining_processes_alive():
                    raise TimeoutError(f"Ray's processes are not up: {error}") from error
                time.sleep(POLL_S)


def start_embedded(*, max_log_files: int = 200, **settings: Any) -> None:
    """`ray.init` of a new cluster, whatever RAY_ADDRESS names. Where Ray cannot be started slim, as it may be with
    another version, it is started as it comes.

    `max_log_files` is how many files of its workers' output it has open at a time. Raises NotReady.
    """
    config = {name: value for name, value in SYSTEM_CONFIG.items() if f"RAY_{name}" not in os.environ}
    changes = dict.fromkeys(secrets_in(os.environ), "") | {LOG_MONITOR_FILES: str(max_log_files)}
    original, node.Node = node.Node, _EmbeddedNode
    try:
        with _starting_processes(changes):
            ray.init("local", **settings, _system_config=config)
        return
    except Exception as error:
        log.warning("Ray does not start without its dashboard and agents; starting it with them: %s", error)
    finally:
        node.Node = original
    try:
        with _starting_processes(changes):
            ray.init("local", **settings)
    except Exception as error:
        raise NotReady(f"Ray does not start: {error}; is the machine overloaded?", retry_after_s=1.0) from error


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that hold a secret which no process of Ray's needs."""
    return [
        name
        for name, value in environment.items()
        if name in REDIS or SECRET_NAME.fullmatch(name) or SECRET_VALUE.match(value)
    ]


@contextmanager
def _starting_processes(
    changes: Mapping[str, str] = MappingProxyType({}), *, without_agents: bool = False
) -> Iterator[None]:
    """Inside, each process of Ray's that is started has `changes` in its environment."""
    start = services.start_ray_process

    def start_changed(command: Sequence[str], *more: Any, **options: Any) -> Any:
        words = [_without_agent(word) for word in command] if without_agents else command
        environment = {**(options.pop("env_updates", None) or {}), **changes}
        return start(words, *more, env_updates=environment, **options)

    services.start_ray_process = start_changed
    try:
        yield
    finally:
        services.start_ray_process = start


def daemons() -> dict[str, int]:
    """The processes that this embedded cluster cannot do without: their names, and their numbers as children."""
    own = ray._private.worker._global_node
    return {name: own.all_processes[name][0].process.pid for name in DAEMONS}


def stop_ray() -> None:
    """`ray.shutdown`, and the end of every process that this one had started, which Ray does not always wait for."""
    own = ray._private.worker._global_node
    started = [each.process for kind in own.all_processes.values() for each in kind] if own is not None else []
    ray.shutdown()
    for process in started:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("Ray's process %d is still there %g s after its end was asked for", process.pid, STOP_TIMEOUT_S)


def kill_ray() -> None:
    """Ends an embedded cluster that has lost a daemon: every process, at once, since nothing answers any more.

    Workers end with their raylet, whether it was lost or is killed here. `ray.shutdown` would wait for the lost one.
    """
    own = ray._private.worker._global_node
    started = [each.process for kind in own.all_processes.values() for each in kind]
    workers = [process for process in psutil.process_iter() if _is_worker_of(daemons()["raylet"], process)]
    for process in started:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=STOP_TIMEOUT_S)
    for process in alive:
        log.warning("Ray's process %d outlived its raylet; killing it", process.pid)
        with suppress(psutil.Error):
            process.kill()


def _is_worker_of(raylet: int, process: psutil.Process) -> bool:
    """A worker knows its raylet; when that is gone it is nobody's child."""
    try:
        return bool(process.environ().get("RAY_RAYLET_PID") == str(raylet))
    except psutil.Error:
        return False


def _without_agent(word: str) -> str:
    return next((flag + STAND_IN for flag in AGENT_FLAGS if word.startswith(flag)), word)
