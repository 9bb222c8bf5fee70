"""What mixed traffic costs in a quarter of the memory: tokens/s, bytes paged and first tokens through the service,
beside the same requests with room for all experts, and beside what a quarter of them in slots alone gives.

python -m benchmarks.traffic [MODEL]  about 10 minutes on 2 cores; with --corpus DIR, prompts from its documents
python -m benchmarks.traffic --tables waves --mixes 8x8  a part; others are arrivals, fairness and size
python -m benchmarks.traffic --quick  a smoke run that writes no file
"""

from __future__ import annotations

import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from expert_pager.v1 import expert_pager_pb2 as pb

from benchmarks.checkpoints import WORK, synthetic
from benchmarks.engine_run import EngineRun, fixed, load_engine
from benchmarks.measure import alternate
from benchmarks.page_cache import read_through
from benchmarks.prompts import Domains, domains_of, prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten, ratio
from benchmarks.service import KV_MEMORY, Client, Wave, first_tokens_ms, service
from pager.engine.interface import EngineLimits
from pager.engine.paged_model import PagedModel
from pager.lab.traffic import Pools
from pager.memory import Budgets
from pager.pools.pick import pick_pool
from pager.predict.fitted import PREDICTOR_NAME, LexicalPredictor, PredictorFile
from pager.types import ExpertPool, PoolPolicy, Share, Usage

MODEL = ROOT / "models" / "emo-tiny"
MIXES = {(16, 4): 0.75, (8, 8): 0.90, (16, 16): 0.90}
"""Domains and requests of each in flight, and the goal: of the tokens/s with all experts in memory."""
MEMORIES = ("25%", "100%")
SLOTS_ALONE = "25%, slots alone"
"""The smaller memory without what the page cache has beside it: a GPU has no such way, nor a machine without memory."""
WAYS_TO_SERVE = {MEMORIES[0]: (MEMORIES[0], True), MEMORIES[1]: (MEMORIES[1], True), SLOTS_ALONE: (MEMORIES[0], False)}
"""How much memory for experts, and whether those without a slot are computed in the page cache."""
ALL_MIXES = ",".join(f"{domains}x{each}" for domains, each in MIXES)
NUM_DOMAINS = 16
POOL = 0.125
PROMPT_TOKENS = ANSWER_TOKENS = 64
LOAD = 0.8  # of the requests/s that all experts in memory sustain
TABLES = ("waves", "arrivals", "fairness", "size")
SIZE_SHAPE, SIZE_LAYERS, SIZE_GOAL = "emo-1b14b", 2, 0.80  # experts of 12 MiB, as released
FLOOD_REQUESTS, FLOOD_ROWS, NUM_ASKED = 200, 64, 24  # in flight, running, and those of the tenant that asks little
FAIR_P99, FAIR_PAGED = 1.5, 1.2


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with a tokenizer and a fitted router.")] = MODEL,
    source: Annotated[str, typer.Option(help="What chooses the pools: codebook, prediction or prefill.")] = "codebook",
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 3,
    mixes: Annotated[str, typer.Option(help="Domains x requests of each in flight, with commas between.")] = ALL_MIXES,
    corpus: Annotated[Path | None, typer.Option(help="A directory with documents of many domains.")] = None,
    tables: Annotated[str, typer.Option(help=f"Some of {', '.join(TABLES)}, with commas between.")] = ",".join(TABLES),
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure mixed traffic in a quarter of the memory."""
    quieten()
    asked = [tuple(map(int, mix.split("x"))) for mix in mixes.split(",")]
    chosen, rounds, tokens = ([(2, 2)], 1, 4) if quick else ([(mix[0], mix[1]) for mix in asked], rounds, ANSWER_TOKENS)
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
        if "size" in wanted and not quick:
            report.add(expert_size(model, rounds, tokens))
    if not quick:
        report.write(results)


def _services(model: Path, most: int, stack: ExitStack) -> dict[str, Client]:
    clients = {}
    for way, (memory, in_place) in WAYS_TO_SERVE.items():
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = stack.enter_context(service(model, folder, most, None, memory, in_place=in_place))
        clients[way] = stack.enter_context(closing(Client(ready["address"])))
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
    for num_domains, num_each in mixes:
        goal = str(MIXES.get((num_domains, num_each), "-"))
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
        *(f"{SLOTS_ALONE}: tokens/s", "MiB paged", "first token ms, p50 / p99"),
    )
    notes = (
        "All requests of a wave are sent at once, one of each domain after the other; tokens/s are those of answers, "
        "from there to the last one's end.",
        f"{num_rounds} rounds in which the services take turns, after one of each that is not counted; bytes paged "
        "are of one wave in the smaller memory.",
        "Experts without a slot are computed where the page cache has them, except with slots alone.",
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


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve a tenant that asks one domain at a time: what else is in flight, and by which rules."""

    name: str
    num_flood: int = FLOOD_REQUESTS
    guaranteed_share: float = 0.0  # of the slots, for the tenant
    in_order: bool = False  # all requests in order of arrival, whosever they are
    num_asked: int = NUM_ASKED


WAYS = (
    Way("alone", num_flood=0),
    Way("beside a flood, half of the slots guaranteed", guaranteed_share=0.5),
    Way("beside a flood", num_asked=8),
    Way("beside it, first come, first served", in_order=True, num_asked=3),
)


def fairness(model: Path, num_tokens: int, most_asked: int, most_flood: int, corpus: Path | None) -> Table:
    """One tenant asks one domain at a time, while another keeps many requests of 16 domains in flight."""
    domains = domains_of(model, NUM_DOMAINS, 32, PROMPT_TOKENS, corpus)
    rows, alone = [], (math.nan, 0.0)
    for way in WAYS:
        way = replace(way, num_asked=min(way.num_asked, most_asked), num_flood=min(way.num_flood, most_flood))
        limits = EngineLimits(
            max_running=FLOOD_ROWS,
            max_waiting=2 * FLOOD_REQUESTS,
            max_overtakes=0 if way.in_order else EngineLimits().max_overtakes,
            prefix_cache=False,
        )
        budgets = Budgets(expert_memory=MEMORIES[0], host_memory=0, kv_memory=KV_MEMORY, max_running=FLOOD_ROWS)
        torch.set_num_threads(1)
        with load_engine(model, torch.bfloat16, budgets, 4, limits=limits) as engine:
            asked = Asked(engine, domains, _pools_of(engine.paged, domains), num_tokens, way)
            asked.run()
        first_ms, mib = np.percentile(1e3 * np.array(asked.first_s), (50, 99)), asked.bytes_paged / 2**20
        if not way.num_flood:
            alone = first_ms[1], mib
        rows.append(
            (
                *(way.name, str(way.num_asked), f"{first_ms[0]:.0f} / {first_ms[1]:.0f}"),
                *(f"{first_ms[1] / alone[0]:.2f}", f"{mib:.2f}", f"{mib / max(alone[1], 1e-9):.2f}"),
                f"{asked.flood_tokens_per_s:.0f}",
            )
        )
    return Table(
        "A tenant that asks one domain at a time",
        ("", "its requests", "first token ms, p50 / p99", "p99 over alone", "MiB paged for it", "over alone",
         "tokens/s beside it"),
        rows,
        (
            f"The engine in this process, {MEMORIES[0]} of the experts; {FLOOD_REQUESTS} requests of 16 domains are in "
            f"flight beside it, of which {FLOOD_ROWS} may run; each domain has a pool of {100 * POOL:g} %.",
            "Its requests come one after another, from another thread, each up to a tenth of a second after the end of "
            "the one before. The first, which pages its experts in, comes before the flood and counts by its bytes "
            "alone. At most "
            f"{FAIR_P99:g} x its first token alone, and {FAIR_PAGED:g} x the bytes, are aimed at.",
        ),
    )  # fmt: skip


def expert_size(model: Path, num_rounds: int, num_tokens: int) -> Table:
    """Experts of the released size, of two layers, in pools that overlap as those of two layers of `model` do."""
    plain = synthetic(WORK, SIZE_SHAPE, SIZE_LAYERS)
    codewords = list(Pools.of(model, Share(POOL)).codewords.values())[:NUM_DOMAINS]
    pools = [fixed(ExpertPool(pool.experts[2 : 2 + SIZE_LAYERS])) for pool in codewords]
    num_each = 4
    prompts = prompts_of(plain, NUM_DOMAINS * num_each, PROMPT_TOKENS)
    requests = [(prompt, pools[number % NUM_DOMAINS]) for number, prompt in enumerate(prompts)]
    rows, rates = [], {}
    for way, (memory, in_place) in WAYS_TO_SERVE.items():
        budgets = Budgets(expert_memory=memory, host_memory=0, kv_memory=KV_MEMORY, max_running=len(requests))
        limits = EngineLimits(max_running=len(requests), prefix_cache=False)
        read_through(plain.glob("*.safetensors"))  # what the engine before it took may have displaced pages
        with load_engine(plain, torch.bfloat16, budgets, 4, limits=limits, in_place=in_place) as engine:
            engine.answer_all(requests[:NUM_DOMAINS], 2)
            rounds = [_burst(engine, requests, num_tokens) for _ in range(num_rounds)]
        burst = sorted(rounds, key=lambda each: each.seconds)[num_rounds // 2]
        rates[way] = len(requests) * num_tokens / burst.seconds
        rows.append(
            (
                *(way, f"{rates[way]:.1f}", f"{burst.seconds:.1f}", f"{burst.forward_s:.1f}"),
                *(f"{burst.waited_s:.1f}", f"{burst.nbytes / 2**20:.0f}"),
            )
        )
    share = rates[MEMORIES[0]] / rates[MEMORIES[1]]
    return Table(
        "Mixed traffic at the released expert size",
        ("of the experts in memory", "tokens/s", "seconds", "in forwards", "waiting for experts in them", "MiB paged"),
        rows,
        (
            f"{SIZE_SHAPE} with {SIZE_LAYERS} layers, the engine in this process; {NUM_DOMAINS} pools with "
            f"{num_each} requests each, all sent at once; the files are read into the page cache before each of the "
            f"engines. {num_rounds} rounds each after one that is not counted; the row is the round of median length.",
            f"The ratio is {share:.2f}; at least {SIZE_GOAL} is aimed at.",
        ),
    )


@dataclass(frozen=True, slots=True)
class _Burst:
    """What requests that were all sent at once took: seconds, those in forwards, and for experts in them."""

    seconds: float
    forward_s: float
    waited_s: float
    nbytes: int


def _burst(engine: EngineRun, requests: Sequence[tuple[list[int], PoolPolicy]], num_tokens: int) -> _Burst:
    paged, started_s = engine.paged.pager.stats().paging.bytes_paged, time.perf_counter()
    forward_s = engine.forward_s
    usages = engine.answer_all(requests, num_tokens)
    return _Burst(
        time.perf_counter() - started_s,
        engine.forward_s - forward_s,
        sum(usage.paging.stall_s for usage in usages),
        engine.paged.pager.stats().paging.bytes_paged - paged,
    )


def _pools_of(paged: PagedModel, domains: Domains) -> list[PoolPolicy]:
    """One fixed pool for each domain: the prediction for its first prompt."""
    lexical = LexicalPredictor(PredictorFile.load(Path(paged.path) / PREDICTOR_NAME, paged.fingerprint))
    return [fixed(pick_pool(lexical.scores(prompts[0]), Share(POOL), paged.facts)) for prompts in domains]


class Asked:
    """The requests of a tenant that asks for one domain, one after another, beside a flood of another tenant's."""

    def __init__(
        self, engine: EngineRun, domains: Domains, policies: Sequence[PoolPolicy], num_tokens: int, way: Way
    ) -> None:
        self.first_s: list[float] = []
        self.bytes_paged = 0
        self.flood_tokens_per_s = 0.0
        self._engine = engine
        self._domains = domains
        self._policies = policies
        self._num_tokens = num_tokens
        self._way = way
        self._delivered_s: dict[str, float] = {}  # first tokens, by request
        self._usages: dict[str, Usage] = {}
        self._flooding: set[str] = set()
        self._numbers = count()

    def run(self) -> None:
        """Steps the engine until all have been answered, and one before the flood, whose bytes alone count."""
        self._step_until_answered(1)
        self.first_s.clear()
        for _ in range(self._way.num_flood):
            self._flood()
        self._step_until_answered(self._way.num_asked)

    def _step_until_answered(self, num_asked: int) -> None:
        asking = threading.Thread(target=self._ask, args=(num_asked,), name="asking")
        asking.start()
        began_s, num_tokens = time.perf_counter(), 0
        while asking.is_alive():
            chunks = self._engine.timed_step()
            for delivered_s, chunk in chunks:
                name = chunk.request_id
                self._delivered_s.setdefault(name, delivered_s)
                num_tokens += name in self._flooding
                if chunk.usage is not None:
                    self._usages[name] = chunk.usage
                    if name in self._flooding:
                        self._flooding.remove(name)
                        self._flood()
            if not chunks:
                time.sleep(0.0005)
        self.flood_tokens_per_s = num_tokens / (time.perf_counter() - began_s)

    def _flood(self) -> None:
        number, domains = next(self._numbers), self._domains
        prompts = domains[number % len(domains)]
        prompt = prompts[number // len(domains) % len(prompts)]
        tenant = "small" if self._way.in_order else "flood"  # of one tenant, none of whose requests come first
        policy = self._policies[number % len(domains)]
        self._flooding.add(self._engine.submit(prompt, self._num_tokens, policy, tenant=tenant))

    def _ask(self, num_asked: int) -> None:
        random = np.random.default_rng(0)
        for number in range(num_asked):
            time.sleep(random.uniform(0, 0.1))
            prompt, sent_s = self._domains[0][-1 - number % len(self._domains[0])], time.perf_counter()
            name = self._engine.submit(
                *(prompt, self._num_tokens, self._policies[0]),
                tenant="small",
                guaranteed_share=self._way.guaranteed_share,
            )
            while name not in self._usages:
                time.sleep(0.002)
            self.first_s.append(self._delivered_s[name] - sent_s)
            self.bytes_paged += self._usages[name].paging.bytes_paged


def _next_wave(client: Client, waves: Iterator[list[list[int]]], num_tokens: int, pool: dict[str, Any]) -> Wave:
    return client.wave(next(waves), num_tokens, pool)


def _row(mix: str, found: dict[str, list[Wave]], goal: str) -> tuple[str, ...]:
    small, whole, slots_alone = (found[way] for way in WAYS_TO_SERVE)
    rates = [[wave.tokens_per_s for wave in waves] for waves in (small, whole, slots_alone)]
    mib = [f"{statistics.median(wave.bytes_paged for wave in waves) / 2**20:.1f}" for waves in (small, slots_alone)]
    firsts = [" / ".join(f"{value:.0f}" for value in first_tokens_ms(waves)) for waves in (small, whole, slots_alone)]
    figures = (figure(rates[0], 0), figure(rates[1], 0), ratio(rates[0], rates[1]), goal, mib[0])
    return (mix, *figures, *firsts[:2], figure(rates[2], 0), mib[1], firsts[2])


if __name__ == "__main__":
    typer.run(main)
