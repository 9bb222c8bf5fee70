"""What the ledger keeps of who holds experts and who waits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pager.cache.usage import Cause, UsageMeter
from pager.errors import ExpertUnavailable
from pager.types import ExpertKey

Meanwhile = Callable[[], float | None]
"""Called by whoever waits for a read, with no lock held: work for the time. When to be called again at the latest, in
seconds; None where there is nothing to do. What it raises ends the wait."""


@dataclass(slots=True, eq=False)
class Holding:
    """What one lease or one exact forward holds. Changed by the ledger alone, under its lock."""

    cause: Cause
    order: int
    meter: UsageMeter
    reserved: int = 0  # promised slots that no expert was bound to yet
    keys: dict[ExpertKey, None] = field(default_factory=dict)  # pinned, in the order of binding
    pending: set[ExpertKey] = field(default_factory=set)  # of these, what is not read yet
    failed: ExpertUnavailable | None = None
    released: bool = False

    @property
    def ready(self) -> bool:
        return not self.pending and self.failed is None


@dataclass(slots=True, eq=False)
class Load:
    """A read that is queued or running. `payer` is charged for it."""

    slot: int
    payer: UsageMeter
    waiters: list[Holding]
    reading: bool = False
