"""Decode tokens a second at each residency and pool, beside plain transformers with everything resident."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from benchmarks.engine_run import fixed, load_engine, random_pools
from benchmarks.measure import alternate
from benchmarks.models import (
    PREFILL_IMPLEMENTATION,
    Decode,
    Decoded,
    library_decode,
    load_library,
    load_plain,
    plain_decode,
)
from benchmarks.prompts import prompts_of
from benchmarks.report import Table, console, figure, ratio
from pager.memory import Budgets, format_bytes
from pager.types import PoolPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Name = TypeVar("Name", bound=Hashable)

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PROMPT_TOKENS = 16
KV_MEMORY = "64MiB"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. `num_steps` are the decode steps of each repeat, by batch size."""

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


Group = tuple[Way, ...]
"""Ways that are loaded together and take turns, with plain transformers between them."""

GROUPS: tuple[Group, ...] = (
    (Way("exact, load_model", 1.0), Way("exact, load_model", 0.5)),
    (Way("exact, load_model", 0.25), Way("exact, load_model", 0.125)),
    (
        Way("exact, engine", 1.0, by_engine=True),
        Way("pool 25 %, engine", 0.25, pool=0.25, by_engine=True),
        Way("pool 12.5 %, engine", 0.125, pool=0.125, by_engine=True),
    ),
)

COLUMNS = ("", "residency", "batch", "tokens/s", "plain tokens/s", "ratio", "paged in a token")


def measure(path: Path, dtype: torch.dtype, effort: Effort, groups: Sequence[Group] = GROUPS) -> Iterator[Table]:
    """First how plain transformers does by each of its implementations, then everything else beside the best."""
    plain, batches = load_plain(path, dtype), tuple(effort.num_steps)
    prompts = prompts_of(path, max(batches), PROMPT_TOKENS)
    best: dict[int, str] = {}
    rows = []
    for batch in batches:
        decodes = {name: plain_decode(plain, name) for name in IMPLEMENTATIONS}
        with console.status(f"plain transformers, batch {batch}"):
            found = _runs(
                decodes, prompts[:batch], max(1, effort.num_steps[batch] // 4), max(1, effort.num_rounds // 2)
            )
        rates = {name: _rates(runs) for name, runs in found.items()}
        best[batch] = max(rates, key=lambda name: statistics.median(rates[name]))
        cells = [figure(rates[name]) + (" *" if name == best[batch] else "") for name in IMPLEMENTATIONS]
        rows.append((f"batch {batch}", *cells))
    yield Table(
        f"Plain transformers generate, {path.name}, decode tokens/s by experts implementation",
        ("", *IMPLEMENTATIONS),
        rows,
        (f"* is what the next table compares with. Prefill, not timed here, is always by {PREFILL_IMPLEMENTATION}.",),
    )
    steps = " and ".join(f"{effort.num_steps[batch]} steps at batch {batch}" for batch in batches)
    rows = [row for group in groups for row in _beside(group, plain, best, path, dtype, prompts, effort)]
    yield Table(
        f"Decode, {path.name}",
        COLUMNS,
        sorted(rows, key=lambda row: int(row[COLUMNS.index("batch")])),
        (
            "Ratio: of medians, plain and paged runs taking turns. The prefill is not in the time.",
            f"Prompts of {PROMPT_TOKENS} tokens, a different one each row; greedy; {effort.num_rounds} repeats of "
            f"{steps}. Brackets: smallest and largest.",
            "Exact: what is missing is read while decoding, here from the operating system's page cache. Every repeat "
            "is the same text, the first is not counted, and each prefill wants nearly all experts.",
            "Pool: one random pool, fixed before the prompt, for all rows of the batch; its experts fill the slots.",
        ),
    )


def _beside(
    group: Group,
    plain: PreTrainedModel,
    best: dict[int, str],
    path: Path,
    dtype: torch.dtype,
    prompts: list[list[int]],
    effort: Effort,
) -> Iterator[tuple[str, ...]]:
    with ExitStack() as opened:
        decodes: dict[Way | None, Decode] = {way: opened.enter_context(way.open(path, dtype, effort)) for way in group}
        for batch, implementation in best.items():
            with console.status(f"{', '.join(f'{way.name} at {way.residency:.1%}' for way in group)}, batch {batch}"):
                all_decodes = {None: plain_decode(plain, implementation), **decodes}
                found = _runs(all_decodes, prompts[:batch], effort.num_steps[batch], effort.num_rounds)
            plain_rates = _rates(found[None])
            for way in group:
                yield (
                    way.name,
                    f"{way.residency:.1%}",
                    str(batch),
                    figure(_rates(found[way])),
                    figure(plain_rates),
                    ratio(_rates(found[way]), plain_rates),
                    format_bytes(round(statistics.median(run.nbytes / run.num_tokens for run in found[way]))),
                )


def _rates(runs: Sequence[Decoded]) -> list[float]:
    return [run.rate for run in runs]


def _runs(
    decodes: Mapping[Name, Decode], prompts: list[list[int]], num_steps: int, num_rounds: int
) -> dict[Name, list[Decoded]]:
    for decode in decodes.values():
        decode(prompts, num_steps)  # the first run chooses kernels, and reads what then stays
    return alternate({name: partial(decode, prompts, num_steps) for name, decode in decodes.items()}, num_rounds)
