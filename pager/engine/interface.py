"""What an engine is given and what it gives back."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pager.errors import PagerError
from pager.memory.needs import PREFILL_CHUNK_TOKENS
from pager.types import Account, DriftReport, ExpertPool, TokenChunk

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of one engine. KV memory is not in here: the plan says it.

    The plan's `max_running`, and the needs' PREFILL_CHUNK_TOKENS, hold where they are lower: they are what there is
    working memory for.
    """

    max_running: int = 32  # sequences that hold KV and slots at a time
    max_waiting: int = 256  # beyond max_running + max_waiting a request is refused
    max_overtakes: int = 8  # how often a request that does not fit yet may be passed by later ones
    # Of a prompt whose pool is fixed already, so that decoding goes on in between.
    prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended without its answer's last chunk."""

    request_id: str
    error: PagerError
    tenant: str
    account: Account


StreamEvent = TokenChunk | Failure


def failure_of(error: BaseException, request_id: str, what: str) -> PagerError:
    """`error` as the client of one request is told of it. What is no PagerError stays in the log: `what` happened."""
    if isinstance(error, PagerError):
        return error
    log.error("request %s: %s", request_id, what, exc_info=error)
    return PagerError(f"request {request_id!r}: {what}; the worker's log says more")


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot. `progress` changes with every step, layer computed and byte read: a watchdog takes a step in which it
    stands still for one that hangs.
    """

    waiting: int
    running: int
    kv_blocks_used: int
    kv_blocks_total: int
    is_stepping: bool
    progress: int
    num_steps: int
    num_decode_forwards: int
    place_s: float | None  # how long one place in the line has been lasting


class EngineObserver:
    """What the engine reports as it goes, from its own thread; every method does nothing by default."""

    def queued(self, seconds: float) -> None:
        """A request was admitted after waiting so long for KV and slots."""

    def first_token(self, seconds: float) -> None:
        """From submission to the first token."""

    def output_token(self, seconds: float) -> None:
        """Mean time per token after the first, once a request."""

    def used(self, account: Account) -> None:
        """What a request that ended has used, however it ended."""

    def finished(self, outcome: str) -> None:
        """A finish reason, or the `reason` of the error that ended the request, in lower case."""

    def load(self, running: int, waiting: int, kv_blocks_used: int) -> None:
        """After every step."""

    def pool(self, pool: ExpertPool, out_of_pool_mass: float) -> None:
        """The pool of an answer that is finished, and the mean gate mass that fell outside it while decoding."""

    def drift(self, report: DriftReport) -> None:
        """What was done about drift in an answer that is finished and whose policy looked for it."""

    def predicted(self, recall: float) -> None:
        """Which share of the actual pool the router's prediction had named."""

    def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
        """One step, and how much of it the model's forwards took (as the host saw it)."""
