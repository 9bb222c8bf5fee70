"""`expert-pager calibrate` and `expert-pager pools`: named pools."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pager.cli.options import (
    AsJson,
    Device,
    Dtype,
    ExpertMemory,
    Pool,
    PoolOptions,
    bundled,
    busy,
    err,
    model_folder,
    out,
    pool_dict,
    pool_text,
    print_json,
    print_table,
    serve_extra,
)
from pager.config import API_KEY, API_KEY_FILE
from pager.errors import ConfigError, InvalidRequest, UnknownPool
from pager.memory import Budgets, resolve_device
from pager.pools.pick import check_name, check_num_examples
from pager.reading import MAX_PEM_BYTES, read_bounded, reason_of
from pager.types import Full, NamedPool

if TYPE_CHECKING:
    from grpc import ChannelCredentials

    from pager.cli.local import Local
    from pager.client import Client
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
    """The options for the address of a service, and for the connection."""

    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            "-s",
            help="Use the service at this address. Default of `status` and `drain`: localhost:50051.",
            metavar="HOST:PORT",
        ),
    ] = None
    tenant: Annotated[str, typer.Option(help="Tenant of the call, and of the named pools.")] = "default"
    timeout: Annotated[float | None, typer.Option(help="Deadline of the call, in seconds.", metavar="SECONDS")] = None
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            help="With --server: use TLS, and trust servers whose certificate this one has signed.", metavar="PEM"
        ),
    ] = None
    tls_identity: Annotated[
        Path | None,
        typer.Option(
            help="With --tls-ca, for a service that requires it: the client's certificate and key in a file.",
            metavar="PEM",
        ),
    ] = None

    def check(self) -> None:
        """Raises typer.BadParameter for options that would have no effect."""
        if self.tls_ca is not None and self.server is None:
            raise typer.BadParameter("--tls-ca would have no effect here; it goes with --server")
        if self.tls_ca is None and self.tls_identity is not None:
            raise typer.BadParameter("--tls-identity would have no effect here; it goes with --tls-ca")

    def credentials(self) -> ChannelCredentials | None:
        """Returns what TLS needs; None without TLS. Raises ConfigError."""
        import grpc

        if self.tls_ca is None:
            return None
        ca = _pem(self.tls_ca, "--tls-ca")
        identity = _pem(self.tls_identity, "--tls-identity") if self.tls_identity is not None else None
        return grpc.ssl_channel_credentials(ca, identity, identity)

    def service(self) -> Client:
        """Returns a client of the service, to be closed or used as a context. Raises ConfigError."""
        from pager.client import Client

        assert self.server is not None
        return Client(
            self.server,
            tenant=self.tenant,
            timeout_s=self.timeout,
            credentials=self.credentials(),
            api_key=api_key(os.environ),
        )


def api_key(env: Mapping[str, str]) -> str | None:
    """Returns the key to call a service with: EXPERT_PAGER_API_KEY, or the content of the file
    EXPERT_PAGER_API_KEY_FILE.

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
            raise typer.BadParameter(f"{', '.join(idle)} would have no effect here; it goes with {needed}")

    def local(self) -> Local:
        """Opens the checkpoint in this process. Raises ConfigError for a missing device."""
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
    """Returns the result of `work` on the store in `folder`, else in Redis. Raises ConfigError without either."""

    async def run() -> Answer:
        store = _open_pools(folder)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def find_named(folder: Path | None, tenant: str, name: str) -> NamedPool:
    """Returns a tenant's named pool. Raises UnknownPool, DamagedPool, InvalidRequest."""
    check_name(name, "pool.name")
    checked_tenant(tenant)
    found = with_pools(folder, lambda store: store.find(tenant, name))
    if found is None:
        raise UnknownPool(f"tenant {tenant!r} has no pool {name!r} here; make it with `expert-pager calibrate`")
    return found


def checked_tenant(tenant: str) -> str:
    """Returns `tenant`, checked, since it becomes a part of a file's name. Raises InvalidRequest."""
    from router_service.admission import check_tenant

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
            raise ConfigError("there is no store of named pools: give --pools FOLDER, set REDIS_URL, or ask a --server")
        return FolderPools(folder)
    with serve_extra("REDIS_URL"):
        from router_service.redis import open_pools, redis_url
    return open_pools(redis_url(os.environ), folder)


# --- pools ------------------------------------------------------------------------------------------------------------


@bundled
def calibrate(
    name: Annotated[str, typer.Option(help="What requests call the pool: letters, digits and . _ -", metavar="NAME")],
    examples: Annotated[
        Path,
        typer.Option(
            help='One to a hundred examples: JSON lines with a "text" each, or one plain text; .gz or not.',
            metavar="FILE",
        ),
    ],
    place: Place,
    pool: Pool = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="What chooses it: trunk, lexical or fitted; with --model also prefill, mean, greedy, easy-ep, "
            "frequency and random. Default: the best pass; with --model and nothing fitted, mean.",
            metavar="METHOD",
        ),
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help="Documents of all kinds, for the method frequency.", metavar="FILE")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing pool of that name.")] = False,
    pools: PoolsFolder = None,
    expert_memory: ExpertMemory = None,
    as_json: AsJson = False,
) -> None:
    """Make a pool from one to a hundred examples, and keep it under a name that requests can give.

    In a service, or in this process; then it is kept in the folder given with --pools or in the Redis of REDIS_URL,
    where a service that has the same finds it. It is good for this model only, and stays until it is deleted.

    Examples:

    `expert-pager calibrate --name law --examples contracts.jsonl --pool 12.5% --server localhost:50051`

    `expert-pager calibrate --name law --examples contract.txt --pool 12.5% --model ./model --pools ./pools`
    """
    from pager.lab.corpus import read_examples

    place.check({"--expert-memory": expert_memory, "--sample": sample})
    if sample is not None and method != "frequency":
        raise typer.BadParameter("--sample is for --method frequency")
    check_name(name)
    ask, texts = PoolOptions(pool=pool).ask(), read_examples(examples)
    check_num_examples(len(texts))
    if place.server is not None:
        with place.service() as service:
            named = service.calibrate(name, texts, ask, method=method, replaces=replace)
    else:
        checked_tenant(place.tenant)
        _check_kept(pools, place.tenant, name, replace)
        with busy("loading"):
            named = place.local().calibrate(
                name, texts, ask.size or Full(), method, read_examples(sample) if sample else (),
                Budgets(expert_memory=expert_memory),
            )  # fmt: skip
        _keep(pools, place.tenant, named, replace)
    if as_json:
        print_json(named_dict(named))
    else:
        out.print(named_text(named), markup=False)


def _check_kept(folder: Path | None, tenant: str, name: str, replaces: bool) -> None:
    """Checks before the work that there is a store, and that the name is free. Raises ConfigError, PoolNameInUse."""
    from router_service.pools import name_in_use

    if name in with_pools(folder, lambda store: store.all_of(tenant)).names and not replaces:
        raise name_in_use(name)


def _keep(folder: Path | None, tenant: str, named: NamedPool, replaces: bool) -> None:
    with_pools(folder, lambda store: (store.replace if replaces else store.add)(tenant, named))


pools_app = typer.Typer(no_args_is_help=True, help="List or delete named pools.", rich_markup_mode="markdown")


@pools_app.command("list")
@bundled
def list_pools(
    at: ServerOptions,
    pools: PoolsFolder = None,
    as_json: AsJson = False,
) -> None:
    """List a tenant's named pools: of a service, of the folder given with --pools, or of the Redis in REDIS_URL.

    Example: `expert-pager pools list --server localhost:50051`
    """
    at.check()
    if at.server is not None:
        with at.service() as service:
            listing = service.list_pools()
    else:
        checked_tenant(at.tenant)
        listing = with_pools(pools, lambda store: store.all_of(at.tenant))
    if as_json:
        print_json({"pools": [named_dict(named) for named in listing.pools], "damaged": list(listing.damaged)})
    else:
        _print(listing.pools)
    for name in listing.damaged:
        err.print(f"damaged: {name}; calibrate it again with --replace, or delete it", markup=False)


@pools_app.command("delete")
@bundled
def delete_pool(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    at: ServerOptions,
    pools: PoolsFolder = None,
) -> None:
    """Delete a named pool. Requests in flight continue with it.

    Example: `expert-pager pools delete law --server localhost:50051`
    """
    check_name(name)
    at.check()
    if at.server is not None:
        with at.service() as service:
            is_deleted = service.delete_pool(name)
    else:
        checked_tenant(at.tenant)
        is_deleted = with_pools(pools, lambda store: store.delete(at.tenant, name))
    if not is_deleted:
        raise UnknownPool(f"tenant {at.tenant!r} has no pool {name!r}; see `expert-pager pools list`")
    out.print(f"deleted pool {name}", markup=False)


def named_dict(named: NamedPool) -> dict[str, Any]:
    return {
        "name": named.name,
        "method": named.method,
        "num_examples": named.num_examples,
        "num_tokens": named.num_tokens,
        "model_fingerprint": named.fingerprint,
        "pool": pool_dict(named.pool),
    }


def named_text(named: NamedPool) -> str:
    examples = "1 example" if named.num_examples == 1 else f"{named.num_examples} examples"
    return f"{named.name}: {pool_text(named.pool)}, by {named.method} from {examples} of {named.num_tokens} tokens"


def _print(found: Sequence[NamedPool]) -> None:
    columns = ("pool", "experts", "method", "examples", "tokens", "digest", "model")
    rows = [
        (
            each.name,
            str(each.pool.num_experts),
            each.method,
            str(each.num_examples),
            str(each.num_tokens),
            each.pool.digest,
            each.fingerprint,
        )
        for each in found
    ]
    print_table("named pools", columns, rows)
