"""Pools that alike prompts share: which codeword a request gets, and what a prompt that none covers gets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from redis.asyncio import Redis

from pager.predict.fitted import LENGTHS, MEANS, THRESHOLDS, Codebook, Codeword
from pager.predict.learning import Learned, Observation, revise
from pager.types import (
    Count,
    DriftPolicy,
    ExpertPool,
    FinishReason,
    Full,
    PagingCounts,
    PoolPolicy,
    PoolSource,
    RoutingScores,
    Usage,
)
from pager.wire import decode_pool
from router_service.prediction import REVISE_AFTER, Passes, Scorer, TrafficCodebook
from router_service.redis import RedisClient, RedisLearned
from tests.router_service.conftest import FACTS, MODEL, FirstTokenScorer, Running, scores_for
from tests.support.calls import failure
from tests.support.processes import RedisProcess
from tests.support.waiting import POLL_S

# Two codewords, each for the prompts that begin with a letter of one residue; what lies between is covered by neither.
MEANS_CO = np.stack([np.concatenate(scores_for(ord(letter), "lexical").mean_LR) for letter in "ae"])
CODEBOOK = Codebook({MEANS: MEANS_CO, LENGTHS: np.array([16, 64]), THRESHOLDS: np.full((2, 2), 0.9)}, FACTS)
SHARED = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_CODEBOOK)
LONG = replace(MODEL, context_length=16_384, kv_token_limit=16_384)


def passes() -> Passes:
    scorer = FirstTokenScorer("lexical")
    return Passes({"lexical": lambda: scorer}, ("lexical",), lambda *_: 0.5, codebook=CODEBOOK)


def with_trunk(elsewhere: str | None = None) -> Passes:
    """Passes whose trunk sees the same as the lexical one, or always what prompts that begin so want."""
    lexical, trunk = FirstTokenScorer("lexical"), FirstTokenScorer("trunk")
    fixed = None if elsewhere is None else scores_for(ord(elsewhere), "trunk")

    class Trunk:
        def scores(self, token_ids: Any, /) -> RoutingScores:
            return fixed or trunk.scores(token_ids)

    available: dict[str, Callable[[], Scorer]] = {"lexical": lambda: lexical, "trunk": Trunk, "fitted": lambda: lexical}
    return replace(passes(), available=available, chain=("fitted",))


async def generate(service: Any, text: bytes, pool: pb.PoolPolicy | None) -> tuple[pb.Usage, Any]:
    """The usage, and the request that the worker got."""
    wire = pb.GenerateRequest(text=text, sampling=pb.SamplingParams(max_tokens=2), pool=pool)
    messages = [message async for message in service.stub.Generate(wire)]
    return messages[-1].usage, service.cluster.received[-1][1]


async def refused(call: Awaitable[object]) -> str:
    error = await failure(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(error.details())


async def test_alike_prompts_share_a_codewords_pool_which_the_worker_gets_as_a_fixed_one(
    serve: Callable[..., Any],
) -> None:
    async with serve(passes=passes()) as service:
        for text in (b"a", b"ab", b"azz", b"i"):
            usage, request = await generate(service, text, SHARED)
            assert usage.codeword == CODEBOOK.names[0]
            assert usage.pool.digest == CODEBOOK.pool(CODEBOOK.names[0], Count(3)).digest
            assert request.pool == PoolPolicy(source=PoolSource.FIXED, fixed=request.pool.fixed)
        usage, _ = await generate(service, b"e", SHARED)
        assert usage.codeword == CODEBOOK.names[1]
        assert service.metric("codeword_requests_total", codeword=CODEBOOK.names[0]) == 4
        assert service.metric("codeword_requests_total", codeword=CODEBOOK.names[1]) == 1
        assert service.metric("codebook_coverage_ratio_count") == 5
        assert service.metric("route_seconds_count", source="codebook") == 5
        state = await service.watch.state()
        assert sorted(row["size"] for row in state["pools"]) == sorted(CODEBOOK.names)


async def test_requests_of_a_codeword_meet_at_its_home_whatever_other_workers_have_to_do(
    serve: Callable[..., Any], make_cluster: Callable[..., Any], make_worker: Callable[..., Any]
) -> None:
    cluster = make_cluster(views={name: make_worker(name) for name in ("w0", "w1", "w2")})
    async with serve(cluster, passes=passes()) as service:
        for text in (b"a", b"ab", b"i"):
            await generate(service, text, SHARED)
        (home,) = {worker for worker, _ in cluster.received}
        answer = await service.stub.Route(pb.RouteRequest(text=b"a", pool=SHARED))
        assert answer.placement.worker == home, "placed as a request of it would be"
        cluster.change(home, running=3)
        await generate(service, b"azz", SHARED)
        assert cluster.received[-1][0] == home
        assert service.metric("placements_total", source="codeword", result="miss") == 4
        cluster.change(home, resident=(0, 255, 255))
        await generate(service, b"a", SHARED)
        assert service.metric("placements_total", source="codeword", result="hit") == 1
        fixed = pb.PoolPolicy(digest=answer.pool.digest)
        await generate(service, b"c", fixed)
        await generate(service, b"c", pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_PREDICTION))
        placed = {
            kind: sum(service.metric("placements_total", source=kind, result=each) for each in ("hit", "miss"))
            for kind in ("codeword", "fixed", "predicted")
        }
        assert placed == {"codeword": 5, "fixed": 1, "predicted": 1}
        cluster.change(home, state="dead")
        await generate(service, b"a", SHARED)
        assert cluster.received[-1][0] != home


async def test_a_prompt_that_no_codeword_covers_gets_the_pool_of_its_prefill(serve: Callable[..., Any]) -> None:
    async with serve(passes=passes()) as service:
        usage, request = await generate(service, b"c", SHARED)
        assert request.pool == PoolPolicy(Count(3))
        assert usage.codeword == ""
        assert service.metric("codebook_fallbacks_total") == 1
        assert sum(service.metric("codeword_requests_total", codeword=name) for name in CODEBOOK.names) == 0


async def test_a_prompt_that_the_trunk_finds_uncovered_gets_a_pool_of_its_own_before_its_prefill(
    serve: Callable[..., Any],
) -> None:
    async with serve(passes=with_trunk(elsewhere="c")) as service:
        usage, request = await generate(service, b"a", SHARED)
        assert (usage.codeword, request.pool.source) == ("", PoolSource.FIXED)
        assert service.metric("codebook_fallbacks_total") == 1
        assert service.metric("route_seconds_count", source="own") == 1
        routed = await service.stub.Route(pb.RouteRequest(text=b"a", pool=SHARED))
        assert (routed.codeword, decode_pool(routed.pool).experts) == ("", request.pool.fixed.experts)


async def test_prompts_that_none_covers_become_a_codeword_without_a_pause(serve: Callable[..., Any]) -> None:
    async with serve(passes=with_trunk()) as service:
        holds = service.cluster.hold[1] = asyncio.Event()
        reached = service.cluster.reached[1] = asyncio.Event()
        early = asyncio.create_task(generate(service, b"cc", SHARED))
        await reached.wait()
        del service.cluster.hold[1]
        before = service.cluster.received[0][1].pool.fixed
        names: Sequence[str] = ()
        while len(names) <= 2:  # the router looks once a second
            await generate(service, b"cc", SHARED)
            names = (await service.stub.GetModel(pb.GetModelRequest())).codewords
        assert tuple(names[:2]) == CODEBOOK.names
        (learned,) = names[2:]
        usage, _ = await generate(service, b"cde", SHARED)
        assert usage.codeword == learned
        assert (await service.stub.Route(pb.RouteRequest(text=b"c", pool=SHARED))).codeword == learned
        holds.set()
        usage, _ = await early
        assert (usage.codeword, usage.pool.digest) == ("", before.digest)
        assert service.metric("learned_codewords") == 1
        assert service.metric("codebook_changes_total", change="born") == 1
        assert service.metric("codeword_requests_total", codeword="learned") >= 1
        known, _ = await generate(service, b"a", SHARED)
        assert known.codeword == CODEBOOK.names[0]
        assert learned in {row["size"] for row in (await service.watch.state())["pools"]}


async def test_a_codebook_that_may_not_learn_stays_as_it_was_fitted(serve: Callable[..., Any]) -> None:
    async with serve(passes=with_trunk(), learns=False) as service:
        for _ in range(REVISE_AFTER + 1):
            await generate(service, b"c", SHARED)
        await service.pipeline.beat()
        assert tuple((await service.stub.GetModel(pb.GetModelRequest())).codewords) == CODEBOOK.names
        assert service.metric("codebook_version") == 0


class Answers:
    """What answers say of a codebook: usages of the codeword of one prompt."""

    def __init__(self) -> None:
        self.traffic = TrafficCodebook(CODEBOOK, FACTS.routed_per_layer)

    def codeword(self, lexical: str, trunk: str) -> Codeword:
        seen = replace(scores_for(ord(trunk), "trunk"), num_tokens=64)
        return self.traffic.codebook.assign(scores_for(ord(lexical), "lexical"), Count(3), seen)

    async def many(self, codeword: Codeword | None, policy: PoolPolicy, pool: ExpertPool, outside: float) -> Learned:
        usage = Usage("pool", FinishReason.STOP, 4, 32, pool, PagingCounts(), outside, None, 0.0, 0.0, "a model")
        for _ in range(REVISE_AFTER):
            self.traffic.answered(codeword, policy, usage)
        revisions: list[Learned] = []
        self.traffic.on_revision = revisions.append
        await self.traffic.beat()
        return revisions[-1] if revisions else Learned()


async def test_answers_whose_mass_fell_outside_of_a_codewords_pool_are_learned_from() -> None:
    answers = Answers()
    codeword = answers.codeword("a", "a")
    assert codeword.is_covered
    assert codeword.pool is not None
    assert codeword.pool.covered_mass is not None
    fixed = PoolPolicy(source=PoolSource.FIXED, fixed=codeword.pool)
    expected = 1 - codeword.pool.covered_mass
    assert (await answers.many(codeword, fixed, codeword.pool, expected)).version == 0
    assert len((await answers.many(codeword, fixed, codeword.pool, 0.95)).codewords) == 1


async def test_pools_that_prefills_chose_are_learned_from() -> None:
    answers = Answers()
    known, new = CODEBOOK.pool(CODEBOOK.names[0], Count(3)), ExpertPool(((), (1, 4, 6), (0, 2, 5)))
    assert (await answers.many(None, PoolPolicy(Count(3)), known, 0.5)).version == 0
    learned = await answers.many(None, PoolPolicy(Count(3)), new, 0.5)
    assert len(learned.codewords) == 1
    made = answers.traffic.codebook.pool(learned.names[0], Count(3))
    assert made.experts == new.experts


async def test_a_codewords_pool_can_be_widened_by_drift(serve: Callable[..., Any]) -> None:
    async with serve(passes=passes()) as service:
        drifting = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_CODEBOOK, drift=pb.DriftPolicy(threshold=0.25))
        _, request = await generate(service, b"a", drifting)
        assert (request.pool.source, request.pool.drift) == (PoolSource.FIXED, DriftPolicy(0.25))


async def test_what_names_no_source_gets_the_services(serve: Callable[..., Any]) -> None:
    async with serve(passes=passes(), default_pool=PoolPolicy(Full(), PoolSource.CODEBOOK)) as service:
        _, request = await generate(service, b"a", None)
        assert request.pool == PoolPolicy()
        usage, _ = await generate(service, b"a", pb.PoolPolicy(count=3))
        assert usage.codeword == CODEBOOK.names[0]
        for source in (pb.POOL_SOURCE_PREFILL, pb.POOL_SOURCE_PREDICTION):
            usage, request = await generate(service, b"a", pb.PoolPolicy(count=3, source=source))
            assert usage.codeword == ""
            assert request.pool.source is not PoolSource.FIXED
    async with serve(passes=replace(passes(), codebook=None)) as service:
        _, request = await generate(service, b"a", pb.PoolPolicy(count=3))
        assert request.pool.source is PoolSource.PREFILL


async def test_route_and_get_model_name_codewords(serve: Callable[..., Any]) -> None:
    async with serve(passes=passes()) as service:
        assert tuple((await service.stub.GetModel(pb.GetModelRequest())).codewords) == CODEBOOK.names
        covered = await service.stub.Route(pb.RouteRequest(text=b"a", pool=SHARED))
        assert (covered.codeword, covered.coverage) == (CODEBOOK.names[0], pytest.approx(1))
        assert decode_pool(covered.pool).experts == CODEBOOK.pool(covered.codeword, Count(3)).experts
        outside = await service.stub.Route(pb.RouteRequest(text=b"c", pool=SHARED))
        assert outside.codeword == ""
        assert outside.coverage < 0.9
        assert outside.pool.digest != covered.pool.digest
        plain = await service.stub.Route(pb.RouteRequest(text=b"a", pool=pb.PoolPolicy(count=3)))
        assert not plain.HasField("coverage")


async def test_a_codebook_that_is_not_there_is_refused(serve: Callable[..., Any]) -> None:
    async with serve(passes=replace(passes(), codebook=None)) as service:
        assert "fit-router" in await refused(generate(service, b"a", SHARED))
    async with serve(passes=passes()) as service:
        everything = pb.PoolPolicy(full=pb.Full(), source=pb.POOL_SOURCE_CODEBOOK)
        assert "all experts" in await refused(generate(service, b"a", everything))


async def learned_names(service: Running, text: bytes, count: int) -> list[str]:
    """Sends prompts that begin so until the router knows as many learned codewords."""
    names: Sequence[str] = ()
    while len(names) < len(CODEBOOK.names) + count:
        if text:
            await generate(service, text, SHARED)
        names = (await service.stub.GetModel(pb.GetModelRequest())).codewords
        await asyncio.sleep(POLL_S)  # the routers learn once a second, on this event loop
    return list(names[len(CODEBOOK.names) :])


async def test_routers_share_what_their_codebooks_learn_and_go_on_without_redis(
    serve: Callable[..., Any], redis: RedisProcess
) -> None:
    async with serve(passes=with_trunk(), redis_url=redis.url) as one:
        async with serve(passes=with_trunk(), redis_url=redis.url) as two:
            names = await learned_names(one, b"c", 1)
            assert await learned_names(two, b"", 1) == names
            usage, _ = await generate(two, b"c", SHARED)
            assert usage.codeword == names[0]
        async with serve(passes=with_trunk(), redis_url=redis.url) as later:
            assert await learned_names(later, b"", 1) == names
        redis.kill()
        assert (await learned_names(one, b"g", 2))[0] == names[0]


async def test_a_version_replaces_only_the_one_that_it_was_made_of(redis: RedisProcess) -> None:
    client, stranger = RedisClient(redis.url), Redis.from_url(redis.url)
    store = RedisLearned(client, FACTS, "f")
    try:
        assert (await store.version(), await store.load()) == (None, None)
        seen_O = np.concatenate(scores_for(ord("c"), "trunk").mean_LR)
        batch = [Observation(seen_O, 0.9)] * REVISE_AFTER
        first = revise(Learned(), batch, FACTS.routed_per_layer)
        second = revise(first, batch, FACTS.routed_per_layer)
        assert await store.save(first, 0)
        assert not await store.save(replace(first, num_seen=7), 0)
        assert await store.save(second, 1)
        found = await store.load()
        assert found is not None
        assert (await store.version(), found.version, found.names, found.num_seen) == (
            2,
            2,
            first.names,
            second.num_seen,
        )
        key = "expert-pager:1:f:learned-codewords"
        assert await stranger.ttl(key) > 0
        # What somebody else wrote is replaced by the next version that is made.
        await stranger.hset(key, mapping={"version": 9, "learned": b"no tensors"})
        traffic = TrafficCodebook(CODEBOOK, FACTS.routed_per_layer, store)
        usage = Usage(
            "pool",
            FinishReason.STOP,
            4,
            32,
            CODEBOOK.pool(CODEBOOK.names[0], Count(3)),
            PagingCounts(),
            0.0,
            None,
            0.0,
            0.0,
            "a model",
        )
        stray = replace(scores_for(ord("c"), "trunk"), num_tokens=64)
        codeword = CODEBOOK.assign(scores_for(ord("a"), "lexical"), Count(3), stray)
        for _ in range(REVISE_AFTER):
            traffic.answered(codeword, PoolPolicy(), usage)
        await traffic.beat()
        assert await store.version() == 1
        assert len(traffic.codebook.names) == 3
    finally:
        await client.close()
        await stranger.aclose()


async def test_a_conversation_keeps_the_pool_of_its_last_turn(serve: Callable[..., Any]) -> None:
    """Whether a codeword's or, as no codeword covers the prompt, the one that its prefill chose."""
    async with serve(passes=passes(), model=LONG) as service:
        for number, first in enumerate((b"c" * 20, b"a" * 20)):
            said, answer, usage, request = await turn(service, first)
            assert request.pool.source is (PoolSource.PREFILL, PoolSource.FIXED)[number]
            following = [*said, *answer, *b" and then?"]
            _, _, kept, request = await turn(service, following)
            assert request.pool == PoolPolicy(source=PoolSource.FIXED, fixed=request.pool.fixed)
            assert (kept.pool.digest, kept.codeword) == (usage.pool.digest, usage.codeword)
            assert kept.codeword == ("", CODEBOOK.names[0])[number]
            assert service.metric("route_seconds_count", source="turn") == number + 1
            assert service.metric("codeword_requests_total", codeword=CODEBOOK.names[0]) == (0, 2)[number]
            ask = pb.RouteRequest(token_ids=pb.TokenIds(ids=following), pool=SHARED)
            routed = await service.stub.Route(ask, metadata=(("x-tenant-id", "somebody"),))
            assert decode_pool(routed.observed).experts == request.pool.fixed.experts


@pytest.mark.parametrize("keeps_prefills", [True, False])
async def test_a_conversation_keeps_what_its_prefill_chose_where_nobody_chose_a_source(
    serve: Callable[..., Any], keeps_prefills: bool
) -> None:
    """The service of a model without a codebook, in which `pools.default_source` is `auto`; or is `prefill`."""
    prefill = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_PREFILL)
    async with serve(model=LONG, keeps_prefills=keeps_prefills) as service:
        said, answer, first, request = await turn(service, b"c" * 20, pool=prefill)
        assert request.pool.source is PoolSource.PREFILL
        _, _, second, request = await turn(service, [*said, *answer, *b" and then?"], pool=prefill)
        assert request.pool.source is (PoolSource.FIXED if keeps_prefills else PoolSource.PREFILL)
        assert not keeps_prefills or second.pool.digest == first.pool.digest


async def test_what_only_begins_like_a_conversation_does_not_get_its_pool(serve: Callable[..., Any]) -> None:
    """Another prompt or answer, another tenant, another size, or a turn too far back."""
    async with serve(passes=passes(), model=LONG) as service:
        said, answer, _, _ = await turn(service, bytes(range(99, 139)))
        following = [*said, *answer]
        strangers: list[tuple[list[int], dict[str, Any]]] = [
            ([*said, *(token ^ 1 for token in answer)], {}),
            ([*said, *reversed(said)], {}),
            ([said[0], said[0] ^ 1, *following[2:]], {}),
            (following, {"tenant": "somebody-else"}),
            (following, {"pool": pb.PoolPolicy(count=2, source=pb.POOL_SOURCE_CODEBOOK)}),
            ([*following, *[99] * 9000], {}),
        ]
        for ids, options in strangers:
            _, _, _, request = await turn(service, ids, **options)
            assert request.pool.source is PoolSource.PREFILL
        for num_more in (0, 1, 500, 2000, 8000):
            _, _, _, request = await turn(service, [*following, *[99] * num_more])
            assert request.pool.source is PoolSource.FIXED, num_more


async def turn(
    service: Any, prompt: Sequence[int], *, tenant: str = "somebody", pool: pb.PoolPolicy = SHARED
) -> tuple[list[int], list[int], pb.Usage, Any]:
    """The tokens of the prompt and of the answer, the usage, and the request that the worker got."""
    sampling = pb.SamplingParams(max_tokens=18)
    wire = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, pool=pool)
    call = service.stub.Generate(wire, metadata=(("x-tenant-id", tenant),))
    messages = [message async for message in call]
    answer = [token for message in messages for token in message.token_ids]
    return [*prompt], answer, messages[-1].usage, service.cluster.received[-1][1]
