"""The released size on a machine that its weights do not fit: eight prompts, in trunk + budget + 15 % of memory.

python -m benchmarks.scale  writes 27 GB to build/benchmarks (2 minutes; --keep keeps them), then 2 to 4 minutes
python -m benchmarks.scale --quick  a smoke run on a toy shape that writes no file
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.engine_run import load_engine
from benchmarks.page_cache import drop
from benchmarks.process_memory import Peak, peak_of
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten
from benchmarks.shapes import SHAPES
from benchmarks.synthetic import check_checkpoint, write_checkpoint
from pager.cli.options import bytes_progress, print_error
from pager.errors import PagerError
from pager.memory import Budgets, Plan, format_bytes
from pager.types import PoolPolicy, Share

WORK = ROOT / "build" / "benchmarks"
BUDGET = "12.5%"
POOL = 0.125
NUM_PROMPTS, PROMPT_TOKENS = 8, 64
MOST = 1.15


@dataclass(frozen=True, slots=True)
class Answered:
    """Seconds and bytes of one request, alone in the engine."""

    first_token_s: float
    decode_s: float
    num_tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Served:
    plan: Plan
    load_s: float
    by_mode: dict[str, list[Answered]]


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int | None, typer.Option(help="Keep so many layers. Default: all.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="After each prompt; half as many where exact.")] = 16,
    exact: Annotated[int, typer.Option(min=0, help="How many of the prompts are answered exactly, too.")] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoint there.")] = False,
    work: Annotated[Path, typer.Option(help="Where the checkpoint is, or goes.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, few tokens, no file is written.")] = False,
) -> None:
    """Serve a synthetic checkpoint of the released shape with experts for 12.5 % in memory."""
    quieten()
    if quick:
        shape, layers, new_tokens, exact = "emo-micro", 2, 4, 1
    chosen = SHAPES[shape].shortened(layers)
    model = work / f"{shape}-{chosen.num_layers}-layers"
    was_there = model.exists()
    report = Report(
        "scale",
        f"{shape} with {chosen.num_layers} layers, random weights, bfloat16, experts for {BUDGET} in memory",
        conditions(prompts=f"{NUM_PROMPTS} of {PROMPT_TOKENS} tokens, {new_tokens} new ones each, one after the other"),
    )
    report.start()
    try:
        if not was_there:
            with bytes_progress(f"writing {model.name}") as progress:
                write_checkpoint(model, chosen, progress=progress)
        check_checkpoint(model, chosen)
        files = sorted(model.glob("*.safetensors"))
        drop(files)
        with console.status("a process that only imports"):
            idle = peak_of(_import_only)
        with console.status(f"{NUM_PROMPTS} prompts"):
            peak = peak_of(_serve, model, new_tokens, exact)
        report.add(_answers_table(peak.value, sum(file.stat().st_size for file in files)))
        report.add(_memory_table(idle, peak))
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    finally:
        if not was_there and not keep:
            shutil.rmtree(model, ignore_errors=True)
    if not quick:
        report.write(results)


def _import_only() -> None:
    """This module and all that it imports are there already."""
    torch.ones(8) @ torch.ones(8)


def _serve(model: Path, num_tokens: int, num_exact: int) -> Served:
    quieten()
    started_s = time.perf_counter()
    budgets = Budgets(expert_memory=BUDGET, host_memory=0, kv_memory="64MiB", max_running=1)
    with load_engine(model, torch.bfloat16, budgets, 4) as engine:
        load_s = time.perf_counter() - started_s
        prompts = prompts_of(model, NUM_PROMPTS, PROMPT_TOKENS)

        def answer(prompt: Sequence[int], policy: PoolPolicy, num_new: int) -> Answered:
            begun_s = time.perf_counter()
            (usage,) = engine.answer_all([(prompt, policy)], num_new)
            decode_s = time.perf_counter() - begun_s - usage.time_to_first_token_s
            return Answered(usage.time_to_first_token_s, decode_s, num_new, usage.bytes_from_disk)

        by_mode = {f"pool of {POOL:.1%}": [answer(each, PoolPolicy(Share(POOL)), num_tokens) for each in prompts]}
        if num_exact:
            by_mode["exact"] = [answer(each, PoolPolicy(), num_tokens // 2) for each in prompts[:num_exact]]
        return Served(engine.paged.plan, load_s, by_mode)


def _answers_table(served: Served, nbytes: int) -> Table:
    rows = [
        (
            f"{name}, {len(answers)} prompts",
            figure([answer.first_token_s for answer in answers]),
            figure([(answer.num_tokens - 1) / answer.decode_s for answer in answers], 2),
            format_bytes(round(statistics.median(answer.nbytes for answer in answers))),
        )
        for name, answers in served.by_mode.items()
    ]
    return Table(
        f"Answers of a model of {format_bytes(nbytes)}",
        ("", "first token s", "decode tokens/s", "read for an answer"),
        rows,
        (
            f"Loaded in {served.load_s:.1f} s. Nothing was in the page cache at the start. Each prompt's pool is "
            "chosen by its prefill.",
        ),
    )


def _memory_table(idle: Peak, peak: Peak) -> Table:
    plan = peak.value.plan
    weights = plan.trunk_bytes + plan.resident_bytes
    allowed = weights + plan.slot_bytes
    verdict = "ok" if peak.pss / allowed <= MOST else "more"
    return Table(
        "Memory of the process",
        ("trunk", "budget for experts", "peak", "peak / (trunk + budget)", f"at most {MOST}", "of it imports"),
        [
            (
                format_bytes(weights),
                f"{format_bytes(plan.slot_bytes)}, {plan.num_slots} of {plan.num_routed} experts",
                f"{format_bytes(peak.pss)} ({format_bytes(peak.rss)})",
                f"{peak.pss / allowed:.3f}",
                verdict,
                format_bytes(idle.pss),
            )
        ],
        (
            "Peak: proportional set size of the whole process, looked at every 20 ms from outside; in brackets the "
            "kernel's own peak of the resident set size. Imports: a process that does nothing else.",
            f"The trunk counts its shared experts. In the peak, too: KV, {format_bytes(plan.kv_bytes)}.",
        ),
    )


if __name__ == "__main__":
    typer.run(main)
