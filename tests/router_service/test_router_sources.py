"""Which pass scores a prompt, and the next better source when too little recall is expected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import ConfigError
from pager.types import (
    Bytes,
    Count,
    Counts,
    DriftAction,
    DriftPolicy,
    ExpertPool,
    Full,
    ModelInfo,
    PoolPolicy,
    PoolSource,
    RoutingScores,
)
from router_service.prediction import Passes
from tests.router_service.conftest import FirstTokenScorer, Running
from tests.support.calls import failure

PREDICTED = pb.PoolPolicy(count=3, source=pb.POOL_SOURCE_PREDICTION)
# What each source is expected to recall, by the first byte of the prompt.
EXPECTED = {"lexical": {ord("a"): 0.9}, "fitted": {ord("a"): 0.95, ord("b"): 0.8}}


class Ladder:
    """lexical, then fitted; which of them has been loaded and asked."""

    def __init__(self, make_scorer: type[FirstTokenScorer]) -> None:
        self.scorers = {name: make_scorer(name) for name in ("lexical", "fitted")}
        self.loaded: list[str] = []
        self.passes = Passes(
            {name: partial(self._load, name) for name in self.scorers},
            ("lexical", "fitted"),
            lambda scores, pool: self._expected(scores, pool),
            min_recall=0.5,
        )

    def _load(self, name: str) -> FirstTokenScorer:
        self.loaded.append(name)
        return self.scorers[name]

    @staticmethod
    def _expected(scores: RoutingScores, pool: ExpertPool) -> float:
        assert pool.num_experts == 6
        # The scorer rolls its largest weight to just before the first token: told by where it is.
        first = (int(scores.mean_LR[1].argmax()) + 1) % 8
        return next((value for token, value in EXPECTED[scores.source].items() if token % 8 == first), 0.2)

    @property
    def num_calls(self) -> dict[str, int]:
        return {name: scorer.num_calls for name, scorer in self.scorers.items()}


@pytest.fixture
def ladder(make_scorer: type[FirstTokenScorer]) -> Ladder:
    return Ladder(make_scorer)


async def generate(service: Running, text: bytes, pool: pb.PoolPolicy | None) -> tuple[pb.Usage, Any]:
    """The usage, and the request that the worker got."""
    wire = pb.GenerateRequest(text=text, sampling=pb.SamplingParams(max_tokens=2), pool=pool)
    messages = [message async for message in service.stub.Generate(wire)]
    return messages[-1].usage, service.cluster.received[-1][1]


async def refused(call: Awaitable[object]) -> str:
    error = await failure(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(error.details())


async def test_the_cheapest_pass_does_where_it_is_expected_to_be_good(
    serve: Callable[..., Any], ladder: Ladder
) -> None:
    async with serve(passes=ladder.passes) as service:
        _, request = await generate(service, b"a", PREDICTED)
        assert (ladder.num_calls, ladder.loaded) == ({"lexical": 1, "fitted": 0}, ["lexical"])
        assert request.pool.source is PoolSource.PREDICTION
        assert request.predicted.experts == ((), (6, 7, 0), (6, 7, 0)) or request.predicted.num_experts == 6
        assert service.metric("escalations_total", **{"from": "lexical", "to": "fitted"}) == 0
        assert service.metric("route_seconds_count", source="lexical") == 1


async def test_the_next_better_pass_is_taken_where_little_is_expected(
    serve: Callable[..., Any], ladder: Ladder
) -> None:
    async with serve(passes=ladder.passes) as service:
        _, request = await generate(service, b"b", PREDICTED)
        assert (ladder.num_calls, ladder.loaded) == ({"lexical": 1, "fitted": 1}, ["lexical", "fitted"])
        assert (request.pool.source, request.predicted.num_experts) == (PoolSource.PREDICTION, 6)
        assert service.metric("escalations_total", **{"from": "lexical", "to": "fitted"}) == 1
        assert service.metric("escalations_total", **{"from": "fitted", "to": "prefill"}) == 0
        assert service.metric("route_seconds_count", source="fitted") == 1


@pytest.mark.parametrize("source", [pb.POOL_SOURCE_PREDICTION, pb.POOL_SOURCE_PREFILL])
async def test_the_prefill_chooses_where_no_pass_is_good_enough(
    serve: Callable[..., Any], ladder: Ladder, source: pb.PoolSource
) -> None:
    async with serve(passes=ladder.passes) as service:
        usage, request = await generate(service, b"c", pb.PoolPolicy(count=3, source=source))
        assert ladder.num_calls == {"lexical": 1, "fitted": 1}
        assert request.pool == PoolPolicy(Count(3), PoolSource.PREFILL)
        assert request.predicted is None
        assert not usage.HasField("predicted_recall")
        for came, went in (("lexical", "fitted"), ("fitted", "prefill")):
            assert service.metric("escalations_total", **{"from": came, "to": went}) == 1
        # What the prefill chose is remembered, for requests that leave the choice to it.
        await generate(service, b"c", pb.PoolPolicy(count=3))
        assert service.cluster.received[-1][1].predicted.digest == usage.pool.digest
        assert ladder.num_calls == {"lexical": 1, "fitted": 1}


async def test_what_the_prefill_will_choose_is_told_from_the_prompt_and_not_from_what_comes_after(
    serve: Callable[..., Any], make_scorer: type[FirstTokenScorer]
) -> None:
    prompt, document = make_scorer("trunk"), make_scorer("fitted")

    class Ahead:
        def scores(self, token_ids: Any, /) -> RoutingScores:
            return replace(document.scores(token_ids), of_prompt=prompt.scores((token_ids[0] + 4,)))

    def best_three(scores: RoutingScores) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted((-mean_R).argsort()[:3].tolist())) for mean_R in scores.mean_LR)

    async with serve(passes=Passes({"fitted": Ahead}, ("fitted",))) as service:
        _, left_to_the_prefill = await generate(service, b"a", pb.PoolPolicy(count=3))
        _, predicted = await generate(service, b"a", PREDICTED)
        assert left_to_the_prefill.predicted.experts == best_three(prompt.scores((ord("a") + 4,)))
        assert predicted.predicted.experts == best_three(document.scores((ord("a"),)))


async def test_route_says_its_source_and_what_it_expects(serve: Callable[..., Any], ladder: Ladder) -> None:
    async with serve(passes=ladder.passes) as service:
        for text, source, expected in ((b"a", "lexical", 0.9), (b"b", "fitted", 0.8), (b"c", "fitted", 0.2)):
            reply = await service.stub.Route(pb.RouteRequest(text=text, pool=pb.PoolPolicy(count=3)))
            assert reply.scores.source == source
            assert reply.expected_recall == pytest.approx(expected)
            assert reply.pool.num_experts == 6
        reply = await service.stub.Route(pb.RouteRequest(text=b"c"))
        assert (reply.scores.source, reply.HasField("expected_recall"), reply.HasField("pool")) == (
            "lexical", False, False,
        )  # fmt: skip


async def test_without_an_estimate_nothing_is_escalated(service: Running) -> None:
    reply = await service.stub.Route(pb.RouteRequest(text=b"c", pool=pb.PoolPolicy(count=3)))
    assert (reply.scores.source, reply.HasField("expected_recall")) == ("trunk", False)


async def test_calibrate_can_choose_the_pass(serve: Callable[..., Any], ladder: Ladder) -> None:
    async with serve(passes=ladder.passes) as service:
        examples, pool = [pb.Example(text=b"abc")], pb.PoolPolicy(count=3)
        for method, used in (("", "fitted"), ("lexical", "lexical"), ("fitted", "fitted")):
            wire = pb.CalibrateRequest(name="p", examples=examples, pool=pool, method=method, replace=True)
            assert (await service.stub.Calibrate(wire)).pool.method == used
        wire.method = "trunk"
        assert "these are: lexical, fitted" in await refused(service.stub.Calibrate(wire))


# --- no pass at all -------------------------------------------------------------------------------------------------


async def test_without_any_pass_the_prefill_chooses_and_what_it_chose_is_remembered(serve: Callable[..., Any]) -> None:
    async with serve(passes=Passes()) as service:
        usage, request = await generate(service, b"abc", pb.PoolPolicy(count=3))
        assert (request.pool.source, request.predicted) == (PoolSource.PREFILL, None)
        _, request = await generate(service, b"abc", pb.PoolPolicy(count=3))
        assert request.predicted.digest == usage.pool.digest
        reply = await service.stub.Route(pb.RouteRequest(text=b"abc", pool=pb.PoolPolicy(count=3)))
        assert (reply.scores.source, reply.scores.num_tokens, len(reply.scores.layers)) == ("prefill", 3, 0)
        assert not reply.HasField("pool")
        assert reply.observed.digest == usage.pool.digest
        assert reply.placement.worker


async def test_without_any_pass_what_needs_one_is_refused(serve: Callable[..., Any], model: ModelInfo) -> None:
    sized = replace(model, facts=replace(model.facts, expert_bytes=1000))
    async with serve(passes=Passes(), model=sized) as service:
        assert "'prefill'" in await refused(generate(service, b"abc", PREDICTED))
        assert "'prefill'" in await refused(generate(service, b"abc", pb.PoolPolicy(bytes=6000)))
        wire = pb.CalibrateRequest(name="p", examples=[pb.Example(text=b"abc")], pool=pb.PoolPolicy(count=3))
        assert "calibrate --model" in await refused(service.stub.Calibrate(wire))
    for default in (PoolPolicy(Count(3), PoolSource.PREDICTION), PoolPolicy(Bytes(6000))):
        with pytest.raises(ConfigError, match="would have no effect"):
            async with serve(passes=Passes(), model=sized, default_pool=default):
                pass


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sized(model: ModelInfo) -> ModelInfo:
    return replace(model, facts=replace(model.facts, expert_bytes=1000))


async def test_bytes_reach_the_worker_as_a_count_a_layer(serve: Callable[..., Any], sized: ModelInfo) -> None:
    async with serve(model=sized) as service:
        for source in (pb.POOL_SOURCE_PREFILL, pb.POOL_SOURCE_PREDICTION):
            usage, request = await generate(service, b"abc", pb.PoolPolicy(bytes=7999, source=source))
            assert request.pool.size == Counts((0, 4, 3))
            assert [len(layer.experts) for layer in usage.pool.layers] == [0, 4, 3]


async def test_what_is_remembered_does_not_change_how_bytes_are_shared_out(
    serve: Callable[..., Any], sized: ModelInfo
) -> None:
    async with serve(model=sized) as service:
        await generate(service, b"abc", pb.PoolPolicy(bytes=7999))
        _, request = await generate(service, b"abc", pb.PoolPolicy(bytes=7999))
        assert service.scorer.num_calls == 2
        assert request.pool.size == Counts((0, 4, 3))
        assert service.metric("hint_lookups_total", result="hit") == 1


async def test_too_few_bytes_and_bad_counts_are_refused(serve: Callable[..., Any], sized: ModelInfo) -> None:
    async with serve(model=sized) as service:
        for pool, says in (
            (pb.PoolPolicy(bytes=0), "at least one byte"),
            (pb.PoolPolicy(bytes=3999), "at least 4000 bytes"),
            (pb.PoolPolicy(counts=pb.LayerCounts(routed=[3, 3])), "names 2 layers and the model has 3"),
            (pb.PoolPolicy(counts=pb.LayerCounts(routed=[0, 1, 3])), "smaller than the 2"),
            (pb.PoolPolicy(counts=pb.LayerCounts(routed=[0, 3, 9])), "more than the 8"),
        ):
            assert says in await refused(generate(service, b"abc", pool))
        _, request = await generate(service, b"abc", pb.PoolPolicy(counts=pb.LayerCounts(routed=[0, 3, 5])))
        assert request.pool.size == Counts((0, 3, 5))


# --- drift ----------------------------------------------------------------------------------------------------------


async def test_drift_is_passed_on_and_reported(service: Running) -> None:
    drift = pb.DriftPolicy(threshold=0.25)
    usage, request = await generate(service, b"abc", pb.PoolPolicy(count=3, drift=drift))
    assert request.pool.drift == DriftPolicy(0.25, DriftAction.WIDEN, 16)
    assert usage.drift == pb.DriftReport(peak_mass=0.5, widenings=2, experts_added=3, exact_from=7)
    exact = pb.DriftPolicy(threshold=0.5, action=pb.DRIFT_ACTION_EXACT, window=4)
    fixed = pb.PoolPolicy(experts=pb.FixedPool(layers=usage.pool.layers), drift=exact)
    for pool in (fixed, pb.PoolPolicy(digest=usage.pool.digest, drift=exact)):
        _, request = await generate(service, b"abc", pool)
        assert request.pool.drift == DriftPolicy(0.5, DriftAction.EXACT, 4)
    usage, request = await generate(service, b"abc", pb.PoolPolicy(count=3))
    assert request.pool.drift is None
    assert not usage.HasField("drift")


async def test_a_pool_that_was_widened_is_not_taken_for_the_prompts_own(service: Running) -> None:
    await generate(service, b"abc", pb.PoolPolicy(count=3, drift=pb.DriftPolicy(threshold=0.25)))
    await generate(service, b"abc", pb.PoolPolicy(count=3))
    assert service.metric("hint_lookups_total", result="miss") == 2


async def test_drift_that_makes_no_sense_is_refused(service: Running) -> None:
    for drift, says in (
        (pb.DriftPolicy(), "above 0 and below 1, not 0"),
        (pb.DriftPolicy(threshold=1), "not 1"),
        (pb.DriftPolicy(threshold=float("nan")), "not nan"),
        (pb.DriftPolicy(threshold=0.5, window=0), "at least one token"),
        (pb.DriftPolicy(threshold=0.5, action=cast(pb.DriftAction, 9)), "use WIDEN or EXACT"),
    ):
        assert says in await refused(generate(service, b"abc", pb.PoolPolicy(count=3, drift=drift)))
    some = pb.DriftPolicy(threshold=0.5)
    for pool in (pb.PoolPolicy(full=pb.Full(), drift=some), pb.PoolPolicy(drift=some)):
        assert "no pool that it could leave" in await refused(generate(service, b"abc", pool))


async def test_the_default_drift_goes_with_the_default_pool(serve: Callable[..., Any]) -> None:
    default = DriftPolicy(0.4, DriftAction.EXACT)
    async with serve(default_pool=PoolPolicy(Count(4), drift=default)) as service:
        for pool, expected in (
            (None, default),
            (pb.PoolPolicy(source=pb.POOL_SOURCE_PREFILL), default),
            (pb.PoolPolicy(drift=pb.DriftPolicy(threshold=0.2)), DriftPolicy(0.2)),
            (pb.PoolPolicy(count=3), None),
        ):
            _, request = await generate(service, b"abc", pool)
            assert request.pool.drift == expected
    with pytest.raises(ConfigError, match="no pool that it could leave"):
        async with serve(default_pool=PoolPolicy(Full(), drift=default)):
            pass
