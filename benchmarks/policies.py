"""Which expert to evict: traffic of many domains is recorded once and replayed under every policy and several budgets.

    python -m benchmarks.policies [MODEL] --corpus DIR

CORPUS holds `<domain>.valid.jsonl.gz`; without it there are eight short texts. Counts, not times: the machine
may be busy.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from benchmarks.engine_run import load_engine
from benchmarks.prompts import TEXTS, prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, quieten
from pager.cache.trace import Trace, read_trace
from pager.engine.interface import EngineLimits
from pager.lab.corpus import Cut, read_texts
from pager.lab.replay import OPTIMUM, ReplayResult, replay_all
from pager.memory import Budgets, format_bytes
from pager.types import PoolPolicy, Share

MODEL = ROOT / "models" / "emo-tiny"
BUDGETS = (0.125, 0.25, 0.5, 0.75)
POOL = 0.125
PROMPT_TOKENS = 64

Document = tuple[str, tuple[int, ...]]
"""A domain and the tokens of a prompt."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order in which they come. Every `exact_every`th has no pool; 0: all have one.

    `in_phases`: half of the domains first, then the other half. `decides`: it counts for the choice of the default.
    """

    name: str
    num_running: int
    exact_every: int = 0
    in_phases: bool = False
    decides: bool = False

    def order(self, documents: Sequence[Document]) -> list[Document]:
        shuffled = list(documents)
        random.Random(0).shuffle(shuffled)
        if self.in_phases:
            domains = sorted({domain for domain, _ in documents})
            early = set(domains[: len(domains) // 2])
            shuffled.sort(key=lambda document: document[0] not in early)
        return shuffled

    def policy(self, number: int) -> PoolPolicy:
        is_exact = self.exact_every > 0 and number % self.exact_every == self.exact_every - 1
        return PoolPolicy() if is_exact else PoolPolicy(Share(POOL))


TRAFFIC = (
    Traffic("mixed", 1, exact_every=8, decides=True),
    Traffic("mixed, domains in two phases", 1, exact_every=8, in_phases=True, decides=True),
    Traffic("mixed, four requests at a time", 4, exact_every=8, decides=True),
    Traffic("pools only", 1),
    Traffic("exact only", 1, exact_every=1),
)


def main(
    model: Annotated[Path, typer.Argument(help="A trained checkpoint.")] = MODEL,
    corpus: Annotated[Path | None, typer.Option(help="Folder with <domain>.valid.jsonl.gz.")] = None,
    per_domain: Annotated[int, typer.Option(min=1, help="Requests of each domain.")] = 12,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 32,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Few requests, and no file is written.")] = False,
) -> None:
    """Record traffic of many domains and replay it through every eviction policy."""
    quieten()
    if quick:
        per_domain, new_tokens = 2, 4
    documents = read_documents(model, corpus, per_domain)
    num_domains = len({domain for domain, _ in documents})
    report = Report(
        "policies",
        f"{model.name}: bytes that requests wait for, by eviction policy and budget, beside what is possible at best",
        conditions(
            timed=False,
            requests=f"{len(documents)} of {num_domains} domains, prompts of {PROMPT_TOKENS} tokens, {new_tokens} new "
            f"ones each; pools of {POOL:.1%}, every eighth request of the mixed ones exact",
        ),
    )
    report.start()
    replayed = {}
    for traffic in TRAFFIC:
        # What runs exact costs 20 times as many accesses, and soon repeats itself.
        chosen = traffic.order(documents)[:: 4 if traffic.exact_every == 1 else 1]
        with console.status(traffic.name):
            trace = record(model, traffic, chosen, new_tokens)
            replayed[traffic] = [replay_all(trace, int(budget * trace.header.num_experts)) for budget in BUDGETS]
        report.add(traffic_table(traffic, len(chosen), trace, replayed[traffic]))
    report.add(verdict_table(replayed, trace.header.expert_bytes))
    if not quick:
        report.write(results)


def read_documents(model: Path, corpus: Path | None, per_domain: int) -> list[Document]:
    """Prompts of PROMPT_TOKENS tokens, `per_domain` of each domain. Raises InvalidRequest for a corpus without any."""
    if corpus is None:
        texts = prompts_of(model, len(TEXTS), PROMPT_TOKENS)
        return [
            (str(number), tuple(ids[start:] + ids[:start]))
            for number, ids in enumerate(texts)
            for start in range(0, 5 * per_domain, 5)
        ]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    patterns = [str(corpus / "*.valid.jsonl.gz")]
    return [
        (text.domain, text.token_ids[:PROMPT_TOKENS])
        for text in read_texts(patterns, tokenizer, Cut(PROMPT_TOKENS), max_documents=per_domain)
    ]


def record(model: Path, traffic: Traffic, documents: Sequence[Document], num_tokens: int) -> Trace:
    """Under a budget that holds all experts, so that what is held, and for how long, depends on the requests alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl.gz"
        budgets = Budgets(expert_memory="100%", host_memory=0, kv_memory="64MiB")
        limits = EngineLimits(max_running=traffic.num_running, max_waiting=len(documents), prefix_cache=False)
        with load_engine(model, torch.float32, budgets, 2, limits=limits, trace=path) as engine:
            requests = [(ids, traffic.policy(number)) for number, (_, ids) in enumerate(documents)]
            engine.answer_all(requests, num_tokens)
        return read_trace(path)


def traffic_table(
    traffic: Traffic, num_requests: int, trace: Trace, replayed: Sequence[Sequence[ReplayResult]]
) -> Table:
    rows = []
    for budget, results in zip(BUDGETS, replayed, strict=True):
        best = results[-1].misses
        rows += [
            (
                f"{budget:.1%}",
                str(result.num_slots),
                result.policy,
                f"{result.hit_rate:.1%}",
                format_bytes(result.misses * trace.header.expert_bytes),
                f"{result.misses / best - 1:+.1%}" if best else "-",
            )
            for result in results
        ]
    return Table(
        f"{traffic.name[0].upper()}{traffic.name[1:]}: {num_requests} requests",
        ("budget", "slots", "policy", "hits", "bytes waited for", "over the optimum"),
        rows,
        ("What is held is not evicted. Where everything is held, an expert is read for its access and not kept.",),
    )


def verdict_table(replayed: dict[Traffic, list[list[ReplayResult]]], expert_bytes: int) -> Table:
    """Bytes added up over the budgets, the policy that waits for least first. tests/benchmarks reads it."""
    misses: dict[Traffic, Counter[str]] = {traffic: Counter() for traffic in replayed}
    for traffic, by_budget in replayed.items():
        for results in by_budget:
            misses[traffic].update({result.policy: result.misses for result in results})
    deciding = sum((counts for traffic, counts in misses.items() if traffic.decides), Counter())
    ranked = sorted(deciding, key=lambda name: (name == OPTIMUM, deciding[name]))
    columns = ("policy", "all mixed traffic", *(traffic.name for traffic in misses))
    rows = [
        (
            name,
            *(
                f"{format_bytes(counts[name] * expert_bytes)} ({counts[name] / max(1, counts[OPTIMUM]) - 1:+.1%})"
                for counts in (deciding, *misses.values())
            ),
        )
        for name in ranked
    ]
    notes = (
        f"Bytes waited for, added up over budgets of {', '.join(f'{budget:.1%}' for budget in BUDGETS)}; in brackets, "
        "what is over the optimum. The optimum knows the future: nobody can do better.",
        "The first policy of the first column is the default.",
    )
    return Table("Which policy waits for least", columns, rows, notes)


if __name__ == "__main__":
    typer.run(main)
