"""A deadline that the queue cannot meet is refused at once, by what was measured of the queue."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

PROMPT = "while True:\n    "


def test_a_deadline_within_the_queue_is_refused_at_once(idle_service: Any) -> None:
    service = idle_service
    most = service.plan["num_slots"] // 6  # of each of 6 layers: a pool takes nearly all slots
    stop = threading.Event()

    def keep_asking(number: int) -> int:
        count = 0
        while not stop.is_set():
            service.generate(PROMPT, pool=service.random_pool(number + 100 * count, most), max_tokens=60)
            count += 1
        return count

    def refused() -> Any:
        """Until the worker has seen how long its line lasts, such a request waits, and times out at its client."""
        end_s = time.monotonic() + 90
        while time.monotonic() < end_s:
            try:
                service.generate(PROMPT, pool=service.random_pool(7, most), max_tokens=2, timeout=1.5)
            except grpc.RpcError as error:
                if "requests are in line" in str(error.details()):
                    return error
        raise AssertionError("no request was refused for its deadline")

    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(keep_asking, number) for number in range(12)]
        try:
            found = service.refusal_of(refused())
        finally:
            stop.set()
    assert (found.code, found.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    rejections = "expert_pager_router_admission_rejections_total"
    assert service.metrics("router").total(rejections, reason="DEADLINE_EXCEEDED") >= 1
    assert all(each.result() >= 1 for each in asked), "the others were served"
    answer = service.generate(PROMPT, pool=service.random_pool(7, most), max_tokens=2, timeout=30)
    assert answer.usage.completion_tokens == 2
