"""`expert-pager serve` as a process, and a client that talks to it over its sockets like anybody else's would."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

import pager
from pager import Client
from tests.support import waiting
from tests.support.files import EMO_TINY
from tests.support.processes import command, environment, process_name, worker_pids

MODEL = EMO_TINY
SERVICE_NAME = "expert_pager.v1.ExpertPager"
START_TIMEOUT_S = 120  # the machine may be busy; how long a start takes is printed, and asserted in one place
SERVING = health_pb2.HealthCheckResponse.SERVING
NUM_CORES = psutil.cpu_count() or 1
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    usage: pb.Usage


@dataclass(frozen=True)
class Refusal:
    """What a client gets to know of an error."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str | None
    retry_s: float | None


Labels = tuple[tuple[str, str], ...]


class Metrics(dict[tuple[str, Labels], float]):
    """One scrape: (sample name, labels) to value."""

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of that name and, at least, those labels. There must be one."""
        wanted = labels.items()
        found = [value for (sample, given), value in self.items() if sample == name and wanted <= dict(given).items()]
        assert found, f"no series {name} {labels}"
        return sum(found)


@dataclass
class Service:
    """A running service. Calls are those of a client; processes and files are looked at from outside."""

    process: subprocess.Popen[bytes]
    folder: Path
    ready: dict[str, Any]
    ready_after_s: float
    others_s: float  # of these, what the machine worked for others
    namespace: str
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.ready["address"])
        self.stub: Any = pb_grpc.ExpertPagerStub(self.channel)

    @property
    def plan(self) -> dict[str, Any]:
        return dict(self.ready["plan"])

    @cached_property
    def routed_per_layer(self) -> list[int]:
        with self.client() as client:
            return list(client.model().facts.routed_per_layer)

    def random_pool(self, seed: int, size: int) -> pb.PoolPolicy:
        """A fixed pool of so many routed experts in every layer, another one for every seed."""
        draw = random.Random(seed)
        layers = [sorted(draw.sample(range(routed), size)) for routed in self.routed_per_layer]
        return pb.PoolPolicy(experts=pb.FixedPool(layers=[pb.LayerExperts(experts=layer) for layer in layers]))

    @property
    def log(self) -> str:
        """All that the service has written: its own output, and the workers', which Ray passes on to it."""
        return "".join((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))

    # --- calls ------------------------------------------------------------------------------------------------------

    def client(self, tenant: str = "default") -> Client:
        """The client that users have, to be used as a context. `open` and `stub` show what is on the wire."""
        return Client(self.ready["address"], tenant=tenant, timeout_s=120)

    def open(
        self,
        prompt: str | bytes | Sequence[int],
        *,
        tenant: str | None = None,
        pool: pb.PoolPolicy | int | None = None,
        request_id: str = "",
        model: str = "",
        timeout: float | None = 120,
        channel: grpc.Channel | None = None,
        **sampling: Any,
    ) -> Any:
        """Starts Generate. An int is a pool of so many routed experts a layer, None the service's default."""
        request = pb.GenerateRequest(request_id=request_id, model=model, **prompt_fields(prompt))
        request.sampling.MergeFrom(pb.SamplingParams(**{"ignore_eos": True, **sampling}))
        if pool is not None:
            request.pool.CopyFrom(pb.PoolPolicy(count=pool) if isinstance(pool, int) else pool)
        stub: Any = self.stub if channel is None else pb_grpc.ExpertPagerStub(channel)
        return stub.Generate(request, timeout=timeout, metadata=() if tenant is None else (("x-tenant-id", tenant),))

    def generate(self, prompt: str | bytes | Sequence[int], **options: Any) -> Answer:
        return read(self.open(prompt, **options))

    def refusal(self, prompt: str | bytes | Sequence[int], **options: Any) -> Refusal:
        """How Generate fails; a call that succeeds is a failed test."""
        with pytest.raises(grpc.RpcError) as caught:
            self.generate(prompt, **options)
        return self.refusal_of(caught.value)

    @staticmethod
    def refusal_of(error: Any) -> Refusal:
        """What an error tells. ErrorInfo has to be there."""
        status = rpc_status.from_call(error)
        assert status is not None, f"{error.code()} without details: {error.details()}"
        details: dict[type, Any] = {}
        for kind in (ErrorInfo, RetryInfo, BadRequest):
            for packed in status.details:
                if packed.Is(kind.DESCRIPTOR):
                    details[kind] = kind()
                    packed.Unpack(details[kind])
        assert details[ErrorInfo].domain == "expert-pager"
        retry, bad = details.get(RetryInfo), details.get(BadRequest)
        return Refusal(
            error.code(),
            error.details(),
            details[ErrorInfo].reason,
            bad.field_violations[0].field if bad else None,
            retry.retry_delay.ToMilliseconds() / 1000 if retry else None,
        )

    def health(self, name: str = SERVICE_NAME) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30).status)

    def residency(self) -> dict[str, pb.WorkerResidency]:
        workers = self.stub.GetResidency(pb.GetResidencyRequest(), timeout=30).workers
        return {worker.worker: worker for worker in workers}

    # --- from outside -------------------------------------------------------------------------------------------------

    def targets(self) -> dict[str, str]:
        """Metrics addresses by worker id, and of the router as "router", from the file_sd file."""
        groups = json.loads((self.folder / "targets.json").read_text())
        return {group["labels"].get("worker", "router"): group["targets"][0] for group in groups}

    def metrics(self, target: str) -> Metrics:
        return scrape(self.targets()[target])

    def worker_metrics(self) -> Metrics:
        """Of all workers together."""
        found = Metrics()
        for target in self.targets():
            if target != "router":
                for key, value in self.metrics(target).items():
                    found[key] = found.get(key, 0.0) + value
        return found

    def worker_pids(self) -> list[int]:
        return worker_pids(self.process.pid)

    def processes(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def command_lines(self) -> str:
        """Of all its processes; some of Ray's come and go."""
        return " ".join(map(process_name, self.processes()))

    def settled(self, *names: str) -> list[float]:
        """What the workers have counted, once it has stood still: experts asked for ahead come after their request."""
        before, found = None, [self.worker_metrics().total(name) for name in names]
        while found != before:
            time.sleep(1)
            before, found = found, [self.worker_metrics().total(name) for name in names]
        return found

    def is_idle(self) -> bool:
        """No request anywhere, and nothing held for one."""
        router, worker = self.metrics("router"), self.worker_metrics()
        return (
            router.total("expert_pager_router_requests_in_flight") == 0
            and router.total("expert_pager_router_tokens_in_flight") == 0
            and worker.total("expert_pager_requests_running") == 0
            and worker.total("expert_pager_requests_waiting") == 0
            and worker.total("expert_pager_kv_used_bytes") == 0
            and worker.total("expert_pager_pinned_bytes", tier="device") == 0
            and worker.total("expert_pager_reserved_bytes", tier="device") == 0
        )

    def wait_until_idle(self, seconds: float = START_TIMEOUT_S) -> None:
        until(self.is_idle, seconds)

    def wait_until_ready(self, num_workers: int = 1) -> None:
        def is_ready() -> bool:
            workers = self.residency().values()
            return sum(worker.state == "ready" for worker in workers) >= num_workers and self.health() == SERVING

        until(is_ready, 120)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


# --- pieces that tests use by themselves ------------------------------------------------------------------------------


def prompt_fields(prompt: str | bytes | Sequence[int]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt.encode()}
    if isinstance(prompt, bytes):
        return {"text": prompt}
    return {"token_ids": pb.TokenIds(ids=prompt)}


def read(call: Any) -> Answer:
    """All of a stream. Only its last message has a usage."""
    messages = list(call)
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    tokens = [token for message in messages for token in message.token_ids]
    return Answer(tokens, "".join(message.text for message in messages), messages[-1].usage)


def scrape(address: str) -> Metrics:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return Metrics({(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples})


def busy_s() -> float:
    """Seconds that the machine's cores have worked for anybody, or been lent to other machines, each on average."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal) / NUM_CORES


def worked_s(process: psutil.Process) -> float:
    """The part of these that went to a process and those below it."""
    found = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = each.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found / NUM_CORES


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Polls; what is not there yet (a socket, a file, a process) counts as not fulfilled."""
    waiting.until(condition, seconds, absent=(OSError, grpc.RpcError, psutil.Error))


@contextlib.contextmanager
def serving(folder: Path, *arguments: object, **env: str) -> Iterator[Service]:
    """`expert-pager serve ARGUMENTS` on free ports. Ended, with all that it has started, if the test did not do it."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = ("--port", 0, "--http-port", 0, "--metrics-port", 0, "--file-sd", folder / "targets.json", "--json")
    namespace = env.setdefault("EXPERT_PAGER_CLUSTER_NAMESPACE", f"e2e-{os.getpid()}-{folder.name}")
    # Most tests compare with a pool that the prompt chooses; the shipped model has a codebook, which is the default.
    env.setdefault("EXPERT_PAGER_POOLS_DEFAULT_SOURCE", "prefill")
    started_s, busy_before_s = time.monotonic(), busy_s()
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            command("serve", *arguments, "--device", "cpu", *ports), env=environment(env), stdout=out, stderr=err
        )
    service = None
    try:
        until(lambda: (folder / "stdout").read_bytes().endswith(b"\n") or process.poll() is not None, START_TIMEOUT_S)
        line = (folder / "stdout").read_text()
        assert line.startswith("{"), (folder / "stderr").read_text()
        others_s = max(0.0, busy_s() - busy_before_s - worked_s(psutil.Process(process.pid)))
        service = Service(process, folder, json.loads(line), time.monotonic() - started_s, others_s, namespace)
        after = f"ready after {service.ready_after_s:.1f} s, {others_s:.1f} of them others'"
        print(f"\n{after}: {' '.join(map(str, arguments))}")
        yield service
    finally:
        if service is not None:
            service.channel.close()
        if process.poll() is None:
            left = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for each in left:
                with contextlib.suppress(psutil.Error):
                    each.kill()
            process.wait()
    check_output(folder, env)


def check_output(folder: Path, env: Mapping[str, str]) -> None:
    """Whatever has happened: stdout has the one line of JSON that was promised, and the log no colours."""
    assert (folder / "stdout").read_text().count("\n") == 1
    log = (folder / "stderr").read_text(errors="replace")
    assert "\x1b" not in log
    assert "(raylet" not in log
    assert "(WorkerActor" not in log
    if env.get("EXPERT_PAGER_LOG_FORMAT") == "json":
        assert all(isinstance(json.loads(line), dict) for line in log.splitlines())


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model() -> Path:
    return MODEL


@pytest.fixture(scope="session", name="until")
def until_fixture() -> Callable[..., None]:
    return until


@pytest.fixture(scope="session")
def serve(ray_runtime: None) -> Callable[..., Any]:
    """Starts a service: `with serve(folder, *arguments, **environment) as service:`."""
    return serving


@pytest.fixture(scope="session")
def service(ray_runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One worker on the shipped model in fp32, with room for a quarter of its experts. Most tests share it."""
    with serving(
        tmp_path_factory.mktemp("e2e") / "service",
        *(MODEL, "--dtype", "float32", "--expert-memory", "25%"),
        EXPERT_PAGER_ROUTER_STREAM_BUFFER_CHUNKS="64",
        EXPERT_PAGER_ROUTER_WRITE_TIMEOUT_S="3",
        EXPERT_PAGER_WORKERS_STEP_TIMEOUT_S="6",
    ) as running:
        yield running
        # It idled for minutes while other modules had services of their own.
        assert "but its process is well" not in running.log, "an idle stream to a worker was broken"


@pytest.fixture
def idle_service(service: Service) -> Iterator[Service]:
    """The shared service; the test has to leave nothing in flight on it."""
    service.wait_until_idle()
    yield service
    service.wait_until_idle()


@pytest.fixture(scope="session")
def reference() -> Iterator[Callable[..., list[int]]]:
    """`reference(prompt ids, max_tokens, pool_size=None)`: what the library's `generate` makes of it, in fp32."""
    loaded: dict[object, Any] = {}

    def generate(prompt_ids: Sequence[int], max_tokens: int, pool_size: int | str | None = None) -> list[int]:
        if pool_size not in loaded:
            loaded[pool_size] = pager.load_model(MODEL, dtype="float32", expert_memory="50%", pool_size=pool_size)
            loaded[pool_size].generation_config.eos_token_id = None
        inputs = torch.tensor([list(prompt_ids)])
        output = loaded[pool_size].generate(inputs, max_new_tokens=max_tokens, do_sample=False)
        return list(map(int, output[0, inputs.shape[1] :]))

    yield generate
    for model in loaded.values():
        model.expert_paging.close()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="session")
def run(new_process: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(*arguments, **environment)`: expert-pager to its end."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*arguments), env=environment(env), capture_output=True, text=True, timeout=180)

    return run


@pytest.fixture(scope="session")
def launch(ray_runtime: None) -> Callable[..., psutil.Popen]:
    """`launch(*arguments, **environment)`: expert-pager as a process, all its output in one pipe of text."""

    def launch(*arguments: object, **env: str) -> psutil.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return psutil.Popen(command(*arguments), env=environment(env), **pipes)

    return launch
