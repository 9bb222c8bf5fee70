"""What less memory costs: page-in, time to first token and decode speed, each beside what it is measured against.

python -m benchmarks.residency [MODEL]  6 to 8 minutes on 2 cores; keeps 20 GB in build/benchmarks
python -m benchmarks.residency --quick  a smoke run on a toy shape
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import decode
from benchmarks.checkpoints import WORK, checkpoints
from benchmarks.decode import Effort, Way
from benchmarks.first_token import first_token_table
from benchmarks.page_in import bandwidth_table, why_not_direct
from benchmarks.report import RESULTS, ROOT, Report, conditions, console, quieten
from benchmarks.shapes import SHAPES
from pager.cli.options import print_error
from pager.errors import PagerError
from pager.models.open_model import OpenModel
from pager.pools.pick import largest_counts
from pager.types import Share

REFERENCE = ROOT / "models" / "emo-tiny"
DTYPE = torch.bfloat16
REFERENCE_GROUPS = (
    (
        Way("exact, load_model", 1.0),
        Way("exact, load_model", 0.125),
        Way("exact, engine", 1.0, by_engine=True),
        Way("pool 25 %, engine", 0.25, pool=0.25, by_engine=True),
        Way("pool 12.5 %, engine", 0.125, pool=0.125, by_engine=True),
    ),
)


def main(
    reference: Annotated[Path, typer.Argument(help="A trained checkpoint, for a table of its own.")] = REFERENCE,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int, typer.Option(help="So many of its layers, and as large a part of the vocabulary.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    threads: Annotated[int, typer.Option(help="Of torch.")] = torch.get_num_threads(),
    readers: Annotated[int, typer.Option(help="Threads that read experts, and of the raw read.")] = 4,
    work: Annotated[Path, typer.Option(help="Where synthetic checkpoints are kept.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, two repeats, no file is written.")] = False,
) -> None:
    """Measure page-in, time to first token and decode speed at 100, 50, 25 and 12.5 % of the experts."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shapes are {', '.join(SHAPES)}")
    quieten()
    torch.set_num_threads(threads)
    if quick:
        shape, layers, rounds = "emo-micro", 2, 2
    steps = {1: 4, 8: 2} if quick else {1: 24, 8: 8}
    effort = Effort(rounds, steps, readers)
    report = Report(
        "residency",
        f"{shape} with {layers} of {SHAPES[shape].num_layers} layers, random weights, bfloat16",
        conditions(threads=f"{threads} of torch, {readers} readers"),
    )
    report.start()
    started_s = time.monotonic()
    try:
        if reference.exists():
            check_poolable(reference)
        plain, packed = checkpoints(work, shape, layers)
        # While the last layer computes nothing is left to read: of two layers that is half, of four a quarter.
        _, deeper = checkpoints(work, shape, 2 * layers)
        # Before plain transformers maps the files: what is mapped does not leave the page cache.
        report.add(bandwidth_table((plain, packed), DTYPE, rounds, readers))
        for direct in (False,) if why_not_direct(deeper, DTYPE) else (True, False):
            report.add(first_token_table(deeper, DTYPE, 2 * rounds, readers, direct=direct))
            gc.collect()
        for table in decode.measure(plain, DTYPE, effort):
            report.add(table)
        gc.collect()
        if reference.exists():
            for table in decode.measure(reference, DTYPE, effort, REFERENCE_GROUPS):
                report.add(table)
        else:
            console.print(f"\nno reference model at {reference}; its tables are left out")
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    console.print(f"\n{time.monotonic() - started_s:.0f} s")
    if not quick:
        report.write(results)


def check_poolable(model: Path) -> None:
    """Before minutes are spent. Raises PagerError where the smallest pool of the table is too small for the model."""
    opened = OpenModel.open(model)
    opened.checkpoint.close()
    smallest = min(way.pool for group in REFERENCE_GROUPS for way in group if way.pool is not None)
    largest_counts(Share(smallest), opened.facts)


if __name__ == "__main__":
    typer.run(main)
