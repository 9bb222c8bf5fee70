"""`expert-pager calibrate` and `expert-pager pools`: named pools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pager.cli.options import AsJson, ExpertMemory, Pool, PoolOptions, bundled
from pager.cli.output import busy, err, out, pool_dict, pool_text, print_json, print_table
from pager.cli.place import Place, PoolsFolder, ServerOptions, checked_tenant, with_pools
from pager.errors import UnknownPool
from pager.memory.plan import Budgets
from pager.pools.named import check_name, check_num_examples
from pager.types import Full, NamedPool


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
            help="How it is chosen: trunk, lexical or fitted; with --model also prefill, mean, greedy, easy-ep, "
            "frequency and random. Default: the best pass; with --model and nothing fitted, mean.",
            metavar="METHOD",
        ),
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help="Documents of all kinds, for the method frequency.", metavar="FILE")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a pool of that name.")] = False,
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
    """Before the work: that there is a store, and the name is free. Raises ConfigError, PoolNameInUse."""
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
    """Delete a named pool. Requests under way go on with it.

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
