"""What mixed traffic costs in a quarter of the memory: tokens/s, bytes paged and first tokens through the service,
beside the same requests with room for all experts.

python -m benchmarks.traffic [MODEL]  about 8 minutes on 2 cores; with --corpus DIR, prompts from its documents
python -m benchmarks.traffic --tables waves  requests sent at once only; or arrivals, or fairness
python -m benchmarks.traffic --quick  a smoke run that writes no file
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from expert_pager.v1 import expert_pager_pb2 as pb

from benchmarks.engine_run import EngineRun, fixed, load_engine
from benchmarks.measure import alternate
from benchmarks.prompts import Domains, domains_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from benchmarks.service import KV_MEMORY, Client, Wave, first_tokens_ms, service
from pager.engine.interface import EngineLimits
from pager.engine.paged_model import PagedModel
from pager.memory import Budgets
from pager.pools.pick import pick_pool
from pager.predict.fitted import PREDICTOR_NAME, LexicalPredictor, PredictorFile
from pager.types import PoolPolicy, Share

MODEL = ROOT / "models" / "emo-tiny"
MIXES = ((16, 4), (8, 8), (16, 16))  # domains, and requests of each in flight
GOALS = (0.75, 0.90, 0.90)  # of the tokens/s with all experts in memory
MEMORIES = ("25%", "100%")
POOL = 0.125
PROMPT_TOKENS = ANSWER_TOKENS = 64
LOAD = 0.8  # of the requests/s that all experts in memory sustain
TABLES = ("waves", "arrivals", "fairness")
FLOOD_REQUESTS, FLOOD_ROWS, NUM_ASKED = 200, 64, 6  # in flight, running, and those of the tenant that asks little


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with a tokenizer and a fitted router.")] = MODEL,
    source: Annotated[str, typer.Option(help="What chooses the pools: codebook, prediction or prefill.")] = "codebook",
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 3,
    mixes: Annotated[int, typer.Option(min=1, max=len(MIXES), help="How many of the mixes.")] = len(MIXES),
    corpus: Annotated[Path | None, typer.Option(help="A directory with documents of many domains.")] = None,
    tables: Annotated[str, typer.Option(help=f"Some of {', '.join(TABLES)}, with commas between.")] = ",".join(TABLES),
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure mixed traffic in a quarter of the memory."""
    quieten()
    chosen, rounds, tokens = (((2, 2),), 1, 4) if quick else (MIXES[:mixes], rounds, ANSWER_TOKENS)
    pool = {"share": POOL, "source": pb.PoolSource.Value(f"POOL_SOURCE_{source.upper()}")}
    wanted = set(tables.split(","))
    if not wanted <= set(TABLES):
        raise typer.BadParameter(f"{tables!r} names other tables than {', '.join(TABLES)}", param_hint="--tables")
    report = Report(
        "traffic",
        f"{model.name}, bfloat16, pools of {100 * POOL:g} % from the {source}; {PROMPT_TOKENS} prompt tokens from "
        f"{'documents of a corpus' if corpus else 'texts of the repository'}, answers of {tokens}",
        conditions(),
    )
    report.start()
    with console.status("requests"):
        if wanted & {"waves", "arrivals"}:
            with ExitStack() as stack:
                clients = _services(model, max(domains * each for domains, each in chosen), stack)
                if "waves" in wanted:
                    report.add(table(model, clients, pool, chosen, rounds, tokens, corpus))
                if "arrivals" in wanted:
                    report.add(arrivals(model, clients, pool, chosen[0], tokens, corpus))
        if "fairness" in wanted:
            report.add(fairness(model, tokens, 2 if quick else NUM_ASKED, 4 if quick else FLOOD_REQUESTS, corpus))
    if not quick:
        report.write(results)


def _services(model: Path, most: int, stack: ExitStack) -> dict[str, Client]:
    clients = {}
    for memory in MEMORIES:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = stack.enter_context(service(model, folder, most, None, memory))
        clients[memory] = stack.enter_context(closing(Client(ready["address"])))
    return clients


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


def arrivals(
    model: Path,
    clients: dict[str, Client],
    pool: dict[str, Any],
    mix: tuple[int, int],
    num_tokens: int,
    corpus: Path | None,
) -> Table:
    """Requests that come one by one, as often as LOAD of what all experts in memory sustain."""
    num_domains, num_each = mix
    by_domain = domains_of(model, num_domains, 4 * num_each, PROMPT_TOKENS, corpus)
    mixed = [domain[number] for number in range(4 * num_each) for domain in by_domain]
    num_at_once = num_domains * num_each
    for client in clients.values():
        client.wave(mixed[:num_at_once], num_tokens, pool)
    sustained = clients[MEMORIES[1]].wave(mixed[num_at_once : 2 * num_at_once], num_tokens, pool)
    requests_per_s = LOAD * sustained.tokens_per_s / num_tokens
    prompts = mixed[2 * num_at_once :]
    times_s = np.random.default_rng(0).exponential(1 / requests_per_s, len(prompts)).cumsum().tolist()
    rows = []
    for memory, client in clients.items():
        wave = client.wave(prompts, num_tokens, pool, times_s)
        firsts = " / ".join(f"{value:.0f}" for value in first_tokens_ms([wave]))
        rows.append((memory, f"{wave.tokens_per_s:.0f}", f"{wave.bytes_paged / 2**20:.1f}", firsts))
    columns = ("of the experts in memory", "tokens/s", "MiB paged", "first token ms, p50 / p99")
    return Table(
        "Arrivals one by one",
        columns,
        rows,
        (
            f"{len(prompts)} requests of {num_domains} domains at {requests_per_s:.1f} a second with exponential gaps: "
            f"{LOAD:g} of what a wave of {num_at_once} had with all experts in memory.",
            "Tokens/s are those of answers, from the start to the last one's end.",
        ),
    )


def fairness(model: Path, num_tokens: int, num_asked: int, num_flood: int, corpus: Path | None) -> Table:
    """One tenant asks one domain at a time, while another keeps many requests of 16 domains in flight."""
    domains = domains_of(model, MIXES[0][0], 16, PROMPT_TOKENS, corpus)
    ways = {  # requests in flight beside it, whose they are, and how often one may be passed
        "alone": (0, "flood", EngineLimits().max_overtakes),
        "beside a flood": (num_flood, "flood", EngineLimits().max_overtakes),
        "beside it, first come, first served": (num_flood, "small", 0),
    }
    rows = []
    for name, (flood, tenant, max_overtakes) in ways.items():
        limits = EngineLimits(
            max_running=FLOOD_ROWS, max_waiting=2 * FLOOD_REQUESTS, max_overtakes=max_overtakes, prefix_cache=False
        )
        budgets = Budgets(expert_memory=MEMORIES[0], host_memory=0, kv_memory=KV_MEMORY, max_running=FLOOD_ROWS)
        torch.set_num_threads(1)
        with load_engine(model, torch.bfloat16, budgets, 4, limits=limits) as engine:
            policies = _pools_of(engine.paged, domains)
            num = min(num_asked, 3) if max_overtakes == 0 else num_asked
            firsts_s, nbytes = _ask(engine, domains, policies, (num, num_tokens), flood, tenant)
        mib = nbytes / num / 2**20
        rows.append((name, f"{1e3 * statistics.median(firsts_s):.0f} / {1e3 * max(firsts_s):.0f}", f"{mib:.2f}"))
    return Table(
        "A tenant that asks one domain at a time",
        ("", "first token ms, p50 / longest", "MiB paged for a request"),
        rows,
        (
            f"The engine in this process, {MEMORIES[0]} of the experts; {num_flood} requests of 16 domains in flight "
            f"beside it, of which {FLOOD_ROWS} may run; each domain has a pool of {100 * POOL:g} %.",
            f"{num_asked} requests one after another; first come, first served: three.",
        ),
    )


def _pools_of(paged: PagedModel, domains: Domains) -> list[PoolPolicy]:
    """One fixed pool for each domain: the prediction for its first prompt."""
    lexical = LexicalPredictor(PredictorFile.load(Path(paged.path) / PREDICTOR_NAME, paged.fingerprint))
    return [fixed(pick_pool(lexical.scores(prompts[0]), Share(POOL), paged.facts)) for prompts in domains]


def _ask(
    engine: EngineRun,
    domains: Domains,
    policies: Sequence[PoolPolicy],
    asked: tuple[int, int],
    num_flood: int,
    tenant: str,
) -> tuple[list[float], int]:
    """Seconds to the first token of each of `asked` (requests, tokens of each), and the bytes paged for all of them.

    As many as `num_flood` requests of `tenant` are in flight meanwhile, of all domains in turn.
    """
    num_asked, num_tokens = asked
    numbers = count()

    def flood() -> None:
        number = next(numbers)
        prompts = domains[number % len(domains)]
        prompt = prompts[number // len(domains) % len(prompts)]
        engine.submit(prompt, num_tokens, policies[number % len(domains)], tenant=tenant)

    for _ in range(num_flood):
        flood()
    firsts_s, nbytes = [], 0
    for number in range(num_asked):
        sent_s, first_s, has_ended = time.perf_counter(), 0.0, False
        name = engine.submit(domains[0][number], num_tokens, policies[0], tenant="small")
        while not has_ended:
            for delivered_s, chunk in engine.timed_step():
                if chunk.request_id == name:
                    first_s = first_s or delivered_s - sent_s
                    has_ended = chunk.usage is not None
                    nbytes += chunk.usage.paging.bytes_paged if chunk.usage is not None else 0
                elif chunk.usage is not None:
                    flood()
        firsts_s.append(first_s)
    return firsts_s, nbytes


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
