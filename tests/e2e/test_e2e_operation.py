"""A service as an operator meets it: what it logs, and SIGTERM under load, to one of two workers and to the router."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

PROMPT = "It is ordered that the respondent shall "
MARKER = "quartz-zebra-ledger"
TRACE = "0af7651916cd43dd8448eb211c80319c"
NOT_SERVING = 2


@pytest.fixture(scope="module")
def service(model: Path, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = (model, "--dtype", "float32", "--expert-memory", "25%", "--workers", 2)
    folder = tmp_path_factory.mktemp("e2e")
    settings = {"ROUTER_DRAIN_S": "120", "WORKERS_DRAIN_S": "120", "WORKERS_STATE": str(folder), "LOG_FORMAT": "json"}
    env = {f"EXPERT_PAGER_{name}": value for name, value in settings.items()}
    with serve(folder / "operation", *options, **env) as running:
        running.wait_until_ready(2)
        yield running


def entries(service: Any) -> list[dict[str, Any]]:
    """Of the log; a line that is no object is a failure, unless it is still being written."""
    return [json.loads(line) for line in (service.folder / "stderr").read_text().split("\n")[:-1]]


def ray_logs(service: Any) -> list[Path]:
    """Every file that Ray and the workers write to."""
    found = re.search(r"--log_dir=(/tmp/expert-pager-[^ ]+)", service.command_lines())
    assert found
    return [path for path in Path(found[1]).rglob("*") if path.is_file()]


def test_a_request_is_followed_by_its_ids_and_its_text_is_nowhere(service: Any, until: Callable[..., None]) -> None:
    asked = pb.GenerateRequest(request_id="followed", text=f"{MARKER} {PROMPT}".encode())
    asked.sampling.MergeFrom(pb.SamplingParams(max_tokens=4, ignore_eos=True))
    traced = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
    assert list(service.stub.Generate(asked, timeout=120, metadata=traced))[-1].usage.completion_tokens == 4
    refused = service.refusal(f"{MARKER} " * 5000, max_tokens=4, request_id="too-long")
    assert refused.reason == "PROMPT_TOO_LONG"
    with pytest.raises(grpc.RpcError):
        service.generate(MARKER.encode() + b"\xff\xfe", model=MARKER, max_tokens=4)

    def told(**wanted: Any) -> bool:
        return any(wanted.items() <= entry.items() for entry in entries(service))

    ids = {"request_id": "followed", "trace_id": TRACE}
    until(lambda: told(source="router", method="Generate", code="OK", **ids))
    until(lambda: told(outcome="length", completion_tokens=4, **ids))
    until(lambda: told(source="router", request_id="too-long", code="INVALID_ARGUMENT"))
    until(lambda: {entry["source"] for entry in entries(service)} == {"router", "worker-0", "worker-1"})
    assert {entry["source"] for entry in entries(service) if entry.get("outcome")} <= {"worker-0", "worker-1"}
    for path in [service.folder / "stdout", service.folder / "stderr", *ray_logs(service)]:
        written = path.read_text(errors="replace")
        assert MARKER not in written, path


def num_tokens(call: Any) -> int:
    """Of the rest of a stream."""
    return sum(len(message.token_ids) for message in call)


class Load:
    """Three clients that send one request after the other; what became of each."""

    def __init__(self, service: Any, max_tokens: int) -> None:
        self._service = service
        self._max_tokens = max_tokens
        self._is_over = threading.Event()
        self.answers: list[int] = []
        self.errors: list[Any] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        pool = self._service.random_pool(number, 8)
        while not self._is_over.is_set():
            try:
                usage = self._service.generate(PROMPT, pool=pool, max_tokens=self._max_tokens).usage
                self.answers.append(usage.completion_tokens)
            except grpc.RpcError as error:
                self.errors.append(error)
                return


def test_a_drain_under_load_loses_nothing(service: Any, until: Callable[..., None]) -> None:
    def states() -> list[str]:
        return [worker.state for worker in service.residency().values()]

    def running() -> list[int]:
        return sorted(worker.running for worker in service.residency().values())

    def is_said(words: str) -> bool:
        return any(words in entry["message"] for entry in entries(service))

    service.wait_until_idle()
    until(lambda: running() == [0, 0])
    long = []
    for _ in range(2):  # these are placed by load alone, the second one beside the first: each worker has one
        long.append(service.open(PROMPT, max_tokens=700))
        next(long[-1])
    with ThreadPoolExecutor(2) as readers, Load(service, 150) as load:
        read = readers.map(num_tokens, long)
        until(lambda: running()[0] >= 1 and sum(running()) == 5)
        leaving = service.worker_pids()[0]
        num_before = len(load.answers)
        os.kill(leaving, signal.SIGTERM)
        until(lambda: "draining" in states())
        until(lambda: not psutil.pid_exists(leaving), 120)
        until(lambda: states() == ["ready", "ready"], 180)
        until(lambda: len(load.answers) > num_before + 6, 120)
    assert load.errors == []
    assert set(load.answers) == {150}
    assert list(read) == [699, 699]
    until(lambda: is_said("has drained and is started again") and is_said("remembered experts in"))
    service.wait_until_idle()  # nothing is leased

    last = service.open(PROMPT, max_tokens=900)  # goes on for longer than the others: who asks after it finds nobody
    next(last)
    with ThreadPoolExecutor(1) as readers, Load(service, 200) as load:
        read = readers.map(num_tokens, [last])
        until(lambda: sum(running()) == 4)
        service.process.terminate()
        until(lambda: service.health() == service.health("") == NOT_SERVING, 20)
        until(lambda: len(load.errors) == 3, 120)
    refused = [service.refusal_of(error) for error in load.errors]
    assert {(each.code, each.reason) for each in refused} == {(grpc.StatusCode.UNAVAILABLE, "NOT_READY")}
    assert all(each.retry_s for each in refused)
    assert load.answers == [200] * len(load.answers) != []
    assert list(read) == [899]
    assert service.process.wait(120) == 0
    assert not [entry for entry in entries(service) if "cut off" in entry["message"] or "exception" in entry]
