"""How much of the engine's speed reaches a client: tokens/s and first tokens through the whole service, over gRPC,
beside the engine in this process, by the number of streams in flight.

python -m benchmarks.service [MODEL]  about 6 minutes on 2 cores
python -m benchmarks.service --quick  a smoke run that writes no file
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import grpc.aio
import torch
import typer
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc

from benchmarks.engine_run import EngineRun, load_engine
from benchmarks.measure import alternate
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten
from pager.engine.interface import EngineLimits
from pager.memory import Budgets
from pager.types import PoolPolicy

MODEL = ROOT / "models" / "emo-tiny"
STREAMS = (1, 4, 16, 64, 256)
PROMPT_TOKENS = 64
KV_MEMORY = "256MiB"
START_TIMEOUT_S = 300
WAVES = {1: 12, 4: 8, 16: 8}  # by the number of streams: few take a quarter of a second, and vary by a third
UNCOUNTED_WAVES = 2
SMALLEST_SHARE, HELD_TO = 0.9, (1, 16, 64)  # of the engine's tokens/s, and with so many streams


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that were sent at once: all their tokens, until the last one's end, and when each one's first came."""

    num_tokens: int
    seconds: float
    first_token_s: Sequence[float]
    bytes_paged: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")] = MODEL,
    pairs: Annotated[int, typer.Option(min=1, help="Services and engines, all in new processes.")] = 4,
    waves: Annotated[int, typer.Option(min=1, help="Of each number of streams beside each service; more of few.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Of torch, here and in the worker. Default: its choice.")] = None,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure the service beside its engine."""
    quieten()
    if quick:
        pairs, waves, tokens = 1, 1, 4
    found = conditions()  # what else runs, before the service does
    run = Run(model, STREAMS[:2] if quick else STREAMS, waves, tokens, threads)
    with console.status("waves"):
        measured = [in_new_process(run) for _ in range(pairs)]
    report = Report(
        "service",
        f"{model.name}, bfloat16, exact, all experts in slots; {PROMPT_TOKENS} prompt tokens, answers of {tokens}",
        found | {"threads": f"{measured[0].threads} of torch in the worker, and in the engine beside it"},
    )
    report.start()
    report.add(table(measured))
    if not quick:
        report.write(results)


@dataclass(frozen=True, slots=True)
class Pair:
    """The waves of one engine and of one service that took turns, by the number of streams."""

    threads: int
    engine: Mapping[int, Sequence[Wave]]
    service: Mapping[int, Sequence[Wave]]

    def share(self, num_streams: int) -> float:
        """The service's tokens/s over the engine's, as the median of waves that ran one after the other."""
        turns = zip(self.service[num_streams], self.engine[num_streams], strict=True)
        return statistics.median(through.tokens_per_s / beside.tokens_per_s for through, beside in turns)


@dataclass(frozen=True, slots=True)
class Run:
    """Measures one pair when it is called, with the engine in the process that calls it."""

    model: Path
    streams: Sequence[int]
    num_waves: int
    num_tokens: int
    threads: int | None

    def __call__(self) -> Pair:
        quieten()
        most = max(self.streams)
        with tempfile.TemporaryDirectory() as folder, service(self.model, Path(folder), most, self.threads) as ready:
            torch.set_num_threads(ready["plan"]["num_threads"])
            budgets = Budgets(expert_memory="100%", host_memory=0, kv_memory=KV_MEMORY, max_running=most)
            limits = EngineLimits(max_running=most, prefix_cache=False)
            with (
                load_engine(self.model, torch.bfloat16, budgets, 4, limits=limits) as engine,
                closing(Client(ready["address"])) as client,
            ):
                found = {num_streams: self._take_turns(engine, client, num_streams) for num_streams in self.streams}
        return Pair(
            torch.get_num_threads(),
            {num_streams: waves["engine"] for num_streams, waves in found.items()},
            {num_streams: waves["service"] for num_streams, waves in found.items()},
        )

    def _take_turns(self, engine: EngineRun, client: Client, num_streams: int) -> dict[str, list[Wave]]:
        prompts = prompts_of(self.model, num_streams, PROMPT_TOKENS)
        ways: dict[str, Callable[[], Wave]] = {
            "engine": partial(in_process, engine, prompts, self.num_tokens),
            "service": partial(client.wave, prompts, self.num_tokens),
        }
        alternate(ways, UNCOUNTED_WAVES)
        return alternate(ways, max(self.num_waves, WAVES.get(num_streams, 0)) if self.num_waves > 1 else 1)


def in_new_process(run: Run) -> Pair:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run).result()


def table(pairs: Sequence[Pair]) -> Table:
    rows = []
    for num_streams in pairs[0].engine:
        shares = [pair.share(num_streams) for pair in pairs]
        verdict = "-" if num_streams not in HELD_TO else "ok" if statistics.median(shares) >= SMALLEST_SHARE else "less"
        engine = [wave for pair in pairs for wave in pair.engine[num_streams]]
        through = [wave for pair in pairs for wave in pair.service[num_streams]]
        rates = (figure([wave.tokens_per_s for wave in waves], 0) for waves in (engine, through))
        firsts = (f"{value:.0f}" for waves in (engine, through) for value in first_tokens_ms(waves))
        rows.append((str(num_streams), *rates, figure(shares, 2), verdict, *firsts))
    columns = (
        *("streams", "engine tokens/s", "service tokens/s", "service / engine", f"at least {SMALLEST_SHARE}"),
        *("engine first token ms, p50", "p99", "service first token ms, p50", "p99"),
    )
    notes = (
        "All requests of a wave are sent at once; tokens/s count from there to the last one's end, prompts included.",
        "The client has one connection and runs in the engine's process, on the same cores as router and worker.",
        f"{len(pairs)} pairs of a service and an engine, all in new processes: one process computes the same up to a "
        "tenth faster than another one, for as long as it lives.",
        f"A pair's waves take turns, after {UNCOUNTED_WAVES} that are not counted. The share is the median of the "
        "pairs' own medians; p50 and p99 are over all requests.",
    )
    return Table("Streams in flight", columns, rows, notes)


def in_process(engine: EngineRun, prompts: Sequence[Sequence[int]], num_tokens: int) -> Wave:
    started_s = time.perf_counter()
    open_requests = {engine.submit(prompt, num_tokens, PoolPolicy()) for prompt in prompts}
    waiting_for_first, firsts = set(open_requests), []
    while open_requests:
        for delivered_s, chunk in engine.timed_step():
            if chunk.request_id in waiting_for_first:
                waiting_for_first.remove(chunk.request_id)
                firsts.append(delivered_s - started_s)
            if chunk.usage is not None:
                open_requests.remove(chunk.request_id)
    return Wave(len(prompts) * num_tokens, time.perf_counter() - started_s, firsts)


class Client:
    """One connection to the service."""

    def __init__(self, address: str) -> None:
        # A collection of all that torch has imported here takes a quarter of a second, in which nothing is received.
        gc.collect()
        gc.freeze()
        self._loop = asyncio.new_event_loop()
        self._channel = self._loop.run_until_complete(self._connect(address))
        self._stub: Any = pb_grpc.ExpertPagerStub(self._channel)

    def wave(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        pool: Mapping[str, Any] | None = None,
        arrivals_s: Sequence[float] | None = None,
    ) -> Wave:
        """Sends all requests at once, or at these times after the start.

        `pool` has the fields of their PoolPolicy, without which they are exact.
        """
        return self._loop.run_until_complete(self._wave(prompts, num_tokens, pool, arrivals_s or [0.0] * len(prompts)))

    def close(self) -> None:
        self._loop.run_until_complete(self._channel.close(None))
        self._loop.close()

    @staticmethod
    async def _connect(address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address)

    async def _wave(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        pool: Mapping[str, Any] | None,
        arrivals_s: Sequence[float],
    ) -> Wave:
        async def arrive(prompt: Sequence[int], arrival_s: float) -> tuple[float, int]:
            await asyncio.sleep(arrival_s)
            sent_s = time.perf_counter()
            first_s, nbytes = await self._answer(prompt, num_tokens, pool)
            return first_s - sent_s, nbytes

        started_s = time.perf_counter()
        answers = await asyncio.gather(*map(arrive, prompts, arrivals_s))
        seconds = time.perf_counter() - started_s
        firsts = [first_s for first_s, _ in answers]
        return Wave(len(prompts) * num_tokens, seconds, firsts, sum(nbytes for _, nbytes in answers))

    async def _answer(
        self, prompt: Sequence[int], num_tokens: int, pool: Mapping[str, Any] | None
    ) -> tuple[float, int]:
        """Returns when the first token of an answer came, which is read to its end, and the bytes paged for it."""
        sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        policy = None if pool is None else pb.PoolPolicy(**pool)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, pool=policy)
        first_s, num_received, nbytes = 0.0, 0, 0
        async for message in self._stub.Generate(request):
            first_s = first_s or time.perf_counter()
            num_received += len(message.token_ids)
            nbytes += message.usage.bytes_from_disk + message.usage.bytes_from_host
        assert num_received == num_tokens, f"{num_received} tokens instead of {num_tokens}"
        return first_s, nbytes


@contextmanager
def service(
    model: Path,
    folder: Path,
    max_running: int,
    threads: int | None,
    expert_memory: str = "100%",
    *,
    in_place: bool = True,
) -> Iterator[dict[str, Any]]:
    """Starts the real one, and gives what it says when it is ready."""
    options = {
        "WORKERS_EXPERT_MEMORY": expert_memory,
        "WORKERS_HOST_MEMORY": "0",
        "WORKERS_IN_PLACE": str(in_place).lower(),
        "WORKERS_KV_MEMORY": KV_MEMORY,
        "WORKERS_MAX_RUNNING": str(max_running),
        "WORKERS_PREFIX_CACHE": "false",  # the waves are the same prompts again
        "ROUTER_MAX_REQUESTS_PER_TENANT": str(max(max_running, min(4 * max_running, 256))),  # some wait
    }
    if threads is not None:
        options["WORKERS_NUM_THREADS"] = str(threads)
    with serving([str(model)], folder, {f"EXPERT_PAGER_{name}": value for name, value in options.items()}) as (
        _,
        ready,
    ):
        yield ready


@contextmanager
def serving(
    words: Sequence[str], folder: Path, options: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Starts `serve` on free ports, its log in `folder`, and gives its process and what it says when it is ready."""
    ports = ("--port", "0", "--http-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "pager.cli", "serve", *words, *ports, "--json"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | options)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        if line is None:
            raise SystemExit(f"the service did not start:\n{(folder / 'log').read_text()}")
        yield process, json.loads(line)
    finally:
        process.terminate()
        process.communicate(timeout=START_TIMEOUT_S)


def first_tokens_ms(waves: Sequence[Wave]) -> tuple[float, float]:
    """Median and 99th percentile."""
    times = sorted(1e3 * first_s for wave in waves for first_s in wave.first_token_s)
    return statistics.median(times), times[round(0.99 * (len(times) - 1))]


if __name__ == "__main__":
    typer.run(main)
