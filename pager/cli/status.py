"""`expert-pager status`: the workers, named pools and load of a running service."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pager.cli.options import AsJson, bundled
from pager.cli.output import out, print_json
from pager.cli.place import ServerOptions
from pager.errors import NotReady, PagerError, ServiceUnreachable
from pager.memory.units import format_bytes
from pager.types import ModelInfo, NamedPool, ServiceStatus

if TYPE_CHECKING:
    from pager.client import Client

DEFAULT_SERVER = "localhost:50051"


@bundled
def status(
    at: ServerOptions,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=0.1)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show what a service does: its workers, the tenant's named pools, and the requests in flight by tenant.

    Requests and tokens are those of the router that answers. Where keys are on, it takes one with the role operator.

    Examples:

    `expert-pager status`

    `expert-pager status --server router:50051 --watch`
    """
    at = replace(at, server=at.server or DEFAULT_SERVER)
    at.check()
    with at.service() as service:
        if not watch:
            _print(_look(service), as_json)
        elif as_json or not out.is_terminal:
            while True:
                _print(_look(service), as_json)
                time.sleep(every)
        else:
            _live(service, every)


Look = tuple[ModelInfo, ServiceStatus, tuple[NamedPool, ...]]


def _look(service: Client) -> Look:
    return service.model(), service.status(), service.list_pools().pools


def _live(service: Client, every_s: float) -> None:
    """Shows the service until the program is interrupted; one that is away for a while is waited for."""
    with Live(console=out, auto_refresh=False, screen=False) as live:
        while True:
            try:
                live.update(_shown(_look(service)), refresh=True)
            except (ServiceUnreachable, NotReady) as error:
                live.update(Text(_message(error), style="red"), refresh=True)
            time.sleep(every_s)


def _message(error: PagerError) -> str:
    return f"{error.message}; looking again"


def _print(look: Look, as_json: bool) -> None:
    if as_json:
        print_json(facts_of(look), indent=None)
    else:
        out.print(_shown(look))


def facts_of(look: Look) -> dict[str, Any]:
    """The status as JSON has it."""
    model, service, pools = look
    workers = [
        {
            "id": each.id,
            "state": each.state,
            "waiting": each.waiting,
            "running": each.running,
            "slots": each.num_slots,
            "resident_experts": each.num_resident,
            "resident_bytes": each.num_resident * each.expert_bytes,
            "remote": each.is_remote,
        }
        for each in service.workers
    ]
    named = [{"name": each.name, "experts": each.pool.num_experts, "method": each.method} for each in pools]
    load = asdict(service.load)
    return {"model": model.name, "fingerprint": model.fingerprint, "workers": workers, "pools": named, "load": load}


def _shown(look: Look) -> RenderableType:
    facts = facts_of(look)
    load = facts["load"]
    in_flight = f"{load['num_requests']} requests with {load['num_tokens']} tokens in flight"
    shown: list[RenderableType] = [Text(f"{facts['model']}: {in_flight}")]
    workers = [
        (
            each["id"] + (" (another router's)" if each["remote"] else ""),
            each["state"],
            each["waiting"],
            each["running"],
            f"{each['resident_experts']} of {each['slots']}",
            format_bytes(each["resident_bytes"]),
        )
        for each in facts["workers"]
    ]
    shown.append(_table(("worker", "state", "waiting", "running", "slots in use", "experts"), workers))
    if load["tenants"]:
        tenants = [(each["tenant"], each["num_requests"], each["num_tokens"]) for each in load["tenants"]]
        shown.append(_table(("tenant", "requests", "tokens"), tenants))
    if facts["pools"]:
        pools = [(each["name"], each["experts"], each["method"]) for each in facts["pools"]]
        shown.append(_table(("named pool", "experts", "method"), pools))
    return Group(*shown)


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table
