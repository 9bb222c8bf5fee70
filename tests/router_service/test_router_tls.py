"""TLS on a real socket: whom the router lets in, what it shows, and what it says of files that are wrong."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pager.cli.pools import ServerOptions
from pager.errors import ConfigError, PagerError, PortInUse
from pager.types import SamplingParams
from router_service.server import SERVICE_NAME, HealthPort, RouterServer
from router_service.tls import TlsFiles
from tests.router_service.conftest import Running

BEGINNING = "-----BEGIN CERTIFICATE-----\nMIIB"


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

    def issue(self) -> dict[str, bytes]:
        issued = self.authority.issue_cert("localhost")
        return {"tls.crt": issued.cert_chain_pems[0].bytes(), "tls.key": issued.private_key_pem.bytes()}

    def renew(self) -> bytes:
        pems = self.issue()
        for name, pem in pems.items():
            (self.folder / name).write_bytes(pem)
        return pems["tls.crt"]

    def identity(self) -> Path:
        path = self.folder / "identity.pem"
        self.authority.issue_cert("client.example.org").private_key_and_cert_chain_pem.write_to_path(path)
        return path


class Volume:
    """Files as Kubernetes mounts a Secret: links through a link that is exchanged for another folder at a renewal."""

    def __init__(self, files: Files, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._number = 0
        self.swap(files.issue())
        for name in self.pems:
            (folder / name).symlink_to(Path("..data", name))
        self.server = TlsFiles(folder / "tls.crt", folder / "tls.key")

    def swap(self, pems: dict[str, bytes]) -> None:
        self.pems = pems
        self._number += 1
        version = self._folder / f"..{self._number}"
        version.mkdir()
        for name, pem in pems.items():
            (version / name).write_bytes(pem)
        (self._folder / "..new").symlink_to(version.name)
        (self._folder / "..new").rename(self._folder / "..data")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "ours")


@asynccontextmanager
async def listening(
    service: Running, tls: TlsFiles | None, health: HealthPort | None = None
) -> AsyncIterator[RouterServer]:
    server = service.another_server()
    await server.start("127.0.0.1", 0, tls, health)
    try:
        yield server
    finally:
        await server.stop(0)


async def answer(server: RouterServer, ca: Path | None, identity: Path | None = None) -> str:
    """What the command line's own client gets for a prompt."""

    def ask() -> str:
        at = ServerOptions(server=f"localhost:{server.port}", timeout=10.0, tls_ca=ca, tls_identity=identity)
        with at.service() as client:
            return client.generate("hi", SamplingParams(max_tokens=4)).text()

    return await asyncio.to_thread(ask)


async def shown_certificate(server: RouterServer) -> bytes:
    return (await asyncio.to_thread(ssl.get_server_certificate, ("localhost", server.port))).encode()


async def test_who_trusts_the_authority_is_answered(service: Running, files: Files) -> None:
    async with listening(service, files.server) as server:
        assert await answer(server, files.ca) == "hihi"


async def test_nobody_else_is_answered(service: Running, files: Files, tmp_path: Path) -> None:
    others = Files(tmp_path / "theirs")
    async with listening(service, files.server) as server:
        for ca in (None, others.ca):
            with pytest.raises(PagerError, match="no service answers"):
                await answer(server, ca)


async def test_with_a_client_authority_a_client_needs_an_identity_that_it_signed(
    service: Running, files: Files, tmp_path: Path
) -> None:
    tls = TlsFiles(files.server.cert, files.server.key, files.ca)
    strangers = Files(tmp_path / "theirs").identity()
    async with listening(service, tls) as server:
        assert await answer(server, files.ca, files.identity()) == "hihi"
        for identity in (None, strangers):
            with pytest.raises(PagerError, match="no service answers"):
                await answer(server, files.ca, identity)


async def test_a_renewed_certificate_is_shown_without_a_restart(service: Running, files: Files) -> None:
    async with listening(service, files.server) as server:
        before = await shown_certificate(server)
        renewed = files.renew()
        assert await shown_certificate(server) != before
        assert (await shown_certificate(server)).split() == renewed.split()


async def test_a_renewal_that_is_not_complete_changes_nothing(service: Running, files: Files) -> None:
    async with listening(service, files.server) as server:
        files.server.key.unlink()
        assert await answer(server, files.ca) == "hihi"


async def test_a_renewal_under_load_fails_no_call_however_it_comes_about(
    service: Running, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """New connections all the while, and an answer that is open from before the first renewal until after the last."""
    caplog.set_level("INFO", "router_service.tls")
    failures: list[str] = []
    num_answers = 0

    async def connect_again_and_again(server: RouterServer) -> None:
        nonlocal num_answers
        trust = grpc.ssl_channel_credentials(files.ca.read_bytes())
        options = (("grpc.use_local_subchannel_pool", 1),)  # else they share one connection
        while True:
            async with grpc.aio.secure_channel(f"localhost:{server.port}", trust, options) as channel:
                try:
                    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
                    num_answers += 1
                except grpc.aio.AioRpcError as error:
                    failures.append(str(error))

    async def serve_some() -> None:
        enough = num_answers + 12
        async with asyncio.timeout(120):
            while num_answers < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    volume = Volume(files, tmp_path / "volume")
    async with listening(service, volume.server) as server:
        service.cluster.hold[1] = asyncio.Event()
        trust = grpc.ssl_channel_credentials(files.ca.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", trust) as channel:
            request = pb.GenerateRequest(text=b"abc", sampling=pb.SamplingParams(max_tokens=2))
            stub: Any = pb_grpc.ExpertPagerStub(channel)
            call = stub.Generate(request, timeout=300)
            assert (await call.read()).text == "a"
            load = [asyncio.create_task(connect_again_and_again(server)) for _ in range(3)]
            await serve_some()
            used = volume.pems
            for pems in (
                {"tls.crt": files.issue()["tls.crt"]},  # with the old key
                {"tls.key": files.issue()["tls.key"]},  # another key, for the old certificate
                {"tls.crt": used["tls.crt"][:300]},
                {"tls.key": used["tls.key"][:100]},
                {"tls.key": b""},
            ):
                volume.swap(used | pems)
                await serve_some()
                assert (await shown_certificate(server)).split() == used["tls.crt"].split()
            for _ in range(3):
                volume.swap(files.issue())
                await serve_some()
                assert (await shown_certificate(server)).split() == volume.pems["tls.crt"].split()
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
            service.cluster.hold[1].set()
            message = await call.read()
            while not message.HasField("usage"):
                message = await call.read()
    assert failures == []
    said = [record.levelname for record in caplog.records if record.name == "router_service.tls"]
    assert said.count("INFO") == 3
    # Not one a connection: a state that is like the one before is not said again; a read may fall into a swap.
    assert 3 <= said.count("WARNING") <= 11


async def test_the_health_port_answers_in_plain_text_and_has_nothing_but_health(service: Running, files: Files) -> None:
    port = HealthPort()
    await port.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def is_serving(name: str) -> bool:
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

        assert await is_serving("")
        assert not await is_serving(SERVICE_NAME), "there is no service yet"
        async with listening(service, files.server, port) as server:
            assert await is_serving("")
            assert await is_serving(SERVICE_NAME)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(f"/{SERVICE_NAME}/Status", None, None)(b"")
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            await server.drain(0)
            assert not await is_serving(SERVICE_NAME)
        assert not await is_serving(""), "it answers until its owner stops it"
    await port.stop()


async def test_a_health_port_in_use_is_named(service: Running) -> None:
    with pytest.raises(PortInUse, match=r"router\.health_port"):
        await HealthPort().start("127.0.0.1", service.server.port)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tls.crt", None, r"router\.tls_cert .* cannot be read: No such file"),
        ("tls.key", "secret", r"router\.tls_key .* is not a PEM file"),
        ("tls.key", BEGINNING, r"router\.tls_key .* are not a certificate and its key"),
        ("tls.crt", BEGINNING, r"router\.tls_cert .* are not a certificate and its key"),
        ("ca.crt", BEGINNING, r"router\.tls_client_ca .* holds no certificate"),
    ],
)
def test_a_wrong_file_is_refused_by_name(files: Files, name: str, text: str | None, message: str) -> None:
    path = files.folder / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TlsFiles(files.server.cert, files.server.key, files.ca).credentials()


def test_a_key_of_another_certificate_is_said_to_be_that_and_not_a_port_in_use(files: Files) -> None:
    key = files.server.key.read_bytes()
    files.renew()
    files.server.key.write_bytes(key)
    with pytest.raises(
        ConfigError, match=r"tls_cert .* and router\.tls_key .* are not a certificate and its key: key val"
    ):
        files.server.credentials()
