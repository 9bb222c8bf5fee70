"""Does a worker keep to its budgets? Its peak memory over 100 pool switches, beside what it was given.

python -m benchmarks.memory  4 to 6 minutes on 2 cores; writes 6.5 GB to build/benchmarks and removes them
python -m benchmarks.memory --quick  a smoke run on a toy shape that writes no file
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.engine_run import fixed, load_engine, random_pools
from benchmarks.process_memory import Peak, peak_of
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, quieten
from benchmarks.shapes import SHAPES
from benchmarks.synthetic import write_checkpoint
from pager.cli.options import bytes_progress, print_error
from pager.errors import PagerError
from pager.memory import Budgets, Plan, format_bytes
from pager.types import PoolPolicy, Share

WORK = ROOT / "build" / "benchmarks"
POOL = 0.125
PROMPT_TOKENS = (16, 64, 200, 384)
NEW_TOKENS = 8
MOST = 1.15
LEAST_BYTES = 2 * 10**9

Served = tuple[Plan, int]
"""The plan, and the bytes that were read."""


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int, typer.Option(help="So many of its layers, and as large a part of the vocabulary.")] = 4,
    experts: Annotated[str, typer.Option(help="Budget for slots.")] = "30%",
    host: Annotated[str, typer.Option(help="Budget of the host tier, in the second row.")] = "15%",
    switches: Annotated[int, typer.Option(min=1, help="Requests, each with another pool.")] = 100,
    work: Annotated[Path, typer.Option(help="Where the checkpoint is for as long as it runs.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, few switches, no file is written.")] = False,
) -> None:
    """Measure the peak memory of a worker that changes pools, beside trunk, KV, expert, host and staging budgets."""
    quieten()
    if quick:
        shape, layers, switches = "emo-micro", 2, 4
    chosen = SHAPES[shape].shortened(layers)
    load = f"{switches} requests, each with another pool of {POOL:.1%}, half of them chosen by the prefill"
    report = Report("memory", f"{shape} with {layers} layers, random weights, bfloat16", conditions(load=load))
    report.start()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            model = Path(folder) / shape
            with bytes_progress(f"writing {shape}") as progress:
                write_checkpoint(model, chosen, progress=progress)
            with console.status("a process that only imports"):
                idle = peak_of(_import_only)
            rows = []
            for host_memory in ("0", host):
                with console.status(f"pool switches, host tier {host_memory}"):
                    rows.append(_row(idle, peak_of(_serve, model, experts, host_memory, switches), host_memory))
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    report.add(
        Table(
            "Peak memory of a worker's process",
            ("host tier", "budgets", "peak", "peak / budgets", f"at most {MOST}", "plan", "peak / plan", "read"),
            rows,
            (
                "Peak: proportional set size, looked at every 20 ms from outside, less that of a process that only "
                f"imports the same ({format_bytes(idle.pss)}). In brackets the kernel's own peak of the resident set "
                "size, less the same.",
                "Budgets: trunk and shared experts, KV, slots, host tier, staging. Plan: also what forwards work with "
                "and the kernels that torch compiles for half precision.",
                f"Prompts of {', '.join(map(str, PROMPT_TOKENS))} tokens, {NEW_TOKENS} tokens after each.",
            ),
        )
    )
    if not quick:
        report.write(results)


def _import_only() -> None:
    """This module and all that it imports are there already."""
    torch.ones(8) @ torch.ones(8)


def _serve(model: Path, expert_memory: str, host_memory: str, num_switches: int) -> Served:
    quieten()
    budgets = Budgets(expert_memory=expert_memory, host_memory=host_memory, kv_memory="128MiB")
    with load_engine(model, torch.bfloat16, budgets, 4, in_place=False) as engine:
        prompts = [prompts_of(model, num_switches, length, seed=length) for length in PROMPT_TOKENS]
        for number in range(num_switches):
            pool = random_pools(engine.paged.facts, POOL, 1, seed=number)[0]
            policy = fixed(pool) if number % 2 else PoolPolicy(Share(POOL))
            engine.answer_all([(prompts[number % len(prompts)][number], policy)], NEW_TOKENS)
        stats = engine.paged.pager.stats()
        return engine.paged.plan, stats.paging.bytes_paged


def _row(idle: Peak, peak: Peak, host_memory: str) -> tuple[str, ...]:
    plan, nbytes = peak.value
    weights = plan.trunk_bytes + plan.resident_bytes
    budget = weights + plan.kv_bytes + plan.slot_bytes + plan.host_bytes + plan.staging_bytes
    taken, taken_rss = peak.pss - idle.pss, peak.rss - idle.rss
    verdict = "ok" if taken / budget <= MOST else "more"
    if weights + plan.slot_bytes < LEAST_BYTES:
        verdict = "too small to say"
    return (
        host_memory,
        format_bytes(budget),
        f"{format_bytes(taken)} ({format_bytes(taken_rss)})",
        f"{taken / budget:.3f}",
        verdict,
        format_bytes(plan.total_bytes),
        f"{taken / plan.total_bytes:.3f}",
        format_bytes(nbytes),
    )


if __name__ == "__main__":
    typer.run(main)
