"""The inputs and outputs of an engine: values that a process without torch can hold."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pager.errors import PagerError
from pager.memory import LONE_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS
from pager.types import Account, TokenChunk, Usage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The bounds of one engine, except for KV memory, which is in the plan.

    The plan's `max_running` and `chunk_tokens`, and PREFILL_CHUNK_TOKENS, apply where they are lower: working memory is
    planned for them.
    """

    max_running: int = 32  # requests that hold KV and slots at a time
    max_waiting: int = 256  # beyond max_running + max_waiting a request is refused
    max_overtakes: int = 8  # how often later requests may pass a request; those of one pool count as one
    # Tokens of a forward of prompts. A prompt whose pool is fixed runs in parts, so that decoding continues in
    # between.
    prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS
    lone_chunk_tokens: int = LONE_CHUNK_TOKENS  # the same while one prompt is all that there is to run
    prefix_cache: bool = True  # keys and values of a common prefix are computed once
    share_prefixes: bool = False  # also between tenants


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a request without its answer's last chunk."""

    request_id: str
    error: PagerError
    tenant: str
    account: Account


StreamEvent = TokenChunk | Failure


def failure_of(error: BaseException, request_id: str, what: str) -> PagerError:
    """Returns `error` in the form that a client may see. For anything but a PagerError, the log has the details; `what`
    happened.
    """
    if isinstance(error, PagerError):
        return error
    log.error("request %s: %s", request_id, what, exc_info=error)
    return PagerError(f"request {request_id!r}: {what}; the worker's log has the details")


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of the engine. `progress` changes with every step, layer computed and byte read: a watchdog considers
    a step in which it does not change as hung.
    """

    waiting: int
    running: int
    kv_blocks_used: int
    kv_blocks_cached: int  # blocks with content that requests can take over, in use or not
    kv_blocks_total: int
    is_stepping: bool
    progress: int
    num_steps: int
    num_decode_forwards: int
    place_s: float | None  # how long one place in the line has taken recently


class EngineObserver:
    """Receives the engine's reports as it runs, on its thread; by default every method does nothing."""

    def queued(self, seconds: float) -> None:
        """Called when a request was admitted after waiting this long for KV and slots."""

    def first_token(self, seconds: float) -> None:
        """Called when a request has its first token, this long after its submission."""

    def shared_out(self, tenant: str, given: float, entitled: float) -> None:
        """Called for a tenant with requests in line: what it was given, and what its weight entitled it to, in prompt
        tokens.
        """

    def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
        """Called after a step; the model's forwards took this share of it, as seen by the host."""

    def ended(self, outcome: str, account: Account, usage: Usage | None, token_s: float | None) -> None:
        """Called when a request has ended, with what it has used, and with its usage where its answer ended well.

        `outcome` is the finish reason, or the `reason` of the error that ended it, in lower case; `token_s` is the mean
        time per token after the first, where there was one.
        """
