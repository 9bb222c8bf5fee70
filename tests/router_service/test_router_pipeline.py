"""The pipeline as any front calls it: plain values in, chunks and facts out, errors raised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pager.errors import DeadlineExceeded, DuplicateRequest, Overloaded, SlowReader, UnknownModel, UnknownPool
from pager.types import Count, PoolPolicy, PoolSource, SamplingParams, TokenChunk
from router_service.admission import AdmissionLimits
from router_service.requests import Ask, CalibrateAsk, PoolByName, RouteAsk
from router_service.service import Call
from tests.router_service.conftest import Running

CALL = Call("acme", num_bytes=10)


def ask(id_: str = "r1", max_tokens: int = 3, pool: PoolPolicy | PoolByName | None = None) -> Ask:
    return Ask(id_, "abc", SamplingParams(max_tokens=max_tokens), True, pool or PoolPolicy(Count(3)))


class Client:
    """Keeps what it is sent, and waits for `go` after the first chunk where it is told to."""

    def __init__(self, go: asyncio.Event | None = None) -> None:
        self.chunks: list[TokenChunk] = []
        self.has_some = asyncio.Event()
        self._go = go

    async def send(self, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)
        self.has_some.set()
        if self._go is not None:
            await self._go.wait()


async def test_an_answer_is_sent_in_chunks_and_leaves_nothing_behind(service: Running) -> None:
    client = Client()
    await service.pipeline.generate(CALL, ask(), client.send)
    assert "".join(chunk.text for chunk in client.chunks) == "abc"
    assert [chunk.usage is None for chunk in client.chunks] == [True, True, False]
    assert service.cluster.received[-1][1].tenant == "acme"
    assert service.pipeline.admission.num_requests == 0
    assert service.metric("time_to_first_token_seconds_count", tenant="other") == 1
    await service.pipeline.generate(CALL, ask(), client.send)  # the id is free again


async def test_a_client_that_takes_nothing_ends_its_request_at_the_worker(service: Running) -> None:
    async def refuse(chunk: TokenChunk) -> None:
        raise SlowReader("it does not read")

    with pytest.raises(SlowReader):
        await service.pipeline.generate(CALL, ask(), refuse)
    assert service.cluster.cancelled == ["r1"]
    assert service.pipeline.admission.num_requests == 0


async def test_leaving_and_aborting_end_a_request(service: Running) -> None:
    for leaves in (True, False):
        client = Client(asyncio.Event())
        running = asyncio.create_task(service.pipeline.generate(CALL, ask(), client.send))
        await client.has_some.wait()
        with pytest.raises(DuplicateRequest):
            await service.pipeline.generate(CALL, ask(), client.send)
        assert not await service.pipeline.abort("somebody-else", "r1")
        if leaves:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        else:
            assert await service.pipeline.abort("acme", "r1")
            assert ("r1", "acme") in service.cluster.aborted
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert service.pipeline.admission.num_requests == 0


async def test_what_is_turned_away_says_that_nothing_was_done_for_it(serve: Callable[..., Any]) -> None:
    client = Client(asyncio.Event())
    async with serve(limits=AdmissionLimits(max_requests=1)) as service:
        running = asyncio.create_task(service.pipeline.generate(CALL, ask(), client.send))
        await client.has_some.wait()
        late = Call("acme", 10, time.monotonic() - 1)
        for call, error in ((CALL, Overloaded), (late, DeadlineExceeded)):
            with pytest.raises(error) as caught:
                await service.pipeline.generate(call, ask("r2"), client.send)
            assert caught.value.is_refusal
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_named_pools_and_routes_are_plain_values(service: Running) -> None:
    pipeline = service.pipeline
    named = await pipeline.calibrate(CALL, CalibrateAsk("law", ("abc", "bcd"), Count(3), None, False))
    assert (named.name, named.method, named.num_examples) == ("law", "trunk", 2)
    assert [each.name for each in (await pipeline.list_pools("acme")).pools] == ["law"]
    assert (await pipeline.list_pools("other")).pools == ()
    routed = await pipeline.route(CALL, RouteAsk("abc", PoolByName("law")))
    assert (routed.pool, routed.num_tokens) == (named.pool, 3)
    assert routed.scores is not None
    assert routed.worker is not None
    client = Client()
    await pipeline.generate(CALL, ask(pool=PoolByName("law")), client.send)
    request = service.cluster.received[-1][1]
    assert (request.pool.source, request.pool.fixed) == (PoolSource.FIXED, named.pool)
    assert await pipeline.delete_pool("acme", "law")
    assert not await pipeline.delete_pool("acme", "law")
    with pytest.raises(UnknownPool):
        await pipeline.generate(CALL, ask(pool=PoolByName("law")), client.send)


async def test_the_model_and_what_workers_hold_can_be_looked_at(service: Running) -> None:
    found = service.pipeline.get_model("")
    assert found == service.pipeline.get_model("tiny") == replace(service.pipeline.model, num_slots=16)
    with pytest.raises(UnknownModel):
        service.pipeline.get_model("another")
    held = await service.pipeline.residency()
    assert [(worker.id, worker.is_remote) for worker in held] == [("w0", False), ("w1", False)]
