"""What ends a stream early: clients, deadlines, aborts, slow readers, a draining service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import psutil
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from pager.errors import DeadlineExceeded, NotReady, PagerError, PortInUse, SlowReader
from pager.types import ModelInfo
from router_service.server import SERVICE_NAME
from tests.router_service.conftest import InProcessCluster, Running
from tests.support.calls import details, failure, reason, rest, trailer
from tests.support.waiting import eventually


def request(request_id: str = "", *, max_tokens: int = 4, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id, text=b"abc", sampling=pb.SamplingParams(max_tokens=max_tokens), **fields
    )


def is_idle(service: Running) -> bool:
    return service.pipeline.admission.num_requests == 0 and service.pipeline.admission.num_tokens == 0


async def test_a_client_that_goes_away_cancels_on_the_worker(service: Running) -> None:
    service.cluster.hold[2] = asyncio.Event()
    call = service.stub.Generate(request("gone"))
    await call.read()
    call.cancel()
    await eventually(lambda: service.cluster.cancelled == ["gone"])
    await eventually(lambda: is_idle(service))
    service.cluster.hold.clear()
    again = service.stub.Generate(request("gone"))
    assert (await again.read()).text == "a"


@pytest.mark.slow
async def test_the_deadline_reaches_the_worker_and_ends_the_call(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    call = service.stub.Generate(request("late"), timeout=4)  # enough for the first chunk, wherever it runs
    assert (await call.read()).text == "a"
    error = await failure(call.read())
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: service.cluster.cancelled == ["late"])
    await eventually(lambda: is_idle(service))
    assert service.cluster.received[0][1].deadline_s is not None


async def test_a_deadline_that_paging_can_not_meet_is_refused_at_once(service: Running) -> None:
    for worker_id in ("w0", "w1"):
        service.cluster.change(worker_id, expert_bytes=10**9, peak_page_in_bytes_per_s=1e6)
    predicted = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_PREDICTION)
    error = await failure(service.stub.Generate(request(pool=predicted), timeout=60).read())
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "paging its experts" in str(error.details())
    assert service.cluster.received == []
    assert service.metric("admission_rejections_total", reason="DEADLINE_EXCEEDED") == 1
    # Without a deadline it may take as long as it takes, and a pool that the prefill is to choose is not known.
    assert (await service.stub.Generate(request(pool=predicted)).read()).text == "a"
    assert (await service.stub.Generate(request(pool=pb.PoolPolicy(count=3)), timeout=60).read()).text == "a"


async def test_a_line_that_was_reported_short_makes_no_estimate_of_a_long_one(service: Running) -> None:
    """A request that waited 0.5 s was placed when the last report said one was waiting; 200 more were not in it yet."""
    service.cluster.change("w1", state="dead")
    service.cluster.change("w0", waiting=1)
    [_ async for _ in service.stub.Generate(request())]
    service.cluster.change("w0", waiting=200, place_s=0.0025)
    assert (await service.stub.Generate(request(), timeout=60).read()).text == "a"


async def test_who_is_refused_by_the_worker_is_counted_as_refused(service: Running) -> None:
    refused = DeadlineExceeded("200 requests are in line")
    refused.is_refusal = True
    late = DeadlineExceeded("the deadline passed after 1 of at most 3 tokens")
    service.cluster.fail = {"w0": [(0, refused), (0, late)]}
    service.cluster.change("w1", state="dead")
    for num_refused in (1, 1):
        error = await failure(service.stub.Generate(request()).read())
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert service.metric("admission_rejections_total", reason="DEADLINE_EXCEEDED") == num_refused


async def test_an_abort_ends_the_tenants_own_request_only(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    call = service.stub.Generate(request("mine"), metadata=(("x-tenant-id", "acme"),))
    await call.read()
    stranger = await service.stub.Abort(pb.AbortRequest(request_id="mine"))
    assert not stranger.aborted
    assert service.cluster.aborted == set()
    owner = (("x-tenant-id", "acme"),)
    first = await service.stub.Abort(pb.AbortRequest(request_id="mine"), metadata=owner)
    second = await service.stub.Abort(pb.AbortRequest(request_id="mine"), metadata=owner)
    assert (first.aborted, second.aborted) == (True, True)
    assert service.cluster.aborted == {("mine", "acme")}
    never = await service.stub.Abort(pb.AbortRequest(request_id="never"), metadata=owner)
    assert not never.aborted


async def test_an_abort_on_the_way_to_the_worker_is_not_lost(service: Running) -> None:
    """The worker has nothing to abort yet; the request finds the mark when its first chunk arrives."""
    service.cluster.hold[0], service.cluster.reached[0] = asyncio.Event(), asyncio.Event()
    call = service.stub.Generate(request("early"))
    first = asyncio.ensure_future(call.read())
    await service.cluster.reached[0].wait()
    assert (await service.stub.Abort(pb.AbortRequest(request_id="early"))).aborted
    service.cluster.hold[0].set()
    error = await failure(first)
    assert error.code() is grpc.StatusCode.CANCELLED
    assert reason(error) == "CANCELLED"
    assert service.cluster.cancelled == ["early"]


async def test_a_full_buffer_ends_the_stream_without_an_invitation_to_retry(service: Running) -> None:
    service.cluster.fail = {"w0": [(2, SlowReader("256 chunks unread"))]}
    call = service.stub.Generate(request())
    await call.read()
    await call.read()
    error = await failure(call.read())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(error) == "SLOW_READER"
    assert trailer(error, "grpc-retry-pushback-ms") is None


@pytest.mark.slow
async def test_a_client_that_reads_nothing_gives_up_its_place(
    serve: Callable[..., Any], make_cluster: type[InProcessCluster], model: ModelInfo
) -> None:
    # 120 MB in all: gRPC's windows and the sockets' buffers grow with the speed of a connection, to 20 MB and more.
    cluster = make_cluster(pad="x" * 3_000_000)
    async with serve(cluster, write_timeout_s=2.0) as service:
        call = service.stub.Generate(request("stuck", max_tokens=40))
        await call.read()
        await eventually(lambda: cluster.cancelled == ["stuck"])
        await eventually(lambda: is_idle(service))
        cluster.pad = ""
        assert (await service.stub.Generate(request("stuck")).read()).text == "a"
        error = await failure(rest(call))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(error) == "SLOW_READER"


async def test_draining_finishes_what_runs_and_refuses_the_rest(service: Running) -> None:
    health = health_pb2_grpc.HealthStub(service.channel)
    service.cluster.hold[1] = asyncio.Event()
    running = service.stub.Generate(request())
    await running.read()
    drained = asyncio.ensure_future(service.server.drain(timeout_s=120))
    await eventually(lambda: service.pipeline.admission._is_closed)
    error = await failure(service.stub.Generate(request()).read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(error) == "NOT_READY"
    for name in ("", SERVICE_NAME):
        status = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING
    service.cluster.hold[1].set()
    texts = [(await running.read()).text for _ in range(3)]
    assert texts == ["b", "c", "a"]
    assert await drained


async def test_a_drain_has_an_end(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    call = service.stub.Generate(request())
    await call.read()
    assert not await service.server.drain(timeout_s=0.05)
    await service.server.cut_off()
    error = await failure(call.read())
    assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert service.pipeline.admission.num_requests == 0


async def test_a_worker_that_drains_gets_nothing_and_what_it_refused_goes_elsewhere(service: Running) -> None:
    service.cluster.fail["w0"] = [(0, NotReady("this worker is shutting down", retry_after_s=1.0))]
    assert [chunk.text async for chunk in service.stub.Generate(request())] == ["a", "b", "c", "a"]
    assert [worker for worker, _ in service.cluster.received] == ["w0", "w1"]
    service.cluster.change("w0", state="draining")
    async for _ in service.stub.Generate(request()):
        pass
    assert [worker for worker, _ in service.cluster.received] == ["w0", "w1", "w1"]
    assert service.metric("replacements_total") == 1


async def test_readiness_follows_the_workers(service: Running) -> None:
    health = health_pb2_grpc.HealthStub(service.channel)

    async def status(name: str) -> int:
        return int((await health.Check(health_pb2.HealthCheckRequest(service=name))).status)

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert await status("") == await status(SERVICE_NAME) == serving
    service.cluster.change("w0", state="hung")
    service.cluster.change("w1", state="dead")
    while await status(SERVICE_NAME) != not_serving:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await status("") == serving
    error = await failure(service.stub.Generate(request()).read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert RetryInfo in details(error)
    service.cluster.change("w1", state="ready")
    while await status(SERVICE_NAME) != serving:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert service.metric("workers", state="ready") == 1
    assert service.metric("workers", state="hung") == 1


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_reflection_describes_the_services(service: Running, version: str) -> None:
    ask: Any = service.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    answer = await ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")])).read()
    names = {each.name for each in answer.list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health", "inference.GRPCInferenceService"} <= names
    for name in names:  # tools ask for each
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        assert (await ask(iter([question])).read()).file_descriptor_response.file_descriptor_proto


def connections_to(service: Running) -> set[int]:
    """The ports at which the connections of the service's clients begin."""
    found = psutil.Process().net_connections("tcp")
    return {
        each.raddr.port for each in found if each.laddr.port == service.server.port and each.status == "ESTABLISHED"
    }


async def test_an_old_connection_takes_no_new_requests_and_ends_what_it_has(serve: Callable[..., Any]) -> None:
    async with serve(max_connection_age_s=1.0) as service:
        service.cluster.hold[1] = asyncio.Event()
        call = service.stub.Generate(pb.GenerateRequest(prompt="abc", sampling=pb.SamplingParams(max_tokens=3)))
        first = await call.read()
        [old] = connections_to(service)
        while connections_to(service) == {old}:
            await service.stub.Complete(pb.GenerateRequest(prompt="xyz", sampling=pb.SamplingParams(max_tokens=1)))
            await asyncio.sleep(0.05)
        assert old in connections_to(service)
        service.cluster.hold[1].set()
        assert "".join(message.text for message in [first, *await rest(call)]) == "abc"


async def test_a_second_server_does_not_take_the_port(service: Running) -> None:
    second = service.another_server()
    with pytest.raises(PortInUse, match=str(service.server.port)):
        await second.start("127.0.0.1", service.server.port)


async def test_an_address_that_is_not_ours_is_a_config_error(service: Running) -> None:
    with pytest.raises(PagerError, match="cannot listen on"):
        await service.another_server().start("203.0.113.1", 0)
