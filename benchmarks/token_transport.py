"""What the way from a worker's engine to a router's readers adds to a token: `python -m benchmarks.token_transport`.

Another process plays the worker: its engine's thread delivers a step of one chunk for every open stream, stamped with
the clock that all processes of the machine share, and the readers of this process subtract. `direct` is the same
hand-over from a thread to readers within this process, without a socket: what any server with an engine thread pays.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from expert_pager.v1 import worker_pb2 as pb

from benchmarks.report import RESULTS, Report, Table, conditions, quieten
from pager.cluster.tokens import AnswerStream, TokenServer, WorkerLink
from pager.threads import LoopThread
from pager.types import FinishReason, GenerateRequest, PagingCounts, PoolPolicy, SamplingParams, TokenChunk, Usage

WARM_UP_STEPS = 20
TOKEN = "benchmark"
LAST = Usage("exact", FinishReason.LENGTH, 1, 1, None, PagingCounts(), 0.0, None, 0.0, 0.0, "")


@dataclass(frozen=True, slots=True)
class Load:
    """`is_busy`: the engine's thread computes small products between its deliveries instead of sleeping."""

    num_streams: int
    num_steps: int
    step_s: float
    is_busy: bool


def main() -> None:
    arguments = _arguments()
    quieten()
    num_streams, num_steps = arguments.streams, 60 if arguments.quick else arguments.steps
    report = Report(
        "token_transport",
        f"What the way from an engine to {num_streams} readers adds to each token.",
        conditions(load=f"{num_streams} streams, {num_steps} steps, one every {arguments.step_ms:g} ms"),
    )
    report.start()
    for is_busy in (False, True):
        load = Load(num_streams, num_steps, arguments.step_ms / 1000, is_busy)
        report.add(_table(load))
    if not arguments.quick:
        report.write(arguments.results)


def _table(load: Load) -> Table:
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "direct (no socket)": asyncio.run(direct(load)),
            "TCP": asyncio.run(through(load, "127.0.0.1:0")),
            "a unix socket": asyncio.run(through(load, f"unix:{folder}/worker.sock")),
        }
    base = statistics.median(ways["direct (no socket)"])
    rows = [
        [name, *(f"{value:.3f}" for value in _quantiles(times)), f"{statistics.median(times) - base:.3f}"]
        for name, times in ways.items()
    ]
    return Table(
        f"From the sink to the reader, ms; the engine {'computes' if load.is_busy else 'sleeps'} between steps",
        ("way", "median", "p90", "p99", "added at the median"),
        rows,
        notes=("TCP over the loopback is what a worker uses.",),
    )


# --- the worker's side ----------------------------------------------------------------------------------------------


class Pulse:
    """An engine that waits for `num_streams` requests, then has a token for each of them in every step."""

    def __init__(self, load: Load, sink: Callable[[Sequence[TokenChunk]], None]) -> None:
        self._load = load
        self._sink = sink
        self._requests: list[GenerateRequest] = []

    def submit(self, request: GenerateRequest) -> None:
        self._requests.append(request)
        if len(self._requests) == self._load.num_streams:
            threading.Thread(target=self.run, daemon=True).start()

    def cancel(self, request_id: str, tenant: str) -> bool:
        return False

    def run(self) -> None:
        next_s = time.monotonic()
        for step in range(self._load.num_steps):
            next_s += self._load.step_s
            _pass_time_until(next_s, self._load.is_busy)
            usage = LAST if step == self._load.num_steps - 1 else None
            stamp = str(time.monotonic_ns())
            self._sink([TokenChunk(each.id, (step,), stamp, usage, each.tenant) for each in self._requests])


def _pass_time_until(moment_s: float, is_busy: bool) -> None:
    if not is_busy:
        time.sleep(max(0.0, moment_s - time.monotonic()))
        return
    factor = torch.rand(128, 128)
    while time.monotonic() < moment_s:
        torch.mm(factor, factor)


def play_worker(pipe: Connection, bind: str, load: Load) -> None:
    """Runs in a process of its own until the pipe closes."""
    torch.set_num_threads(1)
    loop = LoopThread("tokens")
    server = TokenServer(TOKEN)
    pipe.send(loop.run(server.start(bind, Pulse(load, server.deliver), pb.Load)))
    pipe.recv()
    loop.run(server.stop())
    loop.stop()


# --- the router's side ----------------------------------------------------------------------------------------------


async def through(load: Load, bind: str) -> list[float]:
    """Milliseconds of every chunk, through the token transport."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    worker = spawn.Process(target=play_worker, args=(there, bind, load))
    worker.start()
    address = await asyncio.to_thread(here.recv)
    link = WorkerLink(address, TOKEN, buffer_chunks=load.num_steps, on_load=lambda _: None)
    await link.attach()
    times = await _read_all([link.generate(_request(f"stream-{index}")) for index in range(load.num_streams)])
    await link.close()
    here.send(None)
    await asyncio.to_thread(worker.join)
    return times


async def direct(load: Load) -> list[float]:
    """Milliseconds of every chunk, from a thread of this process."""
    loop = asyncio.get_running_loop()
    requests = [_request(str(number)) for number in range(load.num_streams)]
    answers = {request.id: AnswerStream(request, load.num_steps) for request in requests}

    def dispatch(chunks: Sequence[TokenChunk]) -> None:
        for chunk in chunks:
            answers[chunk.request_id].push(chunk)

    def sink(chunks: Sequence[TokenChunk]) -> None:
        loop.call_soon_threadsafe(dispatch, chunks)

    pulse = Pulse(load, sink)
    for request in requests:
        pulse.submit(request)
    return await _read_all(list(answers.values()))


async def _read_all(streams: Sequence[AsyncIterator[TokenChunk]]) -> list[float]:
    return [value for times in await asyncio.gather(*map(_read, streams)) for value in times]


async def _read(stream: AsyncIterator[TokenChunk]) -> list[float]:
    times = [(time.monotonic_ns() - int(chunk.text)) / 1e6 async for chunk in stream]
    return times[WARM_UP_STEPS:]


def _request(name: str) -> GenerateRequest:
    return GenerateRequest(name, "t", (1,), SamplingParams(), PoolPolicy())


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=100)
    return cuts[49], cuts[89], cuts[98]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16, metavar="N")
    parser.add_argument("--steps", type=int, default=500, metavar="N")
    parser.add_argument("--step-ms", type=float, default=20.0, metavar="MS")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes no file")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    main()
