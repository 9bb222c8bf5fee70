"""Predicts a request's pool: what was observed for the same prompt before, else the routing-only passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pager.routing.pool import resolve_size
from pager.types import Bytes, ExpertPool, Full, PoolPolicy, PoolSource, RoutingFacts, Usage
from router_service.hints import HintStore, pool_key, prefix_keys
from router_service.scoring import PREFILL, PassChain


@dataclass(frozen=True, slots=True)
class Prediction:
    """`pool` is None where nothing is predicted: a request for all experts, or one left to the prefill.

    `policy` is what the worker gets: bytes shared out over the layers, and the choice left to the prefill where no pass
    is expected to be good enough.
    """

    pool: ExpertPool | None
    source: str  # "hint", "trunk" (whatever the scores say), "prefill", "fixed" or "none"
    policy: PoolPolicy
    took_s: float = 0.0


class Predictor:
    """Knows tenants only as a part of keys: one tenant's prompts never shape another's prediction."""

    def __init__(self, chain: PassChain, hints: HintStore, facts: RoutingFacts, fingerprint: str) -> None:
        self._chain = chain
        self._hints = hints
        self._facts = facts
        self._fingerprint = fingerprint

    async def predict(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Prediction:
        if policy.source is PoolSource.FIXED:
            return Prediction(policy.fixed, "fixed", policy)
        if isinstance(policy.size, Full):
            return Prediction(None, "none", policy)
        self._chain.check(policy)
        started = time.perf_counter()
        prediction = await self._predict(tenant, token_ids, policy)
        return replace(prediction, took_s=time.perf_counter() - started)

    async def _predict(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Prediction:
        # A pool that *is* the prediction depends on the prompt alone, never on what happens to be remembered; and so
        # does how bytes are shared out.
        observed = None
        if policy.source is PoolSource.PREFILL:
            observed = await self.observed(tenant, token_ids, policy)
        if observed is not None and not isinstance(policy.size, Bytes):
            return Prediction(observed, "hint", policy)
        if self._chain.is_empty:
            return Prediction(None, PREFILL, policy)
        # What the prefill will choose is told from the prompt; what a whole document will want is another question.
        ahead = policy.source is PoolSource.PREDICTION
        scored = await self._chain.score(tenant, token_ids, policy.size, ahead=ahead)
        resolved = replace(policy, size=resolve_size(policy.size, scored.scores, self._facts))
        if observed is not None:
            return Prediction(observed, "hint", resolved)
        if scored.is_enough:
            return Prediction(scored.pool, scored.scores.source, resolved)
        return Prediction(None, PREFILL, replace(resolved, source=PoolSource.PREFILL))

    async def observed(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> ExpertPool | None:
        """The pool that a prefill chose for this prompt or a long prefix of it."""
        return await self._hints.find_pool(self._keys(tenant, token_ids, policy))

    async def learn(
        self, tenant: str, token_ids: Sequence[int], asked: PoolPolicy, ran: PoolPolicy, usage: Usage
    ) -> None:
        """Remembers the pool that an answer had. `asked` is the request's policy, `ran` what the worker got."""
        if usage.pool is None:
            return
        keys: tuple[str, ...] = (self.by_digest(tenant, usage.pool.digest),)
        was_widened = usage.drift is not None and usage.drift.experts_added > 0  # no longer what the prompt chose
        if ran.source is PoolSource.PREFILL and not isinstance(ran.size, Full) and not was_widened:
            keys += self._keys(tenant, token_ids, asked)
        await self._hints.remember_pool(keys, usage.pool)

    def by_digest(self, tenant: str, digest: str) -> str:
        return pool_key(self._fingerprint, tenant, digest)

    def _keys(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> tuple[str, ...]:
        return prefix_keys(self._fingerprint, policy.size, tenant, token_ids)
