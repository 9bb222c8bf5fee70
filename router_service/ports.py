"""What the router service relies on from below: workers that generate, and a pass that scores."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pager.types import (
    ExpertPool,
    GenerateRequest,
    PagingCounts,
    RequestObserver,
    RoutingScores,
    TokenChunk,
)


class WorkerPort(Protocol):
    """One worker, as last reported (at most about a second old). Immutable."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str:
        """starting, ready, draining, hung or dead."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def expert_bytes(self) -> int: ...
    @property
    def resident(self) -> tuple[int, ...]:
        """Per layer a bitmask of the routed experts held."""

    @property
    def num_restarts(self) -> int: ...
    @property
    def page_in_bytes_per_s(self) -> float | None:
        """Median measured so far; None before the first page-in."""

    @property
    def peak_page_in_bytes_per_s(self) -> float | None:
        """The most that its readers together may have reached lately; None before the first page-in."""

    @property
    def place_s(self) -> float | None:
        """How long one place in its line has been lasting; None where nobody in it has been admitted yet."""

    @property
    def paging(self) -> PagingCounts: ...

    def missing_bytes(self, pool: ExpertPool) -> int: ...


class ClusterPort(Protocol):
    def workers(self) -> Sequence[WorkerPort]: ...

    def generate(
        self, worker_id: str, request: GenerateRequest, observer: RequestObserver
    ) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of the answer; the last one carries the usage. Closing it cancels the request on the worker.

        `observer` hears when it was sent, and at its end there what it has used.

        Raises PagerError: WorkerLost, SlowReader, DeadlineExceeded, Cancelled, and what the worker's engine refuses.
        """

    async def abort(self, request_id: str, tenant: str) -> bool: ...

    def cut_off(self) -> None:
        """Takes no more requests, and ends the open ones with NotReady."""


class Scorer(Protocol):
    """A routing-only pass. Called from another thread, one call at a time."""

    def scores(self, token_ids: Sequence[int], /) -> RoutingScores: ...


class RecallEstimate(Protocol):
    """The share of the prefill's pool, of the same sizes, that a pool picked by these scores is expected to hold."""

    def __call__(self, scores: RoutingScores, pool: ExpertPool, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text in tokens; `ids` is left empty where they are more than was asked for."""

    num_tokens: int
    ids: Sequence[int]


class Encoder(Protocol):
    """The part of a tokenizer that the router needs. Called from several threads."""

    @property
    def longest_token_bytes(self) -> int:
        """The most bytes of text that one token can stand for."""

    def encode(self, text: str, most: int, /, *, add_special_tokens: bool = True) -> Encoded:
        """The ids of at most `most` tokens. Must let other threads run meanwhile. Raises InvalidRequest."""
