"""Arrivals and cancellations from other threads, the checks of arriving requests, and the pace of the waiting line."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass

from pager.engine.kv import BLOCK_TOKENS, blocks_for
from pager.engine.request import Request
from pager.errors import DeadlineExceeded, DuplicateRequest, InvalidRequest, NotReady, Overloaded, PromptTooLong
from pager.sampling import check_prompt_logprobs, check_sampling, check_vocabulary
from pager.types import GenerateRequest, PoolPolicy


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """The bounds of a single request: the model's context and vocabulary, and the tokens that KV memory holds."""

    context_tokens: int
    kv_tokens: int
    vocab_size: int

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest or PromptTooLong. Pools are checked where they are reserved."""
        check_sampling(request.sampling)
        check_vocabulary(request.sampling, self.vocab_size)
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}", field="prompt"
                )
        prompt, answer = len(request.prompt_token_ids), request.sampling.max_tokens
        check_prompt_logprobs(request.sampling, prompt)
        if prompt + answer > self.context_tokens:
            raise PromptTooLong(
                f"{prompt} prompt tokens and max_tokens {answer} are {prompt + answer}, more than the context of "
                f"{self.context_tokens}; shorten the prompt or ask for fewer tokens",
                field="prompt" if prompt >= self.context_tokens else "sampling.max_tokens",
            )
        if prompt + answer - 1 > self.kv_tokens:
            raise PromptTooLong(
                f"{prompt} prompt tokens and max_tokens {answer} need KV for {prompt + answer - 1} tokens and there is "
                f"room for {self.kv_tokens}; shorten the prompt, ask for fewer tokens or raise kv_memory",
                field="prompt" if prompt >= self.kv_tokens else "sampling.max_tokens",
            )
        num_common = prompt // BLOCK_TOKENS
        num_blocks = num_common + request.sampling.n * (blocks_for(prompt + answer - 1) - num_common)
        if request.sampling.n > 1 and num_blocks * BLOCK_TOKENS > self.kv_tokens:
            raise PromptTooLong(
                f"{request.sampling.n} answers of {answer} tokens to a prompt of {prompt} need KV for "
                f"{num_blocks * BLOCK_TOKENS} tokens and there is room for {self.kv_tokens}; ask for fewer or shorter "
                "answers or raise kv_memory",
                field="sampling.n",
            )


def check_answers(request: GenerateRequest, policy: PoolPolicy, max_running: int) -> None:
    """Raises InvalidRequest for several answers that cannot run beside each other, or not in one pool."""
    num_answers = request.sampling.n
    if num_answers > max_running:
        raise InvalidRequest(
            f"sampling.n is {num_answers}, and a worker runs at most {max_running} answers at once; ask for fewer",
            field="sampling.n",
        )
    if num_answers > 1 and policy.drift is not None:
        raise InvalidRequest(
            f"{num_answers} answers share one pool, which drift would change for each in its own way; send as many "
            "requests, or leave drift out",
            field="sampling.n",
        )


REMEMBERED_ADMISSIONS = 32


class LineClock:
    """Measures how long one place in the line takes, from recent admissions: the wait of each, divided by the place at
    which it joined.

    Only the present line counts. Measurements from before it was last empty say nothing about the requests in it now.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=REMEMBERED_ADMISSIONS)
        self.place_s: float | None = None  # None until the first admission from this line

    def forget(self) -> None:
        """Begins a new line."""
        self._recent.clear()
        self.place_s = None

    def admitted(self, place: int, waited_s: float) -> None:
        """Records that a request which joined at `place`, the first being 1, has waited this long."""
        self._recent.append(waited_s / place)
        self.place_s = statistics.median(self._recent)

    def check(self, num_ahead: int, left_s: float) -> None:
        """Raises DeadlineExceeded for a request that would wait behind this many others for longer than `left_s`."""
        place_s = self.place_s
        if place_s is not None and num_ahead * place_s > left_s:
            raise DeadlineExceeded(
                f"{num_ahead} requests are in line, each place takes {place_s:.2f} s, and the deadline "
                f"leaves {left_s:.2f} s; allow more time or retry later",
                field="deadline",
            )


class Inbox:
    """Arrivals and cancellations on their way to the engine. Thread-safe: the engine's thread takes, all others put."""

    def __init__(self, max_live: int) -> None:
        self._max_live = max_live
        self._live: dict[tuple[str, str], Request] = {}  # by tenant and request id
        self._arrived: list[Request] = []
        self._cancelled: list[Request] = []
        self._is_open = True
        self.is_halted = False
        self._changed = threading.Condition()

    def put(self, request: Request) -> None:
        """Adds a request. Raises NotReady when closed, DuplicateRequest for an id that its tenant uses, Overloaded at
        the bound.
        """
        key = _key_of(request)
        with self._changed:
            if not self._is_open:
                raise NotReady("this worker is shutting down; send the request to another", retry_after_s=1.0)
            if key in self._live:
                raise DuplicateRequest(f"request id {request.asked.id!r} is in use; choose another", field="request_id")
            if len(self._live) >= self._max_live:
                raise Overloaded(
                    f"this worker has {len(self._live)} requests of all tenants, running or waiting, and accepts no "
                    "more",
                    retry_after_s=1.0,
                )
            self._live[key] = request
            self._arrived.append(request)
            self._changed.notify_all()

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Notes the cancellation. Returns whether that tenant has such a request."""
        with self._changed:
            request = self._live.get((tenant, request_id))
            if request is None:
                return False
            self._cancelled.append(request)
            self._changed.notify_all()
            return True

    @property
    def has_news(self) -> bool:
        """Tells whether anything has come since the last `take`."""
        return bool(self._arrived or self._cancelled)

    def take(self) -> tuple[list[Request], list[Request]]:
        """Takes what has arrived and what was cancelled since the last call."""
        with self._changed:
            taken = self._arrived, self._cancelled
            self._arrived, self._cancelled = [], []
            return taken

    def remove(self, request: Request) -> None:
        """Removes a request that has ended; its id may be used again."""
        with self._changed:
            del self._live[_key_of(request)]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def halt(self) -> None:
        """Tells the engine's thread to stop."""
        with self._changed:
            self.is_halted = True
            self._changed.notify_all()

    def wait_for_news(self, timeout_s: float | None) -> None:
        """Waits until there is news; returns at once when there is some, or when the thread is to stop."""
        with self._changed:
            if not (self._arrived or self._cancelled or self.is_halted):
                self._changed.wait(timeout_s)

    def wait_for_company(self, pause_s: float, most_pauses: int, most_tokens: int) -> None:
        """Waits for requests that come together with those that have: pause by pause, until none has come in one, or
        until their prompts have this many tokens.
        """
        tokens_before = 0
        while most_pauses and not self.is_halted:
            num_tokens = sum(len(request.asked.prompt_token_ids) for request in self._arrived)
            if not tokens_before < num_tokens < most_tokens:
                return
            tokens_before, most_pauses = num_tokens, most_pauses - 1
            time.sleep(pause_s)

    def wait_until_empty(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def live(self) -> list[Request]:
        with self._changed:
            return list(self._live.values())

    def __len__(self) -> int:
        return len(self._live)


def _key_of(request: Request) -> tuple[str, str]:
    return request.asked.tenant, request.asked.id
