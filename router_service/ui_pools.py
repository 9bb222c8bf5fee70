"""Which pools the answers of this router use, or used a while ago. Knows no grpc, no clock and no prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pager.types import ExpertPool, Full, PoolPolicy, Usage
from router_service.hints import size_name

KEPT = 256  # beyond those of requests in flight
LONGEST_SIZE = 40  # characters; a size can name every layer


@dataclass(frozen=True, slots=True)
class PoolLabel:
    """What tells one row from another. `name` is the tenant's own; `pool` None while, or because, none is known."""

    tenant: str
    name: str
    size: str  # "count:8" and the like; "named" for a named one
    pool: ExpertPool | None
    is_expected: bool  # predicted; the prefill has not chosen yet


@dataclass(slots=True)
class PoolUse:
    """One row. Mutable, owned by the log."""

    live: int = 0
    answers: int = 0
    experts_hit: int = 0
    experts_missed: int = 0
    bytes_paged: int = 0
    mode: str = ""  # of the last answer


@dataclass(slots=True)
class PoolRow:
    """The use of one pool by all tenants, none of which it names."""

    size: str
    pool: ExpertPool | None
    is_expected: bool
    use: PoolUse
    num_tenants: int


@dataclass(slots=True)
class PoolLog:
    """Owns the rows, the latest used last. Without live requests, the longest unused is dropped first."""

    rows: dict[PoolLabel, PoolUse] = field(default_factory=dict)

    @contextmanager
    def following(self, tenant: str, name: str, policy: PoolPolicy, pool: ExpertPool | None) -> Iterator[LivePool]:
        """Counts a live request for as long as the block lasts. `pool` is fixed or predicted."""
        is_expected = policy.fixed is None and pool is not None and not isinstance(policy.size, Full)
        live = LivePool(
            self, PoolLabel(tenant, name, "named" if name else size_label(policy), policy.fixed or pool, is_expected)
        )
        self._use(live.label).live += 1
        try:
            yield live
        finally:
            self._left(live.label)

    def ended(self, label: PoolLabel, usage: Usage) -> None:
        actual = PoolLabel(label.tenant, label.name, label.size, usage.pool, is_expected=False)
        use = self._use(actual)
        use.answers += 1
        use.experts_hit += usage.experts_hit
        use.experts_missed += usage.experts_missed
        use.bytes_paged += usage.bytes_from_disk + usage.bytes_from_host
        use.mode = usage.mode

    def of_all_tenants(self) -> list[PoolRow]:
        """What tenants and names keep apart, put together; the latest used first."""
        found: dict[tuple[str, ExpertPool | None, bool], list[tuple[PoolLabel, PoolUse]]] = {}
        for label, use in reversed(self.rows.items()):
            found.setdefault((label.size, label.pool, label.is_expected), []).append((label, use))
        return [
            PoolRow(*shared, _sum([use for _, use in each]), len({label.tenant for label, _ in each}))
            for shared, each in found.items()
        ]

    def _use(self, label: PoolLabel) -> PoolUse:
        self.rows[label] = self.rows.pop(label) if label in self.rows else PoolUse()
        return self.rows[label]

    def _left(self, label: PoolLabel) -> None:
        use = self.rows[label]
        use.live -= 1
        if not use.live and not use.answers:
            del self.rows[label]
        idle = [label for label, use in self.rows.items() if not use.live]
        for oldest in idle[: max(0, len(idle) - KEPT)]:
            del self.rows[oldest]


@dataclass(frozen=True, slots=True)
class LivePool:
    """One request in flight."""

    log: PoolLog
    label: PoolLabel

    def answered(self, usage: Usage) -> None:
        self.log.ended(self.label, usage)


def _sum(uses: list[PoolUse]) -> PoolUse:
    """All together; the first is the latest."""
    return PoolUse(
        live=sum(use.live for use in uses),
        answers=sum(use.answers for use in uses),
        experts_hit=sum(use.experts_hit for use in uses),
        experts_missed=sum(use.experts_missed for use in uses),
        bytes_paged=sum(use.bytes_paged for use in uses),
        mode=next((use.mode for use in uses if use.mode), ""),
    )


def size_label(policy: PoolPolicy) -> str:
    """The size that was asked for, in few characters."""
    text = "fixed" if policy.fixed is not None else size_name(policy.size)
    return text if len(text) <= LONGEST_SIZE else f"{text[: LONGEST_SIZE - 1]}…"
