"""`expert-pager status` of a service, help in short, and completion."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from contextlib import suppress
from typing import Any

import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from pager.cli.serve import SETTINGS, given
from pager.config import load_config
from tests.cli.conftest import Run
from tests.router_service.conftest import Running, running_service
from tests.support.calls import rest
from tests.support.processes import command, environment, free_port
from tests.support.waiting import eventually


async def output_of(*arguments: object) -> str:
    process = await asyncio.create_subprocess_exec(
        *command(*arguments), env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def a_busy_service(service: Running) -> Any:
    """Holds one answer of the tenant acme, which has a named pool."""
    metadata = (("x-tenant-id", "acme"),)
    examples = [pb.Example(prompt="abc")]
    wire = pb.CalibrateRequest(name="law", examples=examples, pool=pb.PoolPolicy(count=2))
    await service.stub.Calibrate(wire, metadata=metadata)
    service.cluster.hold[1] = asyncio.Event()
    sampling = pb.SamplingParams(max_tokens=2)
    call = service.stub.Generate(pb.GenerateRequest(prompt="abc", sampling=sampling), metadata=metadata)
    await call.read()
    return call


@pytest.mark.slow
async def test_status_shows_workers_pools_and_load() -> None:
    async with running_service() as service:
        service.cluster.change("w1", state="starting", resident=())
        call = await a_busy_service(service)
        at = ("--server", f"127.0.0.1:{service.server.port}", "--tenant", "acme")
        seen = json.loads(await output_of("status", *at, "--json"))
        text = await output_of("status", *at)
        assert seen["model"] == "tiny"
        assert [(each["id"], each["state"]) for each in seen["workers"]] == [("w0", "ready"), ("w1", "starting")]
        assert [each["name"] for each in seen["pools"]] == ["law"]
        assert seen["load"]["num_requests"] == 1
        assert seen["load"]["tenants"] == [{"tenant": "acme", "num_requests": 1, "num_tokens": 5}]
        assert "1 requests with 5 tokens in flight" in text
        for word in ("w0", "starting", "law", "acme"):
            assert word in text
        service.cluster.hold[1].set()
        await rest(call)


@pytest.mark.slow
async def test_status_follows_a_service() -> None:
    async with running_service() as service:
        at = ("--server", f"127.0.0.1:{service.server.port}", "--watch", "--every", "0.1", "--json")
        process = await asyncio.create_subprocess_exec(
            *command("status", *at), env=environment(), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            assert json.loads(await process.stdout.readline())["load"]["num_requests"] == 0
            call = await a_busy_service(service)
            while json.loads(await process.stdout.readline())["load"]["num_requests"] != 1:
                pass
            service.cluster.hold[1].set()
            await rest(call)
            while json.loads(await process.stdout.readline())["load"]["num_requests"] != 0:
                pass
        finally:
            process.terminate()
            await process.wait()
        await eventually(lambda: service.pipeline.admission.num_requests == 0)


def test_a_service_that_is_not_there_is_named(run: Run) -> None:
    port = free_port()
    done = run("status", "--server", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"no service answers at 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize("command", ["", "serve", "status", "config", "pools", "pack", "generate"])
def test_h_is_help(run: Run, command: str) -> None:
    done = run(*command.split(), "-h")
    assert done.returncode == 0
    assert "Usage: expert-pager" in done.stdout


def test_shells_complete_commands_and_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_EXPERT_PAGER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "expert-pager serve --log")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run().stdout.split() == ["--log-format"]


def test_options_of_serve_are_settings() -> None:
    parameters = {
        "model": "models/emo-tiny",
        "drift": "0.3",
        "tls_cert": "c.pem",
        "tls_key": "k.pem",
        "tls_client_ca": "ca.pem",
        "log_format": "json",
    }
    overrides, flags = given(dict.fromkeys(SETTINGS.values()) | parameters)
    settings = load_config(None, {}, overrides, flags)
    assert settings.pools.default_drift == "0.3"
    assert (settings.router.tls_cert, settings.router.tls_key) == ("c.pem", "k.pem")
    assert settings.router.tls_client_ca == "ca.pem"
    assert settings.log.format == "json"
    assert flags["router.tls_client_ca"] == "--tls-client-ca"


@pytest.mark.slow
def test_a_terminal_shows_all_of_why_nothing_can_be_seen() -> None:
    """In lines as wide as it is; the service is looked for again meanwhile."""
    shown, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    env = environment({"TERM": "xterm", "COLUMNS": "60"})
    at = f"127.0.0.1:{free_port()}"
    watching = command("status", "--server", at, "--watch", "--every", "0.1")
    with subprocess.Popen(watching, stdin=terminal, stdout=terminal, env=env) as process:
        os.close(terminal)
        text, give_up_s = "", time.monotonic() + 60
        while text.count("tryingagain") < 2 and time.monotonic() < give_up_s:
            text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\s", "", os.read(shown, 65536).decode())
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the other end is closed
            while os.read(shown, 65536):
                pass
        assert process.wait(60) == 130
    os.close(shown)
    assert f"noserviceanswersat{at}" in text
    assert text.count("tryingagain") >= 2
