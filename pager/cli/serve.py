"""The commands of the service: `expert-pager serve`, `status` and `drain`, and `config`, which only checks settings."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pager.cli.options import (
    AsJson,
    Dtype,
    ExpertMemory,
    HostMemory,
    KvMemory,
    bundled,
    busy,
    err,
    out,
    print_error,
    print_json,
    require,
    serve_extra,
)
from pager.cli.pools import ServerOptions
from pager.config import SCHEMA, Reading, ServiceConfig, config_of, load_config, read_config, shown
from pager.errors import NotReady, PagerError, ServiceUnreachable
from pager.gguf import is_gguf
from pager.memory import format_bytes
from pager.observe import logs
from pager.pools.drift import parse_drift
from pager.pools.pick import parse_pool_size
from pager.store.hub import HubModel
from pager.types import ModelInfo, NamedPool, ServiceStatus

if TYPE_CHECKING:
    from pager.client import Client
    from router_service.app import Ready


log = logging.getLogger("expert_pager.router")

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
SECRETS = {"REDIS_URL": "a secret, not shown", "REDIS_URL_FILE": None}  # None: a path, which is not secret
_FILES = ("router.tls_cert", "router.tls_key", "router.tls_client_ca", "router.jwt_secret", "router.jwt_jwks")

# Maps parameters of `serve` to the settings that they override.
SETTINGS = {
    "model.path": "model",
    "model.name": "name",
    "model.dtype": "dtype",
    "workers.count": "workers",
    "workers.device": "device",
    "workers.expert_memory": "expert_memory",
    "workers.host_memory": "host_memory",
    "workers.kv_memory": "kv_memory",
    "workers.max_running": "max_running",
    "workers.trace": "trace",
    "pools.default_size": "pool",
    "pools.default_drift": "drift",
    "pools.path": "pools",
    "router.router": "router",
    "router.host": "host",
    "router.keys": "keys",
    "router.port": "port",
    "router.http_port": "http_port",
    "model.chat_template": "chat_template",
    "router.metrics_port": "metrics_port",
    "router.tls_cert": "tls_cert",
    "router.tls_key": "tls_key",
    "router.tls_client_ca": "tls_client_ca",
    "log.format": "log_format",
    "cluster.ray_address": "ray_address",
    "cluster.file_sd": "file_sd",
}


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder, GGUF file, or ORGANISATION/NAME[@REVISION] on the hub.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="TOML file. Flags and environment override it.", metavar="FILE"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the folder's name.")] = None,
    dtype: Dtype = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: 1.", metavar="N")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto (default).", metavar="NAME")] = None,
    expert_memory: ExpertMemory = None,
    host_memory: HostMemory = None,
    kv_memory: KvMemory = None,
    max_running: Annotated[int | None, typer.Option(help="Requests a worker runs at once.", metavar="N")] = None,
    pool: Annotated[
        str | None, typer.Option(help="Pool of requests that do not choose one. Default: full.", metavar="SIZE")
    ] = None,
    drift: Annotated[
        str | None,
        typer.Option(
            help="Widen the default pool when an answer drifts from it: 0.3 or 0.3:exact. Default: never.",
            metavar="DRIFT",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--predictor",
            "--router",
            help="What predicts pools: lexical, trunk, fitted, prefill (no predictor; the worker's prefill alone). "
            "Default: fitted where `fit-router` was run, else trunk.",
        ),
    ] = None,
    pools: Annotated[
        str | None, typer.Option(help="Keep named pools in this folder. Default: in Redis or memory.", metavar="FOLDER")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1. Another one needs --keys.")
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="Require a key of this file (see `expert-pager keys`), or `redis`.", metavar="FILE"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port, 0 for a free one. Default: 50051.", metavar="N")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Chat template (Jinja) of the HTTP API. Default: the checkpoint's own.", metavar="FILE"),
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Port of the HTTP API, 0 for a free one. Default: 8080.", metavar="N")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics, 0 for a free one. Default: 9464.", metavar="N")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="Certificate of the service; it goes with --tls-key.", metavar="PEM")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Private key of the certificate.", metavar="PEM")] = None,
    tls_client_ca: Annotated[
        str | None, typer.Option(help="Require client certificates that this one has signed.", metavar="PEM")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. Default: text.", metavar="FORMAT")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Join this Ray cluster: HOST:PORT, auto (the only one here), local (none). "
            "Default: RAY_ADDRESS, else local.",
            metavar="ADDRESS",
        ),
    ] = None,
    file_sd: Annotated[str | None, typer.Option(help="Keep Prometheus targets in this file.", metavar="FILE")] = None,
    trace: Annotated[
        str | None, typer.Option(help="Record in this folder which experts are used, for `replay`.", metavar="FOLDER")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Serve a model over gRPC and HTTP until SIGTERM or Ctrl-C.

    Prints one line on stdout when it is ready. On a signal it refuses new requests and lets those in flight end; a
    second signal ends them. When the Ray that it started breaks, it ends in the same way and exits with 75, to be
    started again. Redis, if any, is named in REDIS_URL or in the file REDIS_URL_FILE. Every setting has a key
    in the file and an environment variable, as EXPERT_PAGER_WORKERS_COUNT.

    Examples:

    `expert-pager serve ./model --expert-memory 25% --pool 12.5%`

    `expert-pager serve --config service.toml --port 0 --json`
    """
    overrides, flags = given(locals())
    settings = with_model_here(load_config(config, os.environ, overrides, flags))
    logs.configure(settings.log.format, "router")
    with busy("loading"), serve_extra("serve"):
        require("ray", "redis", "jwt")
        from pager.cluster.ray_process import RayProcess

        ray = RayProcess(settings)  # which imports Ray, and its workers' libraries, beside this process's own
        from pager.observe.metrics import importing

        with importing():
            from router_service import app
    try:
        received = asyncio.run(
            app.serve(settings, os.environ, lambda ready: _announce(ready, as_json, settings.log.format), ray)
        )
    except PagerError as error:
        if settings.log.format == "text":
            raise
        log.error("%s", error)
        raise typer.Exit(1) from None
    app.end_process(130 if received == signal.SIGINT else 0)


def with_model_here(settings: ServiceConfig) -> ServiceConfig:
    """Returns the settings with a folder for the model; one that is named as on the hub is downloaded first."""
    model = HubModel.parse(settings.model.path)
    if model is None:
        return settings
    folder = model.fetch()
    here = replace(settings.model, path=str(folder), name=settings.model.name or model.short_name)
    return replace(settings, model=here)


def given(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the values given on the command line by setting, and the name of each setting there."""
    overrides = {key: parameters[name] for key, name in SETTINGS.items()}
    return overrides, {key: "MODEL" if name == "model" else _flag(name) for key, name in SETTINGS.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _announce(ready: Ready, as_json: bool, log_format: str) -> None:
    for line in ready.model.plan.splitlines():
        if log_format == "json":
            log.info("%s", line)
        else:
            err.print(line, style="dim", markup=False)
    if as_json or log_format == "json":
        facts = {"address": ready.address, "http_url": ready.http_url}
        facts |= {"metrics_url": ready.metrics_url, "model": ready.model.name}
        print_json({**facts, "workers": ready.num_workers, "plan": ready.model.plan_facts}, indent=None)
    else:
        workers = "1 worker" if ready.num_workers == 1 else f"{ready.num_workers} workers"
        print(
            f"ready: {ready.model.name} on {ready.address} and {ready.http_url}, {workers}, "
            f"metrics at {ready.metrics_url}",
            flush=True,
        )


def check_config(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Report everything that is wrong; the default.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print what is in force, and where it comes from.")] = False,
) -> None:
    """Check or print the settings of `serve`, whose arguments and options it takes. Starts nothing.

    Defaults are overridden by the file, the file by the environment, and both by the command line. Exit status 1 when
    something is wrong. What is printed is a configuration file.

    Examples:

    `expert-pager config --check --config service.toml`

    `expert-pager config --print ./model --workers 2`
    """
    parsed = _parsed(context)
    overrides, flags = given(parsed)
    reading = read_config(parsed["config"], os.environ, overrides, flags)
    problems = [*reading.problems, *_beyond_the_schema(reading, os.environ)]
    if show:
        for line in _in_force(reading, os.environ):
            print(line)
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(1)
    if check or not show:
        print("the configuration is good")


def _parsed(context: typer.Context) -> dict[str, Any]:
    """Returns the rest of the command line, as `serve` reads it. Ends the program for wrong usage, as `serve` would."""
    assert context.parent is not None, "a command of expert-pager"
    group: Any = context.parent.command
    command = group.get_command(context.parent, "serve")
    parsed: dict[str, Any] = command.make_context(context.info_name, list(context.args), parent=context.parent).params
    return parsed


def _beyond_the_schema(reading: Reading, env: Mapping[str, str]) -> Iterator[str]:
    """Yields the problems that would make a start fail and can be found without one."""
    settings = config_of(reading)
    is_on_hub = HubModel.parse(settings.model.path) is not None
    path = Path(settings.model.path)
    if settings.model.path and not is_on_hub and not is_gguf(path) and not (path / "config.json").is_file():
        yield _said(reading, "model.path", "is not a checkpoint folder, which has a config.json, and no GGUF file")
    for key in _FILES:
        value = reading.value(key)
        if value is not None and not os.access(value, os.R_OK):
            yield _said(reading, key, "is not a file that can be read")
    for key, parse in (("pools.default_size", parse_pool_size), ("pools.default_drift", parse_drift)):
        try:
            parse(reading.value(key))
        except PagerError as error:
            yield _said(reading, key, f"is wrong: {error.message}")
    if settings.workers.count == 0 and settings.cluster.joined is None:
        yield _said(reading, "workers.count", "uses the workers of another router: set cluster.ray_address too")
    ports = {"router.port": settings.router.port, "router.metrics_port": settings.router.metrics_port}
    if settings.router.health_port is not None:
        ports["router.health_port"] = settings.router.health_port
    taken = [port for port in ports.values() if port]
    for port in sorted({port for port in taken if taken.count(port) > 1}):
        yield f"{' and '.join(key for key in ports if ports[key] == port)} are both {port}; choose another for one"
    if settings.router.keys == "redis" and not (env.get("REDIS_URL") or env.get("REDIS_URL_FILE")):
        yield _said(reading, "router.keys", "needs REDIS_URL or REDIS_URL_FILE")
    elif settings.router.keys not in (None, "redis") and not os.access(settings.router.keys, os.R_OK):
        yield _said(reading, "router.keys", "is not a file that can be read")
    secret = env.get("REDIS_URL_FILE")
    if secret and not os.access(secret, os.R_OK):
        yield f"REDIS_URL_FILE is {secret!r}, which is not a file that can be read"


def _said(reading: Reading, key: str, what: str) -> str:
    setting = reading.settings[key]
    return f"{key} {shown(setting.value)} (from {setting.origin}) {what}"


def _in_force(reading: Reading, env: Mapping[str, str]) -> Iterator[str]:
    settings = config_of(reading)
    for section in fields(settings):
        yield f"[{section.name}]"
        for each in fields(getattr(settings, section.name)):
            key, value = f"{section.name}.{each.name}", getattr(getattr(settings, section.name), each.name)
            origin = reading.settings[key].origin if key in reading.settings else "default"
            line = f"# {each.name} is not set" if value is None else f"{each.name} = {_toml(value)}"
            yield f"{line:<40}  # {origin}" if value is not None else line
        yield ""
    for variable, instead in SECRETS.items():
        if env.get(variable):
            yield f"# {variable} is set in the environment ({instead or env[variable]})"
    yield f"# {len(SCHEMA.fields)} settings; what is not set is decided by the planner, the machine or the checkpoint"


def _toml(value: Any) -> str:
    """Formats a value in TOML. A text of several lines is the content of a file, not its name, and may be a secret."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    if len(value.splitlines()) > 1:
        return '"a text of several lines, not shown"'
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- status -----------------------------------------------------------------------------------------------------------


DEFAULT_SERVER = "localhost:50051"


@bundled
def status(
    at: ServerOptions,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two updates.", min=0.1)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the state of a service: its workers, the tenant's named pools, and the requests in flight by tenant.

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


@bundled
def drain(
    at: ServerOptions,
    worker: Annotated[
        str | None, typer.Argument(help="A worker, as `expert-pager status` names it.", metavar="WORKER")
    ] = None,
    router: Annotated[bool, typer.Option("--router", help="The router that answers, instead of a worker.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have a worker, or a router, take nothing new, end what it has in flight, and end.

    A worker is started again by its router, and reads the experts that it had. A router ends with its process, and with
    the workers that it started. It takes a key with the role operator, and returns at once.

    Examples:

    `expert-pager drain worker-0`

    `expert-pager drain --router --server router-1:50051`
    """
    if (worker is None) != router:
        raise typer.BadParameter("name a worker, or give --router for the router that answers")
    at = replace(at, server=at.server or DEFAULT_SERVER)
    at.check()
    with at.service() as service:
        if worker is None:
            service.drain_router()
        else:
            service.drain_worker(worker)
    if as_json:
        print_json({"draining": worker or "router"})
    else:
        out.print(f"{worker or 'the router'} drains", markup=False)


Look = tuple[ModelInfo, ServiceStatus, tuple[NamedPool, ...]]


def _look(service: Client) -> Look:
    return service.model(), service.status(), service.list_pools().pools


def _live(service: Client, every_s: float) -> None:
    """Shows the service until the program is interrupted; while the service does not answer, it keeps trying."""
    with Live(console=out, auto_refresh=False, screen=False) as live:
        while True:
            try:
                live.update(_shown(_look(service)), refresh=True)
            except (ServiceUnreachable, NotReady) as error:
                live.update(Text(_message(error), style="red", overflow="fold", no_wrap=False), refresh=True)
            time.sleep(every_s)


def _message(error: PagerError) -> str:
    return f"{error.message}; trying again"


def _print(look: Look, as_json: bool) -> None:
    if as_json:
        print_json(facts_of(look), indent=None)
    else:
        out.print(_shown(look))


def facts_of(look: Look) -> dict[str, Any]:
    """Returns the status as JSON has it."""
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
