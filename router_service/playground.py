"""The playground of `/ui`: the scores of a prompt, its answer as it is generated with what was paged for it, and the
experts of pools.

It calls the pipeline as every front does, under the same key, bounds and quotas. What it shows beyond the API's answers
is reported by the worker of a watched request. The page is `ui_page/playground.js`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pager.observe.logs import request_id
from pager.pools.pick import write_pool_size
from pager.types import ExpertPool, PagingCounts, PoolPolicy, SamplingParams, TokenChunk, Usage
from router_service import openai
from router_service.http import Exchange, Handler, new_call, run_all, until_gone
from router_service.openai import Strict, model_and_pool
from router_service.requests import Ask, PoolByName, RouteAsk
from router_service.service import Pipeline

MAX_TOKENS = 1024  # of a watched answer
SCORE_DIGITS = 5


class PoolAsked(Strict):
    """A prompt and a pool: a size as with `--pool` on the command line, or the name of one of the tenant's own."""

    prompt: str
    pool: str | None = None
    name: str | None = None
    drift: str | None = None


class AnswerAsked(PoolAsked):
    """The parameters of a requested answer."""

    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)


class Playground:
    """The handlers. Owns no state."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def endpoints(self) -> Mapping[str, tuple[str, str, Handler]]:
        """Returns by path: the HTTP method, the name that calls are recorded under, and the handler."""
        return {
            "/ui/playground.json": ("GET", "PlaygroundFacts", self.facts),
            "/ui/pools/{name}": ("GET", "PlaygroundPool", self.pool),
            "/ui/scores": ("POST", "PlaygroundScores", self.scores),
            "/ui/answers": ("POST", "Playground", self.answer),
        }

    async def facts(self, exchange: Exchange, tenant: str) -> None:
        """Answers GET /ui/playground.json with the model, the service's default pool, and the tenant's named pools."""
        model, default = self._pipeline.model, self._pipeline.default_pool
        listing = await self._pipeline.list_pools(tenant)
        found = {
            "model": model.name,
            "routed_per_layer": model.facts.routed_per_layer,
            "max_tokens": MAX_TOKENS,
            "default_pool": write_pool_size(default.size),
            "pools": [{"name": each.name, "digest": each.pool.digest} for each in listing.pools],
        }
        await exchange.answer(200, found)

    async def pool(self, exchange: Exchange, tenant: str) -> None:
        """Answers GET /ui/pools/NAME with the experts of one of the tenant's named pools."""
        named = await self._pipeline.get_pool(tenant, exchange.path_parameter("name"))
        told = {"name": named.name, "method": named.method, "num_examples": named.num_examples}
        await exchange.answer(200, told | pool_in_json(named.pool))

    async def scores(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /ui/scores with the predictor's scores of a prompt, and the worker that would answer it."""
        asked = PoolAsked.read(await exchange.json())
        route = await self._pipeline.route(new_call(exchange, tenant), RouteAsk(asked.prompt, self._policy(asked)))
        expected = route.observed or route.pool

        def found() -> dict[str, Any]:
            return {
                "source": route.source,
                "num_tokens": route.num_tokens,
                "scores": [[round(score, SCORE_DIGITS) for score in layer] for layer in route.scores],
                "expected": None if expected is None else pool_in_json(expected),
                "expected_recall": route.expected_recall,
                "codeword": route.codeword or None,
                "worker": route.worker,
            }

        await exchange.answer(200, found)  # made in a thread: a large model has thousands of scores

    async def answer(self, exchange: Exchange, tenant: str) -> None:
        """Answers POST /ui/answers with server-sent events, one per token; the last one has the account."""
        asked = AnswerAsked.read(await exchange.json())
        sampling = SamplingParams(max_tokens=asked.max_tokens)
        ask = Ask(
            id=request_id.get(),
            prompt=asked.prompt,
            sampling=openai.checked(sampling, self._pipeline.model),
            has_max_tokens=False,  # at most this many, where the context has room for them
            pool=self._policy(asked),
            is_watched=True,
        )

        async def seen(_: int, chunk: TokenChunk) -> None:
            await exchange.event(event_of(chunk))

        async def work() -> None:
            await run_all(self._pipeline, new_call(exchange, tenant), [ask], seen)
            await exchange.end()

        await until_gone(exchange, work())

    def _policy(self, asked: PoolAsked) -> PoolPolicy | PoolByName:
        model, default = self._pipeline.model, self._pipeline.default_pool
        name = model.name if asked.name is None else f"{model.name}:{asked.name}"
        return model_and_pool(name, asked.pool or None, asked.drift or None, model, default)


def event_of(chunk: TokenChunk) -> dict[str, Any]:
    """Returns a chunk as the page reads it, without absent fields."""
    event: dict[str, Any] = {"text": chunk.text, "ids": chunk.token_ids}
    if chunk.outside_mass is not None:
        event["outside"] = round(chunk.outside_mass, 4)
    if chunk.page_ins:
        # layer, expert, tier, milliseconds
        event["page_ins"] = [[*each.key, each.source, round(1000 * each.at_s, 3)] for each in chunk.page_ins]
    if chunk.usage is not None:
        event["bill"] = bill_of(chunk.usage)
    return event


def bill_of(usage: Usage) -> dict[str, Any]:
    """Returns what kind of answer it was and what it used."""
    drift = usage.drift
    return {
        "mode": usage.mode,
        "finish_reason": usage.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "cached_prompt_tokens": usage.cached_prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "pool": None if usage.pool is None else pool_in_json(usage.pool),
        "codeword": usage.codeword or None,
        "predicted_recall": usage.predicted_recall,
        "out_of_pool_mass": usage.out_of_pool_mass,
        "queue_ms": 1000 * usage.queue_s,
        "first_token_ms": 1000 * usage.time_to_first_token_s,
        "stall_ms": 1000 * usage.stall_s,
        **_counts(usage.paging),
        "widenings": 0 if drift is None else drift.widenings,
        "experts_added": 0 if drift is None else drift.experts_added,
        "exact_from": None if drift is None else drift.exact_from,
    }


def _counts(paging: PagingCounts) -> dict[str, int]:
    return {
        "experts_hit": paging.experts_hit,
        "experts_missed": paging.experts_missed,
        "bytes_from_disk": paging.bytes_from_disk,
        "bytes_from_host": paging.bytes_from_host,
    }


def pool_in_json(pool: ExpertPool) -> dict[str, Any]:
    """Returns a pool with its experts, layer by layer."""
    return {"digest": pool.digest, "num_experts": pool.num_experts, "experts": pool.experts}
