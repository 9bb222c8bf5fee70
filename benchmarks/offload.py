"""Too little memory for the model: a pool, beside accelerate's disk offload and the operating system's own paging.

python -m benchmarks.offload  5 to 8 minutes on 2 cores, as root; writes 13 GB to build/benchmarks and removes them
python -m benchmarks.offload --quick  a smoke run on a toy shape that writes no file
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import alternate
from benchmarks.memory_cap import MemoryCap, NoCap, memory_cap
from benchmarks.offload_ways import POOL, PROMPT_TOKENS, stack_experts
from benchmarks.page_cache import drop
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten
from benchmarks.shapes import SHAPES
from benchmarks.synthetic import write_checkpoint
from pager.cli.options import bytes_progress, print_error
from pager.errors import PagerError
from pager.memory import format_bytes, parse_bytes

WORK = ROOT / "build" / "benchmarks"
TIMEOUT_S = 900
NAMES = {
    "pooled": f"pool of {POOL:.1%}",
    "exact": "exact, all experts",
    "accelerate": "accelerate, experts offloaded to disk",
    "mapped": "memory-mapped, left to the operating system",
}
STEPS = {"pooled": 64, "exact": 16, "accelerate": 4, "mapped": 16}
LEAST = {"accelerate": 20, "mapped": 3}


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int, typer.Option(help="So many of its layers, and as large a part of the vocabulary.")] = 4,
    cap: Annotated[str, typer.Option(help="Memory of each process, its page cache included.")] = "2700MiB",
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 2,
    work: Annotated[Path, typer.Option(help="Where the checkpoints are for as long as it runs.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, one repeat, no file is written.")] = False,
) -> None:
    """Measure decode by four ways in processes that a control group holds to the same memory."""
    quieten()
    if quick:
        shape, layers, cap, rounds = "emo-micro", 2, "1GiB", 1
    cap_bytes = parse_bytes(cap)
    chosen = SHAPES[shape].shortened(layers)
    report = Report(
        "offload",
        f"{shape} with {layers} of {SHAPES[shape].num_layers} layers, random weights, bfloat16, batch 1",
        conditions(
            memory=f"{format_bytes(cap_bytes)} for each process, its page cache included (control group)",
            accelerate=version("accelerate"),
        ),
    )
    report.start()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=work) as folder, memory_cap(cap_bytes) as capped:
            checkpoint, stacked = Path(folder) / shape, Path(folder) / "stacked"
            with bytes_progress(f"writing {shape}") as progress:
                write_checkpoint(checkpoint, chosen, progress=progress)
            with console.status("stacking its experts"):
                stack_experts(checkpoint, stacked)
            runs = {way: partial(_run, capped, way, checkpoint, stacked) for way in NAMES}
            with console.status("decoding"):
                found = alternate(runs, rounds)
            expert_bytes = sum(path.stat().st_size for path in stacked.glob("*/*.dat"))
    except NoCap as reason:
        console.print(f"not measured: {reason}")
        raise typer.Exit(0) from None
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    report.add(_table(found, expert_bytes, rounds))
    if not quick:
        report.write(results)


def _run(capped: MemoryCap, way: str, checkpoint: Path, stacked: Path) -> dict[str, Any] | str:
    """What the process said, or how it ended."""
    drop([*checkpoint.glob("*.safetensors"), *stacked.glob("*/*.dat")])
    command = [sys.executable, "-m", "benchmarks.offload_ways", way, str(checkpoint), str(stacked), str(STEPS[way])]
    done = capped.run(command, TIMEOUT_S)
    if done.returncode:
        return "killed: it needs more" if done.returncode == -9 else f"failed with {done.returncode}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _table(found: dict[str, list[dict[str, Any] | str]], expert_bytes: int, num_rounds: int) -> Table:
    def rates(way: str) -> list[float]:
        return [run["rate"] for run in found[way] if isinstance(run, dict)]

    rows = []
    for way, runs in found.items():
        worked = [run for run in runs if isinstance(run, dict)]
        if not worked:
            rows.append((NAMES[way], "-", str(runs[0]), "-", "-", "-"))
            continue
        beside = "-"
        if way != "pooled" and rates("pooled"):
            beside = f"{statistics.median(rates('pooled')) / statistics.median(rates(way)):.1f}"
        least = f"at least {LEAST[way]}" if way in LEAST else "-"
        first = figure([run["first_token_s"] for run in worked])
        rows.append((NAMES[way], str(worked[0]["slots"]), figure(rates(way), 2), first, beside, least))
    steps = ", ".join(f"{STEPS[way]} {way}" for way in found)
    return Table(
        f"Decode under a memory cap; the experts alone are {format_bytes(expert_bytes)}",
        ("", "slots", "tokens/s", "first token s", "pool / this", "wanted"),
        rows,
        (
            f"{num_rounds} repeats, taking turns, each in a process of its own; steps of a repeat: {steps}. The "
            f"prefill of {PROMPT_TOKENS} tokens is not in tokens/s. Files are dropped from the page cache before each.",
            "Slots: what the planner found room for. Accelerate and mapped: transformers' generate, experts by "
            "'eager', which touches only those that tokens picked; the trunk is in memory for all.",
            "Accelerate reads a layer's experts whole, each time. All but the pool's run is exact.",
        ),
    )


if __name__ == "__main__":
    typer.run(main)
