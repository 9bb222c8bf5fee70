"""How cost grows with experts per layer, layers, pool size and concurrent pools: a table and a plot each, from one run.

python -m benchmarks.growth  3 to 5 minutes on 2 cores; needs 6 GB in build/benchmarks, which it removes
python -m benchmarks.growth --quick  a smoke run on a toy shape that writes no results
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.engine_run import EngineRun, fixed, load_engine, random_pools
from benchmarks.growth_plots import Curve, plot
from benchmarks.measure import alternate
from benchmarks.page_cache import drop
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten
from benchmarks.shapes import SHAPES, Shape
from benchmarks.synthetic import write_checkpoint
from pager.cli.options import print_error
from pager.errors import PagerError
from pager.memory import Budgets, format_bytes
from pager.types import ExpertPool

WORK = ROOT / "build" / "benchmarks"
DTYPE = torch.bfloat16
POOL = 0.125
PROMPT_TOKENS = 64
DECODE_STEPS = 16
NUM_REQUESTS = 8
ROW = ("decode ms a token", "first token ms, pool in slots", "first token ms, pool on disk")
CONCURRENT_ROW = ("8 answers s, slots for all", "8 answers s, slots for two pools")


@dataclass(frozen=True, slots=True)
class Growth:
    """What was varied, and by column of `names` the repeats' values at each of `xs`."""

    name: str
    label: str
    names: tuple[str, ...]
    xs: Sequence[int]
    values: Sequence[Sequence[Sequence[float]]]
    nbytes: Sequence[int]
    note: str

    def table(self) -> Table:
        rows = [
            (str(x), format_bytes(nbytes), *(figure(repeats) for repeats in values))
            for x, nbytes, values in zip(self.xs, self.nbytes, self.values, strict=True)
        ]
        columns = (self.label, "bytes of pools", *self.names)
        return Table(f"By {self.label}", columns, rows, (self.note, f"Plot: growth-{self.name}, same run."))

    def curves(self) -> list[Curve]:
        return [
            Curve(name, [statistics.median(values[column]) for values in self.values])
            for column, name in enumerate(self.names)
        ]


@dataclass(frozen=True, slots=True)
class Sizes:
    base: Shape
    experts: tuple[int, ...] = (64, 128, 256)  # with fewer an eighth is too small a pool for a token
    layers: tuple[int, ...] = (1, 2, 3)
    percents: tuple[int, ...] = (7, 12, 25, 50)
    pools: tuple[int, ...] = (1, 2, 4, 8)

    @property
    def one_layer(self) -> Shape:
        return self.base.shortened(1)


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 3,
    threads: Annotated[int, typer.Option(help="Of torch.")] = torch.get_num_threads(),
    work: Annotated[Path, typer.Option(help="Where the checkpoints are for as long as it runs.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for tables and plots.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, one repeat; nothing is left.")] = False,
) -> None:
    """Measure how the cost of paging grows."""
    quieten()
    torch.set_num_threads(threads)
    sizes = Sizes(SHAPES["emo-micro" if quick else shape])
    if quick:
        sizes, rounds = replace(sizes, experts=(64, 128), layers=(1, 2), percents=(25, 50), pools=(1, 2)), 1
    report = Report(
        "growth",
        f"{shape}, one layer where nothing else is said, random weights, bfloat16, pools of {POOL:.1%}",
        conditions(threads=f"{threads} of torch", repeats=str(rounds)),
    )
    report.start()
    work.mkdir(parents=True, exist_ok=True)
    growths = []
    try:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            for measure in (by_experts, by_layers, by_pool_size, by_pools):
                growths.append(measure(sizes, Path(folder), rounds))
                report.add(growths[-1].table())
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    with tempfile.TemporaryDirectory() as folder:
        written = report.write(Path(folder) if quick else results)
        for growth in growths:
            path = written.with_name(written.stem.replace("growth", f"growth-{growth.name}", 1) + ".png")
            plot(growth.label, growth.xs, growth.curves(), path)
            console.print(f"wrote {path}")


def by_experts(sizes: Sizes, work: Path, num_rounds: int) -> Growth:
    points = [_point(replace(sizes.one_layer, num_experts=count), sizes, work, num_rounds) for count in sizes.experts]
    return _growth("experts", "experts per layer", ROW, sizes.experts, points, "A pool has an eighth of them.")


def by_layers(sizes: Sizes, work: Path, num_rounds: int) -> Growth:
    points = [_point(sizes.base.shortened(count), sizes, work, num_rounds) for count in sizes.layers]
    return _growth("layers", "layers", ROW, sizes.layers, points, "The vocabulary grows with them.")


def by_pool_size(sizes: Sizes, work: Path, num_rounds: int) -> Growth:
    with _checkpoint(sizes.one_layer, sizes, work) as model:
        points = [_pool_point(model, num_rounds, percent / 100) for percent in sizes.percents]
    return _growth("pool-size", "pool size, % of the experts", ROW, sizes.percents, points, "One layer.")


def by_pools(sizes: Sizes, work: Path, num_rounds: int) -> Growth:
    """Eight requests that share fewer or more pools, which all stay in slots, or have to take turns in them."""
    points = []
    with _checkpoint(sizes.one_layer, sizes, work) as model:
        prompts = prompts_of(model, NUM_REQUESTS, PROMPT_TOKENS)
        with _engine(model, "100%") as roomy, _engine(model, "25%") as tight:
            for count in sizes.pools:
                pools = random_pools(roomy.paged.facts, POOL, count)
                runs = {
                    name: partial(_answer_all, engine, prompts, pools)
                    for name, engine in zip(CONCURRENT_ROW, (roomy, tight), strict=True)
                }
                with console.status(f"{count} pools"):
                    for run in runs.values():
                        run()
                    found = alternate(runs, num_rounds)
                nbytes = sum(pool.num_experts for pool in pools) * roomy.paged.plan.expert_bytes
                points.append((nbytes, [found[name] for name in CONCURRENT_ROW]))
    note = f"{NUM_REQUESTS} requests at once, {PROMPT_TOKENS} tokens each and {DECODE_STEPS} more; pools are disjoint."
    return _growth("pools", "concurrent pools", CONCURRENT_ROW, sizes.pools, points, note)


Point = tuple[int, list[list[float]]]
"""The bytes of the pools, and the repeats of each column."""


def _growth(
    name: str, label: str, names: tuple[str, ...], xs: Sequence[int], points: Sequence[Point], note: str
) -> Growth:
    return Growth(name, label, names, xs, [values for _, values in points], [nbytes for nbytes, _ in points], note)


def _point(shape: Shape, sizes: Sizes, work: Path, num_rounds: int) -> Point:
    with _checkpoint(shape, sizes, work) as model:
        return _pool_point(model, num_rounds, POOL)


def _pool_point(model: Path, num_rounds: int, share: float) -> Point:
    """Batch 1 with one pool, in slots for just that; another of its size evicts it."""
    with _engine(model, "100%") as engine:
        pool, other = random_pools(engine.paged.facts, share, 2)
        nbytes = pool.num_experts * engine.paged.plan.expert_bytes
    prompt, files = prompts_of(model, 1, PROMPT_TOKENS)[0], sorted(model.glob("*.safetensors"))
    with _engine(model, nbytes) as engine, console.status(f"pool of {share:.1%}"):
        decode = engine.decoder(fixed(pool))

        def first_token_ms() -> float:
            return 1e3 * engine.first_token(prompt, fixed(pool))[0]

        def cold_ms() -> float:
            engine.first_token(prompt, fixed(other))
            drop(files)
            return first_token_ms()

        runs: dict[str, Callable[[], float]] = {
            "cold": cold_ms,
            "warm": first_token_ms,
            "decode": lambda: 1e3 / decode([prompt], DECODE_STEPS).rate,
        }
        for run in runs.values():
            run()
        found = alternate(runs, num_rounds)
    return nbytes, [found["decode"], found["warm"], found["cold"]]


def _answer_all(engine: EngineRun, prompts: Sequence[Sequence[int]], pools: Sequence[ExpertPool]) -> float:
    requests = [(prompt, fixed(pools[number % len(pools)])) for number, prompt in enumerate(prompts)]
    started_s = time.perf_counter()
    engine.answer_all(requests, DECODE_STEPS)
    return time.perf_counter() - started_s


def _engine(model: Path, memory: str | int) -> AbstractContextManager[EngineRun]:
    return load_engine(model, DTYPE, Budgets(expert_memory=memory, host_memory=0, kv_memory="64MiB"), 4)


@contextmanager
def _checkpoint(shape: Shape, sizes: Sizes, work: Path) -> Iterator[Path]:
    """Written where it is not there yet; the one that all four measure stays until the end."""
    model = work / f"{shape.num_layers}-layers-{shape.num_experts}-experts"
    if not model.exists():
        with console.status(f"writing {shape.num_layers} layers of {shape.num_experts} experts"):
            write_checkpoint(model, shape)
    yield model
    if shape != sizes.one_layer:
        shutil.rmtree(model)


if __name__ == "__main__":
    typer.run(main)
