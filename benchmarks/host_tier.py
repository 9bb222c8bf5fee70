"""The host tier beside the page cache of the operating system: the same pools, page by page, from either.

python -m benchmarks.host_tier          1 to 2 minutes; keeps 3 GB in build/benchmarks
python -m benchmarks.host_tier --quick  a smoke run on a toy shape
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.checkpoints import WORK, checkpoints
from benchmarks.engine_run import random_pools
from benchmarks.measure import alternate
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from benchmarks.shapes import SHAPES
from pager.cache.device import DeviceSlots
from pager.cache.pager import CacheOptions, ExpertPager
from pager.cache.tiers import HostTier
from pager.cli.options import print_error
from pager.errors import PagerError
from pager.models.open_model import OpenModel

POOL_SHARE = 0.125
NUM_POOLS = 6  # that take turns; slots hold one of them
TINY = ROOT / "models" / "emo-tiny"


@dataclass(frozen=True, slots=True)
class Used:
    """One turn of all pools. `hits` is the share of its experts that the host tier held."""

    seconds: float
    cpu_s: float
    nbytes: int
    hits: float


class Paging:
    """A pager with slots for one pool, and pools that take turns."""

    def __init__(self, pager: ExpertPager, opened: OpenModel) -> None:
        self._pager = pager
        self._pools = random_pools(opened.facts, POOL_SHARE, NUM_POOLS)

    def turn(self) -> Used:
        before, cpu_s, started_s = self._pager.stats(), time.process_time(), time.perf_counter()
        for pool in self._pools:
            lease = self._pager.reserve_pool(pool.keys())
            assert lease is not None, "nobody else holds slots"
            with lease:
                for layer in range(len(pool.experts)):
                    lease.wait(layer)
        seconds, cpu_s, after = time.perf_counter() - started_s, time.process_time() - cpu_s, self._pager.stats()
        paged = after.paging - before.paging
        return Used(seconds, cpu_s, paged.bytes_paged, paged.bytes_from_host / paged.bytes_paged)


@contextmanager
def open_paging(path: Path, dtype: torch.dtype, num_readers: int, host_share: float) -> Iterator[Paging]:
    """Reads through the page cache. `host_share` of all experts fit into the host tier; 0 for none."""
    opened = OpenModel.open(path, dtype)
    facts = opened.facts
    with opened.checkpoint, ExitStack() as closing:
        source = opened.open_experts()
        closing.callback(source.close)
        host = None
        if host_share:
            budget = round(host_share * sum(facts.experts_per_layer)) * opened.expert_bytes
            host = HostTier.create(budget, source.shape, dtype)
            closing.callback(host.close)
        slots = DeviceSlots(
            random_pools(facts, POOL_SHARE, 1)[0].num_experts,
            source.shape,
            dtype,
            "cpu",
            num_layers=facts.num_layers,
            max_experts=max(facts.experts_per_layer),
        )
        options = CacheOptions(num_readers=num_readers, bypass_page_cache=False)
        pager = ExpertPager(source, slots, host=host, options=options)
        closing.callback(pager.close)
        yield Paging(pager, opened)


def rows(path: Path, dtype: torch.dtype, num_rounds: int, num_readers: int) -> Iterator[Sequence[str]]:
    """From the page cache, which holds the file, beside host tiers for some of the experts and for all."""
    with ExitStack() as closing, console.status(f"paging {path.name}"):
        ways = {share: closing.enter_context(open_paging(path, dtype, num_readers, share)) for share in (0.0, 0.4, 1.0)}
        for paging in (*ways.values(), *ways.values()):  # the page cache and the tiers fill
            paging.turn()
        used = alternate({share: paging.turn for share, paging in ways.items()}, num_rounds)
    rates = {share: [each.nbytes / 1e6 / each.seconds for each in turns] for share, turns in used.items()}
    for share, turns in used.items():
        yield (
            path.name,
            f"{share:.0%} of the experts" if share else "none",
            figure([100 * each.hits for each in turns], 0),
            figure(rates[share], 0),
            ratio(rates[share], rates[0.0]),
            figure([1e9 * each.cpu_s / each.nbytes for each in turns], 2),
        )


def main(
    layers: Annotated[int, typer.Option(help="So many layers of emo-1b14b.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 9,
    readers: Annotated[int, typer.Option(help="Threads that read experts.")] = 4,
    work: Annotated[Path, typer.Option(help="Where synthetic checkpoints are kept.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, two repeats, no file is written.")] = False,
) -> None:
    """Measure page-in from the host tier beside page-in from the operating system's page cache."""
    quieten()
    shape, layers, rounds = ("emo-micro", 2, 2) if quick else ("emo-1b14b", layers, rounds)
    what = f"emo-tiny, and {shape} with {layers} of {SHAPES[shape].num_layers} layers, random weights; bfloat16"
    report = Report("host_tier", what, conditions(threads=f"{torch.get_num_threads()} of torch, {readers} readers"))
    report.start()
    try:
        plain, packed = checkpoints(work, shape, layers)
        found = [row for path in (TINY, plain, packed) for row in rows(path, torch.bfloat16, rounds, readers)]
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    notes = (
        f"{NUM_POOLS} random pools of {POOL_SHARE:.1%} of the experts take turns in slots for one; {rounds} repeats, "
        "the ways alternating. Hits: the share of paged bytes that came from the host tier.",
        "The file is in the page cache all the time, as on a machine with nothing else to do. A packed checkpoint is "
        "checksummed when it is read, but not from the host tier. What the tier lacks is copied once more, into it.",
    )
    columns = ("checkpoint", "host tier", "hits %", "paged MB/s", "to none", "CPU s/GB")
    report.add(Table("Page-in through the host tier and through the page cache", columns, found, notes))
    if not quick:
        report.write(results)


if __name__ == "__main__":
    typer.run(main)
