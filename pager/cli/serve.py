"""`expert-pager serve`: the service, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pager.cli.options import Dtype, ExpertMemory, HostMemory, KvMemory
from pager.cli.output import busy, err, print_json, serve_extra
from pager.config import load_config
from pager.errors import PagerError
from pager.observe import logs

if TYPE_CHECKING:
    from router_service.app import Ready

log = logging.getLogger("expert_pager.router")

# Parameters of `serve` by the setting that they override.
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
    "pools.path": "pools",
    "router.router": "router",
    "router.host": "host",
    "router.port": "port",
    "router.metrics_port": "metrics_port",
    "cluster.ray_address": "ray_address",
    "cluster.file_sd": "file_sd",
}


def serve(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Checkpoint folder.", show_default=False)] = None,
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
        str | None, typer.Option(help="Pool of requests that name none. Default: full.", metavar="SIZE")
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="Routing-only pass: lexical, trunk, fitted, prefill (no predictor; the worker's prefill alone). "
            "Default: fitted where `fit-router` was run, else trunk."
        ),
    ] = None,
    pools: Annotated[
        str | None, typer.Option(help="Keep named pools in this folder. Default: in Redis or memory.", metavar="FOLDER")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port, 0 for a free one. Default: 50051.", metavar="N")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of /metrics, 0 for a free one. Default: 9464.", metavar="N")
    ] = None,
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
    """Serve a model over gRPC until SIGTERM or Ctrl-C.

    Prints one line on stdout when it is ready. On a signal it refuses new requests and lets those in flight end; a
    second signal ends them. When the Ray that it started breaks, it ends in the same way and exits with 75, to be
    started again. Redis, if any, is named in REDIS_URL or in the file REDIS_URL_FILE. Every setting has a key
    in the file and an environment variable, as EXPERT_PAGER_WORKERS_COUNT.

    Examples:

    `expert-pager serve ./model --expert-memory 25% --pool 12.5%`

    `expert-pager serve --config service.toml --port 0 --json`
    """
    overrides, flags = given(locals())
    settings = load_config(config, os.environ, overrides, flags)
    logs.configure(settings.log.format, "router")
    with busy("loading"), serve_extra("serve"):
        from router_service import app
    try:
        received = asyncio.run(
            app.serve(settings, os.environ, lambda ready: _announce(ready, as_json, settings.log.format))
        )
    except PagerError as error:
        if settings.log.format == "text":
            raise
        log.error("%s", error)
        raise typer.Exit(1) from None
    if received == signal.SIGINT:
        raise typer.Exit(130)


def given(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What was given on the command line, by setting, and how each setting is called there."""
    overrides = {key: parameters[name] for key, name in SETTINGS.items()}
    return overrides, {key: "MODEL" if name == "model" else _flag(name) for key, name in SETTINGS.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _announce(ready: Ready, as_json: bool, log_format: str) -> None:
    for line in ready.model.plan_text.splitlines():
        if log_format == "json":
            log.info("%s", line)
        else:
            err.print(line, style="dim", markup=False)
    if as_json or log_format == "json":
        facts = {"address": ready.address, "metrics_url": ready.metrics_url, "model": ready.model.name}
        print_json({**facts, "workers": ready.num_workers, "plan": ready.model.plan}, indent=None)
    else:
        workers = "1 worker" if ready.num_workers == 1 else f"{ready.num_workers} workers"
        print(f"ready: {ready.model.name} on {ready.address}, {workers}, metrics at {ready.metrics_url}", flush=True)
