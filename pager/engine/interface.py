"""What an engine is given and what it gives back: values that a process without torch can hold."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pager.errors import PagerError
from pager.memory.plan import PREFILL_CHUNK_TOKENS
from pager.types import Account, TokenChunk, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The bounds of one engine, but for KV memory, which is in the plan.

    The plan's `max_running`, and the needs' PREFILL_CHUNK_TOKENS, hold where they are lower: they are what there is
    working memory for.
    """

    max_running: int = 32  # requests that hold KV and slots at a time
    max_waiting: int = 256  # beyond max_running + max_waiting a request is refused
    max_overtakes: int = 8  # how often a request may be passed by later ones; those of one pool pass it as one
    # Of a forward of prompts: one whose pool is fixed already runs in parts, so that decoding goes on in between.
    prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS
    prefix_cache: bool = True  # keys and values of a common prefix are computed once
    share_prefixes: bool = False  # between tenants, too


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended without its answer's last chunk."""

    request_id: str
    error: PagerError
    tenant: str
    account: Account


StreamEvent = TokenChunk | Failure


def failure_of(error: BaseException, request_id: str, what: str) -> PagerError:
    """Returns `error` as a client may see it. Of what is no PagerError, the log has the rest: `what` happened."""
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
    kv_blocks_cached: int  # with content that requests can take over, in use or not
    kv_blocks_total: int
    is_stepping: bool
    progress: int
    num_steps: int
    num_decode_forwards: int
    place_s: float | None  # how long one place in the line has been lasting


class EngineObserver:
    """Receives what the engine reports as it goes, on its thread; every method does nothing by default."""

    def queued(self, seconds: float) -> None:
        """A request was admitted after waiting so long for KV and slots."""

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after its submission."""

    def shared_out(self, tenant: str, given: float, entitled: float) -> None:
        """A tenant with requests in line was given so much, and its weight entitled it to so much, in prompt tokens."""

    def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
        """A step has run; the model's forwards took so much of it, as the host saw it."""

    def ended(self, outcome: str, account: Account, usage: Usage | None, token_s: float | None) -> None:
        """A request has ended, and what it has used; with its usage, where its answer ended well.

        `outcome` is the finish reason, or the `reason` of the error that ended it, in lower case; `token_s` the mean
        time per token after the first, where there was one.
        """
