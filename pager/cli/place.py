"""Where a command runs: on a checkpoint in this process, or in a service. And where it finds named pools."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pager.cli.options import ClientTls
from pager.cli.output import serve_extra
from pager.errors import ConfigError, InvalidRequest, UnknownPool
from pager.memory.machine import resolve_device

if TYPE_CHECKING:
    from pager.cli.local import Local
    from pager.client import Client
    from pager.types import NamedPool
    from router_service.pools import PoolStore

Model = Annotated[
    Path | None, typer.Option("--model", "-m", help="Checkpoint folder to load in this process.", metavar="FOLDER")
]
Server = Annotated[
    str | None, typer.Option("--server", "-s", help="Ask a running service instead.", metavar="HOST:PORT")
]
Tenant = Annotated[str, typer.Option(help="Tenant to name to the service, and whose named pools to use.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds until the service must be done.", metavar="SECONDS")]
PoolsFolder = Annotated[
    Path | None,
    typer.Option(
        "--pools",
        help="Folder of named pools, without --server. Default: the Redis in REDIS_URL.",
        envvar="EXPERT_PAGER_POOLS_PATH",
        metavar="FOLDER",
    ),
]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Place:
    """Exactly one of `model` and `server` is given."""

    model: Path | None
    server: str | None
    tenant: str
    timeout: float | None
    device: str = "auto"
    dtype: str | None = None
    tls: ClientTls | None = None

    @classmethod
    def of(
        cls,
        model: Path | None,
        server: str | None,
        *,
        tenant: str,
        timeout: float | None,
        device: str,
        dtype: str | None,
        local_only: Mapping[str, object] | None = None,
        tls: ClientTls | None = None,
    ) -> Place:
        """Raises typer.BadParameter unless the place is said once, and for options that mean nothing there.

        `local_only` are further options that need --model, None where not given.
        """
        if (model is None) == (server is None):
            raise typer.BadParameter("say where to run it: --model FOLDER in this process, or --server HOST:PORT")
        local = {"--device": None if device == "auto" else device, "--dtype": dtype, **(local_only or {})}
        idle = [name for name, value in local.items() if value is not None] if server is not None else []
        if model is not None and timeout is not None:
            idle = ["--timeout"]
        if idle:
            needed = "--server" if model is not None else "--model"
            raise typer.BadParameter(f"{', '.join(idle)} can take no effect here; it goes with {needed}")
        return cls(model, server, tenant, timeout, device, dtype, tls)

    def local(self) -> Local:
        from pager.cli.local import Local

        assert self.model is not None
        return Local(self.model, resolve_device(self.device), self.dtype)

    def service(self) -> Client:
        """A client of the service, to be closed or used as a context. Raises ConfigError."""
        import grpc

        from pager.client import Client

        assert self.server is not None
        credentials = None
        if self.tls is not None:
            ca, identity = self.tls.read()
            credentials = grpc.ssl_channel_credentials(ca, identity, identity)
        return Client(self.server, tenant=self.tenant, timeout_s=self.timeout, credentials=credentials)


def with_pools(folder: Path | None, work: Callable[[PoolStore], Awaitable[Answer]]) -> Answer:
    """What `work` makes of the store in `folder` or, without one, in Redis. Raises ConfigError without either."""

    async def run() -> Answer:
        store = _open_pools(folder)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def find_named(folder: Path | None, tenant: str, name: str) -> NamedPool:
    """Raises UnknownPool, DamagedPool, InvalidRequest."""
    from pager.pools.named import check_name

    check_name(name, "pool.name")
    checked_tenant(tenant)
    found = with_pools(folder, lambda store: store.find(tenant, name))
    if found is None:
        raise UnknownPool(f"tenant {tenant!r} has no pool {name!r} here; make it with `expert-pager calibrate`")
    return found


def checked_tenant(tenant: str) -> str:
    """`tenant` itself: it becomes a part of a file's name. Raises InvalidRequest."""
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
