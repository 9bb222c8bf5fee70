"""Pools have homes: requests of one pool meet at a worker, and few pools move when a worker comes or goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pager.cluster.placement import ALWAYS_WELCOME, MOST_LOAD, homes, place
from pager.types import ExpertPool

POOL = ExpertPool(((0, 1), (2, 3)))


@dataclass(frozen=True)
class AWorker:
    id: str
    state: str = "ready"
    waiting: int = 0
    running: int = 0
    num_slots: int = 16
    page_in_bytes_per_s: float | None = None
    peak_page_in_bytes_per_s: float | None = None
    place_s: float | None = None
    missing: int = 1000
    asked: list[str] = field(default_factory=list)

    def missing_bytes(self, pool: ExpertPool) -> int:
        self.asked.append(self.id)
        return self.missing


def home(key: str, workers: list[AWorker], **load: int) -> str:
    return homes(key, workers, {worker.id: load.get(worker.id, 0) for worker in workers})[0].id


KEYS = [f"c{number:02d}" for number in range(600)]
fleets = st.lists(st.sampled_from([f"w{number}" for number in range(40)]), min_size=2, max_size=16, unique=True)


@settings(max_examples=50, deadline=None)
@given(ids=fleets)
def test_a_worker_that_comes_or_goes_moves_its_own_part_of_the_pools_and_no_other(ids: list[str]) -> None:
    before = {key: home(key, [AWorker(id_) for id_ in ids]) for key in KEYS}
    after = {key: home(key, [AWorker(id_) for id_ in ids[:-1]]) for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert all(before[key] == ids[-1] for key in moved), "a pool moved although its home is still there"
    assert len(moved) <= 1.6 * len(KEYS) / len(ids) + 10


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.integers(0, 60), min_size=2, max_size=8),
    slots=st.lists(st.sampled_from([8, 16, 32]), min_size=8, max_size=8),
)
def test_only_load_beyond_a_workers_part_sends_a_pool_further_down_its_order(
    loads: list[int], slots: list[int]
) -> None:
    workers = [AWorker(f"w{number}", num_slots=slots[number]) for number in range(len(loads))]
    load = {worker.id: loads[number] for number, worker in enumerate(workers)}
    for key in KEYS[:40]:
        order = [worker.id for worker in homes(key, workers, dict.fromkeys(load, 0))]
        allowed = [worker.id for worker in homes(key, workers, load)]
        assert allowed, "somebody always has less than its part"
        assert allowed == [id_ for id_ in order if id_ in allowed], "the order is the key's alone"
        most = MOST_LOAD * (sum(loads) + 1) / sum(worker.num_slots for worker in workers)
        for worker in workers:
            is_full = load[worker.id] >= max(ALWAYS_WELCOME, most * worker.num_slots)
            assert (worker.id in allowed) is not is_full


def test_a_worker_with_twice_the_slots_is_home_to_twice_the_pools() -> None:
    workers = [AWorker("small", num_slots=16), AWorker("large", num_slots=32)]
    found = Counter(home(key, workers) for key in KEYS)
    assert found["large"] / found["small"] == pytest.approx(2.0, rel=0.3)


def test_requests_of_one_pool_meet_and_those_of_many_spread() -> None:
    workers = [AWorker(f"w{number}") for number in range(4)]
    in_flight: Counter[str] = Counter()
    first = place(POOL, workers, in_flight=in_flight, home_key="law").worker_id
    for _ in range(ALWAYS_WELCOME):
        placed = place(POOL, workers, in_flight=in_flight, home_key="law").worker_id
        assert placed == first
        in_flight[placed] += 1
    spread: Counter[str] = Counter()
    for key in KEYS[:200]:
        spread[place(POOL, workers, in_flight=spread, home_key=key).worker_id] += 1
    assert max(spread.values()) <= MOST_LOAD * 200 / 4 + 1


def test_a_hot_pool_gets_the_next_worker_of_its_order_and_no_more_than_its_load_needs() -> None:
    workers = [AWorker(f"w{number}") for number in range(8)]
    order = [worker.id for worker in homes("hot", workers, {worker.id: 0 for worker in workers})]
    in_flight: Counter[str] = Counter({worker.id: 10 for worker in workers})
    for _ in range(12):
        in_flight[place(POOL, workers, in_flight=in_flight, home_key="hot").worker_id] += 1
    grown = [id_ for id_ in order if in_flight[id_] > 10]
    assert grown == order[: len(grown)]
    assert 2 <= len(grown) < 8


def test_the_next_in_the_order_goes_on_with_what_it_holds_until_the_home_has_it() -> None:
    workers = [AWorker("w0"), AWorker("w1"), AWorker("w2")]
    first, second, third = homes("law", workers, {"w0": 0, "w1": 0, "w2": 0})
    fleet = [
        replace(each, missing=missing, page_in_bytes_per_s=100.0)
        for each, missing in ((first, 1000), (second, 0), (third, 0))
    ]
    assert place(POOL, fleet, in_flight={}, home_key="law").worker_id == second.id
    fleet[0] = replace(fleet[0], missing=0)
    assert place(POOL, fleet, in_flight={}, home_key="law").worker_id == first.id
    fleet[0] = replace(fleet[0], missing=1000)
    fleet[1] = replace(fleet[1], missing=999)  # a part is no reason to leave the home
    assert place(POOL, fleet, in_flight={}, home_key="law").worker_id == first.id


def test_what_only_the_home_holds_is_not_asked_of_all_workers() -> None:
    workers = [AWorker(f"w{number}") for number in range(64)]
    place(POOL, workers, in_flight={}, home_key="law")
    assert sum(len(worker.asked) for worker in workers) == 2


def test_a_pool_of_the_prompts_own_has_no_home() -> None:
    workers = [AWorker("w0"), AWorker("w1", missing=0), AWorker("w2")]
    assert place(POOL, workers, in_flight={}).worker_id == "w1"


def test_the_rest_of_a_fleet_takes_over_what_a_lost_worker_was_home_to() -> None:
    workers = [AWorker(f"w{number}") for number in range(5)]
    lost = home("law", workers)
    order = [worker.id for worker in homes("law", workers, {worker.id: 0 for worker in workers})]
    gone = [replace(worker, state="dead") if worker.id == lost else worker for worker in workers]
    assert place(POOL, gone, in_flight={}, home_key="law").worker_id == order[1]
    assert place(POOL, workers, in_flight={}, exclude={lost}, home_key="law").worker_id == order[1]
