"""Replays of a recorded trace under other eviction policies and budgets, as a table and as metrics."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from pager.cache.index import POLICIES, EvictionPolicy, make_policy
from pager.cache.trace import Access, Trace
from pager.errors import ConfigError
from pager.memory import format_bytes, parse_bytes_or_share
from pager.observe.metrics import Instruments, Kind, Labels, Metric
from pager.reading import replace_file
from pager.types import ExpertKey

OPTIMUM = "optimum"
"""Belady's rule: evict the expert that is needed last. Without pins, no policy misses less."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The hits and misses of a policy, in experts. `num_slots` is the budget; every miss is a read that is waited
    for.
    """

    policy: str
    num_slots: int
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(trace: Trace, policy: str, num_slots: int) -> ReplayResult:
    """Replays a trace. `policy` is a name of `POLICIES`, or OPTIMUM; ConfigError for any other."""
    order = Optimum(trace.accesses) if policy == OPTIMUM else make_policy(policy)
    hits, misses = _Cache(num_slots, order).run(trace.accesses)
    return ReplayResult(policy, num_slots, hits, misses)


def replay_all(trace: Trace, num_slots: int) -> list[ReplayResult]:
    """Returns the results of every policy, the fewest misses first, the optimum at the end."""
    results = sorted((replay(trace, name, num_slots) for name in POLICIES), key=lambda result: result.misses)
    return [*results, replay(trace, OPTIMUM, num_slots)]


class _Cache:
    def __init__(self, num_slots: int, policy: EvictionPolicy) -> None:
        self._num_slots = num_slots
        self._policy = policy
        self._pins: dict[ExpertKey, int] = {}  # of resident experts
        self._passing: Counter[ExpertKey] = Counter()  # held without a slot, because there was no room

    def run(self, accesses: Sequence[Access]) -> tuple[int, int]:
        hits = misses = 0
        for access in accesses:
            if access.cause is None:
                for key in access.keys:
                    self._let_go(key)
                continue
            missing = [key for key in access.keys if key not in self._pins]
            for key in access.keys:
                if key in self._pins:  # held first: what one access hits, its misses do not evict
                    self._hold(key)
            kept = missing[: self._make_room(len(missing))]
            for key in kept:
                self._hold(key)
            for key in missing[len(kept) :]:
                self._policy.use(key)
                self._passing[key] += 1
            hits += len(access.keys) - len(missing)
            misses += len(missing)
        return hits, misses

    def _hold(self, key: ExpertKey) -> None:
        self._policy.use(key)
        pins = self._pins.get(key)
        if pins == 0:
            self._policy.remove(key)
        self._pins[key] = (pins or 0) + 1

    def _make_room(self, num_wanted: int) -> int:
        """Evicts for `num_wanted` slots and returns how many of them there are."""
        num_free = self._num_slots - len(self._pins)
        for victim in list(islice(self._policy.victims(), max(0, num_wanted - num_free))):
            self._policy.remove(victim)
            del self._pins[victim]
        return min(num_wanted, self._num_slots - len(self._pins))

    def _let_go(self, key: ExpertKey) -> None:
        if self._passing[key]:
            self._passing[key] -= 1
        elif self._pins.get(key):
            self._pins[key] -= 1
            if not self._pins[key]:
                self._policy.add(key)


class Optimum:
    """An eviction policy that knows all accesses beforehand."""

    def __init__(self, accesses: Sequence[Access]) -> None:
        self._uses: defaultdict[ExpertKey, deque[int]] = defaultdict(deque)
        for time, access in enumerate(accesses):
            if access.cause is not None:
                for key in access.keys:
                    self._uses[key].append(time)
        self._evictable: dict[ExpertKey, None] = {}

    def use(self, key: ExpertKey) -> None:
        self._uses[key].popleft()

    def add(self, key: ExpertKey) -> None:
        self._evictable[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._evictable[key]

    def victims(self) -> Iterator[ExpertKey]:
        return iter(sorted(self._evictable, key=lambda key: -self._next_use(key)))

    def __len__(self) -> int:
        return len(self._evictable)

    def _next_use(self, key: ExpertKey) -> float:
        return self._uses[key][0] if self._uses[key] else math.inf


@dataclass(frozen=True, slots=True)
class BudgetResults:
    """A trace under one budget, which is written as the user wrote it. The optimum is the last result."""

    budget: str
    num_slots: int
    results: list[ReplayResult]


def replay_budgets(trace: Trace, budgets: Sequence[str]) -> list[BudgetResults]:
    """Replays every policy under every budget, in bytes or as a share of all routed experts. Raises ConfigError."""
    expert_bytes, num_experts = trace.header.expert_bytes, trace.header.num_experts
    found = []
    for budget in budgets:
        num_slots = min(parse_bytes_or_share(budget, num_experts * expert_bytes) // expert_bytes, num_experts)
        if num_slots < 1:
            raise ConfigError(f"budget {budget!r} holds no expert of {format_bytes(expert_bytes)}")
        found.append(BudgetResults(budget, num_slots, replay_all(trace, num_slots)))
    return found


_BY_POLICY = Labels(("policy", "budget"), ())

REPLAY_FAMILIES = (
    Metric(
        "replay_capacity_bytes", Kind.GAUGE, "Size of a budget in bytes.", "Where on the curve is a worker?",
        Labels(("budget",), ()),
    ),
    Metric(
        "replay_hits_ratio", Kind.GAUGE, "Hit rate of the trace's accesses under the budget.",
        "Which budget is enough?", _BY_POLICY,
    ),
    Metric(
        "replay_missed_bytes", Kind.GAUGE, "Bytes that the trace's requests would have waited for.",
        "What would another budget or eviction policy read?", _BY_POLICY,
    ),
    Metric(
        "replay_more_missed_bytes", Kind.GAUGE, "Bytes waited for with one gibibyte more than the budget.",
        "What does one more GiB save?", _BY_POLICY,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The metrics of one budget under one policy. `more_missed_bytes` is with a gibibyte more."""

    policy: str
    budget: str
    capacity_bytes: int
    hit_rate: float
    missed_bytes: int
    more_missed_bytes: int


def curve(trace: Trace, tables: Sequence[BudgetResults]) -> Iterator[CurvePoint]:
    """Replays every budget once more, with a gibibyte added and at most room for all experts."""
    expert_bytes, num_experts = trace.header.expert_bytes, trace.header.num_experts
    for table in tables:
        more = min(num_experts, table.num_slots + 2**30 // expert_bytes)
        fewer_misses = {result.policy: result.misses for result in replay_all(trace, more)}
        for result in table.results:
            yield CurvePoint(
                result.policy,
                table.budget,
                table.num_slots * expert_bytes,
                result.hit_rate,
                result.misses * expert_bytes,
                fewer_misses[result.policy] * expert_bytes,
            )


def write_curve(points: Iterable[CurvePoint], path: Path) -> None:
    """Replaces the file in one step, so that a collector never reads half of it. Raises ConfigError."""
    registry = CollectorRegistry()
    made = Instruments(REPLAY_FAMILIES, registry)
    for point in points:
        made.gauge("replay_capacity_bytes").labels(point.budget).set(point.capacity_bytes)
        for name, value in (
            ("replay_hits_ratio", point.hit_rate),
            ("replay_missed_bytes", point.missed_bytes),
            ("replay_more_missed_bytes", point.more_missed_bytes),
        ):
            made.gauge(name).labels(point.policy, point.budget).set(value)
    try:
        replace_file(path, generate_latest(registry), 0o644)  # its collector runs as another user
    except OSError as error:
        raise ConfigError(f"the curve cannot be written to {path}: {error.strerror}") from None
