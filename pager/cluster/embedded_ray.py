"""An embedded Ray without what a service has no use for, and with patience on a busy machine.

`ray.init` starts a dashboard process, even without a dashboard, an autoscaler, and two agents of the raylet: one
measures its node for the dashboard, one makes environments for jobs. The raylet dies when an agent is not up within
15 s, and `ray.init` gives up on the raylet after 30 s. None of this is a setting. What starts the processes are methods
of a class of Ray's own, which another one replaces while Ray starts.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray._private import node, services

from pager.errors import NotReady

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
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
        start = services.start_ray_process

        def start_without_agents(command: Sequence[str], *more: Any, **options: Any) -> Any:
            return start([_without_agent(word) for word in command], *more, **options)

        services.start_ray_process = start_without_agents
        try:
            super().start_raylet(*arguments, **options)
        finally:
            services.start_ray_process = start

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


def start_embedded(**settings: Any) -> None:
    """`ray.init`. Where Ray can not be started slim, as it may be with another version, it is started as it comes.

    Raises NotReady.
    """
    original, node.Node = node.Node, _EmbeddedNode
    try:
        ray.init(**settings)
        return
    except Exception as error:
        log.warning("Ray does not start without its dashboard and agents; starting it with them: %s", error)
    finally:
        node.Node = original
    try:
        ray.init(**settings)
    except Exception as error:
        raise NotReady(f"Ray does not start: {error}; is the machine overloaded?", retry_after_s=1.0) from error


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


def _without_agent(word: str) -> str:
    return next((flag + STAND_IN for flag in AGENT_FLAGS if word.startswith(flag)), word)
