"""The order of admission: which waiting request adds least to what is loaded, how often each was passed, what tenants
were given.

Pure: no tensors, clocks or threads. The same facts give the same order, so that a recorded day can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

Experts = int
"""A set of experts as bits of one integer, so that sets of thousands are compared in a microsecond."""


def as_bits(experts_per_layer: Iterable[Iterable[int]], width: int) -> Experts:
    """Returns the set of these experts; `width` is more than the number of any expert."""
    bits = 0
    for layer, experts in enumerate(experts_per_layer):
        for expert in experts:
            bits |= 1 << (layer * width + expert)
    return bits


@dataclass(frozen=True, slots=True)
class Want:
    """The needs of one waiting request: `experts` where they are known before its prefill, and `num_slots` in any case.

    `num_tokens` are those of its prompt and its answer.
    """

    num_slots: int
    num_tokens: int
    experts: Experts | None = None


def by_overlap(wants: Sequence[Want], loaded: Experts, held: Experts) -> Iterator[int]:
    """Yields the indices of `wants` in the order in which to admit them, each once; pure.

    Requests of one pool come together. The next pool is the one that pages the fewest experts for each of its waiting
    tokens, given those that are `loaded` and those that the pools before it load; between equal pools, the one that
    takes the fewest slots beside those `held` by running requests, then the one that has waited longest. Requests whose
    experts are not known keep their order of arrival where they reserve the same: nothing else distinguishes them.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, want in enumerate(wants):
        groups.setdefault((index,) if want.experts is None else want.experts, []).append(index)
    num_tokens = {name: sum(wants[index].num_tokens for index in members) for name, members in groups.items()}

    most_tokens = max((want.num_tokens for want in wants if want.experts is None), default=1)

    def cost(name: Hashable) -> tuple[float, float]:
        want = wants[groups[name][0]]
        if want.experts is None:
            return want.num_slots / most_tokens, want.num_slots / most_tokens
        missing, taken = (want.experts & ~loaded).bit_count(), (want.experts & ~held).bit_count()
        return missing / num_tokens[name], taken / num_tokens[name]

    while groups:
        name = min(groups, key=cost)  # the first of several, and groups are in order of arrival
        brought = wants[groups[name][0]].experts or 0
        yield from groups.pop(name)
        loaded, held = loaded | brought, held | brought


def _alike(_: object) -> int:
    return 0


class WaitingLine(Generic[T]):
    """Requests in order of arrival, with bounded overtaking.

    Items that arrive while others wait belong to the next round; once `max_overtakes` of it have been admitted early,
    to the one after it. Within a round items may be admitted in any order: a round is finite. A later item, or
    one with a greater claim, may also pass earlier ones, because those do not fit yet or because it is tried first; but
    no item is passed in this way more than `max_overtakes` times: once the first in line has been, only items of its
    round and claim are admitted. Items of one group (requests of one pool) that are admitted in the same sweep pass the
    others together, as one: they share their slots. So none starves, provided that admitted items end and each item
    fits into an empty engine.
    """

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._times_passed: dict[T, int] = {}  # in order of arrival
        self._round_of: dict[T, int] = {}  # never decreases along the line; the first has the present one
        self._open_round = 0  # which new items join
        self._num_early = 0  # admissions from that round while an earlier one lasts
        self._sweep: list[T] = []  # the line as it was last read, in the order of its claims
        self._claim: Callable[[T], Any] = _alike  # that it was read with
        self._lane: Callable[[T], Hashable] = _alike
        self._group: Hashable = None  # of the item admitted last in this sweep
        self._passed_by_group: set[T] = set()

    def __len__(self) -> int:
        return len(self._times_passed)

    def __iter__(self) -> Iterator[T]:
        return iter(self._times_passed)

    def __contains__(self, item: object) -> bool:
        return item in self._times_passed

    def add(self, item: T) -> None:
        present = next(iter(self._round_of.values()), -1)
        if present == self._open_round or self._num_early >= self._max_overtakes:
            self._open_round, self._num_early = self._open_round + 1, 0
        self._round_of[item] = self._open_round
        self._times_passed[item] = 0

    def remove(self, item: T) -> None:
        """Removes an item that leaves without having been admitted; that counts as passing no item."""
        del self._times_passed[item], self._round_of[item]

    def candidates(
        self,
        *,
        claim: Callable[[T], Any] = _alike,
        ordered: Callable[[Sequence[T]], Iterable[T]] = iter,
        group: Callable[[T], Hashable] = lambda _: None,
        lane: Callable[[T], Hashable] = _alike,
    ) -> Iterator[T]:
        """Yields the items that may be admitted now, in the order to try, taking account of admissions while iterating.

        Items with a lesser `claim` come first; among equal ones `ordered` decides. Behind an item that was admitted
        come all others of its `group` (None is no group). An item that passes any other passes the first in line too,
        as long as claims do not change, so that the first is always the one passed most. Items of different lanes do
        not wait for each other's room, so they do not count as passing one another.
        """
        claims = {item: claim(item) for item in self._times_passed}
        self._claim, self._lane = claims.get, lane
        self._sweep = line = sorted(claims, key=claims.__getitem__)
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

        for _, equals in groupby(line, key=claims.__getitem__):
            for item in ordered([item for item in equals if item in self and self._may_go(item)]):
                if item in self and item not in tried and self._may_go(item):
                    yield from with_group(item)

    def admit(self, item: T, group: Hashable = None) -> None:
        """Takes `item` out of the line; it passes every item before it that its group has not passed yet."""
        if group is None or group != self._group:
            self._group, self._passed_by_group = group, set()
            is_early = next(iter(self._round_of.values())) < self._round_of[item] == self._open_round
            self._num_early += is_early
        for earlier in self._sweep or list(self._times_passed):
            if earlier == item:
                break
            if self._lane(earlier) != self._lane(item):
                continue
            if earlier in self and earlier not in self._passed_by_group and not self._goes_with(item, earlier):
                self._times_passed[earlier] += 1
                self._passed_by_group.add(earlier)
        self.remove(item)

    def _goes_with(self, item: T, earlier: T) -> bool:
        """Tells whether `item` may go before `earlier` without passing it."""
        return self._round_of[item] <= self._round_of[earlier] and self._claim(item) == self._claim(earlier)

    def _may_go(self, item: T) -> bool:
        """Tells whether `item` need not wait for the first in line, as it must for one that was passed often enough."""
        lane = self._lane(item)
        first = next((other for other in self._sweep if other in self and self._lane(other) == lane), item)
        return self._times_passed[first] < self._max_overtakes or self._goes_with(item, first)


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices that tenants are charged, in prompt tokens.

    An output token takes a row of a step of its own. An expert that is paged in costs the machine's time to read it;
    all slots for a second cost what other requests could have decoded with them.
    """

    output_token: float = 2.0
    paged_expert: float = 0.125
    all_slots_second: float = 64.0


DEFAULT_PRICES = Prices()


@dataclass(frozen=True, slots=True)
class Spent:
    """The usage of a request by some moment; counts only grow. `slot_s` is the share of all slots, in seconds."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    paged_experts: float = 0.0
    slot_s: float = 0.0

    def cost(self, before: Spent, prices: Prices = DEFAULT_PRICES) -> float:
        """Returns the price of what was used since `before`, in prompt tokens."""
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
    was_admitted: bool = False  # any request of it since it became active

    @property
    def is_active(self) -> bool:
        return self.num_waiting + self.num_running > 0


class TenantCounters:
    """The counters of what every tenant was given, by weight: a virtual counter that decides whose request is next.
    Knows no clock.

    A tenant that returns is lifted to the least counter of the active ones: it cannot save up time in which it had no
    requests. After Sheng et al., Fairness in Serving Large Language Models (2024), which counts tokens; here paging and
    slots count too.
    """

    MAX_IDLE = 4096
    SLACK = 512.0
    """Counters up to this much above the least one count as equal, so that overlap has requests to choose from."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._floor = 0.0  # the least counter that an active tenant may have

    def counter(self, tenant: str) -> float:
        return self._tenants[tenant].counter

    def arrived(self, tenant: str, weight: float = 1.0) -> None:
        """Counts one more waiting request of the tenant, whose weight is that of its latest request."""
        found = self._tenants.setdefault(tenant, _Tenant(weight, self._floor))
        if not found.is_active:
            found.counter, found.was_admitted = max(found.counter, self._lowest()), False
        found.weight = weight
        found.num_waiting += 1

    def admitted(self, tenant: str) -> None:
        found = self._tenants[tenant]
        found.num_waiting -= 1
        found.num_running += 1
        found.was_admitted = True

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

    def claims(self) -> Callable[[str], tuple[float, int]]:
        """Returns the function that ranks tenants now, the least first.

        Tenants within SLACK of the least waiting counter rank equal, except that those that were idle and have had
        nothing admitted since come first, then those without running requests.
        """
        counters = [tenant.counter for tenant in self._tenants.values() if tenant.num_waiting]
        enough = min(counters, default=0.0) + self.SLACK

        def claim(name: str) -> tuple[float, int]:
            tenant = self._tenants[name]
            return 0.0 if tenant.counter <= enough else tenant.counter, tenant.was_admitted + (tenant.num_running > 0)

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
