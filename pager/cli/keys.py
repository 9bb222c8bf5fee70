"""`expert-pager keys`: makes, lists and revokes the API keys of a service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pager.cli.options import AsJson, bundled, err, out, print_json, print_table, serve_extra
from pager.errors import ConfigError

if TYPE_CHECKING:
    from router_service.keys import Entry, KeyStore

keys_app = typer.Typer(
    no_args_is_help=True, help="Make, list or revoke the API keys of a service.", rich_markup_mode="markdown"
)

KeysFile = Annotated[
    Path | None,
    typer.Option("--keys", help="The file of keys (router.keys). Default: the Redis in REDIS_URL.", metavar="FILE"),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N")]
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """The bounds of a caller."""

    requests_in_flight: Limit = None
    tokens_in_flight: Limit = None
    requests_per_minute: Limit = None
    requests_per_day: Limit = None
    tokens_per_minute: Limit = None
    tokens_per_day: Limit = None


@dataclass(frozen=True, kw_only=True)
class StandingOptions:
    """The options for the standing of a caller's requests beside others'."""

    priority: Annotated[
        int, typer.Option(help="Requests of a higher priority are admitted first.", min=-100, max=100, metavar="N")
    ] = 0
    weight: Annotated[
        float, typer.Option(help="Share of a worker, beside other tenants' weights.", min=0.01, max=100, metavar="W")
    ] = 1.0
    guaranteed_share: Annotated[
        float,
        typer.Option(help="Share of each worker's slots that no other tenant takes.", min=0, max=0.9, metavar="SHARE"),
    ] = 0.0


@keys_app.command("add")
@bundled
def add_key(
    limits: LimitOptions,
    standing: StandingOptions,
    tenant: Annotated[str, typer.Option(help="The tenant whose requests come with this key.", metavar="NAME")],
    keys: KeysFile = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="What the key permits: inference (default), operator, metrics. May be repeated.", metavar="ROLE"
        ),
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option(help="Make no key: identify the client by this name in its certificate.", metavar="NAME"),
    ] = None,
    jwt: Annotated[
        bool, typer.Option("--jwt", help="Make no key: set the bounds for the tenant's JSON web tokens.")
    ] = False,
) -> None:
    """Make a key and print it, this once: the service keeps only its SHA-256. It is valid within a second.

    Example: `expert-pager keys add --tenant acme --keys keys.json --requests-per-minute 600 > acme.key`
    """
    if certificate is not None and jwt:
        raise typer.BadParameter("--certificate and --jwt are two ways to identify a client; give only one")
    with serve_extra("keys"):
        from router_service.admission import Role
        from router_service.keys import EntryLimits, new_entry, new_key
    roles = []
    for each in role or ():
        if each not in list(Role):
            raise typer.BadParameter(f"--role is one of {', '.join(Role)}, not {each[:40]!r}")
        roles.append(Role(each))
    key, sha256 = new_key()
    identity = {"certificate": certificate, "jwt": jwt, "sha256": None if certificate or jwt else sha256}
    entry = new_entry(tenant, roles, EntryLimits(**asdict(limits)), **asdict(standing), **identity)
    _with_store(keys, lambda store: store.change(lambda entries: (*entries, entry)))
    if entry.sha256 is not None:
        print(key, flush=True)
    err.print(f"added {entry.id} for tenant {entry.tenant}: {', '.join(entry.roles)}", markup=False)


@keys_app.command("list")
def list_keys(keys: KeysFile = None, as_json: AsJson = False) -> None:
    """List the keys, without their secret part.

    Example: `expert-pager keys list --keys keys.json`
    """
    entries = _with_store(keys, lambda store: store.entries())
    if as_json:
        shown = [each.model_dump(mode="json", exclude={"sha256"}) | {"kind": _kind(each)} for each in entries]
        print_json({"keys": shown})
        return
    rows = [(each.id, each.tenant, _kind(each), ", ".join(each.roles), _limits(each), each.created) for each in entries]
    print_table("keys", ("id", "tenant", "known by", "roles", "limits", "made"), rows)


@keys_app.command("revoke")
def revoke_key(
    id: Annotated[str, typer.Argument(metavar="ID", help="As in `keys list`.")], keys: KeysFile = None
) -> None:
    """Revoke a key: it is refused within a second. Its requests in flight continue to their end.

    Example: `expert-pager keys revoke k3f9a01c2d4e5 --keys keys.json`
    """

    def without(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        left = tuple(each for each in entries if each.id != id)
        if len(left) == len(entries):
            raise ConfigError(f"there is no key {id[:80]!r}; see `expert-pager keys list`")
        return left

    _with_store(keys, lambda store: store.change(without))
    out.print(f"revoked {id}", markup=False)


def _kind(entry: Entry) -> str:
    if entry.certificate is not None:
        return f"certificate {entry.certificate}"
    return "token" if entry.jwt else "key"


def _limits(entry: Entry) -> str:
    return ", ".join(f"{name}={value}" for name, value in entry.limits.model_dump(exclude_none=True).items())


def _with_store(path: Path | None, work: Callable[[KeyStore], Awaitable[Answer]]) -> Answer:
    """Returns the result of `work` on the keys in the file, else in Redis. Raises ConfigError without either."""
    with serve_extra("keys"):
        from router_service.keys import KeyFile, KeysInRedis
        from router_service.redis import RedisClient, RedisUnavailableError, redis_url
    if path is not None:
        return asyncio.run(_awaited(work(KeyFile(path))))
    url = redis_url(os.environ)
    if url is None:
        raise ConfigError("there is no store of keys: give --keys FILE, or set REDIS_URL")

    async def run() -> Answer:
        client = RedisClient(url)
        try:
            return await work(KeysInRedis(client))
        finally:
            with suppress(RedisUnavailableError):
                await client.close()

    return asyncio.run(run())


async def _awaited(work: Awaitable[Answer]) -> Answer:
    return await work
