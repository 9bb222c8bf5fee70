"""What a cache of one pool's size has to read from one request to the next. Pure: the cache's own index and policy."""

from __future__ import annotations

from collections.abc import Sequence

from pager.cache.index import CacheIndex
from pager.cache.policy import make_policy
from pager.types import ExpertPool


def experts_read(pools: Sequence[ExpertPool], num_slots: int, policy: str = "lru") -> list[int]:
    """For each pool, one after the other and each let go of before the next, how many experts were not there yet.

    `num_slots` holds the largest pool. Starts empty.
    """
    index = CacheIndex(num_slots, make_policy(policy))
    read = []
    for pool in pools:
        keys = pool.keys()
        plan = index.plan(keys)
        assert plan is not None, f"a pool of {len(keys)} experts and {num_slots} slots"
        index.commit(plan)
        for load in plan.loads:
            index.installed(load.key)
        for key in keys:
            index.unpin(key)
        read.append(len(plan.loads))
    return read
