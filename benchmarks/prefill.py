"""What a prefill reads beside what it needs: each expert once, however few slots there are; and how long prompts take
beside plain transformers.

    python -m benchmarks.prefill [MODEL ...]
    python -m benchmarks.prefill --tables times  about 2 minutes on 2 cores

What is read is counts, and the machine may be busy. Exits with status 1 when anything was read twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.checkpoints import WORK, plain_checkpoint
from benchmarks.engine_run import load_engine
from benchmarks.measure import alternate
from benchmarks.models import PREFILL_IMPLEMENTATION, load_plain
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from pager.engine.paged_model import PagedModel
from pager.memory import Budgets, format_bytes
from pager.models.open_model import OpenModel, moe_blocks
from pager.pools.pick import largest_counts
from pager.types import ExpertKey, ExpertPool, PoolPolicy, Share

MODEL = ROOT / "models" / "emo-tiny"


@dataclass(frozen=True, slots=True)
class Way:
    """`pool` None is exact; `budget` is the share of the routed experts that have a slot, None as few as can run."""

    pool: float | None
    budget: float | None

    def slots(self, opened: OpenModel) -> int:
        facts = opened.facts
        if self.budget is not None:
            return int(self.budget * sum(facts.routed_per_layer))
        return max(facts.top_k_per_layer) if self.pool is None else sum(largest_counts(Share(self.pool), facts))

    @property
    def name(self) -> str:
        return "exact" if self.pool is None else f"pool of {self.pool:.1%}"


WAYS = (Way(None, None), Way(None, 0.125), Way(None, 0.25), Way(None, 0.5), Way(0.125, None), Way(0.5, None))
TABLES = ("reads", "times")
TIMED = {512: 5, 4096: 2, 16384: 1}  # lengths of prompts, and rounds of each
SMALLEST_RATIO = 1.0  # of the time that plain transformers take
COLUMNS = ("", "prompt", "slots", "experts needed", "of them picked", "bytes needed", "bytes read", "read / needed")


@dataclass(frozen=True, slots=True)
class Read:
    """Of one prefill. `needed` are experts, of which the prompt's tokens `picked` so many."""

    needed: int
    picked: int
    nbytes_needed: int
    nbytes_read: int

    @property
    def ratio(self) -> float:
        return self.nbytes_read / self.nbytes_needed


def main(
    models: Annotated[list[Path] | None, typer.Argument(help="Checkpoints; the shipped model by default.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each length.")] = 4,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts whose reads are counted.")] = "64,512",
    tables: Annotated[str, typer.Option(help=f"Some of {', '.join(TABLES)}, with commas between.")] = ",".join(TABLES),
    work: Annotated[Path, typer.Option(help="Directory of the synthetic checkpoint whose prompts are timed.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short prompts, and no file is written.")] = False,
) -> None:
    """Compare what a prefill reads with the distinct experts it needs, below the need, and time it."""
    quieten()
    wanted = set(tables.split(","))
    if not wanted or not wanted <= set(TABLES):
        raise typer.BadParameter(f"{tables!r} names other tables than {', '.join(TABLES)}", param_hint="--tables")
    if quick:
        prompts, lengths = 1, "16"
    all_once = True
    if "reads" in wanted:
        report = Report(
            "prefill",
            "expert bytes that a prefill reads, beside the distinct expert bytes it needs",
            conditions(timed=False, prompts=f"{prompts} each of {lengths} tokens, nothing in a slot before"),
        )
        report.start()
        for model in models or [MODEL]:
            table, found_once = reads_table(model, prompts, lengths)
            report.add(table)
            all_once &= found_once
        if not quick:
            report.write(results)
    if "times" in wanted:
        shape, num_layers, timed = ("emo-micro", 2, {16: 1, 48: 1}) if quick else ("emo-1b14b", 2, TIMED)
        threads = f"{torch.get_num_threads()} of torch"
        report = Report(
            "prefill_times", f"{shape} with {num_layers} layers, bfloat16, all experts in slots, exact",
            conditions(threads=threads),
        )  # fmt: skip
        report.start()
        report.add(times_table(plain_checkpoint(work, shape, num_layers, max(timed) + 512), timed))
        if not quick:
            report.write(results)
    raise typer.Exit(0 if all_once else 1)


def reads_table(model: Path, num_prompts: int, lengths: str) -> tuple[Table, bool]:
    """The table, and whether every expert was read once."""
    rows, all_once = [], True
    with console.status(model.name):
        for way in WAYS:
            for length in map(int, lengths.split(",")):
                reads = list(_prefills(model, way, prompts_of(model, num_prompts, length)))
                all_once &= all(read.ratio == 1 for read in reads)
                rows.append(_row(model, way, length, reads))
    notes = (
        "Means over the prompts, but for the ratio: smallest and largest. Exact: needed is what the tokens picked, "
        "as seen at the gates. Pool: needed is the whole pool, which the tokens to come may pick from.",
        "Fewest slots: one token's experts of one layer, or one pool.",
    )
    return Table(f"Prefill, {model.name}", COLUMNS, rows, notes), all_once


def times_table(path: Path, timed: dict[int, int]) -> Table:
    """The time from a prompt's submission to its first token, beside one forward of plain transformers."""
    plain = load_plain(path, torch.bfloat16, PREFILL_IMPLEMENTATION)
    budgets = Budgets(expert_memory="100%", host_memory=0, kv_memory="320MiB", max_running=1)
    rows = []
    with load_engine(path, torch.bfloat16, budgets, 4) as engine, console.status("prompts"):

        def by_plain(prompt: Sequence[int]) -> float:
            started_s = time.perf_counter()
            with torch.inference_mode():
                plain(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            return time.perf_counter() - started_s

        def by_engine(prompt: Sequence[int]) -> float:
            return engine.first_token(prompt, PoolPolicy())[0]

        ways: dict[str, Callable[[Sequence[int]], float]] = {"plain": by_plain, "engine": by_engine}
        for number, (length, num_rounds) in enumerate(timed.items()):
            (prompt,) = prompts_of(path, 1, length)
            for run in ways.values() if number == 0 else ():
                run(prompt)
            found = alternate({name: partial(run, prompt) for name, run in ways.items()}, num_rounds)
            share = statistics.median(found["plain"]) / statistics.median(found["engine"])
            verdict = "ok" if share >= SMALLEST_RATIO else "less"
            figures = (figure(found[name], 3) for name in ways)
            rows.append((f"{length} tokens", *figures, ratio(found["plain"], found["engine"]), verdict))
    return Table(
        f"Prefill, {path.name}",
        ("", "plain transformers s", "engine s", "plain / engine", f"at least {SMALLEST_RATIO:.1f}"),
        rows,
        (
            f"Plain transformers: everything in memory, torch's own attention, experts by {PREFILL_IMPLEMENTATION}. "
            "The engine: until the first token has come.",
            f"{', '.join(map(str, timed.values()))} rounds that take turns, after one of the first length that is not "
            "counted.",
        ),
    )


def _prefills(model: Path, way: Way, prompts: Sequence[Sequence[int]]) -> Iterator[Read]:
    opened = OpenModel.open(model, torch.bfloat16)
    opened.checkpoint.close()
    budgets = Budgets(expert_memory=way.slots(opened) * opened.expert_bytes, host_memory=0, kv_memory="64MiB")
    policy = PoolPolicy() if way.pool is None else PoolPolicy(Share(way.pool))
    for prompt in prompts:
        with load_engine(model, torch.bfloat16, budgets, 4, in_place=False) as engine:
            picked = _watch_gates(engine.paged)
            _, usage = engine.first_token(prompt, policy)
            needed = set(usage.pool.keys()) if isinstance(usage.pool, ExpertPool) else picked
            assert picked <= needed, "a token picked an expert outside of its pool"
            yield Read(len(needed), len(picked), len(needed) * opened.expert_bytes, usage.bytes_from_disk)


def _watch_gates(paged: PagedModel) -> set[ExpertKey]:
    """Fills with the routed experts that tokens picked."""
    picked: set[ExpertKey] = set()

    def hook(layer: int) -> Any:
        num_routed = paged.facts.routed_per_layer[layer]

        def note(gate: Any, _: Any, output: Any) -> None:
            experts = output[2].flatten().unique().tolist()
            picked.update(ExpertKey(layer, expert) for expert in experts if expert < num_routed)

        return note

    for layer, block in moe_blocks(paged.model):
        block.gate.register_forward_hook(hook(layer))
    return picked


def _row(model: Path, way: Way, length: int, reads: Sequence[Read]) -> tuple[str, ...]:
    opened = OpenModel.open(model, torch.bfloat16)
    opened.checkpoint.close()

    def mean(values: Iterator[int]) -> int:
        return round(sum(values) / len(reads))

    ratios = [read.ratio for read in reads]
    return (
        way.name,
        f"{length} tokens",
        f"{way.slots(opened)} of {sum(opened.facts.routed_per_layer)}",
        str(mean(read.needed for read in reads)),
        str(mean(read.picked for read in reads)),
        format_bytes(mean(read.nbytes_needed for read in reads)),
        format_bytes(mean(read.nbytes_read for read in reads)),
        f"{min(ratios):.3f}-{max(ratios):.3f}",
    )


if __name__ == "__main__":
    typer.run(main)
