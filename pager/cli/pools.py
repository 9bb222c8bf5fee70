"""`expert-pager pools`: the named pools that there are, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pager.cli.options import AsJson
from pager.cli.output import err, out, pool_dict, print_json, print_table
from pager.cli.place import Place, PoolsFolder, Server, Tenant, Timeout, checked_tenant, with_pools
from pager.cli.tls import ClientTls, TlsCa, TlsIdentity
from pager.cli.usage import pool_text
from pager.errors import UnknownPool
from pager.routing.named import NamedPool, check_name

pools_app = typer.Typer(no_args_is_help=True, help="List or delete named pools.", rich_markup_mode="markdown")


@pools_app.command("list")
def list_pools(
    server: Server = None,
    pools: PoolsFolder = None,
    tenant: Tenant = "default",
    timeout: Timeout = None,
    tls_ca: TlsCa = None,
    tls_identity: TlsIdentity = None,
    as_json: AsJson = False,
) -> None:
    """List a tenant's named pools: of a service, of the folder given with --pools, or of the Redis in REDIS_URL.

    Example: `expert-pager pools list --server localhost:50051`
    """
    tls = ClientTls.of(server, tls_ca, tls_identity)
    if server is not None:
        with Place(None, server, tenant, timeout, tls=tls).service() as service:
            found, damaged = service.named_pools()
    else:
        checked_tenant(tenant)
        listing = with_pools(pools, lambda store: store.all_of(tenant))
        found, damaged = list(listing.pools), list(listing.damaged)
    if as_json:
        print_json({"pools": [named_dict(named) for named in found], "damaged": damaged})
    else:
        _print(found)
    for name in damaged:
        err.print(f"damaged: {name}; calibrate it again with --replace, or delete it", markup=False)


@pools_app.command("delete")
def delete_pool(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    server: Server = None,
    pools: PoolsFolder = None,
    tenant: Tenant = "default",
    timeout: Timeout = None,
    tls_ca: TlsCa = None,
    tls_identity: TlsIdentity = None,
) -> None:
    """Delete a named pool. Requests under way go on with it.

    Example: `expert-pager pools delete law --server localhost:50051`
    """
    check_name(name)
    tls = ClientTls.of(server, tls_ca, tls_identity)
    if server is not None:
        with Place(None, server, tenant, timeout, tls=tls).service() as service:
            is_deleted = service.delete_pool(name)
    else:
        checked_tenant(tenant)
        is_deleted = with_pools(pools, lambda store: store.delete(tenant, name))
    if not is_deleted:
        raise UnknownPool(f"tenant {tenant!r} has no pool {name!r}; see `expert-pager pools list`")
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
