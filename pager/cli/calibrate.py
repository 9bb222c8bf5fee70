"""`expert-pager calibrate`: a named pool from examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pager.cli.examples import read_examples
from pager.cli.options import AsJson, Device, Dtype, ExpertMemory, Pool
from pager.cli.output import busy, out, print_json
from pager.cli.place import Model, Place, PoolsFolder, Server, Tenant, Timeout, checked_tenant, with_pools
from pager.cli.pool_options import PoolAsk
from pager.cli.pools import named_dict, named_text
from pager.cli.tls import ClientTls, TlsCa, TlsIdentity
from pager.planner import Budgets
from pager.routing.named import NamedPool, check_name, check_num_examples
from pager.types import Full


def calibrate(
    name: Annotated[str, typer.Option(help="What requests call the pool: letters, digits and . _ -", metavar="NAME")],
    examples: Annotated[
        Path,
        typer.Option(
            help='One to a hundred examples: JSON lines with a "text" each, or one plain text; .gz or not.',
            metavar="FILE",
        ),
    ],
    model: Model = None,
    server: Server = None,
    pool: Pool = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How it is chosen: trunk, lexical or fitted; with --model also fused, mean, greedy, easy-ep, "
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
    device: Device = "auto",
    dtype: Dtype = None,
    tenant: Tenant = "default",
    timeout: Timeout = None,
    tls_ca: TlsCa = None,
    tls_identity: TlsIdentity = None,
    as_json: AsJson = False,
) -> None:
    """Make a pool from one to a hundred examples, and keep it under a name that requests can give.

    In a service, or in this process; then it is kept in the folder given with --pools or in the Redis of REDIS_URL,
    where a service that has the same finds it. It is good for this model only, and stays until it is deleted.

    Examples:

    `expert-pager calibrate --name law --examples contracts.jsonl --pool 12.5% --server localhost:50051`

    `expert-pager calibrate --name law --examples contract.txt --pool 12.5% --model ./model --pools ./pools`
    """
    place = Place.of(
        model, server, tenant=tenant, timeout=timeout, device=device, dtype=dtype,
        local_only={"--expert-memory": expert_memory, "--sample": sample},
        tls=ClientTls.of(server, tls_ca, tls_identity),
    )  # fmt: skip
    if sample is not None and method != "frequency":
        raise typer.BadParameter("--sample is for --method frequency")
    check_name(name)
    ask, texts = PoolAsk.of(pool), read_examples(examples)
    check_num_examples(len(texts))
    if server is not None:
        with place.service() as service:
            named = service.calibrate(name, texts, ask, method, replaces=replace)
    else:
        checked_tenant(tenant)
        _check_kept(pools, tenant, name, replace)
        with busy("loading"):
            named = place.local().calibrate(
                name, texts, ask.size or Full(), method, read_examples(sample) if sample else (),
                Budgets(expert_memory=expert_memory),
            )  # fmt: skip
        _keep(pools, tenant, named, replace)
    if as_json:
        print_json(named_dict(named))
    else:
        out.print(named_text(named), markup=False)


def _check_kept(folder: Path | None, tenant: str, name: str, replaces: bool) -> None:
    """Before the work: that there is a store, and the name is free. Raises ConfigError, PoolNameInUse."""
    from router_service.pool_store import name_in_use

    if name in with_pools(folder, lambda store: store.all_of(tenant)).names and not replaces:
        raise name_in_use(name)


def _keep(folder: Path | None, tenant: str, named: NamedPool, replaces: bool) -> None:
    with_pools(folder, lambda store: (store.replace if replaces else store.add)(tenant, named))
