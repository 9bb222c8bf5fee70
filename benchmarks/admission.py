"""How long a long prompt that is admitted keeps those who are running from their next token."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.engine_run import EngineRun, fixed, load_engine, pools_beside
from benchmarks.measure import alternate
from benchmarks.page_cache import drop
from benchmarks.prompts import prompts_of
from benchmarks.report import Table, console, figure, ratio
from pager.memory import Budgets
from pager.models.open_model import OpenModel
from pager.pools.pick import largest_counts
from pager.types import ExpertPool, PoolPolicy, Share

NUM_STREAMS = 7
STREAM_PROMPT_TOKENS = 64
STREAM_TOKENS = 96
POOL = 0.125
LARGEST_GAP = 1.2


@dataclass(frozen=True, slots=True)
class Admission:
    """Seconds. `gap` is the longest between two tokens of a stream; `usual` the median one before."""

    gap: float
    usual: float
    first_token: float
    warm: float


def admission_table(model: Path, dtype: torch.dtype, num_rounds: int, num_tokens: int) -> Table:
    """Streams hold a pool of their own; the prompt's pool is in no slot, and the files are not in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(model, Path(folder) / model.name))  # nobody else maps it, so it can be dropped
        opened = OpenModel.open(copied, dtype)
        opened.checkpoint.close()
        num_slots = 2 * sum(largest_counts(Share(POOL), opened.facts))
        budgets = Budgets(expert_memory=num_slots * opened.expert_bytes, host_memory=0, kv_memory="64MiB")
        prompt = prompts_of(copied, 1, num_tokens)[0]
        # What the engine computes in the file stays in the page cache.
        with (
            load_engine(copied, dtype, budgets, 4, in_place=False) as engine,
            console.status("admission of a long prompt"),
        ):
            by_prefill = PoolPolicy(Share(POOL))
            _, usage = engine.first_token(prompt, by_prefill)
            assert usage.pool is not None
            others = pools_beside(usage.pool, engine.paged.facts, 2)
            policies = {"known before": fixed(usage.pool), "chosen by its prefill": by_prefill}
            runs = {
                name: partial(_admit, engine, copied, prompt, policy, usage.pool, others)
                for name, policy in policies.items()
            }
            for run in runs.values():
                run()
            found = alternate(runs, num_rounds)
    rows = []
    for name, admissions in found.items():
        gaps, warm = [one.gap for one in admissions], [one.warm for one in admissions]
        verdict = "ok" if statistics.median(gaps) / statistics.median(warm) <= LARGEST_GAP else "more"
        times = (gaps, warm, [one.usual for one in admissions], [one.first_token for one in admissions])
        rows.append((name, *(figure([1e3 * one for one in each]) for each in times), ratio(gaps, warm), verdict))
    return Table(
        f"A cold prompt of {num_tokens} tokens while {NUM_STREAMS} streams run",
        (
            "its pool",
            "longest gap ms",
            "warm prefill ms",
            "usual gap ms",
            "cold first token ms",
            "gap / warm prefill",
            f"at most {LARGEST_GAP}",
        ),
        rows,
        (
            f"Pools of {POOL:.1%}; the streams share one that has no expert in common with the prompt's. Cold: no "
            "expert in a slot, files not in the page cache.",
            "Warm prefill: the same prompt alone, everything in slots. Gap: between two tokens of a stream, until it "
            f"has one after the prompt's first. {num_rounds} repeats, taking turns.",
        ),
    )


def _admit(
    engine: EngineRun,
    model: Path,
    prompt: Sequence[int],
    policy: PoolPolicy,
    pool: ExpertPool,
    others: Sequence[ExpertPool],
) -> Admission:
    streams = {
        engine.submit(ids, STREAM_TOKENS, fixed(others[0]))
        for ids in prompts_of(model, NUM_STREAMS, STREAM_PROMPT_TOKENS)
    }
    started: set[str] = set()
    while started != streams:
        started |= {chunk.request_id for chunk in engine.step()}
    _run_until_ended(engine, engine.submit(prompt[:STREAM_PROMPT_TOKENS], 1, fixed(others[1])))  # evicts the pool
    drop(sorted(model.glob("*.safetensors")))
    usual = [_timed_step(engine) for _ in range(8)]
    gap_s, first_token_s = _watch(engine, engine.submit(prompt, 1, policy), streams, pool)
    while streams:
        streams -= {chunk.request_id for chunk in engine.step() if chunk.usage is not None}
    warm_s, usage = engine.first_token(prompt, policy)
    assert usage.experts_missed == 0, f"{usage.experts_missed} experts were missing"
    return Admission(gap_s, statistics.median(usual), first_token_s, warm_s)


def _watch(engine: EngineRun, name: str, streams: set[str], pool: ExpertPool) -> tuple[float, float]:
    """The longest gap of a stream until its first token after `name` has had one, and when that came."""
    submitted_s = time.perf_counter()
    last_s, longest_s = dict.fromkeys(streams, submitted_s), 0.0
    first_token_s = 0.0
    while True:
        has_started = first_token_s > 0
        for now_s, chunk in engine.timed_step():
            if chunk.request_id in last_s:
                assert chunk.usage is None, "a stream ended before the prompt was admitted"
                longest_s = max(longest_s, now_s - last_s[chunk.request_id])
                last_s[chunk.request_id] = now_s
            elif chunk.request_id == name and chunk.usage is not None:
                missed = chunk.usage.experts_missed
                assert missed == pool.num_experts, f"{missed} experts were missing, not {pool.num_experts}"
                first_token_s = now_s - submitted_s
        if has_started:
            return longest_s, first_token_s


def _run_until_ended(engine: EngineRun, name: str) -> None:
    while not any(chunk.request_id == name for chunk in engine.step()):
        pass


def _timed_step(engine: EngineRun) -> float:
    started_s = time.perf_counter()
    engine.step()
    return time.perf_counter() - started_s
