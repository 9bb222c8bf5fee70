"""Tenants and callers, the bounds on what they have in flight, their quotas, and refusals for lack of room or time."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeVar

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from pager.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    PagerError,
    PromptTooLong,
    QuotaExceeded,
    TenantOverloaded,
)
from pager.types import Load, TenantLoad

# --- tenants and callers ----------------------------------------------------------------------------------------------
#
# Their legal names, permissions and bounds, and the tenants that metrics name.


DEFAULT_TENANT = "default"
TENANT_KEY = "x-tenant-id"
OTHER_TENANTS = "other"
MAX_NAMED_TENANTS = 50  # each has some hundred series
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_tenant(value: str) -> str:
    """Returns `value` if it is a legal name. Raises InvalidRequest."""
    if not _TENANT.fullmatch(value):
        raise bad_tenant()
    return value


def bad_tenant() -> InvalidRequest:
    return InvalidRequest(
        f"metadata {TENANT_KEY} must be given once, as 1 to 64 of the characters A-Z a-z 0-9 . _ -", field=TENANT_KEY
    )


def tenant_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the one `x-tenant-id`, or "default". Raises InvalidRequest."""
    values = [value for key, value in metadata or () if key == TENANT_KEY]
    if not values:
        return DEFAULT_TENANT
    value = values[0]
    if len(values) > 1 or not isinstance(value, str):
        raise bad_tenant()
    return check_tenant(value)


class Role(StrEnum):
    """A permission of a caller."""

    INFERENCE = "inference"  # may generate, with the pools and the requests of its own tenant
    OPERATOR = "operator"  # may see what workers hold, and manage the pools and requests of every tenant
    METRICS = "metrics"  # may read /metrics and /ui


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """The bounds of one caller, beside those of its tenant and of the service. None is no bound."""

    requests_in_flight: int | None = None
    tokens_in_flight: int | None = None
    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a method. `id` names the key, certificate or token, and is not a secret; it is empty where no key
    is required.
    """

    tenant: str
    id: str = ""
    roles: frozenset[Role] = frozenset(Role)
    limits: CallerLimits = CallerLimits()
    priority: int = 0  # of its requests: those of a higher priority are admitted first
    weight: float = 1.0  # of its tenant's share of a worker
    guaranteed_share: float = 0.0  # of its tenant: of each worker's slots, which no other tenant takes
    acts_for_another: bool = False  # the tenant is not the key's own


present: ContextVar[Caller | None] = ContextVar("present", default=None)
"""The caller of the present call, from when it is known, whether or not it may make the call."""


class TenantLabels:
    """The values of the label `tenant`: the tenants that the configuration names, and OTHER_TENANTS for all others.

    Tenants choose their own names, so any other rule would let a client create series.
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._named = tuple(dict.fromkeys(named))

    @classmethod
    def parse(cls, text: str) -> TenantLabels:
        """Parses names separated by commas. Raises ConfigError."""
        named = [name.strip() for name in text.split(",") if name.strip()]
        for name in named:
            if not _TENANT.fullmatch(name) or name == OTHER_TENANTS:
                raise ConfigError(
                    f"router.metric_tenants names {name!r}, which is not a tenant's name (or is the name for all "
                    "others)"
                )
        if len(named) > MAX_NAMED_TENANTS:
            raise ConfigError(
                f"router.metric_tenants names {len(named)} tenants and metrics have room for {MAX_NAMED_TENANTS}; "
                "name the largest"
            )
        return cls(named)

    @property
    def values(self) -> tuple[str, ...]:
        return (*self._named, OTHER_TENANTS)

    def of(self, tenant: str) -> str:
        return tenant if tenant in self._named else OTHER_TENANTS


def tenant_or_invalid(value: str) -> str:
    """Returns a tenant's name as log lines have it, since tenants choose their own names."""
    return value if _TENANT.fullmatch(value) else "(invalid)"


def tenant_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the caller's tenant, unchecked; for metrics, which have a fixed list of tenants."""
    values = [value for key, value in metadata or () if key == TENANT_KEY and isinstance(value, str)]
    return values[0] if values else DEFAULT_TENANT


# --- admission --------------------------------------------------------------------------------------------------------


_SMOOTHING = 0.2
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.05, 10.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The bounds. Tokens count prompt plus max_tokens of all requests in flight, bytes count their messages."""

    max_requests: int = 256
    max_tokens: int = 1 << 20
    max_requests_per_tenant: int = 128
    max_tokens_per_tenant: int = 1 << 19
    max_bytes: int = 256 * 2**20
    max_bytes_per_tenant: int = 64 * 2**20

    @property
    def most_tokens(self) -> int:
        """The most tokens that one request may have."""
        return min(self.max_tokens, self.max_tokens_per_tenant)

    @property
    def most_bytes(self) -> int:
        """The most bytes that one request may have."""
        return min(self.max_bytes, self.max_bytes_per_tenant)


class Admission:
    """Counts what is in flight. A ticket is held from a request's admission to its end.

    `num_requests`, `num_tokens` and `num_bytes` may be read from any thread.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._is_closed = False
        self.num_requests = 0
        self.num_tokens = 0
        self.num_bytes = 0
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._requests_of: Counter[str] = Counter()  # by caller
        self._tokens_of: Counter[str] = Counter()
        self._mean_held_s: float | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """Refuses every request from now on with NotReady; those in flight continue."""
        self._is_closed = True

    def enter(self, tenant: str, num_bytes: int = 0, caller: Caller | None = None) -> Ticket:
        """Admits a request whose message has `num_bytes`; a caller may have bounds of its own.

        Raises NotReady, Overloaded, TenantOverloaded or PromptTooLong.
        """
        caller = caller or Caller(tenant)
        with refusing():
            self._check(tenant, num_bytes)
            most = caller.limits.requests_in_flight
            if most is not None and self._requests_of[caller.id] >= most:
                raise TenantOverloaded(
                    f"the key has {most} requests in flight, which is its limit; retry later",
                    retry_after_s=self.retry_after_s(),
                )
        self._requests[tenant] += 1
        self._bytes[tenant] += num_bytes
        if caller.id:
            self._requests_of[caller.id] += 1
        self.num_requests += 1
        self.num_bytes += num_bytes
        return Ticket(self, tenant, self._clock(), num_bytes, caller)

    def load(self) -> Load:
        """Returns what is in flight, the tenants with the most requests first. Called on the event loop only."""
        tenants = [TenantLoad(tenant, count, self._tokens[tenant]) for tenant, count in self._requests.most_common()]
        return Load(self.num_requests, self.num_tokens, tuple(tenants))

    def retry_after_s(self) -> float:
        """Estimates when the next request in flight ends, from how long those in flight have been running."""
        if self._mean_held_s is None:
            return 1.0
        return min(max(self._mean_held_s / max(1, self.num_requests), _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _check(self, tenant: str, num_bytes: int) -> None:
        if self._is_closed:
            raise NotReady("the service is draining; send the request to another replica", retry_after_s=1.0)
        if self.num_requests >= self._limits.max_requests:
            raise Overloaded(
                f"{self._limits.max_requests} requests are in flight, which is the service's limit; retry later",
                retry_after_s=self.retry_after_s(),
            )
        if self._requests[tenant] >= self._limits.max_requests_per_tenant:
            raise TenantOverloaded(
                f"tenant {tenant!r} has {self._limits.max_requests_per_tenant} requests in flight, which is its "
                "limit; retry later",
                retry_after_s=self.retry_after_s(),
            )
        self._check_bytes(tenant, num_bytes)

    def _check_bytes(self, tenant: str, num_bytes: int) -> None:
        limits = self._limits
        if num_bytes > limits.most_bytes:
            raise PromptTooLong(
                f"the request's message has {num_bytes} bytes and the service admits {limits.most_bytes} at once; "
                "send less",
                field="prompt",
            )
        if self.num_bytes + num_bytes > limits.max_bytes:
            raise Overloaded(
                f"messages of {self.num_bytes} of {limits.max_bytes} admitted bytes are in flight and this one has "
                f"{num_bytes}; retry later",
                retry_after_s=self.retry_after_s(),
            )
        if self._bytes[tenant] + num_bytes > limits.max_bytes_per_tenant:
            raise TenantOverloaded(
                f"tenant {tenant!r} has messages of {self._bytes[tenant]} of its {limits.max_bytes_per_tenant} bytes "
                f"in flight and this one has {num_bytes}; retry later",
                retry_after_s=self.retry_after_s(),
            )

    def _charge(self, ticket: Ticket, tokens: int) -> None:
        limits, tenant = self._limits, ticket.tenant
        if ticket.tokens + tokens > limits.most_tokens:
            raise PromptTooLong(
                f"the request has {ticket.tokens + tokens} tokens, those to generate included, and the service admits "
                f"{limits.most_tokens} at once; send less, or ask for less",
                field="prompt",
            )
        if self.num_tokens + tokens > limits.max_tokens:
            raise Overloaded(
                f"{self.num_tokens} of {limits.max_tokens} admitted tokens are in flight and this request needs "
                f"{tokens}; retry later",
                retry_after_s=self.retry_after_s(),
            )
        if self._tokens[tenant] + tokens > limits.max_tokens_per_tenant:
            raise TenantOverloaded(
                f"tenant {tenant!r} has {self._tokens[tenant]} of its {limits.max_tokens_per_tenant} tokens in flight "
                f"and this request needs {tokens}; retry later",
                retry_after_s=self.retry_after_s(),
            )
        self._charge_caller(ticket, tokens)
        self._tokens[tenant] += tokens
        self.num_tokens += tokens

    def _charge_caller(self, ticket: Ticket, tokens: int) -> None:
        id_, most = ticket.caller.id, ticket.caller.limits.tokens_in_flight
        if most is not None and ticket.tokens + tokens > most:
            raise PromptTooLong(
                f"the request has {ticket.tokens + tokens} tokens, those to generate included, and the key may have "
                f"{most} in flight; send less, or ask for less",
                field="prompt",
            )
        if most is not None and self._tokens_of[id_] + tokens > most:
            raise TenantOverloaded(
                f"the key has {self._tokens_of[id_]} of its {most} tokens in flight and this request needs {tokens}; "
                "retry later",
                retry_after_s=self.retry_after_s(),
            )
        if id_:
            self._tokens_of[id_] += tokens

    def _leave(self, ticket: Ticket) -> None:
        self.num_requests -= 1
        self.num_tokens -= ticket.tokens
        self.num_bytes -= ticket.num_bytes
        tenant, id_ = ticket.tenant, ticket.caller.id
        held = [(self._requests, tenant, 1), (self._tokens, tenant, ticket.tokens)]
        held += [(self._bytes, tenant, ticket.num_bytes)]
        held += [(self._requests_of, id_, 1), (self._tokens_of, id_, ticket.tokens)]
        for counts, name, amount in held:
            counts[name] -= amount
            if counts[name] <= 0:
                del counts[name]  # names of tenants come from outside: a name without a request is not kept
        held_s = self._clock() - ticket.entered_s
        before = held_s if self._mean_held_s is None else self._mean_held_s
        self._mean_held_s = before + _SMOOTHING * (held_s - before)

    def check_integrity(self) -> None:
        assert all(count > 0 for count in self._requests.values())
        assert set(self._tokens) | set(self._bytes) <= set(self._requests)
        assert set(self._tokens_of) <= set(self._requests_of)
        assert self.num_requests == self._requests.total() <= self._limits.max_requests
        assert self.num_tokens == self._tokens.total() <= self._limits.max_tokens
        assert self.num_bytes == self._bytes.total() <= self._limits.max_bytes


class Ticket:
    """One admitted request; leaving the block gives back the room that it holds."""

    def __init__(self, admission: Admission, tenant: str, entered_s: float, num_bytes: int, caller: Caller) -> None:
        self._admission = admission
        self.tenant = tenant
        self.caller = caller
        self.entered_s = entered_s
        self.num_bytes = num_bytes
        self.tokens = 0

    def charge(self, tokens: int) -> None:
        """Counts the request's tokens as they become known. Raises Overloaded, TenantOverloaded or PromptTooLong."""
        with refusing():
            self._admission._charge(self, tokens)
        self.tokens += tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._leave(self)


@contextmanager
def refusing() -> Iterator[None]:
    """Marks errors that are raised in the block for lack of room or time as refusals: no work was done for the call."""
    try:
        yield
    except (Overloaded, NotReady, DeadlineExceeded) as error:
        error.is_refusal = True
        raise


def remaining_s(deadline_s: float | None) -> float | None:
    """Returns the seconds until a deadline on the monotonic clock; None without one."""
    return None if deadline_s is None else deadline_s - time.monotonic()


# --- quotas -----------------------------------------------------------------------------------------------------------
#
# Quotas bound the requests and tokens of a caller in a minute and in a day. Here one router counts them; with
# `SharedQuotas` in `router_service.redis` all routers count together. `Admission` bounds what is in flight.


Answer = TypeVar("Answer")


class Quotas:
    """The counts of all callers. A window begins with its first request, and ends a minute or a day later."""

    def __init__(self) -> None:
        self._local = FixedWindowRateLimiter(MemoryStorage())

    async def request(self, caller: Caller) -> None:
        """Counts a request. Raises QuotaExceeded when the quota is used up."""
        for item in _items(caller, "requests"):
            if not await self._ask(FixedWindowRateLimiter.hit, item, caller):
                raise await self._exceeded(item, caller, "requests")

    async def prompt(self, caller: Caller, num_tokens: int) -> None:
        """Counts a prompt's tokens. Raises QuotaExceeded, or PromptTooLong for more than a whole window's quota."""
        items = list(_items(caller, "tokens"))
        for item in items:
            if num_tokens > item.amount:
                raise PromptTooLong(
                    f"the prompt has {num_tokens} tokens, more than the {item.amount} that the key may use in "
                    f"{_window(item)}; send less",
                    field="prompt",
                )
            if not await self._ask(FixedWindowRateLimiter.test, item, caller, cost=num_tokens):
                raise await self._exceeded(item, caller, "tokens")
        await self._count(items, caller, num_tokens)

    async def answer(self, caller: Caller, num_tokens: int) -> None:
        """Counts the tokens of an answer, which may exceed the quota: the next prompt is refused then."""
        await self._count(_items(caller, "tokens"), caller, num_tokens)

    async def headers(self, caller: Caller) -> dict[str, str]:
        """Returns what is left of the present minute, as `x-ratelimit-*` headers; none without a limit."""
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
        """Does nothing: no connection is open."""

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
        """Checks against this router's own counts."""
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
