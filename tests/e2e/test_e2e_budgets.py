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
from tests.support.processes import free_port

MIB = 2**20
LAYERS, ROUTED = 6, 63
# In fp32 experts of 1.5 MiB, 567 MiB of them; a quarter of that is 141 MiB of slots, not enough for two pools of 72.
SHAPE = Shape(
    hidden=512, intermediate=256, num_layers=LAYERS, num_heads=8, num_kv_heads=8,
    num_experts=ROUTED + 1, top_k=5, vocabulary=2048, context=512,
)  # fmt: skip
# The same kernels, next to no weights.
SMALL_SHAPE = Shape(
    hidden=256, intermediate=64, num_layers=1, num_heads=4, num_kv_heads=4,
    num_experts=8, top_k=3, vocabulary=256, context=64,
)  # fmt: skip
PER_LAYER = 8
SWITCHES = 200


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with enough bytes of experts that holding too many of them shows."""
    path = tmp_path_factory.mktemp("large") / "random-emo"
    write_checkpoint(path, SHAPE)
    return path


@pytest.fixture(scope="module")
def large_service(large: Path, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With a Redis that was never there, KV for less than the context, and a short line; every expert in use is in a
    slot.
    """
    options = (large, "--dtype", "float32", "--expert-memory", "25%", "--kv-memory", "8MiB", "--max-running", 4)
    env = {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0", "EXPERT_PAGER_WORKERS_MAX_WAITING": "6"}
    env["EXPERT_PAGER_WORKERS_IN_PLACE"] = "false"
    with serve(tmp_path_factory.mktemp("serve-large") / "large", *options, **env) as running:
        yield running


@pytest.fixture(scope="module")
def small_service(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What a worker takes whatever its model: interpreter, libraries, threads, gRPC."""
    path = tmp_path_factory.mktemp("small") / "random-emo"
    write_checkpoint(path, SMALL_SHAPE, dtype="float32")
    options = (path, "--dtype", "float32", "--expert-memory", "100%", "--max-running", 1)
    with serve(tmp_path_factory.mktemp("serve-small") / "small", *options) as running:
        yield running


def proportional_bytes(pid: int) -> int:
    """What the process takes of main memory: its own pages, and its share of those it shares (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")


class Sampler:
    """Reads the memory of a process, and what its pager says of its slots, over and over.

    `pss` is what it takes beyond `beside`, a process with the same libraries, at the same moment: a page of a library
    that others map too counts less, and others come and go.
    """

    def __init__(self, service: Any, beside: Any) -> None:
        [self._pid], [self._beside_pid] = service.worker_pids(), beside.worker_pids()
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
        self.pss.append(proportional_bytes(self._pid) - proportional_bytes(self._beside_pid))

    def _metrics(self) -> None:
        found = self._service.metrics("worker-0")
        names = ("resident", "pinned", "reserved")
        self.slots.append(tuple(found.total(f"expert_pager_{name}_bytes", tier="device") for name in names))


def test_memory_stays_within_the_plan_while_pools_switch(small_service: Any, large_service: Any) -> None:
    plan, small_plan = large_service.plan, small_service.plan
    # What the small one holds of a model is taken off; not what it may work with, of which its few requests use little.
    small_bytes = sum(small_plan[name] for name in ("trunk_bytes", "resident_bytes", "slot_bytes", "kv_bytes"))
    limit = plan["total_bytes"] - small_bytes
    room = plan["workspace_bytes"] + plan["kernel_bytes"] + plan["staging_bytes"]
    assert room < PER_LAYER * LAYERS * plan["expert_bytes"], "an old pool beside a new one would not be seen"
    for pool in (4, None):
        small_service.generate([5] * 40, pool=pool, max_tokens=8, temperature=1.0, top_p=0.9)
    before = large_service.worker_metrics()
    numbers = itertools.count()

    def ask(_: int) -> int:
        number = next(numbers)
        # Most pools are given, some are chosen by the prefill, and a few requests page as they go.
        chosen = pb.PoolPolicy(full=pb.Full()) if number % 40 == 7 else pb.PoolPolicy(count=PER_LAYER)
        pool = chosen if number % 4 == 3 else large_service.random_pool(number, PER_LAYER)
        # The longest prompts that KV memory takes, with each kind of pool, work with the most.
        length = plan["kv_tokens"] - 3 if number % 20 in (11, 12) or number == 7 else 12
        prompt = [random.Random(number).randrange(2000) for _ in range(length)]
        answer = large_service.generate(prompt, pool=pool, max_tokens=3, temperature=1.0, top_p=0.9)
        return int(answer.usage.completion_tokens)

    with Sampler(large_service, small_service) as seen, ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, range(SWITCHES))) == [3] * SWITCHES
    after = large_service.worker_metrics()
    moved = after.total("expert_pager_transfer_bytes_total") - before.total("expert_pager_transfer_bytes_total")
    peak = max(seen.pss)
    print(
        f"\n{SWITCHES} switches moved {moved / MIB:.0f} MiB; in {len(seen.pss)} samples at most {peak / MIB:.1f} MiB "
        f"beyond the small service; the plans allow {limit / MIB:.1f} MiB, {plan['slot_bytes'] / MIB:.1f} MiB of it "
        f"slots and {plan['workspace_bytes'] / MIB:.1f} MiB to work with"
    )
    assert len(seen.pss) > 100
    assert moved > 10 * plan["slot_bytes"]
    assert peak <= limit
    assert peak > plan["slot_bytes"], "the slots are in the process that was measured"
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
