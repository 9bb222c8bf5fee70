from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator import replayed
from pager.client import AsyncClient
from pager.cluster.placement import WorkerView, check_deadline, place
from pager.errors import ConfigError, DeadlineExceeded, NotReady
from pager.lab.simulate import Arrival
from pager.lab.traffic import Measuring, Pools
from pager.types import ExpertPool
from tests.router_service.conftest import FACTS

POOL = ExpertPool(((), (0, 1), (2, 3)))


@pytest.fixture
def worker(make_worker: Callable[..., WorkerView]) -> WorkerView:
    return make_worker("w0")


def test_the_worker_that_holds_the_pool_is_chosen(worker: WorkerView) -> None:
    warm = replace(worker, id="w1", resident=(0, 0b11, 0b1100), expert_bytes=10**9)
    placement = place(POOL, [replace(worker, expert_bytes=10**9), warm], in_flight={})
    assert (placement.worker_id, placement.missing_bytes) == ("w1", 0)


def test_a_long_queue_outweighs_a_few_missing_bytes(worker: WorkerView) -> None:
    warm = replace(worker, id="w1", resident=(0, 0b11, 0b1100), waiting=20)
    placement = place(POOL, [worker, warm], in_flight={})
    assert (placement.worker_id, placement.missing_bytes) == ("w0", 4000)


def test_what_was_just_sent_counts_before_the_worker_reports_it(worker: WorkerView) -> None:
    workers = [worker, replace(worker, id="w1")]
    in_flight = {"w0": 0, "w1": 0}
    for _ in range(16):
        in_flight[place(None, workers, in_flight=in_flight).worker_id] += 1
    assert in_flight == {"w0": 8, "w1": 8}


@pytest.mark.parametrize("state", ["starting", "draining", "hung", "dead"])
def test_only_a_ready_worker_is_chosen(worker: WorkerView, state: str) -> None:
    assert (
        place(None, [replace(worker, state=state), replace(worker, id="w1", waiting=9)], in_flight={}).worker_id == "w1"
    )
    with pytest.raises(NotReady):
        place(None, [replace(worker, state=state)], in_flight={})


def test_an_excluded_worker_is_not_chosen(worker: WorkerView) -> None:
    with pytest.raises(NotReady):
        place(None, [worker], in_flight={}, exclude={"w0"})


def test_paging_counts_at_its_fastest_and_as_if_it_had_gone_on_since_the_report(worker: WorkerView) -> None:
    assert place(POOL, [worker], in_flight={}).least_paging_s == 0
    assert place(POOL, [replace(worker, page_in_bytes_per_s=1.0)], in_flight={}).least_paging_s == 0
    measured = place(POOL, [replace(worker, waiting=3, peak_page_in_bytes_per_s=500.0, place_s=9.0)], in_flight={})
    assert measured.least_paging_s == pytest.approx(4000 / 500 - 1.5)
    check_deadline(measured.least_paging_s, None)
    check_deadline(measured.least_paging_s, 7.0)
    with pytest.raises(DeadlineExceeded, match=r"6\.50 s"):
        check_deadline(measured.least_paging_s, 6.0)


def test_a_line_that_moves_quickly_is_no_reason_to_go_elsewhere(worker: WorkerView) -> None:
    quick = replace(worker, id="w1", resident=(0, 0b11, 0b1100), waiting=20, place_s=1e-6)
    assert place(POOL, [replace(worker, expert_bytes=10**9), quick], in_flight={}).worker_id == "w1"
    slow = replace(quick, place_s=5.0)
    assert place(POOL, [replace(worker, expert_bytes=10**9), slow], in_flight={}).worker_id == "w0"


masks = st.integers(0, 255)
worker_facts = st.fixed_dictionaries(
    {
        "state": st.sampled_from(["ready", "ready", "ready", "starting", "draining", "hung", "dead"]),
        "waiting": st.integers(0, 50),
        "running": st.integers(0, 50),
        "resident": st.tuples(st.just(0), masks, masks),
        "page_in_bytes_per_s": st.none() | st.floats(1e3, 1e11),
        "expert_bytes": st.integers(1, 10**9),
    }
)


@given(facts=st.lists(worker_facts, min_size=1, max_size=6), seed=st.randoms(use_true_random=False))
def test_the_choice_is_ready_and_does_not_depend_on_the_order(
    make_worker: Callable[..., WorkerView], facts: list[dict[str, Any]], seed: random.Random
) -> None:
    workers = [make_worker(f"w{index}", **each) for index, each in enumerate(facts)]
    ready = {worker.id: worker for worker in workers if worker.state == "ready"}
    if not ready:
        with pytest.raises(NotReady):
            place(POOL, workers, in_flight={})
        return
    placement = place(POOL, workers, in_flight={})
    assert placement.missing_bytes == ready[placement.worker_id].missing_bytes(POOL)
    shuffled = list(workers)
    seed.shuffle(shuffled)
    assert place(POOL, shuffled, in_flight={}) == placement


@given(facts=worker_facts, more_waiting=st.integers(0, 9), more_running=st.integers(0, 9), dropped=masks)
def test_a_worker_that_is_worse_in_every_way_is_never_preferred(
    make_worker: Callable[..., WorkerView], facts: dict[str, Any], more_waiting: int, more_running: int, dropped: int
) -> None:
    better = make_worker("z", **facts | {"state": "ready"})
    dense, first, second = better.resident
    worse = replace(
        better,
        id="a",
        waiting=better.waiting + more_waiting,
        running=better.running + more_running,
        resident=(dense, first & ~dropped, second & ~dropped),
    )
    chosen = place(POOL, [worse, better], in_flight={})
    if chosen.worker_id == "a":  # equal in everything that counts: the lower id
        assert worse.missing_bytes(POOL) == better.missing_bytes(POOL)
        assert (worse.waiting, worse.running) == (better.waiting, better.running)


class ShortMeasuring(Measuring):
    SHAPES = ((1, 1), (2, 1), (2, 2))
    ROUNDS = MIXED = 1
    REPEATS = 2
    TOKENS = 6
    SHORT, LONG = 4, 20
    ARRIVALS = 8


async def test_what_work_costs_is_measured_at_a_running_service(
    serve: Callable[..., Any], make_cluster: Callable[..., Any], make_worker: Callable[..., WorkerView]
) -> None:
    views = {name: make_worker(name, num_slots=number) for number, name in ((16, "w0"), (14, "w1"))}
    cluster = make_cluster(views=views)
    async with serve(cluster) as service, AsyncClient(f"127.0.0.1:{service.server.port}") as client:
        costs = await ShortMeasuring(client, Pools(FACTS, (0, 3, 3), {})).run()
        assert (costs.num_slots, costs.expert_bytes) == (14, 1000)
        assert costs.step_s > 0
        assert costs.page_bytes_per_s > 0
        used: dict[str, Counter[str]] = {}
        num_mixed = 24 * len(views)
        one_by_one = [request for _, request in cluster.received[-2 * ShortMeasuring.ARRIVALS :]]
        del cluster.received[-2 * ShortMeasuring.ARRIVALS :]
        assert all(request.pool.fixed is not None for request in one_by_one)
        for worker, request in cluster.received[:-num_mixed]:
            assert request.pool.fixed is not None
            used.setdefault(worker, Counter())[request.pool.fixed.digest] += 1
        assert set(used) == {"w0", "w1"}, "every worker has the same to do"
        busiest = [counts.most_common(1)[0] for counts in used.values()]
        assert abs(busiest[0][1] - busiest[1][1]) == 2, "but for a wave of two rows that one has to itself"
        assert busiest[0][0] != busiest[1][0], "each in a pool that is at home there"
        mixed = Counter(request.pool.fixed for _, request in cluster.received[-num_mixed:])
        assert len(mixed) == 2 * Measuring.POOLS, "all at once, of all pools that are at home somewhere"
        prompts = [request.prompt_token_ids for _, request in cluster.received]
        assert len(set(prompts)) > len(prompts) // 2, "what is cached of a prompt would cost nothing"
    cluster.change("w0", state="starting")
    async with serve(cluster) as service, AsyncClient(f"127.0.0.1:{service.server.port}") as client:
        with pytest.raises(ConfigError, match="1 of 2 workers are ready"):
            await ShortMeasuring(client, Pools(FACTS, (0, 3, 3), {})).run()
    for name in views:
        cluster.change(name, state="draining")
    async with serve(cluster) as service, AsyncClient(f"127.0.0.1:{service.server.port}") as client:
        with pytest.raises(ConfigError, match="no worker is ready"):
            await ShortMeasuring(client, Pools(FACTS, (0, 3, 3), {})).run()


async def test_what_a_forecast_is_compared_with_is_of_the_same_tenants(
    serve: Callable[..., Any], make_cluster: Callable[..., Any]
) -> None:
    arrivals = [Arrival(0.0, tenant, "pool", prompt_tokens=4, output_tokens=2) for tenant in ("a", "b", "a")]
    cluster = make_cluster()
    async with serve(cluster) as service:
        outcome = await replayed(f"127.0.0.1:{service.server.port}", arrivals, {"pool": POOL})
    assert outcome.num_failed == 0
    assert Counter(request.tenant for _, request in cluster.received) == {"a": 2, "b": 1}
