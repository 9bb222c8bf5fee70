"""Who may call: keys, certificates and tokens through both fronts, and what each caller may do and use."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import random
import re
import ssl
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from expert_pager.inference import open_inference_pb2 as inference
from expert_pager.inference import open_inference_pb2 as inference_pb
from expert_pager.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app

from pager.errors import ConfigError, InvalidRequest, PermissionDenied, Unauthenticated
from pager.observe.metrics import MetricsServer
from router_service.access_log import AuditLog
from router_service.admission import Caller, CallerLimits, Role
from router_service.api import Api, metrics_route
from router_service.http import HttpServer, page_guard
from router_service.keys import (
    Entry,
    EntryLimits,
    Gate,
    KeyFile,
    KeySet,
    KeysInRedis,
    Tokens,
    WatchedFile,
    WatchedRedis,
    new_entry,
    new_key,
    parse_jwks,
    parse_key_set,
    parse_secret,
)
from router_service.redis import RedisClient
from router_service.tls import TlsFiles
from router_service.ui import Page
from tests.router_service.conftest import InProcessCluster, Running, running_service
from tests.support.calls import details, failure, reason, rest
from tests.support.processes import RedisProcess

Pairs = Sequence[tuple[str, str]]
SECRET = b"a secret of thirty-two bytes or more"
AUDIENCE = "expert-pager"
METHODS: Mapping[str, Any] = {
    "Route": pb.RouteRequest(text=b"hi"),
    "Calibrate": pb.CalibrateRequest(name="law", examples=[pb.Example(text=b"hi")], pool=pb.PoolPolicy(count=3)),
    "ListPools": pb.ListPoolsRequest(),
    "DeletePool": pb.DeletePoolRequest(name="law"),
    "Abort": pb.AbortRequest(request_id="mine"),
    "GetModel": pb.GetModelRequest(),
    "GetResidency": pb.GetResidencyRequest(),
    "Drain": pb.DrainRequest(worker="w0"),
    "Generate": pb.GenerateRequest(text=b"hi", sampling=pb.SamplingParams(max_tokens=2)),
    "Complete": pb.GenerateRequest(prompt="hi", sampling=pb.SamplingParams(max_tokens=2)),
}
POSTS: Mapping[str, Any] = {
    "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"model": "tiny", "input": "hi"},
    "/v1/messages": {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    "/ui/scores": {"prompt": "hi"},
    "/ui/answers": {"prompt": "hi", "max_tokens": 2},
}
GETS = (
    "/v1/models",
    "/v1/models/tiny",
    "/ui/state.json",
    "/ui/pool.json",
    "/ui/playground.json",
    "/ui/pools/tiny",
    "/metrics",
)
OPEN = ("/ui", "/ui/", "/health")  # the page itself is the same for everybody, and has a field for the key


def bearer(key: str) -> Pairs:
    return (("authorization", f"Bearer {key}"),)


class KeyRing:
    """A file of keys, and the keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = KeyFile(path)
        self.ids: dict[str, str] = {}

    async def add(self, tenant: str, *roles: Role, **limits: int) -> str:
        key, sha256 = new_key()
        entry = new_entry(tenant, roles, EntryLimits(**limits), sha256=sha256)
        await self.file.change(lambda entries: (*entries, entry))
        self.ids[key] = entry.id
        return key

    async def know(self, tenant: str, **identity: Any) -> None:
        entry = new_entry(tenant, (), EntryLimits(), **identity)
        await self.file.change(lambda entries: (*entries, entry))

    async def revoke(self, key: str) -> None:
        await self.file.change(lambda entries: tuple(each for each in entries if each.id != self.ids[key]))

    def gate(self, **options: Any) -> Gate:
        return Gate(WatchedFile(self.path, "router.keys", parse_key_set), **options)


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@asynccontextmanager
async def guarded(gate: Gate, **options: Any) -> AsyncIterator[Running]:
    await gate.start()
    try:
        async with running_service(gate=gate, **options) as service:
            yield service
    finally:
        await gate.close()


@asynccontextmanager
async def http(
    service: Running, gate: Gate, audit: AuditLog | None = None, tls: TlsFiles | None = None
) -> AsyncIterator[str]:
    """The HTTP front of a service; its address."""
    api = Api(service.pipeline, None, None, 30.0, gate=gate, audit=audit)
    page = Page(service.watch, asyncio.get_running_loop())
    app = api.app(*page.routes(), metrics_route(service.pipeline.metrics.registry))
    paths = {re.sub(r"{.*}", "tiny", getattr(route, "path", "")) for route in app.routes}
    assert paths == {*POSTS, *GETS, *OPEN}, "what is tested here is all there is"
    server = HttpServer(app)
    await server.start("127.0.0.1", 0, tls)
    try:
        yield f"http{'s' if tls else ''}://localhost:{server.port}"
    finally:
        await server.stop()


async def call(service: Running, method: str, headers: Pairs = ()) -> Any:
    """One call to its end; of Generate the messages."""
    called = getattr(service.stub, method)(METHODS[method], metadata=tuple(headers), timeout=60)
    return await rest(called) if method == "Generate" else await called


async def within(seconds: float, condition: Callable[[], Awaitable[bool]]) -> float:
    """Waits for a condition; how long it took."""
    started_s = time.monotonic()
    while not await condition():
        assert time.monotonic() - started_s < seconds
        await asyncio.sleep(0.02)
    return time.monotonic() - started_s


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_every_grpc_method_asks_for_a_key(ring: KeyRing) -> None:
    good = await ring.add("acme", Role.INFERENCE, Role.OPERATOR)
    revoked = await ring.add("acme", *Role)
    await ring.revoke(revoked)
    wrong: list[Pairs] = [(), bearer("epk_wrong"), bearer(revoked), bearer(""), bearer(good[:-1]), bearer(good + "x")]
    wrong += [(("authorization", good),), (("x-tenant-id", "acme"),), (*bearer(good), *bearer("epk_other"))]
    assert set(METHODS) == {method.name for method in pb.DESCRIPTOR.services_by_name["ExpertPager"].methods}
    async with guarded(ring.gate()) as service:
        told = set()
        for method in METHODS:
            await call(service, method, bearer(good))
            for headers in wrong:
                error = await failure(call(service, method, headers))
                assert (error.code(), reason(error)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"), method
                told.add(error.details())
        assert len(told) == 1, "nothing says which part was wrong"
        assert len(service.cluster.received) == 2, "what was refused has come to no worker"


async def test_every_method_of_the_open_inference_protocol_asks_for_a_key(ring: KeyRing) -> None:
    key = await ring.add("acme")
    (protocol,) = inference_pb.DESCRIPTOR.services_by_name.values()
    async with guarded(ring.gate()) as service:

        async def status(method: Any, headers: Pairs) -> grpc.StatusCode:
            path, metadata = f"/{protocol.full_name}/{method.name}", tuple(headers)
            call: Any
            if method.client_streaming:
                call = service.channel.stream_stream(path, None, None)(iter([b""]), metadata=metadata, timeout=60)
                with suppress(grpc.aio.AioRpcError):
                    await rest(call)
            else:
                call = service.channel.unary_unary(path, None, None)(b"", metadata=metadata, timeout=60)
            code: grpc.StatusCode = await call.code()
            return code

        assert len(protocol.methods) == 7
        for method in protocol.methods:
            if method.name in ("ServerLive", "ServerReady"):  # health, which answers everybody
                assert await status(method, ()) == grpc.StatusCode.OK
                continue
            for headers in ((), bearer("epk_wrong")):
                assert await status(method, headers) == grpc.StatusCode.UNAUTHENTICATED, method.name
            assert await status(method, bearer(key)) != grpc.StatusCode.UNAUTHENTICATED, method.name
        assert not service.cluster.received


async def test_reflection_asks_for_a_key_and_health_does_not(ring: KeyRing) -> None:
    key = await ring.add("acme")
    async with guarded(ring.gate()) as service:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(service.channel)

        async def listed(headers: Pairs) -> int:
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            answers = [each async for each in stub.ServerReflectionInfo(asked, metadata=tuple(headers), timeout=60)]
            return len(answers[0].list_services_response.service)

        assert await listed(bearer(key)) >= 3
        error = await failure(listed(()))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        health: Any = health_pb2_grpc.HealthStub(service.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=60)).status == 1


async def test_every_http_method_and_page_asks_for_a_key(ring: KeyRing) -> None:
    key = await ring.add("acme", *Role)
    gate = ring.gate()
    async with guarded(gate) as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:
        for headers in ({}, dict(bearer("epk_wrong")), {"x-api-key": "epk_wrong"}, {"x-tenant-id": "acme"}):
            answers = {path: await client.post(url + path, json=body, headers=headers) for path, body in POSTS.items()}
            answers |= {path: await client.get(url + path, headers=headers) for path in GETS}
            for path, answer in answers.items():
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"].startswith(("Bearer", "Basic")), path
                assert "epk_" not in answer.text
        password = {"authorization": "Basic " + b64encode(f"any:{key}".encode()).decode()}
        for headers in (dict(bearer(key)), {"x-api-key": key}, password):
            assert (
                await client.post(url + "/v1/completions", json=POSTS["/v1/completions"], headers=headers)
            ).is_success
            found = {path: (await client.get(url + path, headers=headers)).status_code for path in GETS}
            nothing_there = {"/ui/pools/tiny", "/ui/pool.json"}
            assert found == {path: 404 if path in nothing_there else 200 for path in GETS}
        pages = [await client.get(url + path, headers=headers) for path in OPEN for headers in ({}, dict(bearer(key)))]
        assert [page.status_code for page in pages] == [200] * len(pages)
        assert len({page.content for page in pages[:4]}) == 1, "it tells nobody anything"


async def test_the_open_inference_protocol_asks_for_keys_but_for_its_probes(ring: KeyRing) -> None:
    key = await ring.add("acme")
    tensor = inference.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"hi")
    wire = inference.ModelInferRequest(
        inputs=[tensor], parameters={"max_tokens": inference.InferParameter(int64_param=2)}
    )
    async with guarded(ring.gate()) as service:
        stub: Any = GRPCInferenceServiceStub(service.channel)
        assert (await stub.ServerReady(inference.ServerReadyRequest())).ready
        for headers in ((), bearer("wrong")):
            for call in (
                stub.ModelReady(inference.ModelReadyRequest(), metadata=headers),
                stub.ModelMetadata(inference.ModelMetadataRequest(), metadata=headers),
                stub.ModelInfer(wire, metadata=headers),
                stub.ModelStreamInfer(iter([wire]), metadata=headers).read(),
            ):
                assert (await failure(call)).code() is grpc.StatusCode.UNAUTHENTICATED
        assert not service.cluster.received
        assert (await stub.ModelReady(inference.ModelReadyRequest(), metadata=bearer(key))).ready
        await stub.ModelInfer(wire, metadata=bearer(key))
        stream = stub.ModelStreamInfer(metadata=bearer(key))
        await stream.write(wire)
        assert not (await stream.read()).error_message
        await ring.revoke(key)
        async with asyncio.timeout(60):  # a stream that goes on has no more rights than a new one
            while not (answer := await stream.read()).error_message:
                await stream.write(wire)
        assert "key" in answer.error_message
        assert {request.tenant for _, request in service.cluster.received} == {"acme"}


@pytest.mark.parametrize("num_bytes", [10, 100_000, 1_500_000, 10_000_000])
async def test_whoever_sends_a_large_body_without_a_key_reads_why_it_is_refused(ring: KeyRing, num_bytes: int) -> None:
    await ring.add("acme")
    gate = ring.gate()
    body = json.dumps({"model": "tiny", "prompt": "x" * num_bytes}).encode()

    def status(port: int) -> int:
        connection = HTTPConnection("localhost", port, timeout=60)
        headers = {"content-type": "application/json", "authorization": "Bearer epk_wrong"}
        connection.request("POST", "/v1/completions", body, headers)
        with closing(connection):
            return connection.getresponse().status

    async with guarded(gate) as service, http(service, gate) as url:
        port = int(url.rpartition(":")[2])
        assert [await asyncio.to_thread(status, port) for _ in range(3)] == [401] * 3


async def test_a_revoked_key_is_refused_within_a_second_and_a_new_one_is_good(ring: KeyRing) -> None:
    key = await ring.add("acme")
    async with guarded(ring.gate()) as service:
        await call(service, "GetModel", bearer(key))
        await ring.revoke(key)

        async def is_refused() -> bool:
            try:
                await call(service, "GetModel", bearer(key))
            except grpc.aio.AioRpcError:
                return True
            return False

        assert await within(30, is_refused) < 1 or _is_busy()
        new = await ring.add("acme")

        async def is_taken() -> bool:
            try:
                await call(service, "GetModel", bearer(new))
            except grpc.aio.AioRpcError:
                return False
            return True

        await within(30, is_taken)


def _is_busy() -> bool:
    """Whether others have the processors, so that a time says nothing."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


async def test_a_damaged_file_leaves_the_last_good_one_in_force_and_is_logged(
    ring: KeyRing, caplog: pytest.LogCaptureFixture
) -> None:
    key = await ring.add("acme")
    watched = WatchedFile(ring.path, "router.keys", parse_key_set)
    gate = Gate(watched)
    for damaged in ("{", '{"keys": [{"id": "k"}]}', json.dumps({"keys": [{"id": "k", "tenant": "a", "sha256": key}]})):
        caplog.clear()
        ring.path.write_text(damaged)
        watched.refresh()
        watched.refresh()
        assert gate.caller_of(bearer(key)).tenant == "acme"
        assert len(caplog.records) == 1, "once"
        assert "continuing with its previous contents" in caplog.text
        assert key not in caplog.text
    ring.path.unlink()
    watched.refresh()
    assert gate.caller_of(bearer(key)).tenant == "acme"
    ring.path.write_text('{"keys": []}')
    watched.refresh()
    with pytest.raises(Unauthenticated):
        gate.caller_of(bearer(key))
    with pytest.raises(ConfigError, match="cannot be read"):
        WatchedFile(ring.path.with_name("none.json"), "router.keys", parse_key_set)


async def test_the_file_is_rotated_under_load_and_no_call_with_a_good_key_fails(ring: KeyRing) -> None:
    key = await ring.add("acme")
    async with guarded(ring.gate()) as service:
        is_over = False

        async def caller() -> int:
            count = 0
            while not is_over:
                await call(service, "Generate", bearer(key))
                count += 1
            return count

        callers = [asyncio.create_task(caller()) for _ in range(4)]
        for _ in range(15):
            other = await ring.add("other")
            await asyncio.sleep(0.05)
            await ring.revoke(other)
        is_over = True
        assert min(await asyncio.gather(*callers)) > 0
        assert ring.path.stat().st_mode & 0o077 == 0, "only its owner reads it"
        assert [path.name for path in ring.path.parent.iterdir()] == ["keys.json"]


async def test_changes_of_a_file_at_the_same_time_are_all_there(ring: KeyRing) -> None:
    keys = await asyncio.gather(*(asyncio.to_thread(asyncio.run, ring.add(f"t{index}")) for index in range(12)))
    found = KeySet.of(await ring.file.entries())
    assert len(found.by_sha256) == len(set(keys)) == 12


# --- tenants and roles ----------------------------------------------------------------------------------------------


async def test_a_tenant_has_its_own_pools_and_requests_alone(ring: KeyRing) -> None:
    acme, rival = await ring.add("acme"), await ring.add("rival")
    cluster = InProcessCluster(hold={1: asyncio.Event()}, reached={1: asyncio.Event()})
    async with guarded(ring.gate(), cluster=cluster) as service:
        await call(service, "Calibrate", bearer(acme))
        for named, code in ((acme, None), (rival, grpc.StatusCode.NOT_FOUND)):
            ask = pb.GenerateRequest(
                text=b"hi", pool=pb.PoolPolicy(name="law"), sampling=pb.SamplingParams(max_tokens=1)
            )
            answer = rest(service.stub.Generate(ask, metadata=bearer(named)))
            assert (await failure(answer)).code() == code if code else await answer
        assert not (await call(service, "DeletePool", bearer(rival))).deleted
        assert [pool.name for pool in (await call(service, "ListPools", bearer(rival))).pools] == []
        ask = pb.GenerateRequest(request_id="mine", text=b"hi", sampling=pb.SamplingParams(max_tokens=4))
        running = service.stub.Generate(ask, metadata=bearer(acme))
        await running.read()
        await cluster.reached[1].wait()
        assert not (await call(service, "Abort", bearer(rival))).aborted
        for headers in ((*bearer(rival), ("x-tenant-id", "acme")),):
            for method in ("Abort", "Generate", "ListPools", "DeletePool", "Calibrate", "Route"):
                assert (await failure(call(service, method, headers))).code() == grpc.StatusCode.PERMISSION_DENIED
        assert (await call(service, "Abort", bearer(acme))).aborted
        cluster.hold[1].set()
        await rest(running)


async def test_over_http_a_tenant_has_its_own_pools_and_requests_alone(ring: KeyRing) -> None:
    acme, rival = await ring.add("acme"), await ring.add("rival")
    cluster = InProcessCluster(hold={1: asyncio.Event()}, reached={1: asyncio.Event()})
    gate = ring.gate()
    guard, headers = guarded(gate, cluster=cluster), dict(bearer(rival))
    async with guard as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:
        await call(service, "Calibrate", bearer(acme))
        for path, body in POSTS.items():
            named = body | {"model": "tiny:law"} if "model" in body else body | {"pool": "law"}
            assert (await client.post(url + path, json=named, headers=headers)).status_code in (400, 404), path
            as_acme = await client.post(url + path, json=body, headers=headers | {"x-tenant-id": "acme"})
            assert as_acme.status_code == 403, path
        for path in GETS:
            refused = await client.get(url + path, headers=headers | {"x-tenant-id": "acme"})
            assert refused.status_code == 403, path
        listed = (await client.get(f"{url}/v1/models", headers=headers)).json()["data"]
        assert [card["id"] for card in listed] == ["tiny"]
        assert (await client.get(f"{url}/v1/models/tiny:law", headers=headers)).status_code == 404
        assert not cluster.received
        ask = POSTS["/v1/completions"] | {"model": "tiny:law", "max_tokens": 4}
        mine = {**dict(bearer(acme)), "x-request-id": "mine"}
        running = asyncio.create_task(client.post(f"{url}/v1/completions", json=ask, headers=mine))
        await cluster.reached[1].wait()
        assert not (await call(service, "Abort", bearer(rival))).aborted
        same_id = asyncio.create_task(
            client.post(
                f"{url}/v1/completions", json=POSTS["/v1/completions"], headers=headers | {"x-request-id": "mine"}
            )
        )
        assert (await client.post(f"{url}/v1/completions", json=ask, headers=mine)).status_code == 409
        assert (await call(service, "Abort", bearer(acme))).aborted
        cluster.hold[1].set()
        await running
        assert (await same_id).status_code == 200, "an id is its tenant's own"
        assert {request.tenant for _, request in cluster.received} == {"acme", "rival"}


async def test_over_http_a_revoked_key_is_refused_within_a_second_everywhere(ring: KeyRing) -> None:
    key = await ring.add("acme", *Role)
    gate = ring.gate()
    async with guarded(gate) as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:
        headers = dict(bearer(key))
        assert (await client.get(f"{url}/v1/models", headers=headers)).status_code == 200
        await ring.revoke(key)

        async def is_refused() -> bool:
            return (await client.get(f"{url}/v1/models", headers=headers)).status_code == 401

        assert await within(30, is_refused) < 1 or _is_busy()
        for path, body in POSTS.items():
            assert (await client.post(url + path, json=body, headers=headers)).status_code == 401, path
        for path in GETS:
            assert (await client.get(url + path, headers=headers)).status_code == 401, path


async def test_what_admission_refuses_says_over_http_when_to_come_again(ring: KeyRing) -> None:
    key = await ring.add("acme", requests_in_flight=1, requests_per_minute=100)
    cluster = InProcessCluster(hold={0: asyncio.Event()}, reached={0: asyncio.Event()})
    gate = ring.gate()
    guard, headers = guarded(gate, cluster=cluster), dict(bearer(key))
    async with guard as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:

        def ask() -> Awaitable[httpx.Response]:
            return client.post(f"{url}/v1/completions", json=POSTS["/v1/completions"], headers=headers)

        first = asyncio.ensure_future(ask())
        await cluster.reached[0].wait()
        refused = await ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tenant_overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-ratelimit-remaining-requests"] == "98"
        cluster.hold[0].set()
        assert (await first).status_code == 200
        for worker in list(cluster.views):
            cluster.change(worker, state="starting")
        away = await ask()
        assert (away.status_code, int(away.headers["retry-after"]) >= 1) == (503, True)


async def test_each_role_does_what_it_is_for(ring: KeyRing) -> None:
    keys = {role: await ring.add("acme", role) for role in Role}
    allowed = {
        Role.INFERENCE: set(METHODS) - {"GetResidency", "Drain"},
        Role.OPERATOR: {"ListPools", "DeletePool", "Abort", "GetModel", "GetResidency", "Drain"},
        Role.METRICS: {"GetModel"},
    }
    asking = {"/ui", "/ui/playground.json"}
    pages = {Role.INFERENCE: asking, Role.OPERATOR: {"/ui", "/ui/state.json", "/metrics"}}
    pages[Role.METRICS] = pages[Role.OPERATOR]
    gate = ring.gate()
    async with guarded(gate) as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:
        for role, key in keys.items():
            for method in METHODS:
                if method in allowed[role]:
                    await call(service, method, bearer(key))
                else:
                    error = await failure(call(service, method, bearer(key)))
                    assert error.code() == grpc.StatusCode.PERMISSION_DENIED, (role, method)
            for path in ("/ui", "/ui/playground.json", "/ui/state.json", "/metrics"):
                status = (await client.get(url + path, headers=dict(bearer(key)))).status_code
                assert status == (200 if path in pages[role] else 403), (role, path)
            answer = await client.post(
                url + "/v1/completions", json=POSTS["/v1/completions"], headers=dict(bearer(key))
            )
            assert answer.status_code == (200 if role is Role.INFERENCE else 403)


async def test_an_operator_drains_workers_and_routers_and_nobody_else_does(ring: KeyRing, tmp_path: Path) -> None:
    tenant, operator = await ring.add("acme"), await ring.add("house", Role.OPERATOR)
    audit, num_stops = AuditLog(tmp_path / "audit.jsonl", 1 << 20), 0

    def stop() -> None:
        nonlocal num_stops
        num_stops += 1

    async with guarded(ring.gate(), audit=audit, stop=stop) as service:

        async def drain(headers: Pairs, **what: Any) -> None:
            await service.stub.Drain(pb.DrainRequest(**what), metadata=tuple(headers), timeout=60)

        for headers, what, code in (
            (bearer(tenant), {"worker": "w0"}, grpc.StatusCode.PERMISSION_DENIED),
            (bearer(operator), {"worker": "w9"}, grpc.StatusCode.NOT_FOUND),
            (bearer(operator), {}, grpc.StatusCode.INVALID_ARGUMENT),
            (bearer(operator), {"router": False}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            assert (await failure(drain(headers, **what))).code() == code
        assert not service.cluster.retired
        await drain(bearer(operator), worker="w1")
        assert service.cluster.retired == ["w1"]
        assert num_stops == 0
        for _ in range(2):
            await drain(bearer(operator), router=True)
        assert num_stops == 1, "a second signal would cut off what is in flight"
    audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines if line["what"] == "Drain"].count("OK") == 3
    async with running_service() as open_service:
        error = await failure(open_service.stub.Drain(pb.DrainRequest(worker="w0")))
        assert (error.code(), open_service.cluster.retired) == (grpc.StatusCode.PERMISSION_DENIED, [])


async def test_an_operator_names_the_tenant_whose_pools_it_manages(ring: KeyRing) -> None:
    acme, operator = await ring.add("acme"), await ring.add("house", Role.OPERATOR)
    async with guarded(ring.gate()) as service:
        await call(service, "Calibrate", bearer(acme))
        for_acme = (*bearer(operator), ("x-tenant-id", "acme"))
        assert [pool.name for pool in (await call(service, "ListPools", for_acme)).pools] == ["law"]
        assert not (await call(service, "ListPools", bearer(operator))).pools
        assert (await call(service, "DeletePool", for_acme)).deleted


async def test_the_tenant_header_is_believed_where_that_is_set(ring: KeyRing) -> None:
    key = await ring.add("gateway")
    named = (*bearer(key), ("x-tenant-id", "acme"))
    assert ring.gate(trusts_tenant_header=True).caller_of(named).tenant == "acme"
    with pytest.raises(PermissionDenied):
        ring.gate().caller_of(named)
    with pytest.raises(InvalidRequest, match="x-tenant-id"):
        ring.gate(trusts_tenant_header=True).caller_of((*bearer(key), ("x-tenant-id", "a b")))
    assert Gate().caller_of((("x-tenant-id", "acme"),)).tenant == "acme"
    assert Gate(trusts_tenant_header=False).caller_of((("x-tenant-id", "acme"),)).tenant == "default"


def test_the_metrics_port_asks_for_the_role_unless_it_is_open(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    tenant, scraper = (asyncio.run(ring.add("acme", role)) for role in (Role.INFERENCE, Role.METRICS))

    audit = AuditLog(tmp_path / "audit.jsonl", 1 << 20)

    @contextmanager
    def listening(*, is_open: bool) -> Iterator[str]:
        server = MetricsServer(
            CollectorRegistry(), "127.0.0.1", 0, page_guard(ring.gate(), audit, open_metrics=is_open)
        )
        server.mount("/ui", make_wsgi_app(CollectorRegistry()))
        try:
            yield f"http://{server.address}"
        finally:
            server.close()

    def status(url: str, headers: Pairs = ()) -> int:
        return httpx.get(url, headers=list(headers)).status_code

    with listening(is_open=False) as url:
        assert [status(f"{url}/metrics", each) for each in ((), bearer(tenant), bearer(scraper))] == [401, 403, 200]
        asked = f"{url}/ui/state.json"
        assert [status(asked, each) for each in ((), bearer("x"), bearer(tenant), bearer(scraper))] == [
            401,
            401,
            403,
            200,
        ]
        assert status(f"{url}/ui") == 200
    with listening(is_open=True) as url:
        assert (status(f"{url}/metrics"), status(f"{url}/ui"), status(f"{url}/ui/state.json")) == (200, 200, 401)
    audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["what"], line["outcome"], line.get("tenant")) for line in lines[:2]] == [
        ("/metrics", "UNAUTHENTICATED", None),
        ("/metrics", "PERMISSION_DENIED", "acme"),
    ]


# --- certificates and tokens ----------------------------------------------------------------------------------------


async def test_the_name_in_a_certificate_is_a_caller_of_both_fronts(ring: KeyRing, tmp_path: Path) -> None:
    await ring.know("acme", certificate="client.acme.example")
    authority = trustme.CA()
    served = authority.issue_cert("localhost")
    tls = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    served.cert_chain_pems[0].write_to_path(tls.cert)
    served.private_key_pem.write_to_path(tls.key)
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    gate = ring.gate()
    async with guarded(gate) as service, http(service, gate, tls=tls) as url:
        server = service.another_server(gate=gate)
        await server.start("127.0.0.1", 0, tls)
        for name, is_known in (("client.acme.example", True), ("client.rival.example", False)):
            client = authority.issue_cert(name)
            pems = [each.bytes() for each in (authority.cert_pem, client.private_key_pem, client.cert_chain_pems[0])]
            async with grpc.aio.secure_channel(
                f"localhost:{server.port}", grpc.ssl_channel_credentials(*pems)
            ) as channel:
                stub: Any = pb_grpc.ExpertPagerStub(channel)
                if is_known:
                    await stub.Calibrate(METHODS["Calibrate"])
                else:
                    error = await failure(stub.Calibrate(METHODS["Calibrate"]))
                    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            client.private_key_and_cert_chain_pem.write_to_path(tmp_path / "identity.pem")
            context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
            context.load_cert_chain(tmp_path / "identity.pem")
            async with httpx.AsyncClient(verify=context, timeout=60) as browser:
                answer = await browser.get(f"{url}/v1/models")
            assert answer.status_code == (200 if is_known else 401)
            assert not is_known or [card["id"] for card in answer.json()["data"]] == ["tiny", "tiny:law"]
        await server.stop(0)


@pytest.fixture(scope="session")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def tokens(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> Tokens:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key.public_key()))
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [public | {"kid": "one", "alg": "RS256"}]}))
    secret = WatchedFile(tmp_path / "secret", "router.jwt_secret", parse_secret)
    return Tokens(AUDIENCE, "issuer", secret=secret, jwks=WatchedFile(tmp_path / "jwks.json", "jwks", parse_jwks))


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    made = {"tenant": "acme", "aud": AUDIENCE, "iss": "issuer", "exp": now + 600} | changes
    return {name: value for name, value in made.items() if value is not None}


def test_good_tokens_are_callers(tokens: Tokens, rsa_key: rsa.RSAPrivateKey) -> None:
    gate = Gate(None, tokens)
    hs256 = jwt.encode(claims(roles=["operator", "unheard-of"]), SECRET)
    rs256 = jwt.encode(claims(), rsa_key, "RS256", headers={"kid": "one"})
    assert gate.caller_of(bearer(hs256)) == Caller("acme", "jwt:acme", frozenset({Role.OPERATOR}))
    assert gate.caller_of(bearer(rs256)).roles == {Role.INFERENCE}


async def test_an_entry_bounds_a_tenant_s_tokens(ring: KeyRing, tokens: Tokens) -> None:
    entry = new_entry("acme", (), EntryLimits(requests_per_minute=3), jwt=True)
    await ring.file.change(lambda _: (entry,))
    caller = ring.gate(tokens=tokens).caller_of(bearer(jwt.encode(claims(roles=["inference", "operator"]), SECRET)))
    assert caller == Caller("acme", entry.id, frozenset({Role.INFERENCE}), CallerLimits(requests_per_minute=3))


BAD_TOKENS: Mapping[str, Callable[[rsa.RSAPrivateKey], str]] = {
    "expired": lambda _: jwt.encode(claims(exp=int(time.time()) - 3600), SECRET),
    "without an end": lambda _: jwt.encode(claims(exp=None), SECRET),
    "not yet": lambda _: jwt.encode(claims(nbf=int(time.time()) + 3600), SECRET),
    "an end that is none": lambda _: jwt.encode(claims(exp=float("inf")), SECRET),
    "another audience": lambda _: jwt.encode(claims(aud="another"), SECRET),
    "no audience": lambda _: jwt.encode(claims(aud=None), SECRET),
    "another issuer": lambda _: jwt.encode(claims(iss="another"), SECRET),
    "another secret": lambda _: jwt.encode(claims(), b"another secret, long enough as well"),
    "alg none": lambda _: jwt.encode(claims(), "", "none"),
    "another algorithm": lambda _: jwt.encode(claims(), SECRET + SECRET, "HS512"),
    "no tenant": lambda _: jwt.encode(claims(tenant=None), SECRET),
    "a tenant that is none": lambda _: jwt.encode(claims(tenant="a b"), SECRET),
    "a tenant that is a list": lambda _: jwt.encode(claims(tenant=["acme"]), SECRET),
    "roles that are a text": lambda _: jwt.encode(claims(roles="operator"), SECRET),
    "another key": lambda _: jwt.encode(claims(), rsa.generate_private_key(65537, 2048), "RS256"),
    "cut": lambda _: jwt.encode(claims(), SECRET)[:-3],
    "nothing": lambda _: "..",
    # The public key as a secret: what a checker takes that lets the token choose how it is checked.
    "the public key as the secret": lambda key: _signed_with_public_key(key),
}


def _signed_with_public_key(key: rsa.RSAPrivateKey) -> str:
    def part(value: bytes) -> str:
        return urlsafe_b64encode(value).rstrip(b"=").decode()

    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = f"{part(json.dumps({'alg': 'HS256', 'kid': 'one'}).encode())}.{part(json.dumps(claims()).encode())}"
    return f"{text}.{part(hmac.digest(pem, text.encode(), hashlib.sha256))}"


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_refused(name: str, tokens: Tokens, rsa_key: rsa.RSAPrivateKey) -> None:
    with pytest.raises(Unauthenticated):
        Gate(None, tokens).caller_of(bearer(BAD_TOKENS[name](rsa_key)))


def test_a_token_of_one_algorithm_is_not_taken_where_only_the_other_is_set(tokens: Tokens) -> None:
    token = jwt.encode(claims(), SECRET)
    with pytest.raises(Unauthenticated):
        Gate(None, replace(tokens, secret=None)).caller_of(bearer(token))


@pytest.mark.parametrize(
    ("parse", "data", "said"),
    [
        (parse_secret, b"short", "needs 32"),
        (parse_jwks, b"{}", "RSA key"),
        (parse_jwks, b"[1]", "RSA key"),
        (parse_jwks, b'{"keys": [{"kty": "oct", "k": "AAAA"}]}', "RSA key"),
        (parse_key_set, b'{"keys": [{"id": "a", "tenant": "b"}]}', "one of"),
        (parse_key_set, b'{"keys": [{"id": "a", "tenant": "b", "sha256": "epk_secret"}]}', "sha256"),
        (parse_key_set, b'{"keys": [{"id": "a", "tenant": "b", "jwt": true, "role": "operator"}]}', "role"),
        (parse_key_set, b'{"keys": 1}', "keys"),
        (parse_key_set, b"\xff", "not JSON"),
    ],
)
def test_files_that_cannot_be_used_are_named_and_not_quoted(
    parse: Callable[[bytes, str], object], data: bytes, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse(data, "the file")
    assert "the file" in caught.value.message
    assert "epk_secret" not in caught.value.message


def test_entries_that_are_the_same_caller_are_refused() -> None:
    one = Entry(id="a", tenant="t", sha256="0" * 64)
    for other in (one, one.model_copy(update={"id": "b"}), Entry(id="a", tenant="t", jwt=True)):
        with pytest.raises(ConfigError, match="two keys have the same"):
            KeySet.of([one, other])


# --- fuzzed ---------------------------------------------------------------------------------------------------------

GOOD, GOOD_SHA256 = new_key()
NAMES = st.sampled_from(["authorization", "x-api-key", "x-tenant-id", "cookie", "authorization-bin"])
SCHEMES = st.sampled_from(["Bearer ", "bearer ", "Basic ", "Digest ", "", "Bearer  ", "Bearer\t"])
VALUES = st.one_of(
    st.text(max_size=300), st.binary(max_size=60), st.builds(str.__add__, SCHEMES, st.text(max_size=80)),
    st.builds(str.__add__, SCHEMES, st.sampled_from([GOOD[:-1], GOOD + "0", GOOD_SHA256, GOOD.upper(), "a.b.c"])),
)  # fmt: skip


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6))
def test_no_header_that_is_not_the_key_is_let_in(pairs: list[tuple[str, str | bytes]]) -> None:
    entry = Entry(id="k", tenant="acme", sha256=GOOD_SHA256)
    gate = Gate(tokens=None)
    gate.is_on, gate._keys = True, _Held(KeySet.of([entry]))  # type: ignore[assignment]
    with pytest.raises(Unauthenticated) as caught:
        gate.caller_of(pairs)
    assert GOOD[4:] not in caught.value.message


class _Held:
    def __init__(self, value: KeySet) -> None:
        self.value = value


async def test_fuzzed_headers_over_a_socket_are_answered_with_401(ring: KeyRing) -> None:
    key = await ring.add("acme")
    gate = ring.gate()
    draw = random.Random(5)
    async with guarded(gate) as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:
        for _ in range(60):
            noise = bytes(draw.choice(range(33, 256)) for _ in range(draw.randrange(1, 200)))
            name = draw.choice([b"authorization", b"x-api-key"])
            value = draw.choice([b"", b"Bearer ", b"Basic "]) + draw.choice([noise, key.encode()[:-1] + noise[:1]])
            if value in (b"Bearer " + key.encode(), key.encode()):
                continue
            answer = await client.get(f"{url}/v1/models", headers=[(name, value)])
            assert answer.status_code == 401
        assert (await client.get(f"{url}/v1/models", headers=dict(bearer(key)))).status_code == 200


# --- quotas ---------------------------------------------------------------------------------------------------------


async def test_requests_of_a_minute_end_in_a_refusal_that_says_when_to_come_again(ring: KeyRing) -> None:
    key, other = await ring.add("acme", requests_per_minute=3), await ring.add("acme")
    gate = ring.gate()
    async with guarded(gate) as service, http(service, gate) as url, httpx.AsyncClient(timeout=60) as client:
        for _ in range(2):
            await call(service, "GetModel", bearer(key))
        answer = await client.get(f"{url}/v1/models", headers=dict(bearer(key)))
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        answer = await client.get(f"{url}/v1/models", headers=dict(bearer(key)))
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        error = await failure(call(service, "GetModel", bearer(key)))
        assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert 0 < details(error)[RetryInfo].retry_delay.ToMilliseconds() <= 60_000
        await call(service, "GetModel", bearer(other))
        assert service.metric("admission_rejections_total", reason="QUOTA_EXCEEDED") == 2


async def test_tokens_of_a_day_are_those_of_prompts_and_answers(ring: KeyRing) -> None:
    key = await ring.add("acme", tokens_per_day=10)
    async with guarded(ring.gate()) as service:
        await call(service, "Generate", bearer(key))  # two of the prompt, two of the answer
        await call(service, "Route", bearer(key))
        await call(service, "Generate", bearer(key))
        for method in ("Generate", "Route", "Calibrate"):
            error = await failure(call(service, method, bearer(key)))
            assert reason(error) == "QUOTA_EXCEEDED", method
            assert details(error)[RetryInfo].retry_delay.seconds > 3600
        await call(service, "GetModel", bearer(key))
        long = pb.RouteRequest(text=b"a" * 11)
        error = await failure(service.stub.Route(long, metadata=bearer(key)))
        assert reason(error) == "PROMPT_TOO_LONG"


async def test_a_key_s_priority_and_weight_reach_the_worker(ring: KeyRing) -> None:
    key, sha256 = new_key()
    entry = new_entry("acme", (), EntryLimits(), sha256=sha256, priority=2, weight=0.5)
    await ring.file.change(lambda _: (entry,))
    async with guarded(ring.gate()) as service:
        await call(service, "Generate", bearer(key))
        ((_, sent),) = service.cluster.received
        assert (sent.priority, sent.weight) == (2, 0.5)
    for wrong in ({"priority": 101}, {"weight": 0}, {"weight": float("nan")}, {"weight": float("inf")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            new_entry("acme", (), EntryLimits(), sha256=sha256, **wrong)


async def test_who_acts_for_a_tenant_has_its_weight_and_priority(ring: KeyRing) -> None:
    """Those of the key with the highest priority; its own, for a tenant without keys."""
    (_, one), (_, two), (operator, three) = new_key(), new_key(), new_key()
    entries = (
        new_entry("acme", (), EntryLimits(), sha256=one, priority=2, weight=3.0),
        new_entry("acme", (), EntryLimits(), sha256=two, priority=1, weight=9.0),
        new_entry("ops", (Role.OPERATOR, Role.INFERENCE), EntryLimits(), sha256=three, priority=7, weight=0.5),
    )
    await ring.file.change(lambda _: entries)
    async with guarded(ring.gate()) as service:
        for tenant in ("acme", "ops", "nobody"):
            await call(service, "Generate", (*bearer(operator), ("x-tenant-id", tenant)))
        found = [(sent.tenant, sent.priority, sent.weight) for _, sent in service.cluster.received]
        assert found == [("acme", 2, 3.0), ("ops", 7, 0.5), ("nobody", 7, 0.5)]


async def test_what_a_tenant_is_guaranteed_reaches_the_worker_whichever_key_it_shows(ring: KeyRing) -> None:
    (first, one), (second, other), (operator, third) = new_key(), new_key(), new_key()
    entries = (
        new_entry("acme", (), EntryLimits(), sha256=one, guaranteed_share=0.25),
        new_entry("acme", (), EntryLimits(), sha256=other),
        new_entry("ops", (Role.OPERATOR, Role.INFERENCE), EntryLimits(), sha256=third, guaranteed_share=0.5),
    )
    await ring.file.change(lambda _: entries)
    async with guarded(ring.gate()) as service:
        for key in (first, second):
            await call(service, "Generate", bearer(key))
        await call(service, "Generate", (*bearer(operator), ("x-tenant-id", "acme")))
        await call(service, "Generate", bearer(operator))
        shares = [(sent.tenant, sent.guaranteed_share) for _, sent in service.cluster.received]
        assert shares == [("acme", 0.25)] * 3 + [("ops", 0.5)]
    with pytest.raises(ConfigError, match="guaranteed_share"):
        new_entry("acme", (), EntryLimits(), sha256=one, guaranteed_share=0.95)
    too_much = new_entry("other", (), EntryLimits(), jwt=True, guaranteed_share=0.2)
    with pytest.raises(ConfigError, match=r"3 tenants are guaranteed 95% of the slots together, and 90% can be"):
        await ring.file.change(lambda entries: (*entries, too_much))


async def test_what_a_key_has_in_flight_is_bounded(ring: KeyRing) -> None:
    key, other = await ring.add("acme", requests_in_flight=1), await ring.add("acme", tokens_in_flight=5)
    cluster = InProcessCluster(hold={1: asyncio.Event()}, reached={1: asyncio.Event()})
    async with guarded(ring.gate(), cluster=cluster) as service:
        first = service.stub.Generate(METHODS["Generate"], metadata=bearer(key))
        await cluster.reached[1].wait()
        assert reason(await failure(call(service, "Generate", bearer(key)))) == "TENANT_OVERLOADED"
        second = service.stub.Generate(METHODS["Generate"], metadata=bearer(other))
        await second.read()
        assert reason(await failure(call(service, "Generate", bearer(other)))) == "TENANT_OVERLOADED"
        large = pb.GenerateRequest(text=b"hi", sampling=pb.SamplingParams(max_tokens=4))
        assert reason(await failure(rest(service.stub.Generate(large, metadata=bearer(other))))) == "PROMPT_TOO_LONG"
        service.pipeline.admission.check_integrity()
        cluster.hold[1].set()
        await rest(first)
        await rest(second)
        await call(service, "Generate", bearer(key))
        service.pipeline.admission.check_integrity()


# --- Redis ----------------------------------------------------------------------------------------------------------


async def test_keys_and_quotas_in_redis_are_those_of_all_routers(redis: RedisProcess) -> None:
    store = KeysInRedis(RedisClient(redis.url))
    key, sha256 = new_key()
    entry = new_entry("acme", (), EntryLimits(requests_per_minute=4, tokens_per_minute=1000), sha256=sha256)
    await store.change(lambda entries: (*entries, entry))
    gates = [Gate(WatchedRedis(KeysInRedis(RedisClient(redis.url)))) for _ in range(2)]
    async with guarded(gates[0], redis_url=redis.url) as one, guarded(gates[1], redis_url=redis.url) as two:
        for service in (one, two, one, two):
            await call(service, "GetModel", bearer(key))
        assert reason(await failure(call(one, "GetModel", bearer(key)))) == "QUOTA_EXCEEDED"
        await store.change(lambda _: ())

        async def is_refused() -> bool:
            error = await failure(call(two, "GetModel", bearer(key)))
            return error.code() == grpc.StatusCode.UNAUTHENTICATED

        assert await within(30, is_refused) < 1 or _is_busy()
    await store.close()


async def test_a_redis_that_goes_away_leaves_the_last_keys_in_force(
    redis_at: Callable[..., RedisProcess], caplog: pytest.LogCaptureFixture
) -> None:
    redis = redis_at()
    store = KeysInRedis(RedisClient(redis.url))
    key, sha256 = new_key()
    entry = new_entry("acme", (), EntryLimits(requests_per_minute=2), sha256=sha256)
    await store.change(lambda entries: (*entries, entry))
    watched = WatchedRedis(KeysInRedis(RedisClient(redis.url)))
    async with guarded(Gate(watched), redis_url=redis.url) as service:
        await call(service, "GetModel", bearer(key))
        redis.kill()
        await watched.refresh()
        await watched.refresh()
        for _ in range(2):  # counted by this router alone now
            await call(service, "GetModel", bearer(key))
        assert reason(await failure(call(service, "GetModel", bearer(key)))) == "QUOTA_EXCEEDED"
        assert "continuing with those read before" in caplog.text
        with pytest.raises(ConfigError, match="cannot be changed"):
            await store.change(lambda _: ())
    await store.close()


async def test_changes_in_redis_at_the_same_time_are_all_there(redis: RedisProcess) -> None:
    async def add(index: int) -> None:
        store = KeysInRedis(RedisClient(redis.url))
        entry = new_entry(f"t{index}", (), EntryLimits(), sha256=new_key()[1])
        await store.change(lambda entries: (*entries, entry))
        await store.close()

    await asyncio.gather(*(add(index) for index in range(6)))
    store = KeysInRedis(RedisClient(redis.url))
    assert sorted(entry.tenant for entry in await store.entries()) == [f"t{index}" for index in range(6)]
    await store.close()


# --- what is written about it ---------------------------------------------------------------------------------------


async def test_the_audit_log_has_refusals_changes_and_operators_calls_and_no_key_or_prompt(
    ring: KeyRing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, operator = await ring.add("acme"), await ring.add("house", Role.OPERATOR)
    audit = AuditLog(tmp_path / "audit.jsonl", 1 << 20)
    gate = ring.gate()
    for name in ("pager", "expert_pager", "router_service"):
        caplog.set_level("DEBUG", name)
    async with guarded(gate, audit=audit) as service, http(service, gate, audit) as url:
        await call(service, "Calibrate", bearer(key))
        await call(service, "Generate", bearer(key))
        await failure(call(service, "GetResidency", bearer(key)))
        await call(service, "GetResidency", bearer(operator))
        await call(service, "DeletePool", (*bearer(operator), ("x-tenant-id", "acme")))
        async with httpx.AsyncClient(timeout=60) as client:
            await client.post(f"{url}/v1/completions", json=POSTS["/v1/completions"], headers=dict(bearer("epk_nope")))
            await client.get(f"{url}/ui/state.json", headers=dict(bearer(key)))
        for _ in range(200):
            await failure(call(service, "Route", bearer("epk_nope")))
    audit.close()
    text = (tmp_path / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    seen = [(line["what"], line["outcome"], line.get("key")) for line in lines if line["what"] != "Route"]
    ids = ring.ids
    assert seen == [
        ("Calibrate", "OK", ids[key]),
        ("GetResidency", "PERMISSION_DENIED", ids[key]),
        ("GetResidency", "OK", ids[operator]),
        ("DeletePool", "OK", ids[operator]),
        ("Completions", "UNAUTHENTICATED", None),
        ("/ui/state.json", "PERMISSION_DENIED", ids[key]),
    ]
    assert lines[0]["pool"] == "named:law"
    assert lines[3]["tenant"] == "acme"
    assert all(line["peer"] for line in lines)
    assert len([line for line in lines if line["what"] == "Route"]) < 20, "refusals that repeat are sampled"
    for place in (text, caplog.text, generate_latest(service.pipeline.metrics.registry).decode()):
        assert not any(secret in place for secret in (key, operator, "epk_nope", "Bearer"))


def test_an_audit_log_that_cannot_be_written_is_said_so_and_nothing_else_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    audit = AuditLog(Path("/dev/full"), 1 << 20)
    for _ in range(3):
        audit.record("Calibrate", "OK", None, "peer")
    audit.close()
    assert "the audit log /dev/full cannot be written: No space left on device" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_the_audit_log_is_rotated_by_its_size(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl", 2000)
    for _ in range(100):
        audit.record("Calibrate", "OK", None, "peer")
    audit.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 2 < len(sizes) <= 9
    assert max(sizes) <= 2000
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    with pytest.raises(ConfigError, match="audit_log"):
        AuditLog(tmp_path / "none" / "audit.jsonl", 2000)
