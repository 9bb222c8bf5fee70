"""Exact decode with a part of the experts in slots, beside its bound: the same with all of them, and the missing bytes
copied.

python -m benchmarks.exact_bound          2 minutes on 2 cores; keeps 3 GB in build/benchmarks
python -m benchmarks.exact_bound --quick  a smoke run on a toy shape
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.checkpoints import WORK, synthetic
from benchmarks.decode import PROMPT_TOKENS, Effort, Way
from benchmarks.measure import alternate
from benchmarks.models import Decode, Decoded
from benchmarks.page_cache import read_through
from benchmarks.prompts import prompts_of
from benchmarks.raw_copy import RawCopy
from benchmarks.report import RESULTS, Report, Table, conditions, console, figure, quieten
from benchmarks.shapes import SHAPES
from pager.cli.options import print_error
from pager.errors import PagerError
from pager.memory import format_bytes
from pager.models.open_model import OpenModel

DTYPE = torch.bfloat16
RESIDENCIES = (1.0, 0.5, 0.25, 0.125)
WANTED = 0.90
COPIED_RECORDS = 32


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int, typer.Option(help="So many of its layers, and as large a part of the vocabulary.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    threads: Annotated[int, typer.Option(help="Of torch.")] = torch.get_num_threads(),
    readers: Annotated[int, typer.Option(help="Threads that read experts.")] = 4,
    work: Annotated[Path, typer.Option(help="Where synthetic checkpoints are kept.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, two repeats, no file is written.")] = False,
) -> None:
    """Measure exact decode at 100, 50, 25 and 12.5 % of the experts in slots, the files in the page cache."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shapes are {', '.join(SHAPES)}")
    quieten()
    torch.set_num_threads(threads)
    if quick:
        shape, layers, rounds = "emo-micro", 2, 2
    effort = Effort(rounds, {1: 4 if quick else 24}, readers)
    report = Report(
        "exact_bound",
        f"{shape} with {layers} of {SHAPES[shape].num_layers} layers, random weights, bfloat16, batch 1",
        conditions(threads=f"{threads} of torch, {readers} readers"),
    )
    report.start()
    try:
        report.add(bound_table(synthetic(work, shape, layers), effort))
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    if not quick:
        report.write(results)


def bound_table(path: Path, effort: Effort) -> Table:
    """Rows: each residency through `load_model` and through the engine. All of them and the copies take turns."""
    opened = OpenModel.open(path, DTYPE)
    opened.checkpoint.close()
    record = opened.expert_bytes
    prompt = prompts_of(path, 1, PROMPT_TOKENS)
    read_through(path.glob("*.safetensors"))
    rows = []
    for by_engine in (False, True):
        name = "engine" if by_engine else "load_model"
        with ExitStack() as opened_ways, RawCopy(COPIED_RECORDS, record, effort.num_readers) as raw:
            runs: dict[float, list[Decoded]] = {residency: [] for residency in RESIDENCIES}
            copies: dict[str, list[float]] = {way: [] for way in raw.ways}
            turns: dict[object, Callable[[], None]] = {}
            for residency, decoded in runs.items():
                decode = opened_ways.enter_context(Way(name, residency, by_engine=by_engine).open(path, DTYPE, effort))
                decode(prompt, effort.num_steps[1])  # the first run chooses kernels, and fills the slots
                turns[residency] = partial(_decode, decode, prompt, effort.num_steps[1], decoded)
            for way, copy in raw.ways.items():
                turns[way] = partial(_copy, copy, copies[way])
            with console.status(f"exact, {name}"):
                alternate(turns, effort.num_rounds)
        rate = COPIED_RECORDS * record / min(map(statistics.median, copies.values()))
        rows += _rows(name, runs, record, rate)
    return Table(
        f"Exact decode beside its bound, {path.name}",
        ("", "in slots", "tokens/s", "misses a token", "read a token", "copy GB/s", "bound", "of it", "at least 0.90"),
        rows,
        (
            "Bound: tokens/s if a token took what it takes with everything in slots, and as long as it takes to copy "
            "the experts that were in no slot, with all cores and nothing beside.",
            f"Batch 1, a prompt of {PROMPT_TOKENS} tokens that is not in the time, {effort.num_steps[1]} steps, "
            f"{effort.num_rounds} repeats that take turns with each other and with the copies. Brackets: smallest and "
            "largest.",
            "Read: copied into slots. What the page cache holds is computed where it is, and counts as a miss.",
        ),
    )


def _rows(
    name: str, runs: Mapping[float, list[Decoded]], record_bytes: int, copied_bytes_a_s: float
) -> list[tuple[str, ...]]:
    token_s = statistics.median(1 / run.rate for run in runs[1.0])
    rows: list[tuple[str, ...]] = []
    for residency, decoded in runs.items():
        rates = [run.rate for run in decoded]
        misses = statistics.median(run.num_missed / run.num_tokens for run in decoded)
        nbytes = statistics.median(run.nbytes / run.num_tokens for run in decoded)
        bound = 1 / (token_s + misses * record_bytes / copied_bytes_a_s)
        reached = statistics.median(rates) / bound
        rows.append(
            (
                f"exact, {name}",
                f"{residency:.1%}",
                figure(rates),
                f"{misses:.1f}",
                format_bytes(round(nbytes)),
                f"{copied_bytes_a_s / 1e9:.1f}",
                f"{bound:.1f}",
                f"{reached:.2f}",
                "-" if residency == 1 else "ok" if reached >= WANTED else "less",
            )
        )
    return rows


def _decode(decode: Decode, prompt: list[list[int]], num_steps: int, runs: list[Decoded]) -> None:
    runs.append(decode(prompt, num_steps))


def _copy(copy: Callable[[], None], seconds: list[float]) -> None:
    started_s = time.perf_counter()
    copy()
    seconds.append(time.perf_counter() - started_s)


if __name__ == "__main__":
    typer.run(main)
