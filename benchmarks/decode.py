"""Decode tokens a second at each residency and pool, beside plain transformers with everything resident."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.measure import alternate
from benchmarks.models import (
    PREFILL_IMPLEMENTATION,
    Decode,
    Decoded,
    fixed,
    library_decode,
    load_engine,
    load_library,
    load_plain,
    plain_decode,
    random_pools,
)
from benchmarks.prompts import prompts_of
from benchmarks.report import Table, console, figure, ratio
from pager.planner import Budgets
from pager.types import PoolPolicy
from pager.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
BATCHES = (1, 8)
PROMPT_TOKENS = 16
KV_MEMORY = "64MiB"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. Steps are decode steps in each repeat, by batch."""

    num_rounds: int
    num_steps: dict[int, int]
    num_readers: int


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode with less than everything in memory. `pool` None is exact."""

    name: str
    residency: float
    pool: float | None = None
    by_engine: bool = False

    @contextmanager
    def open(self, path: Path, dtype: torch.dtype, effort: Effort) -> Iterator[Decode]:
        memory = f"{100 * self.residency}%"
        if not self.by_engine:
            with load_library(path, dtype=dtype, expert_memory=memory, num_readers=effort.num_readers) as model:
                yield library_decode(model)
            return
        budgets = Budgets(expert_memory=memory, host_memory=0, kv_memory=KV_MEMORY)
        with load_engine(path, dtype, budgets, effort.num_readers) as engine:
            facts = engine.paged.facts
            policy = PoolPolicy() if self.pool is None else fixed(random_pools(facts, self.pool, 1)[0])
            yield engine.decoder(policy)


WAYS = (
    *(Way("exact, load_model", residency) for residency in (1.0, 0.5, 0.25, 0.125)),
    Way("exact, engine", 1.0, by_engine=True),
    Way("pool 25 %, engine", 0.25, pool=0.25, by_engine=True),
    Way("pool 12.5 %, engine", 0.125, pool=0.125, by_engine=True),
)

COLUMNS = ("", "residency", "batch", "tokens/s", "plain tokens/s", "ratio", "paged in a token")


def measure(
    path: Path, dtype: torch.dtype, effort: Effort, ways: Sequence[Way] = WAYS, batches: Sequence[int] = BATCHES
) -> Iterator[Table]:
    """First how plain transformers does by each of its implementations, then everything else beside the best."""
    plain = load_plain(path, dtype)
    prompts = prompts_of(path, max(batches), PROMPT_TOKENS)
    best: dict[int, str] = {}
    rows = []
    for batch in batches:
        decodes = {name: plain_decode(plain, name) for name in IMPLEMENTATIONS}
        rates = _rates(decodes, prompts[:batch], effort.num_steps[batch] // 2, max(2, effort.num_rounds // 2))
        best[batch] = max(rates, key=lambda name: statistics.median(rates[name]))
        cells = [figure(rates[name]) + (" *" if name == best[batch] else "") for name in IMPLEMENTATIONS]
        rows.append((f"batch {batch}", *cells))
    yield Table(
        f"Plain transformers generate, {path.name}, decode tokens/s by experts implementation",
        ("", *IMPLEMENTATIONS),
        rows,
        (f"* is what the next table compares with. Prefill, not timed here, is always by {PREFILL_IMPLEMENTATION}.",),
    )
    yield Table(
        f"Decode, {path.name}",
        COLUMNS,
        [row for way in ways for row in _beside(way, plain, best, path, dtype, prompts, effort)],
        (
            "Ratio: of medians, plain and paged runs alternating. The prefill is not in the time.",
            f"Prompts of {PROMPT_TOKENS} tokens, a different one each row; greedy; {effort.num_rounds} repeats of "
            + " and ".join(f"{steps} steps at batch {batch}" for batch, steps in effort.num_steps.items())
            + ". Brackets: smallest and largest.",
            "Exact: what is missing is read while decoding, here from the operating system's page cache. Every repeat "
            "is the same text, the first is not counted, and each prefill wants nearly all experts.",
            "Pool: one random pool, fixed before the prompt, for all rows of the batch; its experts fill the slots.",
        ),
    )


def _beside(
    way: Way,
    plain: PreTrainedModel,
    best: dict[int, str],
    path: Path,
    dtype: torch.dtype,
    prompts: list[list[int]],
    effort: Effort,
) -> Iterator[tuple[str, ...]]:
    with way.open(path, dtype, effort) as decode:
        for batch, implementation in best.items():
            with console.status(f"{way.name} at {way.residency:.1%}, batch {batch}"):
                decodes = {"plain": plain_decode(plain, implementation), "paged": decode}
                found = _runs(decodes, prompts[:batch], effort.num_steps[batch], effort.num_rounds)
            rates = {name: [run.rate for run in runs] for name, runs in found.items()}
            per_token = statistics.median(run.nbytes / run.num_tokens for run in found["paged"])
            yield (
                way.name,
                f"{way.residency:.1%}",
                str(batch),
                figure(rates["paged"]),
                figure(rates["plain"]),
                ratio(rates["paged"], rates["plain"]),
                format_bytes(round(per_token)),
            )


def _rates(
    decodes: dict[str, Decode], prompts: list[list[int]], num_steps: int, num_rounds: int
) -> dict[str, list[float]]:
    found = _runs(decodes, prompts, num_steps, num_rounds)
    return {name: [run.rate for run in runs] for name, runs in found.items()}


def _runs(
    decodes: dict[str, Decode], prompts: list[list[int]], num_steps: int, num_rounds: int
) -> dict[str, list[Decoded]]:
    for decode in decodes.values():
        decode(prompts, num_steps)  # the first run chooses kernels, and reads what then stays
    runs = {name: partial(decode, prompts, num_steps) for name, decode in decodes.items()}
    return alternate(runs, num_rounds)
