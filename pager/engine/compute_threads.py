"""How many threads torch computes a model's steps with on a CPU: what is measured when the model is loaded.

More threads make a small model slower: OpenMP starts and ends a team for each operation, and a team waits for its last
thread, which another process may keep from its core. Nothing is paged for it: experts are taken from slots that nobody
has filled yet. Legend: L layers, E experts of a layer.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pager.cache.device import DeviceSlots
from pager.engine.kv import KvCache, blocks_for
from pager.engine.paged_model import PagedModel
from pager.engine.runner import DecodeBatch, ModelRunner, RowStart
from pager.pools.routing import RequestRouting
from pager.types import Count, ExpertPool, PoolPolicy, PoolSource

log = logging.getLogger(__name__)

BATCHES = (1, 8)
CONTEXT_TOKENS = 64
TIME_S = 1.0  # no round is begun after that; there is one of each
MAX_ROUNDS = 15
WORTH = 1.1  # times as fast has a step to be that takes more threads, which others could use


def use_fastest_num_threads(paged: PagedModel, most: int) -> int:
    """Sets torch's number of threads, for this thread and those that compute later, and returns it.

    To be called before anything is paged, by the thread that will step.
    """
    if paged.device.type != "cpu" or most == 1:
        torch.set_num_threads(most)
        return most
    seconds = step_seconds(paged, [*(1 << power for power in range((most - 1).bit_length())), most])
    chosen = choose(seconds)
    torch.set_num_threads(chosen)
    for count, found in seconds.items():
        told = ", ".join(f"{1e3 * each:.2f} ms with {rows}" for rows, each in zip(BATCHES, found, strict=True))
        log.info("threads %d: a step took %s rows%s", count, told, "; chosen" if count == chosen else "")
    return chosen


def choose(seconds: dict[int, list[float]]) -> int:
    """The number of threads, from the seconds of a step of each batch with each number, in rising order."""
    chosen, *others = seconds
    for count in others:
        gains = [before / now for before, now in zip(seconds[chosen], seconds[count], strict=True)]
        if statistics.geometric_mean(gains) >= WORTH:
            chosen = count
    return chosen


def step_seconds(paged: PagedModel, counts: list[int]) -> dict[int, list[float]]:
    """The median time of a decode step of each of BATCHES, by the number of threads; they take turns."""
    cache = KvCache(paged.config, blocks_for(CONTEXT_TOKENS), paged.dtype, paged.device)
    runner = ModelRunner(paged.model, cache, paged.device)
    pool = ExpertPool(tuple(tuple(range(routed)) for routed in paged.facts.routed_per_layer))
    policy = PoolPolicy(Count(max(paged.facts.routed_per_layer)), PoolSource.FIXED, pool)
    row = RowStart(range(blocks_for(CONTEXT_TOKENS)), 0, CONTEXT_TOKENS - 1)
    taken: dict[int, list[list[float]]] = {count: [[] for _ in BATCHES] for count in counts}
    end_s = time.perf_counter() + TIME_S
    with _all_in_slots(paged.pager.slots):
        for number in range(1 + MAX_ROUNDS):
            if number > 1 and time.perf_counter() > end_s:
                break
            for count in counts:
                torch.set_num_threads(count)
                for times, num_rows in zip(taken[count], BATCHES, strict=True):
                    started_s = time.perf_counter()
                    lease = paged.pager.reserve(0)  # of nothing: all is there
                    requests = [RequestRouting(paged.facts, policy, lease=lease) for _ in range(num_rows)]
                    with paged.step(requests):
                        runner.decode(DecodeBatch([row] * num_rows, paged.device))
                    if number:  # the first one makes buffers, kernels and teams
                        times.append(time.perf_counter() - started_s)
    return {count: [statistics.median(times) for times in batches] for count, batches in taken.items()}


@contextmanager
def _all_in_slots(slots: DeviceSlots) -> Iterator[None]:
    """Has the map find every expert in some slot, whatever its bytes are."""
    slot_of_LE = slots.slot_of_LE
    held_LE = slot_of_LE.clone()
    is_absent_LE = held_LE < 0
    numbers = torch.arange(int(is_absent_LE.sum()), dtype=held_LE.dtype)
    slot_of_LE[is_absent_LE] = numbers % max(1, slots.num_slots)
    try:
        yield
    finally:
        slot_of_LE.copy_(held_LE)
