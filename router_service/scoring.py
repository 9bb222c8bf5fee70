"""Predicts a request's pool: what was observed for the same prompt before, else the routing-only pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pager.routing.pool import pick_pool
from pager.types import ExpertPool, Full, PoolPolicy, PoolSource, RoutingFacts, RoutingScores, Usage
from router_service.hints import HintStore, pool_key, prefix_keys
from router_service.ports import Encoder, Scorer

Result = TypeVar("Result")


class Scoring:
    """Runs tokenizer and routing-only pass in a thread, one call at a time, so that the event loop stays free.

    What waits for the thread is bounded by admission; a cancelled caller leaves the line.
    """

    def __init__(self, scorer: Scorer, encoder: Encoder) -> None:
        self._scorer = scorer
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")

    async def encode(self, text: str) -> list[int]:
        return await self._run(lambda: self._encoder.encode(text))

    async def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        return await self._run(lambda: self._scorer.scores(token_ids))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@dataclass(frozen=True, slots=True)
class Prediction:
    """`pool` is None where there is nothing to predict (a request for all experts)."""

    pool: ExpertPool | None
    source: str  # "hint", "trunk" (whatever the scores say), "fixed" or "none"
    took_s: float = 0.0


class Predictor:
    """Knows tenants only as a part of keys: one tenant's prompts never shape another's prediction."""

    def __init__(self, scoring: Scoring, hints: HintStore, facts: RoutingFacts, fingerprint: str) -> None:
        self._scoring = scoring
        self._hints = hints
        self._facts = facts
        self._fingerprint = fingerprint

    async def predict(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Prediction:
        if policy.source is PoolSource.FIXED:
            return Prediction(policy.fixed, "fixed")
        if isinstance(policy.size, Full):
            return Prediction(None, "none")
        started = time.perf_counter()
        # A pool that *is* the prediction depends on the prompt alone, never on what happens to be remembered.
        if policy.source is PoolSource.PREFILL:
            observed = await self.observed(tenant, token_ids, policy)
            if observed is not None:
                return Prediction(observed, "hint", time.perf_counter() - started)
        scores = await self._scoring.scores(token_ids)
        pool = pick_pool(scores, policy.size, self._facts)
        return Prediction(pool, scores.source, time.perf_counter() - started)

    async def observed(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> ExpertPool | None:
        """The pool that a prefill chose for this prompt or a long prefix of it."""
        return await self._hints.find_pool(self._keys(tenant, token_ids, policy))

    async def learn(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy, usage: Usage) -> None:
        """Remembers the pool that an answer had."""
        if usage.pool is None:
            return
        keys: tuple[str, ...] = (self.named(tenant, usage.pool.digest),)
        if policy.source is PoolSource.PREFILL and not isinstance(policy.size, Full):
            keys += self._keys(tenant, token_ids, policy)
        await self._hints.remember_pool(keys, usage.pool)

    def named(self, tenant: str, digest: str) -> str:
        return pool_key(self._fingerprint, tenant, digest)

    def _keys(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> tuple[str, ...]:
        return prefix_keys(self._fingerprint, policy.size, tenant, token_ids)
