"""Budgets of memory and of the line, on a model whose experts weigh enough to measure from outside the process."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from benchmarks.shapes import Shape
from benchmarks.synthetic import write_checkpoint

MIB = 2**20
LAYERS, ROUTED = 6, 63
# Experts of 768 KiB, 290 MiB of them; a quarter of that is 72 MiB of slots, enough for two pools of 36 MiB.
SHAPE = Shape(
    hidden=512, intermediate=256, num_layers=LAYERS, num_heads=8, num_kv_heads=8,
    num_experts=ROUTED + 1, top_k=5, vocabulary=2048, context=512,
)  # fmt: skip
PER_LAYER = 8
SWITCHES = 200
# What a forward needs beside the plan (activations of 24 tokens, two reads' buffers in the allocator, thread stacks).
# Less than one pool: a cap that was exceeded by holding an old pool beside a new one would be seen.
SLACK = 20 * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with enough bytes of experts that holding too many of them shows."""
    path = tmp_path_factory.mktemp("large") / "random-emo"
    write_checkpoint(path, SHAPE)
    return path


@pytest.fixture(scope="module")
def large_service(
    large: Path, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Any]:
    """With a Redis that was never there, KV for less than the context, and a short line."""
    options = (large, "--expert-memory", "25%", "--kv-memory", "4MiB", "--max-running", 4)
    env = {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0", "EXPERT_PAGER_WORKERS_MAX_WAITING": "6"}
    with serve(tmp_path_factory.mktemp("serve-large") / "large", *options, **env) as running:
        yield running


def proportional_bytes(pid: int) -> int:
    """What the process takes of main memory: its own pages, and its share of those it shares (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")


class Sampler:
    """Reads the memory of a process, and what its pager says of its slots, over and over."""

    def __init__(self, service: Any) -> None:
        [self._pid] = service.worker_pids()
        self._service = service
        self.pss: list[int] = []
        self.slots: list[tuple[float, ...]] = []  # bytes resident, pinned, reserved
        self._stop = threading.Event()

    def __enter__(self) -> Sampler:
        looks = ((self._memory, 0.01), (self._metrics, 0.2))
        self._threads = [threading.Thread(target=self._watch, args=look) for look in looks]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, look: Callable[[], None], pause_s: float) -> None:
        while not self._stop.wait(pause_s):
            look()

    def _memory(self) -> None:
        self.pss.append(proportional_bytes(self._pid))

    def _metrics(self) -> None:
        found = self._service.metrics("worker-0")
        names = ("resident", "pinned", "reserved")
        self.slots.append(tuple(found.total(f"expert_pager_{name}_bytes", tier="device") for name in names))


def test_memory_stays_within_the_plan_while_pools_switch(service: Any, large_service: Any) -> None:
    plan = large_service.plan
    # The same process with next to no model: interpreter, libraries, threads, gRPC. What it holds of its own small plan
    # is taken off.
    service.generate([5] * 8, pool=8, max_tokens=2)
    baseline = proportional_bytes(service.worker_pids()[0]) - service.plan["total_bytes"]
    limit = baseline + plan["total_bytes"] + SLACK
    assert PER_LAYER * LAYERS * plan["expert_bytes"] > SLACK
    assert limit < baseline + plan["num_routed"] * plan["expert_bytes"] / 2, "a check that could not fail"
    before = large_service.worker_metrics()
    numbers = itertools.count()

    def ask(_: int) -> int:
        number = next(numbers)
        # Most pools are given, some are chosen by the prefill, and a few requests page as they go.
        chosen = pb.PoolPolicy(full=pb.Full()) if number % 40 == 7 else pb.PoolPolicy(count=PER_LAYER)
        pool = chosen if number % 4 == 3 else large_service.random_pool(number, PER_LAYER)
        prompt = [random.Random(number).randrange(2000) for _ in range(12)]
        return int(large_service.generate(prompt, pool=pool, max_tokens=3).usage.completion_tokens)

    with Sampler(large_service) as seen, ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, range(SWITCHES))) == [3] * SWITCHES
    after = large_service.worker_metrics()
    moved = after.total("expert_pager_transfer_bytes_total") - before.total("expert_pager_transfer_bytes_total")
    peak = max(seen.pss)
    print(
        f"\n{SWITCHES} switches moved {moved / MIB:.0f} MiB; in {len(seen.pss)} samples at most "
        f"{(peak - baseline) / MIB:.1f} MiB above the baseline of {baseline / MIB:.1f} MiB; the plan is "
        f"{plan['total_bytes'] / MIB:.1f} MiB, {plan['slot_bytes'] / MIB:.1f} MiB of it slots"
    )
    assert len(seen.pss) > 100
    assert moved > 10 * plan["slot_bytes"]
    assert peak <= limit
    assert peak > baseline + plan["slot_bytes"], "the slots are in the process that was measured"
    capacity = after.total("expert_pager_capacity_bytes", tier="device")
    assert capacity == plan["slot_bytes"]
    assert len(seen.slots) > 20
    for resident, pinned, reserved in seen.slots:
        assert resident <= capacity
        assert pinned + reserved <= capacity


def test_the_line_is_bounded_and_who_is_in_it_is_served(large_service: Any) -> None:
    def ask(number: int) -> Any:
        try:
            answer = large_service.generate(
                [number] * 8, pool=large_service.random_pool(number, PER_LAYER), max_tokens=24
            )
        except grpc.RpcError as error:
            return large_service.refusal_of(error)
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(24) as threads:
        outcomes = list(threads.map(ask, range(24)))
    refused = [outcome for outcome in outcomes if outcome != 24]
    assert len(outcomes) - len(refused) >= 4 + 6
    assert refused
    for each in refused:
        assert (each.code, each.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert each.retry_s is not None
    large_service.wait_until_idle()
    assert large_service.generate([5] * 8, pool=PER_LAYER, max_tokens=2).usage.completion_tokens == 2


def test_a_prompt_beyond_kv_memory_is_refused_with_what_fits(large_service: Any) -> None:
    tokens = large_service.plan["kv_tokens"]
    assert tokens < SHAPE.context
    refused = large_service.refusal([5] * (tokens + 1), pool=PER_LAYER, max_tokens=1)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
    assert f"KV budget {tokens}" in refused.message
    assert large_service.generate([5] * (tokens - 2), pool=PER_LAYER, max_tokens=2).usage.completion_tokens == 2


def test_a_model_without_a_tokenizer_takes_token_ids_only(large_service: Any) -> None:
    refused = large_service.refusal("some text", pool=PER_LAYER, max_tokens=2)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "token" in refused.message
    answer = large_service.generate([5, 6, 7], pool=PER_LAYER, max_tokens=2)
    assert (answer.text, len(answer.tokens)) == ("", 2)


def test_a_service_whose_redis_was_never_there_serves_and_says_so(large_service: Any) -> None:
    assert large_service.generate([5, 6, 7], pool=PER_LAYER, max_tokens=2).usage.completion_tokens == 2
    assert large_service.metrics("router").total("expert_pager_router_redis_degraded") == 1
