"""This process's connection to Ray: a cluster of its own, or one that is there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import ray
from ray._private import services
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from pager.cluster.embedded_ray import daemons, kill_ray, start_embedded, stop_ray
from pager.errors import ConfigError
from pager.leftovers import create_owned, remove_abandoned

log = logging.getLogger(__name__)

# Tokens and weights never go through the object store; this is about the least that Ray takes.
OBJECT_STORE_BYTES = 80 * 2**20
LOOPBACK = "127.0.0.1"
ANSWER_TIMEOUT_S = 10.0
TOKEN_HELP = "one that asks for a token needs RAY_AUTH_MODE=token and its token, in RAY_AUTH_TOKEN or ~/.ray/auth_token"
FOLDER_PREFIX = "expert-pager-"
LOCK = "owner.lock"  # in a folder of ours: held by the process that made it
LOG_FILES_OF_A_WORKER = 4  # output and errors, of the one that runs and of one that has died
OTHER_LOG_FILES = 16


@dataclass(frozen=True, slots=True)
class RaySession:
    """`bind_host` is where workers listen: the loopback where all are on this machine, else None (their node's own)."""

    bind_host: str | None
    owns_ray: bool
    folder: _Folder | None
    daemons: Mapping[str, int] = field(
        default_factory=dict
    )  # of an embedded cluster: what it cannot do without, and its pids

    @classmethod
    def open(cls, address: str | None, namespace: str, num_workers: int = 1) -> RaySession:
        """Blocks for some seconds. A process that is connected already stays so. Raises ConfigError, NotReady."""
        # The signals are the service's own, so Ray is started from another thread, and complains.
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
                raise ConfigError(f"can not join the Ray cluster at {address!r}: {error}; {TOKEN_HELP}") from error
            return cls(None, owns_ray=True, folder=None)
        # It only says that an embedded cluster asks for a token, which is as it should be.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        remove_abandoned(_base().glob(f"{FOLDER_PREFIX}*/{LOCK}"), lambda lock: shutil.rmtree(lock.parent))
        folder = _Folder.make()
        try:
            start_embedded(
                max_log_files=LOG_FILES_OF_A_WORKER * (num_workers + 1) + OTHER_LOG_FILES,
                namespace=namespace,
                num_cpus=num_workers + 1,  # as many processes it starts in advance: workers, and the node's control
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.WARNING,
                _temp_dir=str(folder.path / "ray"),
            )
        except BaseException:
            folder.remove()
            raise
        # Ray sends no token to an address that was named unless it is told to.
        join = "RAY_AUTH_MODE=token and --ray-address"
        log.info("embedded Ray at %s; others join it with %s", ray.get_runtime_context().gcs_address, join)
        return cls(LOOPBACK, owns_ray=True, folder=folder, daemons=daemons())

    def close(self, *, is_lost: bool = False) -> None:
        """Ends what `open` started. Logs of an embedded cluster go with it.

        `is_lost` says that one of its daemons has ended: this process cannot use Ray any more, nor leave it properly.
        """
        if is_lost:
            kill_ray()
        elif self.owns_ray:
            stop_ray()
        if self.folder is not None:
            self.folder.remove()


def find_cluster(address: str) -> str:
    """The HOST:PORT of the one cluster that `address` names, which answers. Raises ConfigError.

    Ray itself takes any of several clusters for "auto", and tries for minutes to reach an address where there is none.
    """
    if address == "auto":
        services.find_gcs_addresses.cache_clear()
        found = sorted(services.find_gcs_addresses())
        if not found:
            raise ConfigError("no Ray cluster runs on this machine for 'auto' (cluster.ray_address) to find; name one")
        if len(found) > 1:
            raise ConfigError(
                f"'auto' (cluster.ray_address) is ambiguous: {len(found)} Ray clusters run on this machine, "
                f"{', '.join(found)}; name one of them"
            )
        [address] = found
    _check_answers(address)
    return address


def _check_answers(address: str) -> None:
    """Raises ConfigError unless a Ray cluster answers at this HOST:PORT. Its token is left to Ray to show."""
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
        raise ConfigError(f"can not join the Ray cluster at {where}; {TOKEN_HELP}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise ConfigError(f"no Ray cluster answers at {where} within {ANSWER_TIMEOUT_S:g} s; is it there?")
    raise ConfigError(f"what answers at {where} is no Ray cluster ({code.name}); name its head's address")


def _keep_to_loopback() -> None:
    """Every server of Ray on this node listens on the loopback alone; by default they listen on all interfaces.

    Ray has the switch for desktops, as an environment variable that is read when it is imported.
    """
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False


def num_gpus() -> int:
    """GPUs of the whole cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of this process, for nobody else to look into: Ray gives those that it makes inside to everybody."""

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
    # Ray makes sockets deep below it, and a socket's path has at most 107 characters.
    base = tempfile.gettempdir()
    return Path(base if len(base) <= 24 else "/tmp")
