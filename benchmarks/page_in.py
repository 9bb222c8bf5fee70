"""Paging in beside the physical limit: from the disk beside a raw read, from the host tier beside a plain copy.

python -m benchmarks.page_in          2 to 4 minutes; keeps 7 GB in build/benchmarks
python -m benchmarks.page_in --quick  a smoke run on a toy shape
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.checkpoints import WORK, checkpoints
from benchmarks.engine_run import random_pools
from benchmarks.measure import alternate
from benchmarks.page_cache import drop
from benchmarks.raw_copy import RawCopy
from benchmarks.raw_read import RawReader, extents_of
from benchmarks.report import RESULTS, Report, Table, conditions, console, figure, quieten, ratio
from benchmarks.shapes import SHAPES
from pager.cache.device import DeviceSlots
from pager.cache.pager import CacheOptions, ExpertPager
from pager.cache.tiers import HostTier
from pager.cli.options import print_error
from pager.errors import PagerError
from pager.memory import format_bytes
from pager.models.open_model import OpenModel
from pager.types import ExpertPool

POOL_SHARE = 0.125
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Used:
    """One page-in, raw read or copy. `cpu_s` is processor time of all threads."""

    seconds: float
    cpu_s: float


class Paging:
    """A pager with slots for one of two pools that take turns, so that each evicts the other."""

    def __init__(self, pager: ExpertPager, pools: Sequence[ExpertPool]) -> None:
        self.pager = pager
        self.pools = pools
        self._turns = cycle(pools)

    def page_in(self) -> None:
        pool, before = next(self._turns), self.pager.stats()
        lease = self.pager.reserve_pool(pool.keys())
        assert lease is not None, "nobody else holds slots"
        with lease:
            for layer in range(len(pool.experts)):
                lease.wait(layer)
        assert (self.pager.stats().paging - before.paging).experts_missed == pool.num_experts, (
            "something was resident already"
        )


@contextmanager
def open_paging(
    path: Path, dtype: torch.dtype, num_readers: int, *, bypass_page_cache: bool = False, with_host: bool = False
) -> Iterator[Paging]:
    """`with_host`: a host tier that holds both pools."""
    opened = OpenModel.open(path, dtype)
    facts = opened.facts
    with opened.checkpoint, ExitStack() as closing:
        source = opened.open_experts()
        closing.callback(source.close)
        pools = random_pools(facts, POOL_SHARE, 2)
        host = None
        if with_host:
            host = HostTier.create(2 * pools[0].num_experts * opened.expert_bytes, source.shape, dtype)
            closing.callback(host.close)
        slots = DeviceSlots(
            pools[0].num_experts,
            source.shape,
            dtype,
            "cpu",
            num_layers=facts.num_layers,
            max_experts=max(facts.experts_per_layer),
        )
        options = CacheOptions(num_readers=num_readers, bypass_page_cache=bypass_page_cache)
        pager = ExpertPager(source, slots, host=host, options=options)
        closing.callback(pager.close)
        yield Paging(pager, pools)


def from_disk(
    path: Path, dtype: torch.dtype, num_rounds: int, num_readers: int, *, direct: bool = False
) -> Iterator[Sequence[str]]:
    """Rows: from an empty page cache and, unless it is left out, from a full one, each beside the raw read."""
    with open_paging(path, dtype, num_readers, bypass_page_cache=direct) as paging:
        extents = extents_of(path, paging.pools[0].keys())
        with RawReader(extents, num_readers, direct=direct) as raw:
            for _ in paging.pools:  # slots are in use before the first is timed
                paging.page_in()
            empty = partial(drop, raw.paths)
            caches: list[tuple[str, Callable[[], object]]] = [("empty", empty), ("full", lambda: None)]
            for name, prepare in caches[:1] if direct else caches:
                with console.status(f"page-in of {path.name}, page cache {name}"):
                    if name == "full":  # what the cold rounds left out of it
                        for run in (paging.page_in, paging.page_in, raw.read):
                            run()
                    runs = {"paged": partial(_used, prepare, paging.page_in), "raw": partial(_used, prepare, raw.read)}
                    used = alternate(runs, num_rounds)
                yield path.name, "left out" if direct else name, *_cells(raw.nbytes, used["paged"], used["raw"])


def from_host(path: Path, dtype: torch.dtype, num_rounds: int, num_readers: int) -> Iterator[Sequence[str]]:
    """The row: from the host tier, which holds both pools, beside a copy of as many bytes."""
    with open_paging(path, dtype, num_readers, with_host=True) as paging, console.status("page-in from the host tier"):
        for _ in (*paging.pools, *paging.pools):
            paging.page_in()
        from_disk_before = paging.pager.stats().paging.bytes_from_disk
        num_experts, record = paging.pools[0].num_experts, paging.pager.slots.record_bytes
        with RawCopy(num_experts, record, num_readers) as raw:
            ways = {"paged": paging.page_in, **raw.ways}
            used = alternate({name: partial(_used, lambda: None, run) for name, run in ways.items()}, num_rounds)
        assert paging.pager.stats().paging.bytes_from_disk == from_disk_before, "the host tier did not hold both pools"
        best = min(raw.ways, key=lambda name: statistics.median(each.seconds for each in used[name]))
        yield path.name, best, *_cells(num_experts * record, used["paged"], used[best])


def bandwidth_table(paths: Sequence[Path], dtype: torch.dtype, num_rounds: int, num_readers: int) -> Table:
    """`paths`: checkpoints as downloaded and packed."""
    notes = []
    rows = [row for path in paths for row in from_disk(path, dtype, num_rounds, num_readers)]
    for path in paths:
        why_not = why_not_direct(path, dtype)
        if why_not:
            notes.append(f"{path.name} was not read past the page cache: {why_not}.")
        else:
            rows += from_disk(path, dtype, num_rounds, num_readers, direct=True)
    return Table(
        "Page-in, disk to slots",
        ("checkpoint", "page cache", *_columns("raw")),
        rows,
        (
            f"One random pool of {POOL_SHARE:.1%} of the experts a repeat, evicting another; {num_rounds} repeats, raw "
            "and paged alternating.",
            f"Both with {num_readers} threads, through the page cache or both past it (O_DIRECT), and into memory that "
            "was in use before. Empty: dropped before each read, and seen to be gone (mincore).",
            "A packed checkpoint is checksummed as it is read; a plain one has no checksums. Processor time is that of "
            "all threads.",
            *notes,
        ),
    )


def warm_table(path: Path, dtype: torch.dtype, num_rounds: int, num_readers: int) -> Table:
    return Table(
        "Page-in, host tier to slots",
        ("checkpoint", "copied by", *_columns("copy")),
        list(from_host(path, dtype, num_rounds, num_readers)),
        (
            f"One random pool of {POOL_SHARE:.1%} of the experts a repeat, evicting another; {num_rounds} repeats, "
            "copies and paging alternating.",
            f"Copied by the faster of two ways: torch's copy_ of all the bytes with {torch.get_num_threads()} threads, "
            f"and {num_readers} threads that copy an expert at a time. All memory was in use before.",
        ),
    )


def _columns(limit: str) -> tuple[str, ...]:
    return "bytes", "paged MB/s", f"{limit} MB/s", "ratio", "paged CPU s/GB", f"{limit} CPU s/GB"


def _cells(nbytes: int, paged: Sequence[Used], limit: Sequence[Used]) -> tuple[str, ...]:
    rates = [[nbytes / 1e6 / used.seconds for used in each] for each in (paged, limit)]
    costs = [[used.cpu_s / nbytes * 1e9 for used in each] for each in (paged, limit)]
    return (
        format_bytes(nbytes),
        figure(rates[0], 0),
        figure(rates[1], 0),
        ratio(*rates),
        figure(costs[0], 2),
        figure(costs[1], 2),
    )


def _used(prepare: Callable[[], object], run: Callable[[], object]) -> Used:
    prepare()
    cpu_s, started_s = time.process_time(), time.perf_counter()
    run()
    return Used(time.perf_counter() - started_s, time.process_time() - cpu_s)


def why_not_direct(path: Path, dtype: torch.dtype) -> str:
    """Why a checkpoint cannot be read past the page cache; an empty string where it can."""
    opened = OpenModel.open(path, dtype)
    with opened.checkpoint:
        source = opened.open_experts()
        try:
            return source.bypass_page_cache(dtype)
        finally:
            source.close()


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int, typer.Option(help="So many of its layers.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 9,
    readers: Annotated[int, typer.Option(help="Threads that read experts, and of the raw read.")] = 4,
    work: Annotated[Path, typer.Option(help="Where synthetic checkpoints are kept.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, two repeats, no file is written.")] = False,
) -> None:
    """Measure page-in from disk and from the host tier beside a raw read and a plain copy of the same bytes."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shapes are {', '.join(SHAPES)}")
    quieten()
    if quick:
        shape, layers, rounds = "emo-micro", 2, 2
    report = Report(
        "page_in",
        f"{shape} with {layers} of {SHAPES[shape].num_layers} layers, random weights, bfloat16",
        conditions(threads=f"{torch.get_num_threads()} of torch, {readers} readers"),
    )
    report.start()
    try:
        plain, packed = checkpoints(work, shape, layers)
        report.add(bandwidth_table((plain, packed), DTYPE, rounds, readers))
        report.add(warm_table(packed, DTYPE, rounds, readers))
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    if not quick:
        report.write(results)


if __name__ == "__main__":
    typer.run(main)
