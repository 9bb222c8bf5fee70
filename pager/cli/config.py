"""`expert-pager config`: what a service would run with, where each setting comes from, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from pager.cli import serve
from pager.cli.output import print_error
from pager.config import SCHEMA, Reading, config_of, read_config, shown
from pager.errors import PagerError
from pager.pools.drift import parse_drift
from pager.pools.pick import parse_pool_size

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
SECRETS = {"REDIS_URL": "a secret, not shown", "REDIS_URL_FILE": None}  # None: a path, which is none
_FILES = ("router.tls_cert", "router.tls_key", "router.tls_client_ca")


def config(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Say all that is wrong; the default.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print what is in force, and where it comes from.")] = False,
) -> None:
    """Check or print the settings of `serve`, whose arguments and options it takes. Starts nothing.

    Defaults are overridden by the file, the file by the environment, and both by the command line. Exit status 1 when
    something is wrong. What is printed is a configuration file.

    Examples:

    `expert-pager config --check --config service.toml`

    `expert-pager config --print ./model --workers 2`
    """
    given = _parsed(context)
    overrides, flags = serve.given(given)
    reading = read_config(given["config"], os.environ, overrides, flags)
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
    """What is left of the command line, as `serve` reads it. Ends the program for wrong usage, as `serve` would."""
    assert context.parent is not None, "a command of expert-pager"
    group: Any = context.parent.command
    command = group.get_command(context.parent, "serve")
    parsed: dict[str, Any] = command.make_context(context.info_name, list(context.args), parent=context.parent).params
    return parsed


def _beyond_the_schema(reading: Reading, env: Mapping[str, str]) -> Iterator[str]:
    """What a start would stumble on and that can be seen without one."""
    config = config_of(reading)
    if config.model.path and not (Path(config.model.path) / "config.json").is_file():
        yield _said(reading, "model.path", "is no checkpoint folder: it has no config.json")
    for key in _FILES:
        value = reading.value(key)
        if value is not None and not os.access(value, os.R_OK):
            yield _said(reading, key, "is not a file that can be read")
    for key, parse in (("pools.default_size", parse_pool_size), ("pools.default_drift", parse_drift)):
        try:
            parse(reading.value(key))
        except PagerError as error:
            yield _said(reading, key, f"is wrong: {error.message}")
    if config.workers.count == 0 and config.cluster.joined is None:
        yield _said(reading, "workers.count", "uses the workers of another router: set cluster.ray_address too")
    ports = {"router.port": config.router.port, "router.metrics_port": config.router.metrics_port}
    if config.router.health_port is not None:
        ports["router.health_port"] = config.router.health_port
    taken = [port for port in ports.values() if port]
    for port in sorted({port for port in taken if taken.count(port) > 1}):
        yield f"{' and '.join(key for key in ports if ports[key] == port)} are both {port}; choose another for one"
    secret = env.get("REDIS_URL_FILE")
    if secret and not os.access(secret, os.R_OK):
        yield f"REDIS_URL_FILE is {secret!r}, which is not a file that can be read"


def _said(reading: Reading, key: str, what: str) -> str:
    setting = reading.settings[key]
    return f"{key} {shown(setting.value)} (from {setting.origin}) {what}"


def _in_force(reading: Reading, env: Mapping[str, str]) -> Iterator[str]:
    config = config_of(reading)
    for section in fields(config):
        yield f"[{section.name}]"
        for each in fields(getattr(config, section.name)):
            key, value = f"{section.name}.{each.name}", getattr(getattr(config, section.name), each.name)
            origin = reading.settings[key].origin if key in reading.settings else "default"
            line = f"# {each.name} is not set" if value is None else f"{each.name} = {_toml(value)}"
            yield f"{line:<40}  # {origin}" if value is not None else line
        yield ""
    for variable, instead in SECRETS.items():
        if env.get(variable):
            yield f"# {variable} is set in the environment ({instead or env[variable]})"
    yield f"# {len(SCHEMA.fields)} settings; what is not set is decided by the planner, the machine or the checkpoint"


def _toml(value: Any) -> str:
    """Of a setting's types. A text of several lines is the content of a file, not its name: maybe a secret."""
    if not isinstance(value, str):
        return str(value)
    if len(value.splitlines()) > 1:
        return '"a text of several lines, not shown"'
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
