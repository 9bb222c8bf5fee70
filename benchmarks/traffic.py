"""What mixed traffic costs in a quarter of the memory: tokens/s, bytes paged and first tokens through the service,
beside the same requests with room for all experts.

python -m benchmarks.traffic [MODEL]  about 5 minutes on 2 cores; with --corpus DIR, prompts from its documents
python -m benchmarks.traffic --quick  a smoke run that writes no file
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from expert_pager.v1 import expert_pager_pb2 as pb

from benchmarks.measure import alternate
from benchmarks.prompts import domains_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from benchmarks.service import Client, Wave, first_tokens_ms, service

MODEL = ROOT / "models" / "emo-tiny"
MIXES = ((16, 4), (8, 8), (16, 16))  # domains, and requests of each in flight
GOALS = (0.75, 0.90, 0.90)  # of the tokens/s with all experts in memory
MEMORIES = ("25%", "100%")
POOL = 0.125
PROMPT_TOKENS = 64


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with a tokenizer and a fitted router.")] = MODEL,
    source: Annotated[str, typer.Option(help="What chooses the pools: prediction or prefill.")] = "prediction",
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    mixes: Annotated[int, typer.Option(min=1, max=len(MIXES), help="How many of the mixes.")] = len(MIXES),
    corpus: Annotated[Path | None, typer.Option(help="A directory with documents of many domains.")] = None,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure mixed traffic in a quarter of the memory."""
    quieten()
    chosen, rounds, tokens = (((2, 2),), 1, 4) if quick else (MIXES[:mixes], rounds, tokens)
    pool = {"share": POOL, "source": pb.PoolSource.Value(f"POOL_SOURCE_{source.upper()}")}
    found, most = conditions(), max(domains * each for domains, each in chosen)
    with ExitStack() as stack:
        clients = {}
        for memory in MEMORIES:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            ready = stack.enter_context(service(model, folder, most, None, memory))
            clients[memory] = stack.enter_context(closing(Client(ready["address"])))
        texts = "documents of a corpus" if corpus else "texts of the repository"
        report = Report(
            "traffic",
            f"{model.name}, bfloat16, pools of {100 * POOL:g} % from the {source}; {PROMPT_TOKENS} prompt tokens from "
            f"{texts}, answers of {tokens}",
            found | {"threads": f"{ready['plan']['num_threads']} of torch in each worker"},
        )
        report.start()
        with console.status("waves"):
            report.add(table(model, clients, pool, chosen, rounds, tokens, corpus))
    if not quick:
        report.write(results)


def table(
    model: Path,
    clients: dict[str, Client],
    pool: dict[str, Any],
    mixes: Sequence[tuple[int, int]],
    num_rounds: int,
    num_tokens: int,
    corpus: Path | None,
) -> Table:
    rows = []
    for (num_domains, num_each), goal in zip(mixes, GOALS, strict=False):
        by_domain = domains_of(model, num_domains, num_each * (num_rounds + 1), PROMPT_TOKENS, corpus)
        # No prompt twice: its keys and values would still be there.
        waves = [
            [domain[start + number] for number in range(num_each) for domain in by_domain]
            for start in range(0, num_each * (num_rounds + 1), num_each)
        ]
        runs = {name: partial(_next_wave, client, iter(waves), num_tokens, pool) for name, client in clients.items()}
        for run in runs.values():
            run()
        rows.append(_row(f"{num_domains} x {num_each}", alternate(runs, num_rounds), goal))
    columns = (
        *("domains x requests in flight", *(f"{memory} of the experts, tokens/s" for memory in MEMORIES)),
        *("ratio", "at least", "MiB paged", *(f"first token ms at {memory}, p50 / p99" for memory in MEMORIES)),
    )
    notes = (
        "All requests of a wave are sent at once, one of each domain after the other; tokens/s are those of answers, "
        "from there to the last one's end.",
        f"{num_rounds} rounds in which both services take turns, after one of each that is not counted; bytes paged "
        "are of one wave in the smaller memory.",
    )
    return Table("Mixed traffic", columns, rows, notes)


def _next_wave(client: Client, waves: Iterator[list[list[int]]], num_tokens: int, pool: dict[str, Any]) -> Wave:
    return client.wave(next(waves), num_tokens, pool)


def _row(mix: str, found: dict[str, list[Wave]], goal: float) -> tuple[str, ...]:
    small, whole = (found[memory] for memory in MEMORIES)
    rates = [[wave.tokens_per_s for wave in waves] for waves in (small, whole)]
    paged_mib = statistics.median(wave.bytes_paged for wave in small) / 2**20
    firsts = [" / ".join(f"{value:.0f}" for value in first_tokens_ms(waves)) for waves in (small, whole)]
    figures = (figure(rates[0], 0), figure(rates[1], 0), ratio(rates[0], rates[1]), f"{goal}", f"{paged_mib:.1f}")
    return (mix, *figures, *firsts)


if __name__ == "__main__":
    typer.run(main)
