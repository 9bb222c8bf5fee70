"""Who runs next: arrivals and cancellations from other threads, the checks at the door, the waiting line, and what
tenants have been given.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from pager.engine.request import Request
from pager.errors import DeadlineExceeded, DuplicateRequest, InvalidRequest, NotReady, Overloaded, PromptTooLong
from pager.sampling import check_prompt_logprobs, check_sampling, check_vocabulary
from pager.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """The bounds of a single request: the model's context and vocabulary, and the tokens that KV memory holds."""

    context_tokens: int
    kv_tokens: int
    vocab_size: int

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest or PromptTooLong. Pools are checked by whoever reserves them."""
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


T = TypeVar("T", bound=Hashable)
REMEMBERED_ADMISSIONS = 32

Experts = int
"""A set of experts as bits of one integer, so that sets of thousands are compared in a microsecond."""


@dataclass(frozen=True, slots=True)
class Want:
    """What one waiting request takes: `experts` where they are known before its prefill, and `num_slots` in any case.

    `num_tokens` are those of its prompt and its answer.
    """

    num_slots: int
    num_tokens: int
    experts: Experts | None = None


def by_overlap(wants: Sequence[Want], loaded: Experts, held: Experts) -> Iterator[int]:
    """Yields the indices of `wants` in the order in which to admit them, each once; pure.

    Requests of one pool come together. The next pool is the one that pages the fewest experts for each of its waiting
    tokens, given those that are `loaded` and those that the pools before it bring; between pools alike, the one that
    takes the fewest slots beside those `held` by running requests, then the one that has waited longest.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, want in enumerate(wants):
        groups.setdefault((index,) if want.experts is None else want.experts, []).append(index)
    num_tokens = {name: sum(wants[index].num_tokens for index in members) for name, members in groups.items()}

    def cost(name: Hashable) -> tuple[float, float]:
        want = wants[groups[name][0]]
        if want.experts is None:
            return want.num_slots / num_tokens[name], want.num_slots / num_tokens[name]
        missing, taken = (want.experts & ~loaded).bit_count(), (want.experts & ~held).bit_count()
        return missing / num_tokens[name], taken / num_tokens[name]

    while groups:
        name = min(groups, key=cost)  # the first of several, and groups are in order of arrival
        brought = wants[groups[name][0]].experts or 0
        yield from groups.pop(name)
        loaded, held = loaded | brought, held | brought


class WaitingLine(Generic[T]):
    """Requests in the order in which they came, with bounded overtaking.

    A later item may pass earlier ones, because those do not fit yet or because others are asked first, but nobody is
    passed more than `max_overtakes` times: once the first in line has been, everybody waits for it. Items of one group
    (requests of one pool) that are admitted in the same sweep pass the others together, as one: they share their slots.
    So none starves, provided that what is admitted ends and each item fits into an empty engine.
    """

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._times_passed: dict[T, int] = {}  # in order of arrival
        self._sweep: list[T] = []  # the line as it was asked last, in the order of its claims
        self._group: Hashable = None  # of the item admitted last in this sweep
        self._passed_by_group: set[T] = set()

    def __len__(self) -> int:
        return len(self._times_passed)

    def __iter__(self) -> Iterator[T]:
        return iter(self._times_passed)

    def __contains__(self, item: object) -> bool:
        return item in self._times_passed

    def add(self, item: T) -> None:
        self._times_passed[item] = 0

    def remove(self, item: T) -> None:
        """Takes out an item that leaves without having been admitted; nobody is passed by that."""
        del self._times_passed[item]

    def candidates(
        self,
        *,
        claim: Callable[[T], Any] = lambda _: 0,
        ordered: Callable[[Sequence[T]], Iterable[T]] = iter,
        group: Callable[[T], Hashable] = lambda _: None,
    ) -> Iterator[T]:
        """Yields who may be admitted now, in the order to try, taking account of what is admitted while iterating.

        Items with a lesser `claim` come first; among equal ones `ordered` decides. Behind an item that was admitted
        come all others of its `group` (None is no group). Whoever passes somebody passes the first in line too, as long
        as claims do not change, so that one has always been passed most.
        """
        self._sweep = line = sorted(self._times_passed, key=claim)
        self._group, self._passed_by_group = None, set()
        tried: set[T] = set()

        def with_group(item: T) -> Iterator[T]:
            tried.add(item)
            yield item
            if item in self or group(item) is None:
                return
            for other in line:
                if other in self and other not in tried and group(other) == group(item):
                    tried.add(other)
                    yield other

        for _, equals in groupby(line, key=claim):
            for item in ordered(list(equals)):
                while (due := self._due()) is not None and due != item:
                    if due in tried:
                        return
                    yield from with_group(due)
                if item in self and item not in tried:
                    yield from with_group(item)

    def admit(self, item: T, group: Hashable = None) -> None:
        """Takes `item` out of the line, by which it passes everybody before it who is not passed by its group yet."""
        if group is None or group != self._group:
            self._group, self._passed_by_group = group, set()
        for earlier in self._sweep or list(self._times_passed):
            if earlier == item:
                break
            if earlier in self._times_passed and earlier not in self._passed_by_group:
                self._times_passed[earlier] += 1
                self._passed_by_group.add(earlier)
        del self._times_passed[item]

    def _due(self) -> T | None:
        """The first in line, if it has been passed as often as may be."""
        first = next((item for item in self._sweep if item in self), None)
        return first if first is not None and self._times_passed[first] >= self._max_overtakes else None


@dataclass(frozen=True, slots=True)
class Prices:
    """What a tenant is charged for, in prompt tokens.

    An output token takes a row of a step of its own. An expert that is paged in costs what reading it takes of the
    machine; all slots for a second, what others could have decoded with them.
    """

    output_token: float = 2.0
    paged_expert: float = 0.125
    all_slots_second: float = 64.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What a request has used by some moment; counts only grow. `slot_s` is the share of all slots, in seconds."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    paged_experts: float = 0.0
    slot_s: float = 0.0

    def cost(self, before: Spent, prices: Prices) -> float:
        """What was used since `before`, in prompt tokens."""
        return (
            self.prompt_tokens
            - before.prompt_tokens
            + prices.output_token * (self.output_tokens - before.output_tokens)
            + prices.paged_expert * (self.paged_experts - before.paged_experts)
            + prices.all_slots_second * (self.slot_s - before.slot_s)
        )


@dataclass(slots=True)
class _Tenant:
    weight: float
    counter: float
    num_waiting: int = 0
    num_running: int = 0

    @property
    def is_active(self) -> bool:
        return self.num_waiting + self.num_running > 0


class TenantCounters:
    """What every tenant was given, by weight: a virtual counter that decides whose request is next. Knows no clock.

    A tenant that comes back is lifted to the least counter of those that are active: it cannot save up time in which it
    asked for nothing. After Sheng et al., Fairness in Serving Large Language Models (2024), which counts tokens; here
    paging and slots count too.
    """

    MAX_IDLE = 4096
    SLACK = 512.0
    """Counters that are no further above the least one count as equal, so that overlap has requests to choose from."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._floor = 0.0  # the least counter that an active tenant may have

    def counter(self, tenant: str) -> float:
        return self._tenants[tenant].counter

    def arrived(self, tenant: str, weight: float = 1.0) -> None:
        """Counts one more waiting request of the tenant, whose weight is the one that came last."""
        found = self._tenants.setdefault(tenant, _Tenant(weight, self._floor))
        if not found.is_active:
            found.counter = max(found.counter, self._lowest())
        found.weight = weight
        found.num_waiting += 1

    def admitted(self, tenant: str) -> None:
        found = self._tenants[tenant]
        found.num_waiting -= 1
        found.num_running += 1

    def ended(self, tenant: str, *, was_admitted: bool) -> None:
        found = self._tenants[tenant]
        if was_admitted:
            found.num_running -= 1
        else:
            found.num_waiting -= 1
        if not found.is_active:
            self._floor = max(self._floor, self._lowest()) if self._any_active() else max(self._floor, found.counter)
            self._forget()

    def charge(self, costs: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Charges tenants for what was used, in prompt tokens.

        Returns, for each tenant that has requests waiting, what it was given and what its weight entitled it to: its
        share, among the active tenants, of what all of them were given.
        """
        total = sum(costs.values())
        total_weight = sum(tenant.weight for tenant in self._tenants.values() if tenant.is_active)
        for name, cost in costs.items():
            self._tenants[name].counter += cost / self._tenants[name].weight
        return {
            name: (costs.get(name, 0.0), total * tenant.weight / total_weight)
            for name, tenant in self._tenants.items()
            if tenant.num_waiting
        }

    def claims(self) -> Callable[[str], float]:
        """Returns the function that ranks tenants now: 0 for those within SLACK of the least counter that waits."""
        counters = [tenant.counter for tenant in self._tenants.values() if tenant.num_waiting]
        enough = min(counters, default=0.0) + self.SLACK

        def claim(tenant: str) -> float:
            counter = self._tenants[tenant].counter
            return 0.0 if counter <= enough else counter

        return claim

    def __len__(self) -> int:
        return len(self._tenants)

    def _any_active(self) -> bool:
        return any(tenant.is_active for tenant in self._tenants.values())

    def _lowest(self) -> float:
        active = (tenant.counter for tenant in self._tenants.values() if tenant.is_active)
        return max(self._floor, min(active, default=self._floor))

    def _forget(self) -> None:
        """Drops idle tenants that would be lifted anyway, and beyond MAX_IDLE those that would be lifted most."""
        idle = sorted((tenant.counter, name) for name, tenant in self._tenants.items() if not tenant.is_active)
        for number, (counter, name) in enumerate(idle):
            if counter <= self._floor or len(idle) - number > self.MAX_IDLE:
                del self._tenants[name]


class LineClock:
    """Measures how long one place in the line lasts, by those admitted from it lately: the wait of each, divided by the
    place at which it joined.

    Only the present line counts. What was measured before it was last empty says nothing about who is in it now.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=REMEMBERED_ADMISSIONS)
        self.place_s: float | None = None  # None until somebody was admitted from this line

    def forget(self) -> None:
        """Begins a new line."""
        self._recent.clear()
        self.place_s = None

    def admitted(self, place: int, waited_s: float) -> None:
        """Takes note that a request which joined at `place`, the first being 1, has waited for so long."""
        self._recent.append(waited_s / place)
        self.place_s = statistics.median(self._recent)

    def check(self, num_ahead: int, left_s: float) -> None:
        """Raises DeadlineExceeded for a request that would wait behind so many others for longer than `left_s`."""
        place_s = self.place_s
        if place_s is not None and num_ahead * place_s > left_s:
            raise DeadlineExceeded(
                f"{num_ahead} requests are in line, each place of which has lasted {place_s:.2f} s, and the deadline "
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

    def put(self, sequence: Request) -> None:
        """Raises NotReady when closed, DuplicateRequest for an id that its tenant uses, Overloaded at the bound."""
        key = _key_of(sequence)
        with self._changed:
            if not self._is_open:
                raise NotReady("this worker is shutting down; send the request to another", retry_after_s=1.0)
            if key in self._live:
                raise DuplicateRequest(
                    f"request id {sequence.request.id!r} is in use; choose another", field="request_id"
                )
            if len(self._live) >= self._max_live:
                raise Overloaded(f"{len(self._live)} requests are running or waiting already", retry_after_s=1.0)
            self._live[key] = sequence
            self._arrived.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Notes the cancellation. Returns whether that tenant has such a request."""
        with self._changed:
            sequence = self._live.get((tenant, request_id))
            if sequence is None:
                return False
            self._cancelled.append(sequence)
            self._changed.notify_all()
            return True

    def take(self) -> tuple[list[Request], list[Request]]:
        """Takes what has arrived and what was cancelled since the last time."""
        with self._changed:
            taken = self._arrived, self._cancelled
            self._arrived, self._cancelled = [], []
            return taken

    def remove(self, sequence: Request) -> None:
        """Removes a request that has ended; its id may be used again."""
        with self._changed:
            del self._live[_key_of(sequence)]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def halt(self) -> None:
        """Asks the engine's thread to stop."""
        with self._changed:
            self.is_halted = True
            self._changed.notify_all()

    def wait_for_news(self, timeout_s: float | None) -> None:
        """Waits until something comes; returns at once when something has, or when the thread is to stop."""
        with self._changed:
            if not (self._arrived or self._cancelled or self.is_halted):
                self._changed.wait(timeout_s)

    def wait_until_empty(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def live(self) -> list[Request]:
        with self._changed:
            return list(self._live.values())

    def __len__(self) -> int:
        return len(self._live)


def _key_of(sequence: Request) -> tuple[str, str]:
    return sequence.request.tenant, sequence.request.id
