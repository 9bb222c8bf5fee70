"""Calibrate, ListPools, DeletePool, and requests that name a pool: in memory, in a folder and in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from redis.asyncio import Redis

from pager.errors import ConfigError, TooManyPools
from pager.types import Count, ExpertPool, ModelInfo, NamedPool, PoolPolicy, RoutingScores
from router_service import pools
from router_service.admission import AdmissionLimits
from router_service.pools import FolderPools
from router_service.prediction import Passes
from router_service.redis import RedisClient, RedisPools
from tests.router_service.conftest import FirstTokenScorer, Running
from tests.support.calls import details, failure
from tests.support.processes import RedisProcess

FOUR = pb.PoolPolicy(count=4)


def example(*ids: int) -> pb.Example:
    return pb.Example(token_ids=pb.TokenIds(ids=ids))


async def calibrate(
    service: Running, name: str = "law", *examples: pb.Example, tenant: str = "default", **fields: Any
) -> pb.NamedPool:
    wire = pb.CalibrateRequest(name=name, examples=examples or [example(0, 5)], **{"pool": FOUR, **fields})
    reply: pb.CalibrateResponse = await service.stub.Calibrate(wire, metadata=(("x-tenant-id", tenant),))
    return reply.pool


async def generate(service: Running, name: str = "law", *, tenant: str = "default", **fields: Any) -> pb.Usage:
    wire = pb.GenerateRequest(
        text=b"abc", sampling=pb.SamplingParams(max_tokens=2), pool=pb.PoolPolicy(name=name, **fields)
    )
    call = service.stub.Generate(wire, metadata=(("x-tenant-id", tenant),))
    messages: list[pb.GenerateResponse] = [message async for message in call]
    return messages[-1].usage


async def names(service: Running, tenant: str = "default") -> list[str]:
    reply = await service.stub.ListPools(pb.ListPoolsRequest(), metadata=(("x-tenant-id", tenant),))
    return [pool.name for pool in reply.pools]


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, dict[type, Any]]:
    """Code, message and details."""
    error = await failure(call)
    return error.code(), str(error.details()), details(error)


Store = dict[str, Any]


@pytest.fixture(params=["memory", "folder", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """What to serve with."""
    if request.param == "redis":
        return {"redis_url": request.getfixturevalue("redis").url}
    return {"pools_path": tmp_path / "pools"} if request.param == "folder" else {}


# --- making and using one -------------------------------------------------------------------------------------------


async def test_a_pool_is_made_named_listed_and_deleted(serve: Callable[..., Any], store: Store) -> None:
    async with serve(**store) as service:
        made = await calibrate(service)
        assert (made.name, made.method, made.num_examples, made.num_tokens) == ("law", "trunk", 1, 2)
        assert made.model_fingerprint == "f" * 16
        assert [list(layer.experts) for layer in made.pool.layers] == [[], [4, 5, 6, 7], [4, 5, 6, 7]]
        assert made.pool.covered_mass == pytest.approx(26 / 36)
        assert (await generate(service)).pool.layers == made.pool.layers
        assert service.cluster.received[-1][1].pool.fixed.digest == made.pool.digest
        [listed] = (await service.stub.ListPools(pb.ListPoolsRequest())).pools
        assert listed == made
        routed = await service.stub.Route(pb.RouteRequest(text=b"abc", pool=pb.PoolPolicy(name="law")))
        assert routed.pool.digest == made.pool.digest
        assert (await service.stub.DeletePool(pb.DeletePoolRequest(name="law"))).deleted
        assert not (await service.stub.DeletePool(pb.DeletePoolRequest(name="law"))).deleted
        code, message, details = await refusal(generate(service))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "'law'" in message
        assert details[BadRequest].field_violations[0].field == "pool.name"
        assert await names(service) == []


async def test_examples_count_by_their_tokens(service: Running) -> None:
    made = await calibrate(service, "mixed", example(0), example(2, 1, 1), example(2))
    assert (made.num_examples, made.num_tokens) == (3, 5)
    # Rolled by 2 with four fifths of the weight: 7 and 8 of 8 sit at experts 0 and 1.
    assert [list(layer.experts) for layer in made.pool.layers][1] == [0, 1, 6, 7]


async def test_texts_and_every_size_do(serve: Callable[..., Any], model: ModelInfo) -> None:
    sized = replace(model, facts=replace(model.facts, expert_bytes=1000))
    async with serve(model=sized, default_pool=PoolPolicy(Count(3))) as service:
        text = pb.Example(text="héllo".encode())
        for pool, count in (
            (pb.PoolPolicy(), 6),
            (pb.PoolPolicy(share=0.5), 6),
            (pb.PoolPolicy(mass=pb.Mass(mass=0.5)), 6),
            (pb.PoolPolicy(bytes=5500), 5),
            (pb.PoolPolicy(counts=pb.LayerCounts(routed=[0, 2, 5])), 7),
        ):
            made = await calibrate(service, "p", text, pool=pool, replace=True)
            assert (made.pool.num_experts, made.num_tokens) == (count, 6)


async def test_tenants_do_not_see_each_others(serve: Callable[..., Any], store: Store) -> None:
    async with serve(**store) as service:
        mine = await calibrate(service, "law", example(0), tenant="a")
        theirs = await calibrate(service, "law", example(3), tenant="b")
        assert mine.pool.digest != theirs.pool.digest
        await calibrate(service, "only", tenant="b")
        assert (await names(service, "a"), await names(service, "b")) == (["law"], ["law", "only"])
        assert (await generate(service, tenant="a")).pool.digest == mine.pool.digest
        assert (await generate(service, tenant="b")).pool.digest == theirs.pool.digest
        assert (await refusal(generate(service, "only", tenant="a")))[0] is grpc.StatusCode.NOT_FOUND
        delete = service.stub.DeletePool(pb.DeletePoolRequest(name="only"), metadata=(("x-tenant-id", "a"),))
        assert not (await delete).deleted
        assert await names(service, "b") == ["law", "only"]


async def test_a_name_in_use_is_refused_unless_it_is_to_be_replaced(serve: Callable[..., Any], store: Store) -> None:
    async with serve(**store) as service:
        first = await calibrate(service)
        calls = service.scorer.num_calls
        code, message, details = await refusal(calibrate(service, "law", example(3)))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert details[ErrorInfo].reason == "POOL_NAME_IN_USE"
        assert "replace" in message
        assert service.scorer.num_calls == calls, "it scored examples for nothing"
        assert (await generate(service)).pool.digest == first.pool.digest
        second = await calibrate(service, "law", example(3), replace=True)
        assert (await generate(service)).pool.digest == second.pool.digest != first.pool.digest


async def test_of_two_at_a_time_one_is_refused(serve: Callable[..., Any], store: Store) -> None:
    async with serve(**store) as service:
        calls = [calibrate(service, "law", example(token)) for token in range(4)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        made = [result for result in results if isinstance(result, pb.NamedPool)]
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert (len(made), {error.code() for error in refused}) == (1, {grpc.StatusCode.ALREADY_EXISTS})
        assert (await generate(service)).pool.digest == made[0].pool.digest


async def test_a_pool_outlives_the_service_and_is_refused_by_another_model(
    serve: Callable[..., Any], model: ModelInfo, redis: RedisProcess, tmp_path: Path
) -> None:
    for kept in ({"redis_url": redis.url}, {"pools_path": tmp_path / "pools"}):
        async with serve(**kept) as service:
            made = await calibrate(service)
        async with serve(**kept) as service:
            assert (await generate(service)).pool.digest == made.pool.digest
        async with serve(**kept, model=replace(model, fingerprint="other-model")) as service:
            code, message, details = await refusal(generate(service))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert details[ErrorInfo].reason == "POOL_OF_ANOTHER_MODEL"
            assert "f" * 16 in message
            assert "other-model" in message
            assert "calibrate it again" in message
            assert await names(service) == ["law"], "a refused pool is kept"
            assert (await refusal(calibrate(service)))[0] is grpc.StatusCode.ALREADY_EXISTS


async def test_only_so_many_pools_are_kept(
    serve: Callable[..., Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "MAX_POOLS_OF_TENANT", 2)
    async with serve(**store) as service:
        for name in ("a", "b"):
            await calibrate(service, name)
        code, _, details = await refusal(calibrate(service, "c"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (details[ErrorInfo].reason, RetryInfo in details) == ("TOO_MANY_POOLS", False)
        await calibrate(service, "b", replace=True)
        await calibrate(service, "c", tenant="other")
        await service.stub.DeletePool(pb.DeletePoolRequest(name="a"))
        await calibrate(service, "c")


async def test_tenants_that_take_all_they_can_leave_room_for_one_that_comes_later(
    serve: Callable[..., Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "MAX_POOLS", 12)

    async def fill(service: Running, tenant: str) -> int:
        calls = [calibrate(service, f"p{count}", tenant=tenant) for count in range(12)]
        made = await asyncio.gather(*calls, return_exceptions=True)
        refused = [error for error in made if isinstance(error, grpc.aio.AioRpcError)]
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all("delete one" in str(error.details()) for error in refused)
        return len(made) - len(refused)

    async with serve(**store) as service:
        assert [await fill(service, tenant) for tenant in ("greedy", "second", "third", "late")] == [6, 3, 2, 1]
        made = sorted(await names(service, "greedy"))  # which of them is open: they were made side by side
        await calibrate(service, made[0], tenant="greedy", replace=True)
        for name in made:
            await service.stub.DeletePool(pb.DeletePoolRequest(name=name), metadata=(("x-tenant-id", "greedy"),))
        assert await fill(service, "latest") == 3, "what was deleted is there for others"


def test_no_number_of_pools_of_64_tenants_keeps_others_out() -> None:
    held = dict.fromkeys(map(str, range(64)), 0)
    for _ in range(pools.MAX_POOLS_OF_TENANT):
        for tenant in held:
            with contextlib.suppress(TooManyPools):
                pools.check_room(held[tenant], sum(held.values()))
                held[tenant] += 1
    assert min(held.values()) > 200
    for count in range(100):
        pools.check_room(count, sum(held.values()) + count)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"name": ""}, "name", "1 to 64"),
        ({"name": "../x"}, "name", "1 to 64"),
        ({"name": "x" * 65}, "name", "of 65"),
        ({"examples": []}, "examples", "not from 0"),
        ({"examples": [example(1)] * 101}, "examples", "not from 101"),
        ({"examples": [example(1), pb.Example()]}, "examples[1]", "example 2 is missing"),
        ({"examples": [pb.Example(text=b"")]}, "examples[0]", "is empty"),
        ({"examples": [example()]}, "examples[0]", "is empty"),
        ({"examples": [example(1), pb.Example(text=b"a\xff")]}, "examples[1]", "example 2 is not valid UTF-8: byte 1"),
        ({"examples": [example(*range(65))]}, "examples[0]", "65 tokens and the model's context 64"),
        ({"examples": [pb.Example(text=b"x" * 65)]}, "examples[0]", "cut it"),
        ({"examples": [example(256)]}, "examples[0]", "not in the vocabulary of 256"),
        ({"method": "greedy"}, "method", "these are: trunk"),
        ({"pool": pb.PoolPolicy(full=pb.Full())}, "pool.size", "needs no examples"),
        ({"pool": pb.PoolPolicy()}, "pool.size", "needs no examples"),
        ({"pool": pb.PoolPolicy(count=1)}, "pool.size", "smaller than the 2"),
        ({"pool": pb.PoolPolicy(count=9)}, "pool.size.count", "more than the 8"),
        ({"pool": pb.PoolPolicy(bytes=5000)}, "pool.size.bytes", "how many bytes"),
        ({"pool": pb.PoolPolicy(count=4, source=pb.POOL_SOURCE_PREFILL)}, "pool", "made from a size"),
        ({"pool": pb.PoolPolicy(name="other")}, "pool", "made from a size"),
        ({"pool": pb.PoolPolicy(count=4, drift=pb.DriftPolicy(threshold=0.5))}, "pool", "made from a size"),
    ],
)
async def test_what_can_not_be_calibrated_is_said(
    service: Running,
    fields: dict[str, str]
    | dict[str, list[object]]
    | dict[str, Any]
    | dict[str, list[pb.Example]]
    | dict[str, pb.PoolPolicy],
    field: str,
    says: str,
) -> None:
    wire = pb.CalibrateRequest(**{"name": "law", "examples": [example(1)], "pool": FOUR, **fields})
    code, message, details = await refusal(service.stub.Calibrate(wire))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in message
    assert details[BadRequest].field_violations[0].field == field
    assert await names(service) == []
    assert service.pipeline.admission.num_requests == 0


async def test_calibrating_is_admitted_like_anything_else(serve: Callable[..., Any]) -> None:
    async with serve(limits=AdmissionLimits(max_tokens=40, max_tokens_per_tenant=40)) as service:
        code, message, _ = await refusal(calibrate(service, "law", *[example(*range(21))] * 2))
        assert (code, "42 tokens" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        await calibrate(service, "law", *[example(*range(20))] * 2)
        service.pipeline.admission.close()
        assert (await refusal(calibrate(service, "more")))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_deadline_ends_it_and_keeps_nothing(
    serve: Callable[..., Any], make_scorer: type[FirstTokenScorer]
) -> None:
    class HeldScorer(FirstTokenScorer):
        held, reached = threading.Event(), threading.Event()

        def scores(self, token_ids: Any, /) -> RoutingScores:
            self.reached.set()
            self.held.wait(60)
            return super().scores(token_ids)

    scorer = HeldScorer()
    async with serve(passes=Passes({"trunk": lambda: scorer}, ("trunk",))) as service:
        wire = pb.CalibrateRequest(name="law", examples=[example(1)] * 3, pool=FOUR)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.Calibrate(wire, timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while service.pipeline.admission.num_requests:  # noqa: ASYNC110 - the server cleans up after the client has gone
            await asyncio.sleep(0.01)
        scorer.held.set()
        assert await names(service) == []
        await calibrate(service)
        assert scorer.num_calls <= 2, "it went on scoring for a call that had ended"


@pytest.mark.parametrize("name", ["", "a/b", "ä", "x" * 65])
async def test_a_bad_name_is_refused_wherever_it_is_given(service: Running, name: str) -> None:
    assert (await refusal(service.stub.DeletePool(pb.DeletePoolRequest(name=name))))[0] is (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    code, _, details = await refusal(generate(service, name))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details[BadRequest].field_violations[0].field == "pool.name"


async def test_a_named_pool_has_its_size_and_source(service: Running) -> None:
    await calibrate(service)
    for fields, field in (({"count": 3}, "pool.size"), ({"source": pb.POOL_SOURCE_PREDICTION}, "pool.source")):
        code, _, details = await refusal(generate(service, **fields))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details[BadRequest].field_violations[0].field == field


# --- stores ---------------------------------------------------------------------------------------------------------


async def test_a_damaged_file_is_said_and_can_be_replaced_or_deleted(serve: Callable[..., Any], tmp_path: Path) -> None:
    async with serve(pools_path=tmp_path) as service:
        good = await calibrate(service, "good")
        await calibrate(service, "bad")
        path = tmp_path / "default@bad.json"
        value = json.loads(path.read_bytes())
        for damage in (
            b"",
            b"{",
            b"[]",
            b"\xff\xfe",
            json.dumps(value | {"v": 2}).encode(),
            json.dumps(value | {"name": "good"}).encode(),
            json.dumps(value | {"experts": [[], [3, 2], [1, 2]]}).encode(),
            json.dumps(value | {"experts": [[], [-1, 2], [1, 2]]}).encode(),
            json.dumps(value | {"experts": None}).encode(),
            json.dumps(value | {"tokens": 0}).encode(),
            json.dumps(value | {"model": None}).encode(),
        ):
            path.write_bytes(damage)
            code, message, details = await refusal(generate(service, "bad"))
            assert code is grpc.StatusCode.DATA_LOSS, damage
            assert details[ErrorInfo].reason == "DAMAGED_POOL"
            assert "calibrate it again" in message
            assert str(tmp_path) not in message
            listed = await service.stub.ListPools(pb.ListPoolsRequest())
            assert (list(listed.pools), list(listed.damaged)) == ([good], ["bad"])
        path.write_bytes(json.dumps(value | {"experts": [[], [0, 1], [1, 99]]}).encode())
        assert (await refusal(generate(service, "bad")))[0] is grpc.StatusCode.DATA_LOSS
        await calibrate(service, "bad", replace=True)
        assert (await generate(service, "bad")).pool.num_experts == 8
        path.write_bytes(b"{")
        assert (await service.stub.DeletePool(pb.DeletePoolRequest(name="bad"))).deleted
        assert sorted(os.listdir(tmp_path)) == ["default@good.json"]


async def test_no_name_leaves_the_folder(serve: Callable[..., Any], tmp_path: Path) -> None:
    async with serve(pools_path=tmp_path / "pools") as service:
        for tenant in ("..", ".", "a.json"):
            for name in ("..", ".", "-"):
                await calibrate(service, name, tenant=tenant)
            assert await names(service, tenant) == ["-", ".", ".."]
        assert os.listdir(tmp_path) == ["pools"]
        assert len(os.listdir(tmp_path / "pools")) == 9


async def test_a_folder_that_can_not_be_used_is_said_before_anything_starts(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"pools\.path .*file cannot be written"):
        async with serve(pools_path=tmp_path / "file"):
            pass
    with pytest.raises(ConfigError, match="keep one of the two"):
        async with serve(pools_path=tmp_path / "pools", redis_url="redis://127.0.0.1:1/0"):
            pass


async def test_a_folder_that_goes_away_is_unavailable_and_its_path_stays_here(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    async with serve(pools_path=tmp_path / "pools") as service:
        (tmp_path / "pools").rmdir()
        code, message, details = await refusal(calibrate(service))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert RetryInfo in details
        assert str(tmp_path) not in message


async def test_two_routers_share_pools(serve: Callable[..., Any], redis: RedisProcess) -> None:
    async with serve(redis_url=redis.url) as one, serve(redis_url=redis.url) as two:
        made = await calibrate(one)
        assert (await generate(two)).pool.digest == made.pool.digest
        replaced = await calibrate(two, "law", example(3), replace=True)
        assert (await generate(one)).pool.digest == replaced.pool.digest
        await one.stub.DeletePool(pb.DeletePoolRequest(name="law"))
        assert (await refusal(generate(two)))[0] is grpc.StatusCode.NOT_FOUND


async def test_named_pools_in_redis_never_expire_and_survive_their_hints(
    serve: Callable[..., Any], redis: RedisProcess, redis_client: Redis
) -> None:
    async with serve(redis_url=redis.url) as service:
        await calibrate(service)
        await generate(service)
        [key] = [key for key in await redis_client.keys("*") if b"named-pools" in key]
        assert key == b"expert-pager:1:named-pools:default"
        assert await redis_client.ttl(key) == -1
        await redis_client.hset(key, "bad", b"{")
        assert (await refusal(generate(service, "bad")))[0] is grpc.StatusCode.DATA_LOSS
        assert list((await service.stub.ListPools(pb.ListPoolsRequest())).damaged) == ["bad"]
        assert service.metric("redis_degraded") == 0


async def test_without_redis_a_pool_seen_before_can_be_used_and_another_can_not(
    serve: Callable[..., Any], redis_at: Callable[..., RedisProcess]
) -> None:
    redis = redis_at()
    async with serve(redis_url=redis.url) as one, serve(redis_url=redis.url) as two:
        made = await calibrate(one)
        redis.kill()
        assert (await generate(one)).pool.digest == made.pool.digest
        code, message, details = await refusal(generate(two))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert details[ErrorInfo].reason == "POOL_STORE_UNAVAILABLE"
        assert details[RetryInfo].retry_delay.ToMilliseconds() > 0
        assert "127.0.0.1" not in message
        for call in (
            calibrate(two, "more"),
            two.stub.ListPools(pb.ListPoolsRequest()),
            two.stub.DeletePool(pb.DeletePoolRequest(name="law")),
        ):
            assert (await refusal(call))[0] is grpc.StatusCode.UNAVAILABLE
        assert two.metric("redis_degraded") == 1
        wire = pb.GenerateRequest(text=b"abc", sampling=pb.SamplingParams(max_tokens=2), pool=FOUR)
        assert len([message async for message in two.stub.Generate(wire)]) == 2, "requests without a name go on"


# --- a router that is killed while it stores one ---------------------------------------------------------------------


def made(name: str, first: int = 0) -> NamedPool:
    return NamedPool(name, ExpertPool(((), (first, 5), (first, 7))), "trunk", 1, 2, "f" * 16)


def killed_at(call: Callable[[], object], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has another process make the call, which is killed there: "before link" is as it calls `os.link`."""
    when, name = where.split()
    real = getattr(os, name)

    def kill(*arguments: object, **options: object) -> None:
        if when == "after":
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, kill)
        pid = os.fork()
        if pid == 0:
            try:
                call()
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "is_new", "is_there"),
    [
        ("before fsync", True, False),
        ("before link", True, False),
        ("after link", True, True),
        ("before unlink", True, True),
        ("before fsync", False, False),
        ("before replace", False, False),
        ("after replace", False, True),
    ],
)
def test_a_kill_leaves_a_pool_in_the_folder_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, is_new: bool, is_there: bool
) -> None:
    store, law, other = FolderPools(tmp_path), made("law"), made("other")
    asyncio.run(store.add("acme", other))
    if not is_new:
        asyncio.run(store.add("acme", made("law", 1)))
    killed_at(lambda: store._write("acme", law, is_new=is_new), where, monkeypatch)

    again = FolderPools(tmp_path)
    listing = asyncio.run(again.all_of("acme"))
    before = () if is_new else (made("law", 1),)
    assert (listing.pools, listing.damaged) == (((law,) if is_there else before) + (other,), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"acme@{each.name}.json" for each in listing.pools]
    asyncio.run(again.replace("acme", law))
    assert asyncio.run(again.find("acme", "law")) == law


def test_a_pool_that_a_living_router_writes_is_not_cleaned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = FolderPools(tmp_path), os.link

    def link(*arguments: Any) -> None:
        FolderPools(tmp_path)  # another router starts
        real(*arguments)

    monkeypatch.setattr(os, "link", link)
    asyncio.run(store.add("acme", made("law")))
    assert asyncio.run(store.find("acme", "law")) == made("law")


# Stores one pool after the other, and prints the name of each that is.
STORES = """
import asyncio, itertools, sys
from pager.types import NamedPool
from pager.types import ExpertPool
from router_service.redis import RedisClient
from router_service.redis import RedisPools

async def main():
    pools = RedisPools(RedisClient(sys.argv[1]))
    for number in itertools.count():
        named = NamedPool(f"p{number}", ExpertPool(((), (0, 5), (0, 7))), "trunk", 1, 2, "f" * 16)
        await (pools.replace if number % 2 else pools.add)("acme", named)
        print(named.name, flush=True)

asyncio.run(main())
"""


async def test_a_kill_leaves_pools_in_redis_whole_or_not_at_all(redis: RedisProcess, redis_client: Redis) -> None:
    for _ in range(3):
        await redis_client.flushall()
        router = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STORES, str(redis.url), stdout=asyncio.subprocess.PIPE
        )
        assert router.stdout is not None
        acknowledged = [(await router.stdout.readline()).decode().strip() for _ in range(20)]
        router.kill()
        acknowledged += (await router.communicate())[0].decode().split()
        pools = RedisPools(RedisClient(redis.url))
        listing = await pools.all_of("acme")
        assert listing.damaged == ()
        assert {made(name) for name in acknowledged} <= set(listing.pools)
        assert len(listing.pools) <= len(acknowledged) + 1, "the one that it was storing"
        assert all(named == made(named.name) for named in listing.pools)
        assert await redis_client.hgetall("expert-pager:1:named-pool-counts") == {
            b"acme": str(len(listing.pools)).encode()
        }
        await pools.replace("acme", made("law"))
        assert await pools.find("acme", "law") == made("law")
        await pools.close()
