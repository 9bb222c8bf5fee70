"""What a rolling restart costs under load: hit rate before, while and after two workers are told to end, one at a time,
with their warm sets remembered and without.

python -m benchmarks.rolling_restart [MODEL]  about 3 minutes on 2 cores
python -m benchmarks.rolling_restart --quick  a smoke run that writes no file
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc

from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, quieten

MODEL = ROOT / "models" / "emo-tiny"
PROMPT = b"The parties agree as follows: "
NUM_WORKERS, NUM_CLIENTS = 2, 4
NUM_POOLS, ROUTED = 6, 8  # in use, and routed experts a layer of each
START_TIMEOUT_S = 300
PHASES = ("before", "during", "after")


@dataclass(frozen=True, slots=True)
class Answer:
    phase: str
    hits: int
    misses: int
    first_token_s: float


@dataclass(slots=True)
class Load:
    """Clients that send one request after the other, each with one of a few pools. Who restarts writes `phase`."""

    stub: Any
    pools: Sequence[pb.PoolPolicy]
    phase: str = "warm-up"
    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.is_over.set()
            for thread in threads:
                thread.join()

    def _ask(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self.is_over.is_set():
            request = pb.GenerateRequest(text=PROMPT, pool=draw.choice(self.pools))
            request.sampling.MergeFrom(pb.SamplingParams(max_tokens=16, ignore_eos=True))
            phase = self.phase
            try:
                *_, last = self.stub.Generate(request, timeout=START_TIMEOUT_S)
            except grpc.RpcError as error:
                self.errors.append(f"{error.code().name}: {error.details()}")
                time.sleep(0.1)
            else:
                usage = last.usage
                first_s = usage.time_to_first_token_seconds
                self.answers.append(Answer(phase, usage.experts_hit, usage.experts_missed, first_s))

    def hit_rate(self, phase: str) -> str:
        chosen = [answer for answer in self.answers if answer.phase == phase]
        lookups = sum(answer.hits + answer.misses for answer in chosen)
        return f"{100 * sum(answer.hits for answer in chosen) / lookups:.1f} %" if lookups else "no answers"

    def first_token_ms(self, phase: str) -> str:
        """The slowest tenth's bound."""
        times = sorted(answer.first_token_s for answer in self.answers if answer.phase == phase)
        return f"{1000 * times[int(0.9 * (len(times) - 1))]:.0f} ms" if times else "no answers"


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")] = MODEL,
    seconds: Annotated[float, typer.Option(min=1, help="Length of the time before, and of the time after.")] = 20.0,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure the dip of the hit rate that a rolling restart of two workers makes."""
    quieten()
    seconds = 2.0 if quick else seconds
    load = f"{NUM_CLIENTS} clients, {NUM_POOLS} pools of {ROUTED} routed experts a layer"
    report = Report("rolling_restart", f"{model.name}, {NUM_WORKERS} workers with 25 % each", conditions(load=load))
    report.start()
    with tempfile.TemporaryDirectory() as folder:
        kept = measure(model, seconds, Path(folder), {"EXPERT_PAGER_WORKERS_STATE": f"{folder}/state"})
        cold = measure(model, seconds, Path(folder), {})
    columns = ("warm set", *(f"hit rate {phase}" for phase in PHASES), *(f"first token {phase}" for phase in PHASES))
    rows = [
        [name, *map(load.hit_rate, PHASES), *map(load.first_token_ms, PHASES), str(len(load.errors))]
        for name, load in (("remembered", kept), ("forgotten", cold))
    ]
    notes = ["during: from the first SIGTERM until both new workers are ready; first token: nine in ten come sooner"]
    notes += sorted(set(kept.errors + cold.errors))
    report.add(Table("Rolling restart", (*columns, "lost"), rows, notes))
    if not quick:
        report.write(results)


def measure(model: Path, seconds: float, folder: Path, env: dict[str, str]) -> Load:
    with service(model, folder, env) as (process, address), grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.ExpertPagerStub(channel)

        def states() -> list[str]:
            return [worker.state for worker in stub.GetResidency(pb.GetResidencyRequest(), timeout=30).workers]

        all_ready = ["ready"] * NUM_WORKERS
        until(lambda: states() == all_ready)
        load = Load(stub, pools(stub))
        with load.running():
            time.sleep(seconds)
            load.phase = "before"
            time.sleep(seconds)
            load.phase = "during"
            for worker in workers_of(process):
                worker.send_signal(signal.SIGTERM)
                until(lambda worker=worker: not worker.is_running() and states() == all_ready)  # type: ignore[misc]
            load.phase = "after"
            time.sleep(seconds)
    return load


@contextmanager
def service(model: Path, folder: Path, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    options = [
        "--workers",
        str(NUM_WORKERS),
        "--expert-memory",
        "25%",
        "--port",
        "0",
        "--http-port",
        "0",
        "--metrics-port",
        "0",
        "--json",
    ]
    command = [sys.executable, "-m", "pager.cli", "serve", str(model), *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | env)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        if line is None:
            raise SystemExit(f"the service did not start:\n{(folder / 'log').read_text()}")
        yield process, json.loads(line)["address"]
    finally:
        process.terminate()
        process.communicate(timeout=START_TIMEOUT_S)


def pools(stub: Any) -> list[pb.PoolPolicy]:
    """The same for every run."""
    draw = random.Random(0)
    routed = [layer.routed for layer in stub.GetModel(pb.GetModelRequest(), timeout=30).pool_sizes.layers]

    def pool() -> pb.PoolPolicy:
        layers = [pb.LayerExperts(experts=sorted(draw.sample(range(each), min(ROUTED, each)))) for each in routed]
        return pb.PoolPolicy(experts=pb.FixedPool(layers=layers))

    return [pool() for _ in range(NUM_POOLS)]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "".join(child.cmdline()).startswith("ray::WorkerActor")]


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(grpc.RpcError):
            if condition():
                return
        if time.monotonic() > end_s:
            raise SystemExit(f"not within {START_TIMEOUT_S} s")
        time.sleep(0.05)


if __name__ == "__main__":
    typer.run(main)
