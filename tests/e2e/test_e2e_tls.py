"""A service with TLS that asks clients for certificates, and the command line as its client."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import free_port

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    server, client = authority.issue_cert("localhost", "::1"), authority.issue_cert("client")
    (tmp_path / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in server.cert_chain_pems))
    server.private_key_pem.write_to_path(tmp_path / "tls.key")
    client.private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    return authority


@contextlib.contextmanager
def foreign_services() -> Iterator[None]:
    """Whatever they are, on the ports that Ray has for its services, unless somebody has those already."""
    with contextlib.ExitStack() as stack:
        for port in (6379, 8076, 8077, 8265, 10001, 10002, 52365):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


@pytest.mark.usefixtures("authority")
def test_the_command_line_speaks_tls_with_a_service_on_ipv6_whatever_has_the_usual_ports(
    serve: Callable[..., Any], run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    health_port = free_port()
    env = {f"EXPERT_PAGER_ROUTER_TLS_{key}": str(tmp_path / name)
           for key, name in (("CERT", "tls.crt"), ("KEY", "tls.key"), ("CLIENT_CA", "ca.crt"))}  # fmt: skip
    env |= {"EXPERT_PAGER_ROUTER_HEALTH_PORT": str(health_port)}
    with foreign_services(), serve(tmp_path / "service", GOLDEN, "--host", "::1", **env) as service:
        assert service.ready["address"].startswith("[::1]:")
        assert service.ready["metrics_url"].startswith("http://[::1]:")
        assert service.metrics("router").total("expert_pager_router_requests_in_flight") == 0
        server = ("--server", service.ready["address"])
        trust, identity = ("--tls-ca", tmp_path / "ca.crt"), ("--tls-identity", tmp_path / "client.pem")
        ask = ("generate", "--token-ids", "1,2,3", "--max-tokens", 4, "--ignore-eos", *server)
        answered = run(*ask, *trust, *identity)
        assert answered.returncode == 0, answered.stderr
        assert run("pools", "list", *server, *trust, *identity).returncode == 0
        for refused in (run(*ask), run(*ask, *trust)):
            assert refused.returncode == 1
            assert "no service answers" in refused.stderr
        with grpc.insecure_channel(f"[::1]:{health_port}") as channel:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert service.stop() == 0


@pytest.mark.usefixtures("authority")
def test_a_key_that_is_not_there_is_named_at_once(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run(
        "serve", GOLDEN, "--port", 0, "--http-port", 0, "--metrics-port", 0,
        EXPERT_PAGER_ROUTER_TLS_CERT=str(tmp_path / "tls.crt"), EXPERT_PAGER_ROUTER_TLS_KEY=str(tmp_path / "absent"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "router.tls_key" in done.stderr
    assert "cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", GOLDEN, "--tls-ca", "ca.crt"), "it goes with --server"),
        (("--server", "localhost:1", "--tls-identity", "client.pem"), "it goes with --tls-ca"),
        (("--server", "localhost:1", "--tls-ca", "absent.crt"), "cannot be read"),
    ],
)
def test_options_that_can_take_no_effect_are_refused(
    run: Callable[..., subprocess.CompletedProcess[str]], options: tuple[object, ...], message: str
) -> None:
    done = run("generate", "--token-ids", "1", *options)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.replace("│", " ").split())
