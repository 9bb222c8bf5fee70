"""Pools that alike prompts share: which codeword a request gets, and what a prompt that none covers gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from pager.predict.fitted import LENGTHS, MEANS, THRESHOLDS, Codebook
from pager.types import Count, DriftPolicy, Full, PoolPolicy, PoolSource, RoutingScores
from pager.wire import decode_pool
from router_service.prediction import Passes, Scorer
from tests.router_service.conftest import FACTS, FirstTokenScorer, scores_for
from tests.support.calls import failure

# Two codewords, each for the prompts that begin with a letter of one residue; what lies between is covered by neither.
MEANS_CO = np.stack([np.concatenate(scores_for(ord(letter), "lexical").mean_LR) for letter in "ae"])
CODEBOOK = Codebook({MEANS: MEANS_CO, LENGTHS: np.array([16, 64]), THRESHOLDS: np.full((2, 2), 0.9)}, FACTS)
SHARED = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_CODEBOOK)


def passes() -> Passes:
    scorer = FirstTokenScorer("lexical")
    return Passes({"lexical": lambda: scorer}, ("lexical",), lambda *_: 0.5, codebook=CODEBOOK)


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


async def test_the_trunk_judges_where_the_first_pass_runs_it(serve: Callable[..., Any]) -> None:
    lexical, elsewhere = FirstTokenScorer("lexical"), scores_for(ord("c"), "trunk")

    class Trunk:
        def scores(self, _: Any, /) -> RoutingScores:
            return elsewhere

    available: dict[str, Callable[[], Scorer]] = {"lexical": lambda: lexical, "trunk": Trunk, "fitted": lambda: lexical}
    async with serve(passes=replace(passes(), available=available, chain=("fitted",))) as service:
        usage, request = await generate(service, b"a", SHARED)
        assert (usage.codeword, request.pool.source) == ("", PoolSource.PREFILL)


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
