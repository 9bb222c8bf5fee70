"""Route, GetModel, GetResidency, and what the metrics say."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from pager.errors import ConfigError
from pager.observe.metrics import MetricsServer
from pager.types import Count, Full, PoolPolicy, PoolSource
from router_service.metrics import ADAPTERS, GATEWAY
from tests.router_service.conftest import InProcessCluster, Running
from tests.support.calls import rest
from tests.support.waiting import eventually


async def test_route_gives_scores_pool_and_place_and_generates_nothing(service: Running) -> None:
    service.cluster.change("w1", resident=(0, 0xFF, 0xFF))
    reply = await service.stub.Route(pb.RouteRequest(token_ids=pb.TokenIds(ids=[0, 5]), pool=pb.PoolPolicy(count=2)))
    assert reply.scores.source == "trunk"
    assert [len(layer.mean) for layer in reply.scores.layers] == [0, 8, 8]
    assert list(reply.scores.layers[1].mean) == pytest.approx([index / 36 for index in range(1, 9)])
    assert [list(layer.experts) for layer in reply.pool.layers] == [[], [6, 7], [6, 7]]
    assert reply.pool.covered_mass == pytest.approx(15 / 36)
    assert (reply.placement.worker, reply.placement.missing_bytes) == ("w1", 0)
    assert not reply.HasField("observed")
    assert service.cluster.received == []
    assert service.pipeline.admission.num_requests == 0


async def test_route_tells_what_a_prefill_chose_before(service: Running) -> None:
    prompt = pb.TokenIds(ids=[0, 5])
    wire = pb.GenerateRequest(token_ids=prompt, pool=pb.PoolPolicy(count=2), sampling=pb.SamplingParams(max_tokens=2))
    messages = [message async for message in service.stub.Generate(wire)]
    reply = await service.stub.Route(pb.RouteRequest(token_ids=prompt, pool=pb.PoolPolicy(count=2)))
    assert reply.observed.digest == messages[-1].usage.pool.digest != reply.pool.digest


async def test_a_routed_pool_can_be_generated_with(service: Running) -> None:
    reply = await service.stub.Route(pb.RouteRequest(text=b"abc", pool=pb.PoolPolicy(count=2)))
    fixed = pb.PoolPolicy(experts=pb.FixedPool(layers=reply.pool.layers))
    for pool in (fixed, pb.PoolPolicy(digest=reply.pool.digest)):
        wire = pb.GenerateRequest(text=b"xyz", pool=pool, sampling=pb.SamplingParams(max_tokens=2))
        messages = [message async for message in service.stub.Generate(wire)]
        assert messages[-1].usage.pool.digest == reply.pool.digest


async def test_route_without_a_ready_worker_still_answers(service: Running) -> None:
    for worker_id in ("w0", "w1"):
        service.cluster.change(worker_id, state="starting", resident=())
    reply = await service.stub.Route(pb.RouteRequest(text=b"abc"))
    assert not reply.HasField("placement")
    assert not reply.HasField("pool")


async def test_route_refuses_what_generate_refuses(service: Running) -> None:
    for wire in (
        pb.RouteRequest(),
        pb.RouteRequest(text=b"\xff"),
        pb.RouteRequest(text=b"a", pool=pb.PoolPolicy(count=1)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Route(wire)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_default_pool_is_the_services(serve: Callable[..., Any]) -> None:
    async with serve(default_pool=PoolPolicy(Count(4), PoolSource.PREDICTION)) as service:
        wire = pb.GenerateRequest(text=b"abc", sampling=pb.SamplingParams(max_tokens=2))
        [_ async for _ in service.stub.Generate(wire)]
        assert service.cluster.received[0][1].pool == PoolPolicy(Count(4), PoolSource.PREDICTION)
    with pytest.raises(ConfigError):
        async with serve(default_pool=PoolPolicy(Full(), PoolSource.PREDICTION)):
            pass


async def test_get_model_says_what_a_client_has_to_know(service: Running) -> None:
    reply = await service.stub.GetModel(pb.GetModelRequest(model="tiny"))
    assert (reply.name, reply.fingerprint) == ("tiny", "f" * 16)
    assert (reply.context_length, reply.kv_token_limit, reply.vocab_size) == (64, 48, 256)
    assert reply.tokenizer.class_name == "ByteTokenizer"
    assert (reply.pool_sizes.min_routed, reply.pool_sizes.max_routed, reply.pool_sizes.slots) == (2, 8, 16)
    assert [(layer.routed, layer.shared, layer.top_k) for layer in reply.pool_sizes.layers] == [
        (0, 0, 0),
        (8, 1, 2),
        (8, 1, 2),
    ]
    assert reply.plan == "16 slots"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.GetModel(pb.GetModelRequest(model="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_residency_is_a_bitmap_a_layer(service: Running) -> None:
    service.cluster.change("w0", resident=(0, 0b1000_0001, 0b10), waiting=1, running=2)
    service.cluster.change("w1", state="starting", resident=())
    reply = await service.stub.GetResidency(pb.GetResidencyRequest())
    loaded, starting = reply.workers
    assert (loaded.worker, loaded.state, loaded.waiting, loaded.running) == ("w0", "ready", 1, 2)
    assert (loaded.slots, loaded.expert_bytes, loaded.resident_experts) == (16, 1000, 3)
    assert list(loaded.resident) == [b"", b"\x81", b"\x02"]
    assert (starting.state, list(starting.resident)) == ("starting", [b"", b"\x00", b"\x00"])


async def test_endpoint_pickers_find_the_load_under_the_names_they_know(service: Running) -> None:
    service.cluster.change("w0", waiting=3, running=2, kv_share=0.5)
    service.cluster.change("w1", waiting=1, running=4, kv_share=1.0)

    def values() -> list[float | None]:
        registry = service.pipeline.metrics.registry
        return [registry.get_sample_value(name, {"model_name": "tiny"}) for name in GATEWAY]

    await eventually(lambda: values() == [4, 6, 0.75])
    service.cluster.change("w1", state="hung")
    await eventually(lambda: values() == [3, 2, 0.5])


async def test_endpoint_pickers_find_named_pools_as_adapters_where_that_is_asked_for(
    serve: Callable[..., Any], service: Running
) -> None:
    def shown(of: Running) -> list[tuple[dict[str, str], float]]:
        families = [each for each in of.pipeline.metrics.registry.collect() if each.name == ADAPTERS]
        return [(sample.labels, sample.value) for family in families for sample in family.samples]

    assert not shown(service), "names of pools are their tenants' own"
    cluster = InProcessCluster(
        hold={0: asyncio.Event(), 1: asyncio.Event()}, reached={0: asyncio.Event(), 1: asyncio.Event()}
    )
    async with serve(cluster, shows_pools=True, default_pool=PoolPolicy(Count(4))) as asked:
        await asked.stub.Calibrate(
            pb.CalibrateRequest(name="law", examples=[pb.Example(text=b"hi")], pool=pb.PoolPolicy(count=3))
        )
        names = ("running_lora_adapters", "waiting_lora_adapters")

        def adapters() -> list[str]:
            ((labels, value),) = shown(asked)
            assert abs(value - time.time()) < 60
            assert set(labels) == {"max_lora", *names}
            return [labels[name] for name in names]

        assert adapters() == ["", ""]
        wire = pb.GenerateRequest(text=b"hi", pool=pb.PoolPolicy(name="law"), sampling=pb.SamplingParams(max_tokens=2))
        call = asked.stub.Generate(wire)
        await cluster.reached[0].wait()
        assert adapters() == ["", "tiny:law"]
        cluster.hold[0].set()
        await call.read()
        await cluster.reached[1].wait()
        assert adapters() == ["tiny:law", ""]
        cluster.hold[1].set()
        await rest(call)
        assert adapters() == ["", ""]
        # Two workers of 16 slots, and pools of 4 in each of two layers.
        await eventually(lambda: shown(asked)[0][0]["max_lora"] == "4")


async def test_the_metrics_can_be_scraped_and_name_no_one(service: Running) -> None:
    server = MetricsServer(service.pipeline.metrics.registry, "127.0.0.1")
    wire = pb.GenerateRequest(
        request_id="secret-id", text=b"abc", sampling=pb.SamplingParams(max_tokens=3), pool=pb.PoolPolicy(count=3)
    )
    [_ async for _ in service.stub.Generate(wire, metadata=(("x-tenant-id", "secret-tenant"),))]
    with pytest.raises(grpc.aio.AioRpcError):
        await service.stub.Generate(pb.GenerateRequest()).read()
    with urllib.request.urlopen(f"http://{server.address}/metrics") as response:  # noqa: ASYNC210 - another thread answers
        page = response.read().decode()
    server.close()
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    prefix, other = "expert_pager_router", (("tenant", "other"),)
    assert samples[f"{prefix}_requests_total", (("code", "OK"), ("method", "Generate"))] == 1
    assert samples[f"{prefix}_requests_total", (("code", "INVALID_ARGUMENT"), ("method", "Generate"))] == 1
    assert samples[f"{prefix}_time_to_first_token_seconds_count", other] == 1
    assert samples[f"{prefix}_time_per_output_token_seconds_count", other] == 1
    assert samples[f"{prefix}_route_seconds_count", (("source", "trunk"),)] == 1
    assert samples[f"{prefix}_recall_ratio_sum", (("source", "trunk"),)] == pytest.approx(2 / 3)
    assert samples[f"{prefix}_prompt_tokens_total", other] == 3
    assert samples[f"{prefix}_generated_tokens_total", other] == 3
    assert ("process_open_fds", ()) in samples
    labels = {name for _, pairs in samples for name, _ in pairs}
    named = {"le", "method", "code", "source", "state", "result", "reason", "tenant", "from", "to", "daemon", "change"}
    assert labels == named | {
        "model",
        "model_name",
        "fingerprint",
        "implementation",
        "major",
        "minor",
        "patchlevel",
        "version",
    }
    assert "secret" not in page
