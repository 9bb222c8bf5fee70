"""What the engine adds to the model: time outside of forwards, how long an admission holds up the others, and what
eight domains at once cost.

python -m benchmarks.engine_steps [MODEL]  1 to 2 minutes on 2 cores
python -m benchmarks.engine_steps --quick  a smoke run that writes no file
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.admission import admission_table
from benchmarks.engine_run import EngineRun, fixed, load_engine, random_pools
from benchmarks.measure import alternate
from benchmarks.models import Decode
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from pager.memory import Budgets, format_bytes
from pager.types import PoolPolicy, Share, Usage

MODEL = ROOT / "models" / "emo-tiny"
DTYPE = torch.bfloat16
BATCH = 8
PROMPT_TOKENS = 64
POOL = 0.125
LARGEST_OUTSIDE = 0.10


def main(
    model: Annotated[Path, typer.Argument(help="A trained checkpoint.")] = MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 7,
    threads: Annotated[int, typer.Option(help="Of torch.")] = torch.get_num_threads(),
    long_prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is admitted.")] = 1000,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure the engine's steps at batch 8."""
    quieten()
    torch.set_num_threads(threads)
    rounds, num_tokens = (1, 4) if quick else (rounds, 64)
    report = Report("engine_steps", f"{model.name}, bfloat16, batch {BATCH}", conditions(threads=f"{threads} of torch"))
    report.start()
    report.add(outside_table(model, rounds, num_tokens))
    report.add(admission_table(model, DTYPE, rounds, 200 if quick else long_prompt))
    report.add(domains_table(model, rounds, num_tokens))
    if not quick:
        report.write(results)


def outside_table(model: Path, num_rounds: int, num_steps: int) -> Table:
    """How much of a decode step the model's forward is not."""
    prompts = prompts_of(model, BATCH, PROMPT_TOKENS)
    with ExitStack() as opened:
        engine = opened.enter_context(_engine(model, "100%"))
        pool = random_pools(engine.paged.facts, POOL, 1)[0]
        ways: dict[str, Decode] = {
            "exact, all resident": engine.decoder(PoolPolicy()),
            "pools that each prefill chooses, all resident": engine.decoder(PoolPolicy(Share(POOL))),
            "one pool for all": engine.decoder(fixed(pool)),
        }
        with console.status("decode steps"):
            for decode in ways.values():
                decode(prompts, num_steps)
            found = alternate({name: partial(decode, prompts, num_steps) for name, decode in ways.items()}, num_rounds)
    rows = []
    for name, runs in found.items():
        step_ms = [1e3 * run.seconds / (run.num_tokens / BATCH) for run in runs]
        outside = [1 - run.forward_s / run.seconds for run in runs]
        outside_ms = [share * milliseconds for share, milliseconds in zip(outside, step_ms, strict=True)]
        verdict = "ok" if statistics.median(outside) <= LARGEST_OUTSIDE else "more"
        rows.append((name, figure(step_ms, 2), figure(outside_ms, 2), figure(outside, 3), verdict))
    return Table(
        f"Decode steps, batch {BATCH}",
        ("", "step ms", "outside the forward ms", "outside / step", f"at most {LARGEST_OUTSIDE:.2f}"),
        rows,
        (
            "Outside: sampling, detokenizing, what is due, and events; seen by the host. Sampling is greedy.",
            f"Steps in which all {BATCH} rows decode and nothing else runs, {num_steps} a repeat, {num_rounds} repeats "
            "that take turns.",
        ),
    )


def domains_table(model: Path, num_rounds: int, num_tokens: int) -> Table:
    """Eight prompts of eight domains come at once: with a quarter of the experts they have to share, or to wait."""
    prompts = prompts_of(model, BATCH, PROMPT_TOKENS)
    ways = {
        (name, memory): (policy, memory)
        for name, policy in (("a pool each", PoolPolicy(Share(POOL))), ("exact", PoolPolicy()))
        for memory in ("100%", "25%")
    }
    with ExitStack() as opened:
        engines = {memory: opened.enter_context(_engine(model, memory)) for memory in ("100%", "25%")}
        runs = {
            way: partial(_answer_all, engines[memory], prompts, policy, num_tokens)
            for way, (policy, memory) in ways.items()
        }
        with console.status("eight domains"):
            for run in runs.values():
                run()
            found = alternate(runs, num_rounds)
    rows = []
    for (name, memory), answers in found.items():
        rates = [BATCH * num_tokens / seconds for seconds, _ in answers]
        resident = [BATCH * num_tokens / seconds for seconds, _ in found[name, "100%"]]
        usages = [usage for _, round_usages in answers for usage in round_usages]
        rows.append(
            (
                f"{name}, {memory} of the experts",
                figure(rates),
                ratio(rates, resident),
                _union(answers[0][1]),
                figure([1e3 * max(usage.queue_s for usage in round_usages) for _, round_usages in answers], 0),
                f"{1e3 * statistics.median(usage.stall_s for usage in usages):.0f}",
                format_bytes(sum(usage.bytes_from_disk for usage in usages) // num_rounds),
            )
        )
    return Table(
        f"Eight domains at once, pools of {POOL:.1%}",
        ("", "tokens/s", "/ all resident", "union of pools", "longest wait ms", "stall ms", "paged in a round"),
        rows,
        (
            f"Prompts of {PROMPT_TOKENS} tokens, {num_tokens} tokens after each, {num_rounds} rounds, taking turns; "
            "prefill and waiting are in the time.",
            "Each round finds what the one before left in the slots. Wait: of the last to be admitted, for slots. "
            "Stall: a request's median wait for reads.",
        ),
    )


def _answer_all(
    engine: EngineRun, prompts: Sequence[Sequence[int]], policy: PoolPolicy, num_tokens: int
) -> tuple[float, list[Usage]]:
    started_s = time.perf_counter()
    usages = engine.answer_all([(prompt, policy) for prompt in prompts], num_tokens)
    return time.perf_counter() - started_s, usages


def _union(usages: Sequence[Usage]) -> str:
    keys = {key for usage in usages if usage.pool is not None for key in usage.pool.keys()}  # noqa: SIM118
    largest = max(usage.pool.num_experts if usage.pool is not None else 0 for usage in usages)
    return f"{len(keys)} experts, {largest} each" if keys else "-"


def _engine(model: Path, memory: str) -> AbstractContextManager[EngineRun]:
    return load_engine(model, DTYPE, Budgets(expert_memory=memory, host_memory=0, kv_memory="64MiB"), 4)


if __name__ == "__main__":
    typer.run(main)
