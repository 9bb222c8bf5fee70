"""What server-sent events cost beside gRPC: the same requests to the same service, by the number of streams in flight.

python -m benchmarks.http_front [MODEL]  about 2 minutes on 2 cores
python -m benchmarks.http_front --streams 256 --rounds 5  one row of the table, with more repeats
python -m benchmarks.http_front --quick  a smoke run that writes no file
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import grpc.aio
import typer
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc

from benchmarks.measure import alternate
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from benchmarks.service import PROMPT_TOKENS, service

MODEL = ROOT / "models" / "emo-tiny"
STREAMS = (1, 64, 256)
SMALLEST_SHARE, MOST_ADDED_MS = 0.95, 1.0
EVENT = b"data: {"


@dataclass(frozen=True, slots=True)
class Stream:
    """When the first and the last token of an answer came."""

    first_s: float
    last_s: float
    num_tokens: int

    @property
    def token_ms(self) -> float:
        return 1e3 * (self.last_s - self.first_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that were sent at once, and how long all of them took."""

    streams: Sequence[Stream]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(stream.num_tokens for stream in self.streams) / self.seconds


Read = Callable[[Sequence[int], int], Awaitable[Stream]]


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")] = MODEL,
    streams: Annotated[list[int] | None, typer.Option(min=1, help="In flight at once; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Of torch in the worker. Default: its choice.")] = None,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure the HTTP front beside gRPC."""
    quieten()
    counts, rounds, tokens = (STREAMS[:1], 1, 4) if quick else (streams or STREAMS, rounds, tokens)
    found = conditions()  # what else runs, before the service does
    with tempfile.TemporaryDirectory() as folder, service(model, Path(folder), max(counts), threads) as ready:
        report = Report(
            "http_front",
            f"{model.name}, bfloat16, exact, all experts in slots; {PROMPT_TOKENS} prompt tokens, answers of {tokens}",
            found | {"threads": f"{ready['plan']['num_threads']} of torch in the worker"},
        )
        report.start()
        with asyncio.Runner() as runner, console.status("waves"):
            grpc_reader = runner.run(GrpcReader.connected(ready["address"]))
            http_reader = HttpReader(ready["http_url"])
            reads = {"gRPC": grpc_reader.read, "SSE": http_reader.read}
            report.add(table(runner, model, reads, counts, rounds, tokens))
            runner.run(grpc_reader.close())
    if not quick:
        report.write(results)


def table(
    runner: asyncio.Runner,
    model: Path,
    reads: Mapping[str, Read],
    streams: Sequence[int],
    num_rounds: int,
    num_tokens: int,
) -> Table:
    rows = []
    for num_streams in streams:
        prompts = prompts_of(model, num_streams, PROMPT_TOKENS)

        def run(read: Read, prompts: Sequence[Sequence[int]] = prompts) -> Wave:
            return runner.run(wave(read, prompts, num_tokens))

        ways = {name: partial(run, read) for name, read in reads.items()}
        for each in ways.values():
            each()
        found = alternate(ways, num_rounds)
        rates = {name: [each.tokens_per_s for each in waves] for name, waves in found.items()}
        token_ms = {
            name: statistics.median(stream.token_ms for each in waves for stream in each.streams)
            for name, waves in found.items()
        }
        share = statistics.median(rates["SSE"]) / statistics.median(rates["gRPC"])
        added_ms = token_ms["SSE"] - token_ms["gRPC"]
        verdict = "ok" if share >= SMALLEST_SHARE and added_ms <= MOST_ADDED_MS else "less"
        figures = (*(figure(rates[name], 0) for name in reads), ratio(rates["SSE"], rates["gRPC"]))
        rows.append(
            (str(num_streams), *figures, *(f"{token_ms[name]:.2f}" for name in reads), f"{added_ms:.2f}", verdict)
        )
    columns = (
        *("streams", "gRPC tokens/s", "SSE tokens/s", "SSE / gRPC", "gRPC ms a token", "SSE ms a token", "added ms"),
        f"{SMALLEST_SHARE} and {MOST_ADDED_MS:g} ms",
    )
    notes = (
        "All requests of a wave are sent at once; tokens/s count from there to the last one's end, prompts included.",
        "ms a token: from an answer's first token to its last, by their number; the median over all answers.",
        "The client runs in one process on the same cores. gRPC has one connection; HTTP has one for each stream, and "
        "its events are counted and not parsed.",
        f"{num_rounds} rounds that take turns, after one of each that is not counted.",
    )
    return Table("Streams in flight", columns, rows, notes)


async def wave(read: Read, prompts: Sequence[Sequence[int]], num_tokens: int) -> Wave:
    started_s = time.perf_counter()
    streams = await asyncio.gather(*(read(prompt, num_tokens) for prompt in prompts))
    assert all(stream.num_tokens == num_tokens for stream in streams)
    return Wave(streams, time.perf_counter() - started_s)


class GrpcReader:
    """Reads answers over one connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub: Any = pb_grpc.ExpertPagerStub(channel)

    @classmethod
    async def connected(cls, address: str) -> GrpcReader:
        return cls(grpc.aio.insecure_channel(address))

    async def close(self) -> None:
        await self._channel.close(None)

    async def read(self, prompt: Sequence[int], num_tokens: int) -> Stream:
        sampling = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
        first_s = last_s = 0.0
        num_received = 0
        async for message in self._stub.Generate(request):
            last_s = time.perf_counter()
            first_s = first_s or last_s
            num_received += len(message.token_ids)
        return Stream(first_s, last_s, num_received)


class HttpReader:
    """Reads answers as server-sent events, each over a connection of its own."""

    def __init__(self, url: str) -> None:
        self._place = urlsplit(url)

    async def read(self, prompt: Sequence[int], num_tokens: int) -> Stream:
        sampling = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({"model": "", "prompt": list(prompt), **sampling}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._place.netloc}\r\ncontent-length: {len(body)}\r\n"
        reader, writer = await asyncio.open_connection(self._place.hostname, self._place.port)
        writer.write(f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + body)
        first_s = last_s = 0.0
        num_events, rest = 0, b""
        while data := await reader.read(1 << 16):
            seen = rest + data
            if found := seen.count(EVENT):
                last_s = time.perf_counter()
                first_s = first_s or last_s
                num_events += found
            rest = seen[-(len(EVENT) - 1) :]
        writer.close()
        return Stream(first_s, last_s, num_events)


if __name__ == "__main__":
    typer.run(main)
