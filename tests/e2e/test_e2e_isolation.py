"""Tenants share steps, slots and a worker, and none of them can tell."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

TENANTS = ("ada", "bob", "cyd", "dan")
TEXTS = (
    "def mean(values):\n    total = 0\n",
    "The court finds that the defendant, ",
    "Shall I compare thee to a summer's day?\n",
    "WHEREAS the parties have agreed that ",
    "import os\nimport sys\n\nclass Reader:\n",
    "O wild West Wind, thou breath of ",
    "for (int i = 0; i < n; i++) {\n",
    "The appellant contends that section 4 ",
)
ROUTED_PER_POOL = 8  # of 127 in each of 6 layers
MAX_TOKENS = 48


@dataclass(frozen=True)
class Ask:
    tenant: str
    prompt: str
    pool: pb.PoolPolicy
    sampling: dict[str, Any]

    def send(self, service: Any) -> Any:
        options = {"tenant": self.tenant, "pool": self.pool, "max_tokens": MAX_TOKENS}
        return service.generate(self.prompt, **options, **self.sampling)


@pytest.fixture(scope="module")
def asks(service: Any) -> list[Ask]:
    """Sixteen: every text under a pool of its prefill's choice and under a random one; every other one sampled."""
    found = []
    for number, (text, is_fixed) in enumerate(itertools.product(TEXTS, (False, True))):
        pool = service.random_pool(number, ROUTED_PER_POOL) if is_fixed else pb.PoolPolicy(count=ROUTED_PER_POOL)
        sampling = {"temperature": 0.9, "top_p": 0.9, "seed": number} if number % 4 > 1 else {}
        found.append(Ask(TENANTS[number % 4], text, pool, sampling))
    return found


def test_sixteen_pools_in_memory_for_four_give_each_the_tokens_it_gets_alone(
    idle_service: Any, asks: list[Ask]
) -> None:
    alone = [ask.send(idle_service) for ask in asks]
    pools = {answer.usage.pool.digest: answer.usage.pool.layers for answer in alone}
    assert len(pools) == 16
    num_slots = idle_service.plan["num_slots"]
    assert num_slots <= 4 * alone[0].usage.pool.num_experts
    wanted = {
        (number, expert) for layers in pools.values() for number, layer in enumerate(layers) for expert in layer.experts
    }
    assert len(wanted) >= 2 * num_slots
    for _ in range(2):
        before = idle_service.worker_metrics()
        with ThreadPoolExecutor(16) as threads:
            together = list(threads.map(lambda ask: ask.send(idle_service), asks))
        after = idle_service.worker_metrics()
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert [a.usage.pool.digest for a in together] == [a.usage.pool.digest for a in alone]
        evicted = after.total("expert_pager_evictions_total") - before.total("expert_pager_evictions_total")
        assert evicted >= len(wanted) - num_slots, "whatever was there before, and whoever came first"
        waits = [answer.usage.queue_seconds for answer in together]
        assert max(waits) > min(waits), "they did not all fit at once"


def test_random_drift_in_company_gives_each_the_tokens_it_gets_alone(idle_service: Any) -> None:
    """Pools that grow, past what there are slots for together, and answers that go exact half-way."""
    draw = random.Random(7)
    asks = []
    for number, text in enumerate((*TEXTS, *TEXTS)):
        pool = idle_service.random_pool(100 + number, 8) if number % 2 else pb.PoolPolicy(count=ROUTED_PER_POOL)
        action = draw.choice([pb.DRIFT_ACTION_WIDEN, pb.DRIFT_ACTION_WIDEN, pb.DRIFT_ACTION_EXACT])
        pool.drift.CopyFrom(pb.DriftPolicy(threshold=draw.uniform(0.1, 0.6), action=action, window=draw.choice([4, 8])))
        asks.append(Ask(TENANTS[number % 4], text, pool, {}))
    alone = [ask.send(idle_service) for ask in asks]
    assert sum(answer.usage.drift.widenings > 0 for answer in alone) >= 4
    assert sum(answer.usage.drift.HasField("exact_from") for answer in alone) >= 2
    with ThreadPoolExecutor(len(asks)) as threads:
        together = list(threads.map(lambda ask: ask.send(idle_service), asks))
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.usage.pool.digest for answer in together] == [answer.usage.pool.digest for answer in alone]


def test_a_request_for_nearly_all_slots_is_not_starved_by_small_ones(idle_service: Any) -> None:
    service = idle_service
    largest = service.plan["num_slots"] // 6
    stop = threading.Event()

    def keep_asking(number: int) -> int:
        tenant = TENANTS[number % 4]
        for turn in itertools.count():
            if stop.is_set():
                return turn
            pool = service.random_pool(100 * number + turn, ROUTED_PER_POOL)
            service.generate(TEXTS[number], pool=pool, tenant=tenant, max_tokens=16)
        raise AssertionError

    with ThreadPoolExecutor(8) as threads:
        small = [threads.submit(keep_asking, number) for number in range(8)]
        try:
            for seed in range(3):
                pool = service.random_pool(seed, largest)
                usage = service.generate(TEXTS[0], pool=pool, tenant="big", max_tokens=8).usage
                assert (usage.completion_tokens, usage.pool.num_experts) == (8, 6 * largest)
        finally:
            stop.set()
        assert sum(each.result() for each in small) >= 8


def test_exact_and_pooled_requests_share_a_worker(idle_service: Any, asks: list[Ask]) -> None:
    exact = [Ask(TENANTS[i], TEXTS[i], pb.PoolPolicy(full=pb.Full()), {}) for i in range(3)]
    mixed = [*exact, *asks[:5]]
    alone = [ask.send(idle_service).tokens for ask in mixed]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda ask: ask.send(idle_service).tokens, mixed))
    assert together == alone
