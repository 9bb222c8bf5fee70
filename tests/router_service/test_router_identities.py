"""What the metrics of a router and its worker count adds up, whatever became of the requests: see docs/metrics.md."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import worker_pb2

from pager.cluster.actors import load_engine
from pager.cluster.placement import WorkerState, WorkerView
from pager.cluster.tokens import WorkerLink
from pager.cluster.worker import Worker
from pager.config import ModelConfig, ServiceConfig, WorkerConfig
from pager.errors import NotReady
from pager.types import GenerateRequest, RequestObserver, TokenChunk
from router_service.admission import AdmissionLimits, TenantLabels
from router_service.metrics import REJECTIONS, STATUSES
from router_service.prediction import Passes
from tests.support.calls import reason, trailer

MODEL = Path(__file__).parents[2] / "models" / "emo-tiny"
TENANTS = ("acme", "initech", "other")


@dataclass
class OneWorker:
    """A cluster of a worker in this process, over the sockets that any worker has."""

    worker: Worker
    loads: list[worker_pb2.Load] = field(default_factory=list)

    def __post_init__(self) -> None:
        ready = self.worker.ready()
        assert ready is not None
        self.model = ready.model
        self.link = WorkerLink(ready.address, ready.token, buffer_chunks=64, on_load=self.loads.append)

    def workers(self) -> tuple[WorkerView, ...]:
        load, model = self.loads[-1], self.model
        view = WorkerView("worker-0", WorkerState.READY, load.waiting, load.running)
        return (replace(view, num_slots=model.num_slots, expert_bytes=model.expert_bytes),)

    async def generate(
        self, worker_id: str, request: GenerateRequest, observer: RequestObserver
    ) -> AsyncGenerator[TokenChunk, None]:
        async for chunk in self.link.generate(request, observer):
            yield chunk

    async def abort(self, request_id: str, tenant: str) -> bool:
        return await self.link.abort(request_id, tenant)

    def cut_off(self) -> None:
        self.link.cancel_all(NotReady("shutting down"))


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OneWorker]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = WorkerConfig(
        device="cpu", expert_memory="25%", host_memory=0, kv_memory="1MiB", num_threads=1, max_running=3, max_waiting=5
    )
    worker = Worker(0, ServiceConfig(model=ModelConfig(path=str(MODEL)), workers=sizes), "127.0.0.1", load_engine)
    await asyncio.to_thread(worker.load)
    cluster = OneWorker(worker)
    await cluster.link.attach()
    yield cluster
    await cluster.link.close()
    await asyncio.to_thread(worker.close)


class Counted:
    """Sums of series of a router and a worker, by names without their prefix."""

    def __init__(self, service: Any, worker: Worker) -> None:
        registries = (service.pipeline.metrics.registry, worker._observer.registry)
        families = [family for registry in registries for family in registry.collect()]
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for sample in self._samples
            if sample.name == f"expert_pager_{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, f"no series {name} {labels}"
        return sum(found)

    @property
    def is_idle(self) -> bool:
        names = ("router_requests_in_flight", "router_tokens_in_flight", "requests_running", "requests_waiting")
        sent, received = self.total("router_sent_total"), self.total("requests_received_total")
        ended = self.total("requests_total") + self.total("requests_refused_total")
        calls = self.total("router_calls_total") == self.total("router_requests_total")
        return calls and sent == received == ended and not any(map(self.total, names))


def check(counted: Counted) -> None:
    """Every identity of docs/metrics.md."""
    total = counted.total
    for method in ("Generate", "Route", "Abort"):
        assert total("router_calls_total", method=method) == total("router_requests_total", method=method)
    for code in STATUSES:
        num_answers = total("router_answers_total", code=code)
        assert num_answers == total("router_requests_total", method="Generate", code=code)
    assert total("router_sent_total") == total("requests_received_total")
    assert total("requests_received_total") == total("requests_refused_total") + total("requests_total")
    finished = total("requests_total", outcome="stop") + total("requests_total", outcome="length")
    assert finished >= total("router_answers_total", code="OK")
    assert total("router_prompt_tokens_total") == total("prompt_tokens_total")
    assert total("router_generated_tokens_total") == total("completion_tokens_total")
    assert total("router_queue_seconds_count") == total("queue_seconds_count")
    assert total("router_queue_seconds_sum") == pytest.approx(total("queue_seconds_sum"))
    begun = total("time_to_first_token_seconds_count")
    prompt_tokens_run = total("prompt_tokens_total") - total("cached_prompt_tokens_total")
    assert total("step_tokens_total") == prompt_tokens_run + total("completion_tokens_total") - begun
    for source in ("disk", "host"):
        assert total("router_paged_bytes_total", source=source) == total("charged_bytes_total", source=source)
    transferred = total("transfer_bytes_total", destination="device")
    assert transferred == total("charged_bytes_total") + total("uncharged_bytes_total")


class Client:
    """Calls of every kind and every fate, and what became of them as a client sees it."""

    def __init__(self, service: Any, seed: int) -> None:
        self._service = service
        self._chance = random.Random(seed)
        self.codes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # by reason, those that may be refused

    async def storm(self, num_calls: int) -> None:
        for number in range(num_calls):
            await self._call(number)

    async def _call(self, number: int) -> None:
        chance = self._chance
        tenant = chance.choice(TENANTS)
        ids = [chance.randrange(5, 500) for _ in range(chance.choice((2, 8, 40)))]
        wire = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ids),
            request_id=chance.choice(("", "", "same")),
            pool=chance.choice((pb.PoolPolicy(count=8), pb.PoolPolicy(count=24), pb.PoolPolicy(full=pb.Full()))),
            sampling=pb.SamplingParams(max_tokens=chance.choice((1, 2, 20, 60)), ignore_eos=True),
        )
        timeout = chance.choice((None, None, None, 0.02, 0.3, 1.0))
        if number % 10 == 0:
            wire.sampling.temperature, timeout = -1.0, None
        call = self._service.stub.Generate(wire, metadata=(("x-tenant-id", tenant),), timeout=timeout)
        leave_after = chance.choice((0, 1, 3, 1000, 1000, 1000))
        try:
            async for message in call:
                leave_after -= 1
                if leave_after < 0:
                    call.cancel()
                if leave_after == 1 and chance.random() < 0.3:
                    abort = pb.AbortRequest(request_id=message.request_id)
                    await self._service.stub.Abort(abort, metadata=(("x-tenant-id", tenant),))
        except grpc.aio.AioRpcError as error:
            if trailer(error, "grpc-status-details-bin") is not None:
                self.refused[reason(error)] += 1
        except asyncio.CancelledError:
            pass  # its own doing
        self.codes[(await call.code()).name] += 1


async def settled(service: Any, worker: Worker) -> Counted:
    """Once everything has ended and nothing is read any more."""
    before = None
    async with asyncio.timeout(120):
        while True:
            counted = Counted(service, worker)
            now = [counted.total(name) for name in ("transfer_bytes_total", "requests_total")]
            if counted.is_idle and now == before:
                return counted
            before = now
            await asyncio.sleep(0.3)


def every_fate_was_met(counted: Counted) -> bool:
    ended = {name: counted.total("requests_total", outcome=name) for name in ("cancelled", "deadline_exceeded")}
    num_refused = counted.total("requests_refused_total", reason="overloaded")
    num_rejected = counted.total("router_admission_rejections_total", reason="TENANT_OVERLOADED")
    return ended["cancelled"] > 5 and min(ended["deadline_exceeded"], num_refused, num_rejected) > 0


@pytest.mark.slow
async def test_what_enters_is_what_leaves_after_a_storm(serve: Any, cluster: OneWorker) -> None:
    limits = AdmissionLimits(max_requests=11, max_requests_per_tenant=5)
    choices = {"model": cluster.model, "limits": limits, "tenants": TenantLabels(TENANTS[:2])}
    async with serve(cluster, passes=Passes(), **choices) as service:
        clients = [Client(service, seed) for seed in range(18)]
        # A fast or a busy machine may let no deadline pass, or refuse nothing, the first time.
        for num_storms in itertools.count(1):
            await asyncio.gather(*(client.storm(20) for client in clients))
            counted = await settled(service, cluster.worker)
            check(counted)
            if every_fate_was_met(counted) or num_storms == 5:
                break
        codes = sum((client.codes for client in clients), Counter())
        refused = sum((client.refused for client in clients), Counter())
        total = counted.total
        # What is compared is no row of zeros, and no less than the clients have seen: some had left before they heard.
        assert codes.total() == num_storms * 18 * 20 >= total("router_calls_total", method="Generate")
        assert total("router_answers_total", code="OK") >= codes["OK"] > 10
        # Those without a message had ended before it arrived: their clients have seen gRPC's own status.
        num_bad = total("router_answers_total", code="INVALID_ARGUMENT")
        assert (
            num_bad - total("router_dropped_calls_total", reason="no_message")
            == codes["INVALID_ARGUMENT"]
            == num_storms * 36
        )
        assert every_fate_was_met(counted)
        assert total("uncharged_bytes_total") + total("charged_bytes_total") > 0
        bounds = ("OVERLOADED", "TENANT_OVERLOADED")
        assert all(total("router_admission_rejections_total", reason=reason) >= refused[reason] for reason in bounds)
        assert sum(refused[reason] for reason in bounds) > 0
        num_rejected = sum(total("router_admission_rejections_total", reason=reason) for reason in REJECTIONS)
        of_refusals = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
        assert num_rejected <= sum(total("router_requests_total", code=code) for code in of_refusals)
