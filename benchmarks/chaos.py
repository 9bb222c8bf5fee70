"""A soak of the whole service under faults: many tenants, every kind of pool, and processes that are killed or stopped.

python -m benchmarks.chaos [MODEL] --minutes 10 --seed N

Needs redis-server. Ends with counts by outcome. It fails on a call that hangs, on tokens other than those that the same
request had before the faults began, on an error that no fault explains, on anything that is still held when all calls
have ended, and on a call that the router's metrics do not know.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from prometheus_client.parser import text_string_to_metric_families
from rich import print

from benchmarks.prompts import TEXTS
from benchmarks.report import ROOT

MODEL = ROOT / "models" / "emo-tiny"
NUM_TENANTS, NUM_WORKERS = 20, 2
NAMESPACE = f"chaos-{os.getpid()}"  # a part of the names of shared memory
START_TIMEOUT_S = 300.0
HANG_S = 150.0  # a call without a deadline of its own that takes longer hangs
FAULT_EVERY_S = (4.0, 12.0)
TRACE_BYTES = 1 << 20  # room for traces, where a small file system can be mounted: it fills by itself
MAX_ROUTER_GROWTH_BYTES = 256 << 20
MAX_ROUTER_DESCRIPTORS = 32  # more than after the warm-up

_Code = grpc.StatusCode
# Errors that the faults explain, by operation; any other is a failure.
_AFTER_FAULTS = {_Code.UNAVAILABLE, _Code.RESOURCE_EXHAUSTED}
_EXPECTED = {
    "generate": _AFTER_FAULTS,
    "cancel": _AFTER_FAULTS | {_Code.CANCELLED},
    "abort": _AFTER_FAULTS | {_Code.CANCELLED},
    "deadline": _AFTER_FAULTS | {_Code.DEADLINE_EXCEEDED},
    "route": _AFTER_FAULTS,
    "calibrate": _AFTER_FAULTS | {_Code.ALREADY_EXISTS},
    "list": _AFTER_FAULTS,
}
_WEIGHTS = {"generate": 60, "cancel": 12, "abort": 4, "deadline": 10, "route": 5, "calibrate": 6, "list": 3}
_METHODS = {"route": "Route", "calibrate": "Calibrate", "list": "ListPools"}


@dataclass(frozen=True, slots=True)
class Question:
    """A request whose answer is known: its text, its pool by kind, and how it is sampled."""

    kind: str
    text: str
    is_greedy: bool

    def request(self, pool: pb.PoolPolicy | None, request_id: str = "") -> pb.GenerateRequest:
        sampling = pb.SamplingParams(max_tokens=24, temperature=0 if self.is_greedy else 0.8, seed=7, ignore_eos=True)
        return pb.GenerateRequest(request_id=request_id, text=self.text.encode(), sampling=sampling, pool=pool)


@dataclass(slots=True)
class Tally:
    """What came of the calls; the one mutable record of the run."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # calls by method
    arrived: Counter[str] = field(default_factory=Counter)  # those that the router has certainly seen

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"[red]failure:[/red] {text}")


class Service:
    """The service under test with its Redis, and what can be done to them."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any], folder: Path, redis: RedisServer) -> None:
        self.process = process
        self.address: str = ready["address"]
        self.metrics_url: str = ready["metrics_url"]
        self.folder = folder
        self.redis = redis

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "".join(child.cmdline()).startswith("ray::WorkerActor"):
                    found.append(child)
        return found

    def samples(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Every sample of the router and of all workers, by name."""
        urls = [self.metrics_url]
        for group in json.loads((self.folder / "targets.json").read_text()):
            urls += [f"http://{target}/metrics" for target in group["targets"]]
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for url in dict.fromkeys(urls):
            with urllib.request.urlopen(url, timeout=30) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    for sample in family.samples:
                        found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found


class RedisServer:
    """A real Redis on a free port of the loopback interface."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--appendonly", "yes"]
        self.process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


# --- clients --------------------------------------------------------------------------------------------------------


class Client:
    """One tenant: asks questions whose answers are known, and does everything else that a client may do."""

    def __init__(self, channel: grpc.aio.Channel, name: str, seed: int, kinds: Kinds, tally: Tally) -> None:
        self._stub = pb_grpc.ExpertPagerStub(channel)
        self._metadata = (("x-tenant-id", name),)
        self._random = random.Random(seed)
        self._kinds = kinds
        self._tally = tally
        self._number = 0

    async def run_until(self, end_s: float, goldens: dict[Question, tuple[int, ...]]) -> None:
        while time.monotonic() < end_s:
            operation = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
            question = self._random.choice(list(goldens))
            try:
                async with asyncio.timeout(HANG_S + 30):
                    await self._try(operation, question, goldens[question])
            except TimeoutError:
                self._tally.fail(f"{operation} of {question.kind} hangs")
            await asyncio.sleep(self._random.uniform(0, 0.5))

    async def _try(self, operation: str, question: Question, golden: tuple[int, ...]) -> None:
        method = _METHODS.get(operation, "Generate")
        self._tally.sent[method] += 1
        try:
            await getattr(self, f"_{operation}")(question, golden)
        except grpc.RpcError as error:
            code = error.code()
            reason = _reason(error)
            self._tally.outcomes[operation, f"{code.name} {reason}".strip()] += 1
            if reason:  # the router has put its name to it
                self._tally.arrived[method] += 1
            if code not in _EXPECTED[operation]:
                self._tally.fail(f"{operation} of {question.kind}: {code.name} {error.details()}")
        else:
            self._tally.arrived[method] += 1
            self._tally.outcomes[operation, "OK"] += 1

    async def answer(self, question: Question, timeout_s: float = HANG_S, request_id: str = "") -> tuple[int, ...]:
        request = question.request(self._kinds.policy(question.kind), request_id)
        call = self._stub.Generate(request, metadata=self._metadata, timeout=timeout_s)
        ids: list[int] = []
        has_usage = False
        async for message in call:
            ids += message.token_ids
            has_usage = message.HasField("usage")
        if not has_usage:
            self._tally.fail(f"an answer of {question.kind} ended without its usage")
        return tuple(ids)

    async def _generate(self, question: Question, golden: tuple[int, ...]) -> None:
        self._compare(question, await self.answer(question), golden)

    async def _deadline(self, question: Question, golden: tuple[int, ...]) -> None:
        self._compare(question, await self.answer(question, self._random.uniform(0.01, 1.5)), golden)

    async def _cancel(self, question: Question, golden: tuple[int, ...]) -> None:
        request = question.request(self._kinds.policy(question.kind))
        call = self._stub.Generate(request, metadata=self._metadata, timeout=HANG_S)
        asyncio.get_running_loop().call_later(self._random.uniform(0, 0.6), call.cancel)
        ids: list[int] = []
        try:
            async for message in call:
                ids += message.token_ids
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # not by `call.cancel`
                raise
        self._tally.arrived["Generate"] += bool(ids) - 1  # a call that is cancelled at once may never leave
        if tuple(ids) != golden[: len(ids)]:
            self._tally.fail(f"a cancelled answer of {question.kind} has other tokens")

    async def _abort(self, question: Question, golden: tuple[int, ...]) -> None:
        self._number += 1
        request_id = f"chaos-{self._number}"
        answering = asyncio.create_task(self.answer(question, request_id=request_id))
        await asyncio.sleep(self._random.uniform(0, 0.5))
        self._tally.sent["Abort"] += 1
        with suppress(grpc.RpcError):
            await self._stub.Abort(pb.AbortRequest(request_id=request_id), metadata=self._metadata, timeout=HANG_S)
            self._tally.arrived["Abort"] += 1
        self._compare(question, await answering, golden)

    async def _route(self, question: Question, golden: tuple[int, ...]) -> None:
        request = pb.RouteRequest(text=question.text.encode(), pool=pb.PoolPolicy(share=0.125))
        await self._stub.Route(request, metadata=self._metadata, timeout=HANG_S)

    async def _list(self, question: Question, golden: tuple[int, ...]) -> None:
        await self._stub.ListPools(pb.ListPoolsRequest(), metadata=self._metadata, timeout=HANG_S)

    async def _calibrate(self, question: Question, golden: tuple[int, ...]) -> None:
        name = f"scratch-{self._random.randrange(4)}"
        await self.calibrate(name)
        self._tally.sent["DeletePool"] += 1
        with suppress(grpc.RpcError):
            await self._stub.DeletePool(pb.DeletePoolRequest(name=name), metadata=self._metadata, timeout=HANG_S)
            self._tally.arrived["DeletePool"] += 1

    async def calibrate(self, name: str, *, replace: bool = False) -> None:
        examples = [pb.Example(text=text.encode()) for text in TEXTS[:4]]
        request = pb.CalibrateRequest(name=name, examples=examples, pool=pb.PoolPolicy(share=0.125), replace=replace)
        await self._stub.Calibrate(request, metadata=self._metadata, timeout=HANG_S)

    def _compare(self, question: Question, ids: tuple[int, ...], golden: tuple[int, ...]) -> None:
        if ids != golden:
            self._tally.fail(f"{question.kind}, {question.text[:20]!r}: {ids} instead of {golden}")


class Kinds:
    """Every kind of pool that a request can ask for."""

    NAMED = "base"

    def __init__(self, layers: Sequence[pb.LayerFacts], *, has_codebook: bool) -> None:
        draw = random.Random(1)
        fixed = [
            pb.LayerExperts(experts=sorted(draw.sample(range(layer.routed), min(8, layer.routed)))) for layer in layers
        ]
        chosen, exact = pb.POOL_SOURCE_PREFILL, pb.DRIFT_ACTION_EXACT
        self._policies = {
            "exact": pb.PoolPolicy(full=pb.Full()),
            "prefill": pb.PoolPolicy(share=0.125, source=chosen),
            "prediction": pb.PoolPolicy(share=0.125, source=pb.POOL_SOURCE_PREDICTION),
            "mass": pb.PoolPolicy(mass=pb.Mass(mass=0.6, cap=12), source=chosen),
            "fixed": pb.PoolPolicy(experts=pb.FixedPool(layers=fixed)),
            "named": pb.PoolPolicy(name=self.NAMED),
            "widen": pb.PoolPolicy(share=0.125, source=chosen, drift=pb.DriftPolicy(threshold=0.2, window=8)),
            "drift to exact": pb.PoolPolicy(
                share=0.125, source=chosen, drift=pb.DriftPolicy(threshold=0.2, window=8, action=exact)
            ),
        }
        if has_codebook:
            self._policies["codebook"] = pb.PoolPolicy(share=0.125, source=pb.POOL_SOURCE_CODEBOOK)

    def policy(self, kind: str) -> pb.PoolPolicy:
        return self._policies[kind]

    def questions(self) -> list[Question]:
        texts = TEXTS[:4]
        return [
            Question(kind, text, is_greedy) for kind in self._policies for text in texts for is_greedy in (True, False)
        ]


def _reason(error: grpc.RpcError) -> str:
    """The reason in the error's details; empty for a status that the router did not write."""
    from google.rpc.error_details_pb2 import ErrorInfo
    from google.rpc.status_pb2 import Status

    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key == "grpc-status-details-bin":
            for detail in Status.FromString(value).details:
                info = ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


# --- faults ---------------------------------------------------------------------------------------------------------


class Faults:
    """Kills, stops and refills at random, one at a time."""

    def __init__(self, service: Service, seed: int, tally: Tally) -> None:
        self._service = service
        self._random = random.Random(seed)
        self._tally = tally

    async def run_until(self, end_s: float) -> None:
        faults: tuple[Callable[[], Awaitable[None]], ...] = (
            self._kill_worker,
            self._stop_worker,
            self._drain_worker,
            self._stop_redis,
            self._restart_redis,
            self._free_traces,
        )
        while time.monotonic() < end_s:
            await asyncio.sleep(self._random.uniform(*FAULT_EVERY_S))
            fault = self._random.choice(faults)
            self._tally.faults[fault.__name__.strip("_").replace("_", " ")] += 1
            with suppress(psutil.Error):
                await fault()

    def _worker(self) -> psutil.Process:
        workers = self._service.workers()
        if not workers:
            raise psutil.NoSuchProcess(0)
        return self._random.choice(workers)

    async def _kill_worker(self) -> None:
        self._worker().kill()

    async def _stop_worker(self) -> None:
        worker = self._worker()
        worker.suspend()
        await asyncio.sleep(self._random.uniform(0.2, 3))
        worker.resume()

    async def _drain_worker(self) -> None:
        self._worker().terminate()

    async def _stop_redis(self) -> None:
        redis = psutil.Process(self._service.redis.process.pid)
        redis.suspend()
        await asyncio.sleep(self._random.uniform(0.2, 4))
        redis.resume()

    async def _restart_redis(self) -> None:
        self._service.redis.stop()
        await asyncio.sleep(self._random.uniform(0, 4))
        self._service.redis.start()

    async def _free_traces(self) -> None:
        """Room on the full disk: the recorders should take up again."""
        for trace in (self._service.folder / "traces").glob("*"):
            trace.unlink(missing_ok=True)


# --- the run --------------------------------------------------------------------------------------------------------


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with a tokenizer.")] = MODEL,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long faults happen.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of clients and faults.")] = 0,
) -> None:
    """Run the service under faults, and fail on a hang, a wrong token, a leak or a call that no metric knows."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, ExitStack() as stack:
        service = stack.enter_context(_service(model, Path(name)))
        asyncio.run(_run(service, minutes * 60, seed, tally))
    if left := [segment for segment in os.listdir("/dev/shm") if NAMESPACE in segment]:
        tally.fail(f"shared memory was left behind: {', '.join(sorted(left))}")
    _print(tally)
    sys.exit(bool(tally.failures))


async def _run(service: Service, seconds: float, seed: int, tally: Tally) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = pb_grpc.ExpertPagerStub(channel)
        described = await stub.GetModel(pb.GetModelRequest(), timeout=START_TIMEOUT_S)
        tally.sent["GetModel"] += 1
        kinds = Kinds(described.pool_sizes.layers, has_codebook=bool(described.codewords))
        clients = [Client(channel, f"tenant-{number}", seed + number, kinds, tally) for number in range(NUM_TENANTS)]
        for client in clients:
            await client.calibrate(Kinds.NAMED, replace=True)
        goldens = {question: await clients[0].answer(question) for question in kinds.questions()}
        for question in goldens:  # in company, before any fault
            clients[0]._compare(question, await clients[1].answer(question), goldens[question])
        calls_before = _calls(service)
        router = psutil.Process(service.process.pid)
        rss_before, descriptors_before = router.memory_info().rss, router.num_fds()
        tally.sent.clear()
        end_s = time.monotonic() + seconds
        faults = asyncio.create_task(Faults(service, seed, tally).run_until(end_s))
        await asyncio.gather(*(client.run_until(end_s, goldens) for client in clients))
        await faults
        await _recovered(service, tally)
        _check_calls(_calls(service), calls_before, tally)
        for question, golden in goldens.items():
            clients[2]._compare(question, await clients[2].answer(question), golden)
        if (grown := router.memory_info().rss - rss_before) > MAX_ROUTER_GROWTH_BYTES:
            tally.fail(f"the router grew by {grown >> 20} MiB")
        if (opened := router.num_fds() - descriptors_before) > MAX_ROUTER_DESCRIPTORS:
            tally.fail(f"the router has {opened} more open files than before")


async def _recovered(service: Service, tally: Tally) -> None:
    """Waits until all workers are ready and nothing is held by anybody."""
    idle = (
        "expert_pager_router_requests_in_flight",
        "expert_pager_router_tokens_in_flight",
        "expert_pager_requests_running",
        "expert_pager_requests_waiting",
        "expert_pager_kv_used_bytes",
        "expert_pager_reserved_bytes",
        "expert_pager_pinned_bytes",
    )
    end_s = time.monotonic() + START_TIMEOUT_S
    held: dict[str, float] = {"no scrape": 1}
    while held and time.monotonic() < end_s:
        await asyncio.sleep(0.5)
        with suppress(OSError, ValueError):
            samples = await asyncio.to_thread(service.samples)
            ready = sum(value for labels, value in samples["expert_pager_router_workers"] if labels["state"] == "ready")
            held = {name: total for name in idle if (total := sum(value for _, value in samples[name]))}
            if ready < NUM_WORKERS:
                held["workers that are not ready"] = NUM_WORKERS - ready
    for name, value in held.items():
        tally.fail(f"{name} is {value:g} after all calls have ended")


def _calls(service: Service) -> Counter[str]:
    """Calls that the router has counted, by method."""
    counted: Counter[str] = Counter()
    for labels, value in service.samples()["expert_pager_router_requests_total"]:
        counted[labels["method"]] += int(value)
    return counted


def _check_calls(now: Counter[str], before: Counter[str], tally: Tally) -> None:
    """A call that was cancelled may not have arrived; every other is counted once."""
    for method, sent in tally.sent.items():
        counted = now[method] - before[method]
        if not tally.arrived[method] <= counted <= sent:
            certain = f"{tally.arrived[method]} certainly arrived"
            tally.fail(f"{method}: the router counted {counted} calls; {sent} were sent, {certain}")


@contextmanager
def _service(model: Path, folder: Path) -> Iterator[Service]:
    traces = folder / "traces"
    traces.mkdir()
    is_mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TRACE_BYTES}", "tmpfs", str(traces)], stderr=subprocess.DEVNULL
    ).returncode
    if not is_mounted:
        print("no file system could be mounted here, so that no disk fills up in this run")
    redis = RedisServer(folder)
    options = ["--workers", str(NUM_WORKERS), "--expert-memory", "25%", "--host-memory", "50%", "--port", "0"]
    options += ["--dtype", "float32"]  # where company cannot round a token to another one
    options += [
        "--http-port",
        "0",
        "--metrics-port",
        "0",
        "--json",
        "--trace",
        str(traces),
        "--file-sd",
        str(folder / "targets.json"),
    ]
    command = [sys.executable, "-m", "pager.cli", "serve", str(model), *options]
    env = os.environ | {
        "REDIS_URL": f"redis://127.0.0.1:{redis.port}/0",
        "EXPERT_PAGER_CLUSTER_NAMESPACE": NAMESPACE,
        "EXPERT_PAGER_POOLS_LEARN_CODEWORDS": "false",  # what traffic teaches changes pools, and tokens with them
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        if line is None:
            raise SystemExit(f"the service did not start:\n{(folder / 'log').read_text()}")
        yield Service(process, json.loads(line), folder, redis)
        process.send_signal(signal.SIGTERM)
        if status := process.wait(START_TIMEOUT_S):
            raise SystemExit(f"the service ended with status {status}:\n{(folder / 'log').read_text()[-4000:]}")
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate()
        redis.stop()
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(traces)], check=False)
        shutil.copy(folder / "log", Path(tempfile.gettempdir()) / "chaos.log")


def _print(tally: Tally) -> None:
    for (operation, outcome), count in sorted(tally.outcomes.items()):
        print(f"{operation:10} {outcome:45} {count}")
    for fault, count in sorted(tally.faults.items()):
        print(f"fault: {fault:24} {count}")
    calls = sum(tally.outcomes.values())
    print(f"{calls} calls, {sum(tally.faults.values())} faults, {len(tally.failures)} failures")


if __name__ == "__main__":
    typer.run(main)
