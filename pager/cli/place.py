"""The place where a command runs, a checkpoint in this process or a service, and the store of named pools."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pager.cli.options import Device, Dtype, model_folder
from pager.cli.output import serve_extra
from pager.config import API_KEY, API_KEY_FILE
from pager.errors import ConfigError, InvalidRequest, UnknownPool
from pager.memory.machine import resolve_device
from pager.reading import MAX_PEM_BYTES, read_bounded, reason_of

if TYPE_CHECKING:
    from pager.cli.local import Local
    from pager.client import Client
    from pager.types import NamedPool
    from router_service.pools import PoolStore

PoolsFolder = Annotated[
    Path | None,
    typer.Option(
        "--pools",
        help="Folder of named pools, without --server. Default: the Redis in REDIS_URL.",
        envvar="EXPERT_PAGER_POOLS_PATH",
        metavar="FOLDER",
    ),
]
MAX_KEY_BYTES = 1 << 14
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The address of a service, and how to talk to it."""

    server: Annotated[
        str | None, typer.Option("--server", "-s", help="Ask a running service instead.", metavar="HOST:PORT")
    ] = None
    tenant: Annotated[str, typer.Option(help="Tenant to name to the service, and whose named pools to use.")] = (
        "default"
    )
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until the service must be done.", metavar="SECONDS")
    ] = None
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="With --server: use TLS, and trust whoever this certificate has signed.", metavar="PEM"),
    ] = None
    tls_identity: Annotated[
        Path | None,
        typer.Option(help="With --tls-ca, for a service that asks: own certificate and key in a file.", metavar="PEM"),
    ] = None

    def check(self) -> None:
        """Raises typer.BadParameter for options that can take no effect."""
        if self.tls_ca is not None and self.server is None:
            raise typer.BadParameter("--tls-ca can take no effect here; it goes with --server")
        if self.tls_ca is None and self.tls_identity is not None:
            raise typer.BadParameter("--tls-identity can take no effect here; it goes with --tls-ca")

    def service(self) -> Client:
        """A client of the service, to be closed or used as a context. Raises ConfigError."""
        import grpc

        from pager.client import Client

        assert self.server is not None
        credentials = None
        if self.tls_ca is not None:
            ca = _pem(self.tls_ca, "--tls-ca")
            identity = _pem(self.tls_identity, "--tls-identity") if self.tls_identity is not None else None
            credentials = grpc.ssl_channel_credentials(ca, identity, identity)
        return Client(
            self.server,
            tenant=self.tenant,
            timeout_s=self.timeout,
            credentials=credentials,
            api_key=api_key(os.environ),
        )


def api_key(env: Mapping[str, str]) -> str | None:
    """The key to call a service with: EXPERT_PAGER_API_KEY, or what the file EXPERT_PAGER_API_KEY_FILE holds.

    Raises ConfigError.
    """
    key, path = env.get(API_KEY), env.get(API_KEY_FILE)
    if key and path:
        raise ConfigError(f"{API_KEY} and {API_KEY_FILE} are both set; keep one")
    if not path:
        return key or None
    try:
        return read_bounded(path, MAX_KEY_BYTES).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{API_KEY_FILE} {path!r} cannot be read: {reason_of(error)}") from None


@dataclass(frozen=True, kw_only=True)
class Place(ServerOptions):
    """The place where a command runs: in this process on `model`, or in the service at `server`."""

    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Checkpoint to load in this process: a folder, or ORGANISATION/NAME[@REVISION] on the hub.",
            metavar="MODEL",
            parser=model_folder,
        ),
    ] = None
    device: Device = "auto"
    dtype: Dtype = None

    def check(self, local_only: Mapping[str, object] | None = None) -> None:
        """Raises typer.BadParameter unless the place is given once, and for options that mean nothing there.

        `local_only` are further options that need --model, None where not given.
        """
        super().check()
        if (self.model is None) == (self.server is None):
            raise typer.BadParameter("say where to run it: --model FOLDER in this process, or --server HOST:PORT")
        device = None if self.device == "auto" else self.device
        local = {"--device": device, "--dtype": self.dtype, **(local_only or {})}
        idle = [name for name, value in local.items() if value is not None] if self.server is not None else []
        if self.model is not None and self.timeout is not None:
            idle = ["--timeout"]
        if idle:
            needed = "--server" if self.model is not None else "--model"
            raise typer.BadParameter(f"{', '.join(idle)} can take no effect here; it goes with {needed}")

    def local(self) -> Local:
        """The checkpoint of this process. Raises ConfigError for a device that is not there."""
        from pager.cli.local import Local

        assert self.model is not None
        return Local(self.model, resolve_device(self.device), self.dtype)


def _pem(path: Path, option: str) -> bytes:
    try:
        text = read_bounded(path, MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} cannot be read: {reason_of(error)}") from None
    if b"-----BEGIN " not in text:
        raise ConfigError(f"{option} {str(path)!r} is not a PEM file")
    return text


def with_pools(folder: Path | None, work: Callable[[PoolStore], Awaitable[Answer]]) -> Answer:
    """The result of `work` on the store in `folder` or, without one, in Redis. Raises ConfigError without either."""

    async def run() -> Answer:
        store = _open_pools(folder)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def find_named(folder: Path | None, tenant: str, name: str) -> NamedPool:
    """A tenant's named pool. Raises UnknownPool, DamagedPool, InvalidRequest."""
    from pager.pools.named import check_name

    check_name(name, "pool.name")
    checked_tenant(tenant)
    found = with_pools(folder, lambda store: store.find(tenant, name))
    if found is None:
        raise UnknownPool(f"tenant {tenant!r} has no pool {name!r} here; make it with `expert-pager calibrate`")
    return found


def checked_tenant(tenant: str) -> str:
    """`tenant` itself, checked, as it becomes a part of a file's name. Raises InvalidRequest."""
    from router_service.tenants import check_tenant

    try:
        return check_tenant(tenant)
    except InvalidRequest:
        raise InvalidRequest(
            f"--tenant has 1 to 64 of the characters A-Z a-z 0-9 . _ -, and {tenant[:80]!r} does not"
        ) from None


def _open_pools(folder: Path | None) -> PoolStore:
    if not (os.environ.get("REDIS_URL") or os.environ.get("REDIS_URL_FILE")):
        from router_service.pools import FolderPools

        if folder is None:
            raise ConfigError("named pools are kept nowhere: give --pools FOLDER, set REDIS_URL, or ask a --server")
        return FolderPools(folder)
    with serve_extra("REDIS_URL"):
        from router_service.redis import redis_url
        from router_service.redis_stores import open_pools
    return open_pools(redis_url(os.environ), folder)
