"""Which experts are where, made directly: a test that needs them there does not have to arrange requests for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pager.cache.pager import ExpertPager
from pager.types import ExpertKey, ExpertPool
from tests.support.values import some


def load(pager: ExpertPager, experts: Collection[ExpertKey]) -> None:
    """Pages these experts in, through the host tier where there is one. Raises as a lease does for one that is damaged.

    They stay until others need their slots: as many as there are slots are all loaded afterwards, and nothing else is.
    """
    with some(pager.reserve_pool(list(experts))) as lease:
        for layer in sorted({key.layer for key in experts}):
            lease.wait(layer)


def load_pools(pager: ExpertPager, *pools: ExpertPool) -> None:
    """Pages in one pool after the other: afterwards all of them are loaded, if there are slots for all."""
    for pool in pools:
        load(pager, list(pool.keys()))


def arrange(pager: ExpertPager, *, device: Collection[ExpertKey], host: Collection[ExpertKey]) -> None:
    """Has `device` in slots, and `host` in the records of the host tier, as far as it has records for both.

    With as many experts in `device` as there are slots, none of the others in `host` is in a slot as well.
    """
    for part in _parts(list(host), pager.num_slots):
        load(pager, part)
    for part in _parts(list(device), pager.num_slots):
        load(pager, part)


def _parts(experts: list[ExpertKey], size: int) -> Iterator[list[ExpertKey]]:
    for start in range(0, len(experts), size):
        yield experts[start : start + size]
