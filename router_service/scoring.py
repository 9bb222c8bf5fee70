"""Scores prompts: the routing-only passes, which of them does for a prompt, and the thread that they run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pager.errors import InvalidRequest
from pager.routing.pool import pick_pool
from pager.tracing import note, span
from pager.types import Bytes, ExpertPool, Full, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores
from router_service.ports import Encoder, RecallEstimate, Scorer

PREFILL = "prefill"  # what comes after the last pass: the worker's own choice, which is the reference
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Passes:
    """The routing-only passes of a router.

    `available`: how to load each, from the least to the best; a pass is loaded when it is first wanted. `chain`: what
    scores a prompt, each asked when the one before is expected to recall less than `min_recall` of the prefill's pool.
    Without `estimate` nothing is expected and the first one does. No pass at all: placement without a prediction.
    """

    available: Mapping[str, Callable[[], Scorer]] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    estimate: RecallEstimate | None = None
    min_recall: float = 0.0

    def __post_init__(self) -> None:
        assert set(self.chain) <= set(self.available)

    def check(self, policy: PoolPolicy) -> None:
        """Raises InvalidRequest for a policy that needs a pass where there is none."""
        if self.chain:
            return
        if policy.source is PoolSource.PREDICTION:
            raise _unscored("a predicted pool", "pool.source")
        if isinstance(policy.size, Bytes):
            raise _unscored("sharing bytes out over the layers", "pool.size.bytes")


class Scoring:
    """Runs tokenizer and passes in a thread, one call at a time, so that the event loop stays free.

    What waits for the thread is bounded by admission; a cancelled caller leaves the line.
    """

    def __init__(self, available: Mapping[str, Callable[[], Scorer]], encoder: Encoder) -> None:
        self._available = available
        self._loaded: dict[str, Scorer] = {}  # the thread's own
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")

    async def encode(self, text: str) -> list[int]:
        return await self._run(lambda: self._encoder.encode(text))

    async def scores(self, name: str, token_ids: Sequence[int]) -> RoutingScores:
        return await self._run(lambda: self._pass(name).scores(token_ids))

    async def load(self, name: str) -> None:
        """So that the first prompt need not wait for it."""
        await self._run(lambda: self._pass(name))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _pass(self, name: str) -> Scorer:
        if name not in self._loaded:
            self._loaded[name] = self._available[name]()
        return self._loaded[name]

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A prompt's scores and the pool they make (None for all experts). `is_enough`: no better source is needed."""

    scores: RoutingScores
    pool: ExpertPool | None
    expected_recall: float | None
    is_enough: bool


class PassChain:
    """Takes the first pass whose pool is expected to be good enough. `on_escalation` hears (from, to)."""

    def __init__(
        self, passes: Passes, scoring: Scoring, facts: RoutingFacts, on_escalation: Callable[[str, str], None]
    ) -> None:
        self._passes = passes
        self._scoring = scoring
        self._facts = facts
        self._on_escalation = on_escalation

    @property
    def is_empty(self) -> bool:
        return not self._passes.chain

    def check(self, policy: PoolPolicy) -> None:
        """Raises InvalidRequest for a policy that needs a pass where there is none."""
        self._passes.check(policy)

    async def score(self, token_ids: Sequence[int], size: PoolSize, *, ahead: bool = True) -> Scored:
        """The best that was tried; `is_enough` is False where only the prefill is better. Needs a pass.

        `ahead`: for all of the document. False: for what the prompt's own prefill will choose.
        """
        chain = self._passes.chain
        for name, following in zip(chain, (*chain[1:], PREFILL), strict=True):
            with span("score", source=name, num_tokens=len(token_ids)):
                scores = await self._scoring.scores(name, token_ids)
            if not ahead and scores.of_prompt is not None:
                scores = scores.of_prompt
            scored = self._judged(scores, size)
            if scored.is_enough:
                break
            self._on_escalation(name, following)
        return scored

    def _judged(self, scores: RoutingScores, size: PoolSize) -> Scored:
        if isinstance(size, Full):
            return Scored(scores, None, None, is_enough=True)
        with span("pick"):
            pool = pick_pool(scores, size, self._facts)
            note(num_experts=pool.num_experts)
        if self._passes.estimate is None:
            return Scored(scores, pool, None, is_enough=True)
        expected = self._passes.estimate(scores, pool)
        return Scored(scores, pool, expected, expected >= self._passes.min_recall)


def _unscored(what: str, field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what} needs a routing-only pass, and this service runs none (its router is 'fused'); let the prefill choose "
        "a pool of a count, a share or a mass",
        field=field,
    )
