"""The simulator's forecast beside the truth: two workers on one machine, all at once and by Poisson arrivals.

python -m benchmarks.simulator [MODEL]  about 4 minutes on 2 cores
python -m benchmarks.simulator --quick  a smoke run that writes no file
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, quieten
from benchmarks.service import service
from pager.client import AsyncClient
from pager.errors import PagerError
from pager.lab.simulate import SERVICE, Arrival, Costs, Outcome, Simulation
from pager.lab.traffic import Drawn, Pools, measure
from pager.types import ExpertPool, PoolAsk, SamplingParams, Share

MODEL = ROOT / "models" / "emo-tiny"
NUM_WORKERS = 2
MAX_RUNNING = 32  # as the service has it where nothing else is asked for
NUM_POOLS = 12
LOAD = 0.7  # of the tokens/s that the service has with everything sent at once
PAUSE_S = 1.0  # between two traces
GOAL = 0.20


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with a codebook.")] = MODEL,
    memory: Annotated[str, typer.Option(help="Of a worker, for experts.")] = "25%",
    requests: Annotated[int, typer.Option(min=8, max=128, help="Of each trace.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Traces of each kind.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="How often the service gets all of them.")] = 4,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure what the simulator is off by."""
    quieten()
    os.environ["EXPERT_PAGER_WORKERS_COUNT"] = str(NUM_WORKERS)
    requests, rounds, repeats = (8, 1, 1) if quick else (requests, rounds, repeats)
    gc.collect()
    gc.freeze()  # a collection of what is imported here takes a quarter of a second, in which nothing is received
    pools, found = Pools.of(model, Share(0.125)), conditions()
    by_digest = {pool.digest: pool for pool in list(pools.codewords.values())[:NUM_POOLS]}  # as the router names them
    with (
        tempfile.TemporaryDirectory() as folder,
        service(model, Path(folder), MAX_RUNNING, None, memory) as ready,
    ):
        report = Report(
            "simulator",
            f"{model.name}, bfloat16, {NUM_WORKERS} workers with {memory} of the experts each, pools of 12.5 %",
            found | {"threads": f"{ready['plan']['num_threads']} of torch in each worker"},
        )
        report.start()
        with console.status("measuring what work costs"):
            workers = asyncio.run(_workers(ready["address"]))
            costs = replace(measure(ready["address"], pools), max_running=MAX_RUNNING)
        console.print(asdict(costs))
        drawn = [Drawn(requests, 8, 1.0, burst_share=0.0, seed=number) for number in range(1, 2 * rounds + 1)]
        at_once = [[replace(each, at_s=0.0) for each in one.arrivals(list(by_digest))] for one in drawn[:rounds]]

        simulation, ended_s = Simulation(by_digest, costs, workers), 0.0

        def forecast_of(trace: Sequence[Arrival]) -> Outcome:
            """After the traces before, as in the service: workers hold what they held."""
            nonlocal ended_s
            outcome = simulation.run([replace(each, at_s=ended_s + each.at_s) for each in trace])
            ended_s = outcome.ended_s + PAUSE_S
            return outcome

        def compared(traces: Sequence[Sequence[Arrival]], num_repeats: int = 1) -> tuple[Outcome, list[Outcome]]:
            truths = [
                _together([_truth(ready["address"], trace, by_digest) for trace in traces]) for _ in range(num_repeats)
            ]
            return _together([forecast_of(trace) for trace in traces]), truths

        warm = [Arrival(0.0, "t0", pool, 16, 2) for pool in by_digest]
        compared([warm])  # slots are full in both, as what the service has from its measuring is not forecast
        with console.status("all at once"):
            forecast, truths = compared(at_once, repeats)
        rows = _rows("all at once", forecast, truths)
        per_s = LOAD * statistics.median(each.tokens_per_s for each in truths) / drawn[0].output_tokens
        with console.status("one by one"):
            rows += _rows(
                f"{per_s:.1f} requests/s",
                *compared([replace(one, per_s=per_s).arrivals(list(by_digest)) for one in drawn[rounds:]], repeats),
            )
        report.add(_table(rows, rounds, requests, repeats, costs))
    if not quick:
        report.write(results)


def _table(rows: Sequence[tuple[str, ...]], rounds: int, requests: int, repeats: int, costs: Costs) -> Table:
    notes = (
        f"{rounds} traces of each kind, of {requests} requests for {NUM_POOLS} codewords by Zipf's law, prompts of 32 "
        "to 96 tokens, answers likewise; tokens/s and percentiles are those of all together.",
        f"The service got all of them {repeats} times. The truth is the median of what each time gave, and the last "
        "column the least and most over it: how well the truth itself repeats.",
        "Costs, measured against the same service before: "
        + ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items()),
    )
    columns = ("traffic", "figure", "forecast", "truth", "forecast / truth", f"within {GOAL:.0%}", "truth / truth")
    return Table("Forecast and truth", columns, rows, notes)


def _rows(name: str, forecast: Outcome, truths: Sequence[Outcome]) -> list[tuple[str, ...]]:
    figures: Sequence[tuple[str, Callable[[Outcome], float], int]] = (
        ("tokens/s", lambda outcome: outcome.tokens_per_s, 0),
        ("first token s, p50", lambda outcome: outcome.first_token_at(50), 3),
        ("first token s, p99", lambda outcome: outcome.first_token_at(99), 3),
        ("MiB paged", lambda outcome: outcome.bytes_paged / 2**20, 1),
    )
    rows: list[tuple[str, ...]] = []
    for figure, of, digits in figures:
        said, times = of(forecast), [of(each) for each in truths]
        was = statistics.median(times)
        beside = [f"{value / was:.2f}" if was else "-" for value in (said, min(times), max(times))]
        is_near = "yes" if abs(said - was) <= GOAL * was else "no"
        rows.append(
            (name, figure, f"{said:.{digits}f}", f"{was:.{digits}f}", beside[0], is_near, " to ".join(beside[1:]))
        )
    return rows


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of traces that ran one after the other."""
    sums = Outcome(SERVICE, NUM_WORKERS, began_s=0.0)
    for each in outcomes:
        sums.first_token_s += each.first_token_s
        sums.num_tokens += each.num_tokens
        sums.bytes_paged += each.bytes_paged
        sums.num_failed += each.num_failed
        sums.ended_s += each.ended_s - each.began_s
    return sums


def _truth(address: str, arrivals: Sequence[Arrival], pools: Mapping[str, ExpertPool]) -> Outcome:
    """What the service made of the same requests."""
    return asyncio.run(replayed(address, arrivals, pools))


async def _workers(address: str) -> list[str]:
    """Their ids, by which pools have the same homes in the simulation, once all are ready."""
    async with AsyncClient(address) as client:
        while True:
            workers = await client.residency()
            if [worker.state for worker in workers] == ["ready"] * NUM_WORKERS:
                return [worker.id for worker in workers]
            await asyncio.sleep(0.5)


async def replayed(address: str, arrivals: Sequence[Arrival], pools: Mapping[str, ExpertPool]) -> Outcome:
    random = np.random.default_rng(3)
    outcome = Outcome(SERVICE, NUM_WORKERS)
    async with AsyncExitStack() as stack:
        clients = {  # the order of admission depends on whose requests they are
            tenant: await stack.enter_async_context(AsyncClient(address, tenant=tenant, timeout_s=300))
            for tenant in sorted({each.tenant for each in arrivals})
        }
        vocabulary = min([(await client.model()).vocab_size for client in clients.values()])  # all are connected now
        prompts = [tuple(map(int, random.integers(0, vocabulary - 4, each.prompt_tokens))) for each in arrivals]
        began_s = outcome.began_s = time.perf_counter() + 0.1

        async def one(arrival: Arrival, prompt: tuple[int, ...]) -> None:
            await asyncio.sleep(began_s + arrival.at_s - time.perf_counter())
            sent_s, first_s = time.perf_counter(), 0.0
            sampling = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
            try:
                answer = clients[arrival.tenant].generate(prompt, sampling, PoolAsk(fixed=pools[arrival.pool]))
                async for chunk in answer:
                    first_s = first_s or time.perf_counter()
                    outcome.num_tokens += len(chunk.token_ids)
                    if chunk.usage is not None:
                        outcome.bytes_paged += chunk.usage.paging.bytes_paged
            except PagerError as error:
                outcome.num_failed += 1
                console.print(f"failed: {error}", markup=False)
                return
            outcome.first_token_s.append(first_s - sent_s)
            outcome.ended_s = max(outcome.ended_s, time.perf_counter())

        await asyncio.gather(*map(one, arrivals, prompts))
    return outcome


if __name__ == "__main__":
    typer.run(main)
