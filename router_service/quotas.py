"""Quotas: how many requests and tokens a caller has had in a minute and a day.

Here they are counted by one router; `SharedQuotas` in `router_service.redis_stores` has all routers count together.
What is in flight is bounded by `router_service.admission`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from pager.errors import PagerError, PromptTooLong, QuotaExceeded
from router_service.tenants import Caller

Answer = TypeVar("Answer")


class Quotas:
    """The counts of all callers. A window begins with its first request, and ends a minute or a day later."""

    def __init__(self) -> None:
        self._local = FixedWindowRateLimiter(MemoryStorage())

    async def request(self, caller: Caller) -> None:
        """Counts a request. Raises QuotaExceeded for one too many."""
        for item in _items(caller, "requests"):
            if not await self._ask(FixedWindowRateLimiter.hit, item, caller):
                raise await self._exceeded(item, caller, "requests")

    async def prompt(self, caller: Caller, num_tokens: int) -> None:
        """Counts the tokens of a prompt. Raises QuotaExceeded, or PromptTooLong for one that no window has room for."""
        items = list(_items(caller, "tokens"))
        for item in items:
            if num_tokens > item.amount:
                raise PromptTooLong(
                    f"the prompt's {num_tokens} tokens are more than the {item.amount} that the key may use in "
                    f"{_window(item)}; send less",
                    field="prompt",
                )
            if not await self._ask(FixedWindowRateLimiter.test, item, caller, cost=num_tokens):
                raise await self._exceeded(item, caller, "tokens")
        await self._count(items, caller, num_tokens)

    async def answer(self, caller: Caller, num_tokens: int) -> None:
        """Counts the tokens of an answer, which may go beyond the quota: the next prompt is refused then."""
        await self._count(_items(caller, "tokens"), caller, num_tokens)

    async def headers(self, caller: Caller) -> dict[str, str]:
        """What is left of the present minute, as `x-ratelimit-*` headers; none without a limit."""
        found = {}
        for what in ("requests", "tokens"):
            for item in _items(caller, what):
                if isinstance(item, RateLimitItemPerMinute):
                    stats = await self._ask(FixedWindowRateLimiter.get_window_stats, item, caller)
                    found[f"x-ratelimit-limit-{what}"] = str(item.amount)
                    found[f"x-ratelimit-remaining-{what}"] = str(stats.remaining)
                    found[f"x-ratelimit-reset-{what}"] = f"{max(0, math.ceil(stats.reset_time - time.time()))}s"
        return found

    async def close(self) -> None:
        """Does nothing: nothing is open."""

    async def _count(self, items: Iterable[RateLimitItem], caller: Caller, num: int) -> None:
        for item in items if num else ():
            await self._ask(FixedWindowRateLimiter.hit, item, caller, cost=num)

    async def _exceeded(self, item: RateLimitItem, caller: Caller, what: str) -> PagerError:
        stats = await self._ask(FixedWindowRateLimiter.get_window_stats, item, caller)
        error = QuotaExceeded(
            f"the key has used its {item.amount} {what} of {_window(item)}; retry later",
            retry_after_s=max(0.1, stats.reset_time - time.time()),
        )
        error.is_refusal = True
        return error

    async def _ask(
        self, question: Callable[..., Awaitable[Answer]], item: RateLimitItem, caller: Caller, **options: int
    ) -> Answer:
        """Asks this router's own counts."""
        return await question(self._local, item, caller.id, **options)


def _items(caller: Caller, what: str) -> Iterator[RateLimitItem]:
    limits = caller.limits
    by_window = {
        RateLimitItemPerMinute: limits.requests_per_minute if what == "requests" else limits.tokens_per_minute,
        RateLimitItemPerDay: limits.requests_per_day if what == "requests" else limits.tokens_per_day,
    }
    for kind, amount in by_window.items():
        if amount is not None:
            yield kind(amount, namespace=what)


def _window(item: RateLimitItem) -> str:
    return "a minute" if isinstance(item, RateLimitItemPerMinute) else "a day"
