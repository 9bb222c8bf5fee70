"""This process's connection to Ray, to an embedded cluster or an existing one, and the forwarding of what Ray logs."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import grpc
import psutil
import ray
from ray._private import node, services
from ray._private.log_monitor import LogMonitor, is_proc_alive
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from pager.cluster.ray_process import secrets_in
from pager.cluster.spare import Spares
from pager.errors import ConfigError, NotReady
from pager.memory import format_bytes
from pager.observe import logs
from pager.store.appearing import create_owned, remove_abandoned

log = logging.getLogger("expert_pager.ray")

HANDLER = "ray_print_logs"  # the name of Ray's own handler
LOGGED_DAEMONS = ("raylet", "gcs_server", "autoscaler")  # these names stand where a process id is expected
END_OF_A_WORKER = "A worker died or was killed"  # the worker's supervisor reports this, and whether it was intended
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def pass_on(kind: str) -> None:
    """Writes Ray's messages as log lines of `kind` ("json" or "text") on standard error. Called before and after
    `ray.init`.

    Ray installs its own handler when it connects. Errors of its daemons have no handler: a function prints them.
    """
    own = logging.getLogger("ray")
    own.handlers.clear()
    own.propagate = True
    handler = functools.partial(_pass_on, kind)
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: handler(data)
    global_worker_stdstream_dispatcher.remove_handler(HANDLER)
    global_worker_stdstream_dispatcher.add_handler(HANDLER, handler)


def _pass_on(kind: str, batch: Mapping[str, Any]) -> None:
    for coloured in batch["lines"]:
        line = _COLOURS.sub("", coloured)
        if batch.get("pid") in LOGGED_DAEMONS:
            level = logging.DEBUG if line.startswith(END_OF_A_WORKER) else logging.WARNING
            log.log(level, "Ray's %s: %s", batch["pid"], " ".join(line.split()))
        elif kind == "text" or is_object(line):
            sys.stderr.write(f"{line}\n")  # one write: between the two writes of `print` another thread may log a line
            sys.stderr.flush()
        elif line.strip():
            named = batch.get("actor_name") or batch.get("task_name") or ""
            log.info("%s", line, extra=logs.facts(actor=named or None, pid=batch.get("pid")))


def is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# where workers.per_node is set, a node has this resource once for each worker that it takes
WORKER_RESOURCE = "expert_pager_worker"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.02
LOG_POLL_S = 0.1
ROOM_BYTES = 8 * 2**20  # of disk, for sockets and logs; they take 0.2 MiB at first
# Ray's own settings, unless the environment sets them. Its memory monitor kills a worker when the machine's memory is
# full, whichever process filled it; a worker's memory is bounded by its plan instead. Task events would be a record of
# every call of an actor, kept by the GCS. A lost GCS ends the service in an orderly way, instead of each process by
# itself. Ray reads a message before it checks its token, so messages are bounded: those of actors are small. Nothing is
# spilled to disk, so that Ray need not warn of a disk that is nearly full, every ten seconds. A raylet tries its object
# store and a worker its raylet before they listen, and then again: for ten seconds, but not once a second.
SYSTEM_CONFIG = {
    "memory_monitor_refresh_ms": 0,
    "task_events_report_interval_ms": 0,
    "gcs_rpc_server_reconnect_timeout_s": 86_400,
    "max_grpc_message_size": 16 * 2**20,
    "local_fs_capacity_threshold": 1.0,
    "raylet_client_connect_timeout_milliseconds": 20,
    "raylet_client_num_connect_attempts": 500,
}
# the log monitor keeps files of dead workers open up to this number
LOG_MONITOR_FILES = "RAY_LOG_MONITOR_MAX_OPEN_FILES"
DAEMONS = ("gcs_server", "raylet")
AGENTS = ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT")
AGENT_FLAGS = ("--dashboard_agent_command=", "--runtime_env_agent_command=")
# The raylet ends with its agents and holds the pipe to their standard input; `cat` ends when the raylet does.
STAND_IN = "cat"


class _EmbeddedNode(node.Node):  # type: ignore[misc]
    def __init__(
        self, ray_params: Any, *arguments: Any, max_log_files: int = 200, worker_path: str | None = None, **options: Any
    ) -> None:
        self._max_log_files = max_log_files
        self._ends = threading.Event()
        ray_params.worker_path = worker_path
        super().__init__(ray_params, *arguments, **options)

    def start_log_monitor(self) -> None:
        """Starts a thread instead of Ray's process, which has some 60 MiB of its own."""
        logging.getLogger("ray._private.log_monitor").setLevel(logging.CRITICAL)  # Ray's process has a file for these
        threading.Thread(target=self._follow_logs, name="ray logs", daemon=True).start()

    def _follow_logs(self) -> None:
        """Publishes what the workers and Ray's daemons write, as Ray's own process does.

        That process keeps files open and looks at those of dead workers for ever; here none stays open, and a dead
        worker's are left when they have been read to their end.
        """
        monitor = LogMonitor(
            self.node_ip_address, self._logs_dir, self.get_gcs_client(), lambda _: True, self._max_log_files
        )
        looked_s = 0.0
        try:
            while not self._ends.wait(LOG_POLL_S):
                writers = {info.worker_pid for info in monitor.closed_file_infos}
                ended = {pid for pid in writers if isinstance(pid, int) and not is_proc_alive(pid)}
                if monitor.should_update_filenames(looked_s):
                    monitor.update_log_filenames()
                    looked_s = time.time()
                monitor.open_closed_files()
                while monitor.check_log_files_and_publish_updates():
                    pass
                monitor._close_all_files()
                monitor.closed_file_infos = [info for info in monitor.closed_file_infos if info.worker_pid not in ended]
        except Exception as error:
            if not self._ends.is_set():
                log.warning("the workers' log lines are not shown any more: %r", error)

    def kill_all_processes(self, *arguments: Any, **options: Any) -> None:
        self._ends.set()
        super().kill_all_processes(*arguments, **options)

    def start_monitor(self) -> None:
        """Starts no autoscaler: there is one node."""

    def start_api_server(self, **_: Any) -> None:
        """Starts no dashboard."""

    def start_raylet(self, *arguments: Any, **options: Any) -> None:
        """Starts the raylet without agents. Where it looks for their ports, it finds the value that Ray writes for an
        unused one.
        """
        raylet: Any = ray._raylet
        for agent in AGENTS:
            raylet.persist_port(self._session_dir, self._node_id, getattr(raylet, f"{agent}_PORT_NAME"), -1)
        with _starting_processes(without_agents=True):
            super().start_raylet(*arguments, **options)

    def start_ray_processes(self) -> None:
        """Returns when the raylet has registered: Ray's own limit of 30 s begins with nothing left to wait for."""
        try:
            super().start_ray_processes()
            self._await_raylet()
        except BaseException:
            self.kill_all_processes(check_alive=False, wait=True)  # Ray would leave these processes behind
            raise

    def _await_raylet(self) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_registered():
            if time.monotonic() > end_s or not self.remaining_processes_alive():
                raise TimeoutError("Ray's processes did not start")
            time.sleep(POLL_S)

    def _is_registered(self) -> bool:
        """Asks the GCS for all nodes: where one is not there yet, asking for it alone takes a second."""
        try:
            nodes = self.get_gcs_client().get_all_node_info(timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return False
        return any(node_id.hex() == self._node_id for node_id in nodes)


def start_embedded(*, max_log_files: int = 200, spares: Spares | None = None, **settings: Any) -> None:
    """Calls `ray.init` for a new cluster, whatever RAY_ADDRESS names.

    Where this version of Ray cannot be started without its dashboard and agents, it is started with them.
    `max_log_files` is the number of its workers' output files that it may hold open at a time; its first workers are
    the `spares`. Raises NotReady.
    """
    config = {name: value for name, value in SYSTEM_CONFIG.items() if f"RAY_{name}" not in os.environ}
    changes = dict.fromkeys(secrets_in(os.environ), "") | {LOG_MONITOR_FILES: str(max_log_files)}
    worker_path = None if spares is None else spares.offer(Path(settings["_temp_dir"]))
    make_node = functools.partial(_EmbeddedNode, max_log_files=max_log_files, worker_path=worker_path)
    original, node.Node = node.Node, make_node
    try:
        with _starting_processes(changes):
            ray.init("local", **settings, _system_config=config)
        return
    except Exception as error:
        log.warning("Ray did not start without its dashboard and agents; starting it with them: %s", error)
    finally:
        node.Node = original
    if spares is not None:
        spares.end()  # they wait for the Ray that did not start
    try:
        with _starting_processes(changes):
            ray.init("local", **settings)
    except Exception as error:
        raise NotReady(f"Ray did not start: {error}; is the machine overloaded?", retry_after_s=1.0) from error


@contextmanager
def _starting_processes(
    changes: Mapping[str, str] = MappingProxyType({}), *, without_agents: bool = False
) -> Iterator[None]:
    """Inside this context, each process that Ray starts has `changes` in its environment."""
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
    """Returns the names and process ids of the processes that this embedded cluster cannot do without."""
    own = ray._private.worker._global_node
    return {name: own.all_processes[name][0].process.pid for name in DAEMONS}


def stop_ray() -> None:
    """Calls `ray.shutdown` and ends every process that Ray had started, for which Ray does not always wait."""
    own = ray._private.worker._global_node
    started = [each.process for kind in own.all_processes.values() for each in kind] if own is not None else []
    ray.shutdown()
    for process in started:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("Ray's process %d is still running %g s after it was told to end", process.pid, STOP_TIMEOUT_S)


def kill_ray() -> None:
    """Kills every process of an embedded cluster that has lost a daemon, at once, since nothing answers any more.

    Workers end with their raylet, whether it was lost or is killed here. `ray.shutdown` would wait for the lost daemon.
    """
    own = ray._private.worker._global_node
    if isinstance(own, _EmbeddedNode):
        own._ends.set()
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
    """Tells whether a process is a worker of this raylet; once the raylet is gone, its workers are no process's
    children.
    """
    try:
        return bool(process.environ().get("RAY_RAYLET_PID") == str(raylet))
    except psutil.Error:
        return False


def _without_agent(word: str) -> str:
    return next((flag + STAND_IN for flag in AGENT_FLAGS if word.startswith(flag)), word)


# Tokens and weights never go through the object store; this is about the least that Ray accepts.
OBJECT_STORE_BYTES = 80 * 2**20
LOOPBACK = "127.0.0.1"
ANSWER_TIMEOUT_S = 10.0
TOKEN_HELP = (
    "a cluster that requires a token needs RAY_AUTH_MODE=token and its token, in RAY_AUTH_TOKEN or ~/.ray/auth_token"
)
FOLDER_PREFIX = "expert-pager-"
LOCK = "owner.lock"  # in the session's folder: held by the process that made it
LOG_FILES_OF_A_WORKER = 4  # standard output and standard error, of the running worker and of one that has died
OTHER_LOG_FILES = 16


@dataclass(frozen=True, slots=True)
class RaySession:
    """The connection to Ray. Workers listen on `bind_host`: the loopback if all are on this machine; None means their
    node's address.
    """

    bind_host: str | None
    owns_ray: bool
    folder: _Folder | None
    # Of an embedded cluster: the daemons it cannot do without, and their process ids.
    daemons: Mapping[str, int] = field(default_factory=dict)
    spares: Spares = field(default_factory=Spares)

    @classmethod
    def open(
        cls, address: str | None, namespace: str, num_workers: int = 1, spares: Spares | None = None
    ) -> RaySession:
        """Connects, which takes seconds; a connected process stays so. The first workers of an embedded cluster are
        the `spares`. Raises ConfigError or NotReady.
        """
        # The signals are the service's own, so Ray is started from another thread, about which it warns.
        logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())
        if ray.is_initialized():
            return cls(LOOPBACK if address is None else None, owns_ray=False, folder=None)
        if address is not None:
            find_cluster(address)
        if address is None or address.startswith((f"{LOOPBACK}:", "localhost:")):
            _keep_to_loopback()
        if address is not None:
            try:
                ray.init(address=address, namespace=namespace, log_to_driver=True, logging_level=logging.WARNING)
            except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
                raise ConfigError(f"cannot join the Ray cluster at {address!r}: {error}; {TOKEN_HELP}") from error
            return cls(None, owns_ray=True, folder=None)
        # The warning only says that an embedded cluster requires a token, which is intended.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        base = _base()
        remove_abandoned(base.glob(f"{FOLDER_PREFIX}*/{LOCK}"), lambda lock: shutil.rmtree(lock.parent))
        _check_room(base)
        folder, spares = _Folder.make(), spares or Spares()
        try:
            start_embedded(
                spares=spares,
                max_log_files=LOG_FILES_OF_A_WORKER * (num_workers + 1) + OTHER_LOG_FILES,
                namespace=namespace,
                num_cpus=max(1, num_workers),  # also how many processes Ray starts in advance
                resources={WORKER_RESOURCE: max(1, num_workers)},
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.WARNING,
                _temp_dir=str(folder.path / "ray"),
            )
        except BaseException:
            folder.remove()
            raise
        # Ray sends no token to an address given explicitly unless it is told to.
        join = "RAY_AUTH_MODE=token and --ray-address"
        log.info("embedded Ray at %s; others join it with %s", ray.get_runtime_context().gcs_address, join)
        return cls(LOOPBACK, owns_ray=True, folder=folder, daemons=daemons(), spares=spares)

    def close(self, *, is_lost: bool = False) -> None:
        """Ends what `open` started and removes the logs of an embedded cluster.

        With `is_lost`, one of the cluster's daemons has ended: this process can neither use Ray any more nor shut it
        down.
        """
        if is_lost:
            kill_ray()
        elif self.owns_ray:
            stop_ray()
        self.spares.end()
        if self.folder is not None:
            self.folder.remove()


def find_cluster(address: str) -> str:
    """Returns the HOST:PORT of the one cluster that `address` names and that answers. Raises ConfigError.

    Given "auto", Ray itself takes any of several clusters, and it tries for minutes to reach an address where there is
    none.
    """
    if address == "auto":
        services.find_gcs_addresses.cache_clear()
        found = sorted(services.find_gcs_addresses())
        if not found:
            raise ConfigError("'auto' (cluster.ray_address) finds no Ray cluster on this machine; name one")
        if len(found) > 1:
            raise ConfigError(
                f"'auto' (cluster.ray_address) is ambiguous: {len(found)} Ray clusters run on this machine, "
                f"{', '.join(found)}; name one of them"
            )
        [address] = found
    _check_answers(address)
    return address


def _check_answers(address: str) -> None:
    """Raises ConfigError unless a Ray cluster answers at this HOST:PORT. Checking its token is left to Ray."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_TIMEOUT_S, wait_for_ready=True)
            return
        except grpc.RpcError as error:
            code = cast(grpc.Call, error).code()
    where = f"{address!r} (cluster.ray_address)"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            return
        raise ConfigError(f"cannot join the Ray cluster at {where}; {TOKEN_HELP}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise ConfigError(f"no Ray cluster answers at {where} within {ANSWER_TIMEOUT_S:g} s; is it there?")
    raise ConfigError(f"what answers at {where} is not a Ray cluster ({code.name}); give the address of its head")


def _keep_to_loopback() -> None:
    """Makes every server of Ray on this node listen on the loopback alone; by default they listen on all interfaces.

    Ray's switch for this is meant for desktops: an environment variable that Ray reads when it is imported.
    """
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


def num_gpus() -> int:
    """Returns the number of GPUs in the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder that only this process's user can read; Ray makes those inside it readable by everybody."""

    path: Path
    lock: int

    @classmethod
    def make(cls) -> _Folder:
        while True:
            path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_base()))
            try:
                return cls(path, create_owned(path / LOCK))
            except FileNotFoundError:  # another service that starts now took it for a leftover
                continue

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            os.close(self.lock)


def _base() -> Path:
    """Returns the folder that an embedded Ray's own is made in. Raises ConfigError where there is none."""
    try:
        base = tempfile.gettempdir()
    except OSError as error:  # which names those that were tried
        raise ConfigError(f"Ray needs a folder for its sockets and logs: {error.strerror}; set TMPDIR to one") from None
    # Ray makes sockets deep below this folder, and a socket's path has at most 107 characters.
    return Path(base if len(base) <= 24 else "/tmp")


def _check_room(base: Path) -> None:
    """Raises ConfigError where Ray would have no room; it would wait for its processes in vain."""
    free = shutil.disk_usage(base).free
    if free < ROOM_BYTES:
        raise ConfigError(
            f"{base} has {format_bytes(free)} free, and Ray needs {format_bytes(ROOM_BYTES)} there for its sockets and "
            "logs; free some space, or set TMPDIR to another folder"
        )
