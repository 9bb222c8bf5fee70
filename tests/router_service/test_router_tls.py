"""TLS on a real socket: whom the router lets in, what it shows, and what it says of files that are wrong."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pager.cli.pool_options import PoolAsk
from pager.cli.remote import Service
from pager.cli.tls import ClientTls
from pager.errors import ConfigError, PagerError, PortInUse
from pager.types import SamplingParams
from router_service.server import RouterServer
from router_service.service import SERVICE_NAME
from router_service.tls import TlsFiles


class Files:
    """A certificate authority, and PEM files of what it has signed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.crt"
        self.authority.cert_pem.write_to_path(self.ca)
        self.server = TlsFiles(folder / "tls.crt", folder / "tls.key")
        self.renew()

    def renew(self) -> bytes:
        issued = self.authority.issue_cert("localhost")
        self.server.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.server.key.write_bytes(issued.private_key_pem.bytes())
        return issued.cert_chain_pems[0].bytes()

    def identity(self) -> Path:
        path = self.folder / "identity.pem"
        self.authority.issue_cert("client.example.org").private_key_and_cert_chain_pem.write_to_path(path)
        return path


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "ours")


@asynccontextmanager
async def listening(service, tls: TlsFiles | None, health_port: int | None = None) -> AsyncIterator[RouterServer]:
    server = RouterServer(service.backend)
    await server.start("127.0.0.1", 0, tls, health_port)
    try:
        yield server
    finally:
        await server.stop(0)


async def answer(server: RouterServer, tls: ClientTls | None) -> str:
    """What the command line's own client gets for a prompt."""

    def ask() -> str:
        with Service(f"localhost:{server.port}", "default", 10.0, tls) as client:
            return "".join(chunk.text for chunk in client.generate("hi", SamplingParams(max_tokens=4), PoolAsk()))

    return await asyncio.to_thread(ask)


async def shown_certificate(server: RouterServer) -> bytes:
    return (await asyncio.to_thread(ssl.get_server_certificate, ("localhost", server.port))).encode()


async def test_who_trusts_the_authority_is_answered(service, files):
    async with listening(service, files.server) as server:
        assert await answer(server, ClientTls(files.ca)) == "hihi"


async def test_nobody_else_is_answered(service, files, tmp_path):
    others = Files(tmp_path / "theirs")
    async with listening(service, files.server) as server:
        for tls in (None, ClientTls(others.ca)):
            with pytest.raises(PagerError, match="no service answers"):
                await answer(server, tls)


async def test_with_a_client_authority_a_client_needs_an_identity_that_it_signed(service, files, tmp_path):
    tls = TlsFiles(files.server.cert, files.server.key, files.ca)
    strangers = Files(tmp_path / "theirs").identity()
    async with listening(service, tls) as server:
        assert await answer(server, ClientTls(files.ca, files.identity())) == "hihi"
        for identity in (None, strangers):
            with pytest.raises(PagerError, match="no service answers"):
                await answer(server, ClientTls(files.ca, identity))


async def test_a_renewed_certificate_is_shown_without_a_restart(service, files):
    async with listening(service, files.server) as server:
        before = await shown_certificate(server)
        renewed = files.renew()
        assert await shown_certificate(server) != before
        assert (await shown_certificate(server)).split() == renewed.split()


async def test_a_renewal_that_is_not_complete_changes_nothing(service, files):
    async with listening(service, files.server) as server:
        files.server.key.unlink()
        assert await answer(server, ClientTls(files.ca)) == "hihi"


async def test_the_health_port_answers_in_plain_text_and_has_nothing_but_health(service, files):
    async with (
        listening(service, files.server, health_port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/{SERVICE_NAME}/Status")(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await server.drain(0)
        reply = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_health_port_in_use_is_named(service):
    with pytest.raises(PortInUse, match=r"router\.health_port"):
        await RouterServer(service.backend).start("127.0.0.1", 0, None, service.server.port)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tls.crt", None, r"router\.tls_cert .* can not be read: No such file"),
        ("tls.key", "secret", r"router\.tls_key .* is not a PEM file"),
    ],
)
def test_a_wrong_file_is_refused_by_name(files, name, text, message):
    path = files.folder / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        files.server.credentials()
