"""What experts in 8 and 4 bits bring: decode speed and hits, beside the same experts in bfloat16.

python -m benchmarks.formats          two minutes on 2 cores, and as many before to write 6 GB to build/benchmarks
python -m benchmarks.formats --quick  a smoke run on a toy shape
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.checkpoints import WORK, checkpoints, quantised
from benchmarks.engine_run import EngineRun, fixed, load_engine, random_pools
from benchmarks.measure import alternate
from benchmarks.models import Decoded
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, Report, Table, conditions, figure, quieten, ratio
from benchmarks.shapes import SHAPES
from pager.cli.options import print_error
from pager.engine.paged_model import PagedModel
from pager.errors import PagerError
from pager.memory import NUM_READERS, Budgets, format_bytes
from pager.models.open_model import OpenModel
from pager.store.pack_format import KINDS
from pager.types import PoolPolicy

PLAIN = "bfloat16"
DTYPE = torch.bfloat16
POOL, RESIDENT = 0.125, 0.25
PROMPT_TOKENS = 16
KV_MEMORY = "64MiB"
AIMS = {(POOL, "int8"): 1.6, (POOL, "int4"): 2.2, (RESIDENT, "int8"): 1.7, (RESIDENT, "int4"): 2.5}


@dataclass(frozen=True, slots=True)
class Effort:
    num_rounds: int
    num_steps: int
    num_readers: int


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "emo-1b14b",
    layers: Annotated[int, typer.Option(help="So many of its layers, and as large a part of the vocabulary.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    threads: Annotated[int, typer.Option(help="Of torch.")] = torch.get_num_threads(),
    work: Annotated[Path, typer.Option(help="Where synthetic checkpoints are kept.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write the checkpoints and measure nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, two repeats, no file is written.")] = False,
) -> None:
    """Measure decode at batch 1 with experts in bfloat16, int8 and int4, in turns."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shapes are {', '.join(SHAPES)}")
    quieten()
    torch.set_num_threads(threads)
    if quick:
        shape, layers, rounds = "emo-micro", 2, 2
    effort = Effort(rounds, 4 if quick else 24, NUM_READERS)
    try:
        plain, packed = checkpoints(work, shape, layers)
        paths = {PLAIN: packed} | {
            kind: quantised(plain, plain.with_name(f"{plain.name}-{kind}"), kind, DTYPE) for kind in KINDS
        }
        if prepare:
            return
        report = Report(
            "formats",
            f"{shape} with {layers} of {SHAPES[shape].num_layers} layers, random weights, batch 1",
            conditions(threads=f"{threads} of torch, {NUM_READERS} readers"),
        )
        report.start()
        report.add(speed_table("Decode in a pool of 12.5 %", paths, POOL, effort, pooled=True))
        report.add(speed_table("Decode, exact, a quarter of the experts in memory", paths, RESIDENT, effort))
        report.add(memory_table(paths, effort))
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    if not quick:
        report.write(results)


@contextmanager
def opened(
    paths: Mapping[str, Path], memory: Mapping[str, str | int], effort: Effort
) -> Iterator[dict[str, EngineRun]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(load_engine(path, DTYPE, Budgets(memory[name], 0, KV_MEMORY), effort.num_readers))
            for name, path in paths.items()
        }


def speed_table(title: str, paths: Mapping[str, Path], share: float, effort: Effort, *, pooled: bool = False) -> Table:
    """`share` of the experts have slots, which a pool fills."""
    prompts = prompts_of(paths[PLAIN], 1, PROMPT_TOKENS)
    with opened(paths, dict.fromkeys(paths, f"{100 * share}%"), effort) as engines:
        pool = random_pools(engines[PLAIN].paged.facts, share, 1)[0]
        policy = fixed(pool) if pooled else PoolPolicy()
        decodes = {name: partial(engine.decoder(policy), prompts, effort.num_steps) for name, engine in engines.items()}
        for decode in decodes.values():
            decode()  # the first run chooses kernels, and reads what then stays
        found = alternate(decodes, effort.num_rounds)
        expert_bytes = {name: engine.paged.facts.expert_bytes for name, engine in engines.items()}
        token_bytes = {name: bytes_of_a_token(engine.paged) for name, engine in engines.items()}
    plain = rates(found[PLAIN])
    rows = [
        (
            name,
            format_bytes(expert_bytes[name]),
            figure(rates(runs)),
            ratio(rates(runs), plain),
            f"{1e3 * processor_s(runs):.1f} ms",
            f"{processor_s(found[PLAIN]) / processor_s(runs):.2f}",
            f"{token_bytes[PLAIN] / token_bytes[name]:.2f}",
            str(AIMS.get((share, name), "")),
            format_bytes(round(statistics.median(run.nbytes / run.num_tokens for run in runs))),
        )
        for name, runs in found.items()
    ]
    return Table(
        title,
        (
            "experts in",
            "an expert",
            "tokens/s",
            "ratio",
            "processor, a token",
            "ratio",
            "by bytes",
            "aim",
            "paged in a token",
        ),
        rows,
        (
            f"Ratio: of medians, beside {PLAIN}, which takes turns with the others. The prefill is not in the time. "
            f"{effort.num_rounds} repeats of {effort.num_steps} steps; brackets: smallest and largest.",
            "Processor: the time of all threads of the process, and how many times as much bfloat16 takes.",
            "By bytes: how many times as much a token reads from memory in bfloat16, attention and head included; "
            "what is missing is not.",
            "What is missing is read while decoding, from the operating system's page cache.",
        ),
    )


def bytes_of_a_token(paged: PagedModel) -> int:
    """The weights that one token is multiplied with: its experts, and the trunk but for the embedding."""
    picks = zip(paged.facts.top_k_per_layer, paged.facts.shared_per_layer, strict=True)
    embedding = paged.model.get_input_embeddings().weight
    is_tied = embedding is paged.model.get_output_embeddings().weight
    trunk = sum(parameter.nbytes for parameter in paged.model.parameters()) - (0 if is_tied else embedding.nbytes)
    return int(trunk) + sum(map(sum, picks)) * paged.facts.expert_bytes


def memory_table(paths: Mapping[str, Path], effort: Effort) -> Table:
    """Hits in equal memory: a quarter of what all experts take in bfloat16."""
    with OpenModel.open(paths[PLAIN], DTYPE).checkpoint as checkpoint:
        assert checkpoint.pack is not None, "it is packed"
        num_bytes = checkpoint.pack.extents_nbytes
    prompts = prompts_of(paths[PLAIN], 1, PROMPT_TOKENS)
    rows = []
    with opened(paths, dict.fromkeys(paths, int(RESIDENT * num_bytes)), effort) as engines:
        for name, engine in engines.items():
            decode = engine.decoder(PoolPolicy())
            decode(prompts, effort.num_steps)
            before = engine.paged.pager.stats().paging
            decode(prompts, effort.num_steps)
            paging = engine.paged.pager.stats().paging - before
            hits = paging.experts_hit / max(1, paging.experts_hit + paging.experts_missed)
            num_routed = sum(engine.paged.facts.routed_per_layer)
            held = f"{engine.paged.pager.num_slots} of {num_routed}"
            rows.append((name, held, f"{hits:.1%}", format_bytes(paging.bytes_from_disk)))
    return Table(
        f"Hits in equal memory, {format_bytes(int(RESIDENT * num_bytes))}, exact",
        ("experts in", "slots", "hits", "paged in"),
        rows,
        (f"A prompt of {PROMPT_TOKENS} tokens and {effort.num_steps} tokens after it, the second time.",),
    )


def processor_s(runs: list[Decoded]) -> float:
    """Of all threads, a token: what a machine that others use as well can still say."""
    return statistics.median(run.processor_s / run.num_tokens for run in runs)


def rates(runs: list[Decoded]) -> list[float]:
    return [run.rate for run in runs]


if __name__ == "__main__":
    typer.run(main)
