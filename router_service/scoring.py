"""Scores prompts: the routing-only passes, which of them does for a prompt, and the threads that all this runs on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pager.errors import InvalidRequest
from pager.routing.pool import pick_pool
from pager.tokenizing import encode_all, longest_token_bytes
from pager.tracing import note, span
from pager.types import Bytes, ExpertPool, Full, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores
from router_service.fair_threads import FairThreads
from router_service.ports import Encoded, Encoder, RecallEstimate, Scorer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFILL = "prefill"  # what comes after the last pass: the worker's own choice, which is the reference
OWN = ""  # whose turn it is when the router itself has work; no tenant is called so


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


class TextEncoder:
    """The tokenizer as the router needs it: other threads go on while it works."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.longest_token_bytes = 1 if tokenizer is None else longest_token_bytes(tokenizer)

    def encode(self, text: str, most: int, /) -> Encoded:
        if self._tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; give the prompt as `token_ids`", field="text")
        encoding = encode_all(self._tokenizer, [text])[0]
        # A list of millions of ids takes the GIL for tens of milliseconds to make, and nobody would read it.
        return Encoded(len(encoding), encoding.ids if len(encoding) <= most else ())


class Scoring:
    """Runs the tokenizer in some threads and the passes in one, tenants in turn, so that the event loop stays free.

    What waits for a thread is bounded by admission; a cancelled caller leaves the line.
    """

    def __init__(self, available: Mapping[str, Callable[[], Scorer]], encoder: Encoder) -> None:
        self._available = available
        self._loaded: dict[str, Scorer] = {}  # the passes' thread's own
        self._encoder = encoder
        self._passes = FairThreads(1, "scoring")
        # Two at least: while one has a text of megabytes, another has those of other tenants.
        self._tokenizer = FairThreads(max(2, min(8, len(os.sched_getaffinity(0)) // 4)), "tokenizer")

    async def encode(self, tenant: str, text: str, most: int) -> Encoded:
        """The ids of at most `most` tokens. Raises InvalidRequest."""
        return await self._tokenizer.run(tenant, lambda: self._encoder.encode(text, most))

    async def scores(self, tenant: str, name: str, token_ids: Sequence[int]) -> RoutingScores:
        return await self._passes.run(tenant, lambda: self._pass(name).scores(token_ids))

    async def load(self, name: str) -> None:
        """So that the first prompt need not wait for it."""
        await self._passes.run(OWN, lambda: self._pass(name))

    def close(self) -> None:
        self._tokenizer.close()
        self._passes.close()

    def _pass(self, name: str) -> Scorer:
        if name not in self._loaded:
            self._loaded[name] = self._available[name]()
        return self._loaded[name]


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

    async def score(self, tenant: str, token_ids: Sequence[int], size: PoolSize, *, ahead: bool = True) -> Scored:
        """The best that was tried; `is_enough` is False where only the prefill is better. Needs a pass.

        `ahead`: for all of the document. False: for what the prompt's own prefill will choose.
        """
        chain = self._passes.chain
        for name, following in zip(chain, (*chain[1:], PREFILL), strict=True):
            with span("score", source=name, num_tokens=len(token_ids)):
                scores = await self._scoring.scores(tenant, name, token_ids)
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
