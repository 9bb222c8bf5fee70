"""Time to first token beside the raw read of the pool and the prefill that finds it there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.engine_run import EngineRun, fixed, load_engine
from benchmarks.measure import alternate
from benchmarks.page_cache import drop
from benchmarks.prompts import prompts_of
from benchmarks.raw_read import RawReader, extents_of
from benchmarks.report import Table, console, figure, ratio
from pager.engine.loading import PagedModel
from pager.engine.trunk import OpenModel
from pager.planner import Budgets
from pager.routing.pool import largest_counts
from pager.types import ExpertPool, PoolPolicy, Share, Usage
from pager.units import format_bytes

POOL_SHARE = 0.125
PROMPT_TOKENS = 64


def first_token_table(path: Path, dtype: torch.dtype, num_rounds: int, num_readers: int) -> Table:
    """A pool that is fixed before the prompt, and one that the prefill chooses, each missing and each held."""
    prompt = prompts_of(path, 1, PROMPT_TOKENS)[0]
    budgets = _exactly_a_pool(path, dtype)
    with load_engine(path, dtype, budgets, num_readers) as engine, console.status("time to first token"):
        by_prefill = PoolPolicy(Share(POOL_SHARE))
        _, usage = engine.first_token(prompt, by_prefill)
        assert usage.pool is not None
        chosen, other = usage.pool, _beside(usage.pool, engine.paged)
        with RawReader(extents_of(path, chosen.keys()), num_readers) as raw:
            runs = {}
            for name, policy in (("fixed", fixed(chosen)), ("fused", by_prefill)):
                empty = partial(_make_cold, engine, prompt, other, raw.paths)
                runs[f"{name} cold"] = partial(_after, empty, partial(_first_token_s, engine, prompt, policy, chosen))
                runs[f"{name} warm"] = partial(_first_token_s, engine, prompt, policy, None)
            runs["raw"] = partial(_after, partial(drop, raw.paths), raw.read)
            seconds = alternate(runs, num_rounds)
            nbytes = raw.nbytes
    return Table(
        f"Time to first token, {path.name}",
        ("pool", "cold ms", "warm ms", "raw read ms", "cold / max(raw, warm)"),
        [_first_token_row(name, seconds) for name in ("fixed", "fused")],
        (
            f"Prompt of {PROMPT_TOKENS} tokens, pool of {POOL_SHARE:.1%} of the experts ({format_bytes(nbytes)}), "
            f"{num_rounds} repeats, alternating.",
            "Cold: no expert of the pool in a slot, its files not in the page cache. Warm: all in slots.",
            "Fixed: known before the prefill, read from the start. Fused: the prefill chooses it layer by layer, "
            "without a prediction, so that reading and computing alternate. Raw: the pool's bytes alone.",
        ),
    )


def _first_token_row(name: str, seconds: dict[str, list[float]]) -> Sequence[str]:
    cold, warm, raw = ([1e3 * value for value in seconds[kind]] for kind in (f"{name} cold", f"{name} warm", "raw"))
    bound = max(raw, warm, key=statistics.median)
    return name, figure(cold, 0), figure(warm, 0), figure(raw, 0), ratio(cold, bound)


def _first_token_s(engine: EngineRun, prompt: Sequence[int], policy: PoolPolicy, missing: ExpertPool | None) -> float:
    """Checks that it was as cold, or as warm, as the table says."""
    seconds, usage = engine.first_token(prompt, policy)
    expected = 0 if missing is None else missing.num_experts
    assert usage.experts_missed == expected, _unexpected(usage, expected)
    return seconds


def _make_cold(engine: EngineRun, prompt: Sequence[int], other: ExpertPool, paths: Sequence[Path]) -> None:
    engine.first_token(prompt, fixed(other))
    drop(paths)


def _after(prepare: Callable[[], None], run: Callable[[], float]) -> float:
    prepare()
    return run()


def _beside(pool: ExpertPool, paged: PagedModel) -> ExpertPool:
    """As many experts as `pool` has, none of them in it."""
    layers = zip(pool.experts, paged.facts.routed_per_layer, strict=True)
    return ExpertPool(
        tuple(tuple(sorted(set(range(num_routed)) - set(experts))[: len(experts)]) for experts, num_routed in layers)
    )


def _exactly_a_pool(path: Path, dtype: torch.dtype) -> Budgets:
    """Slots for one pool and not one more, so that the next evicts all of it."""
    opened = OpenModel.open(path, dtype)
    opened.checkpoint.close()
    num_slots = sum(largest_counts(Share(POOL_SHARE), opened.facts))
    return Budgets(expert_memory=num_slots * opened.expert_bytes, host_memory=0, kv_memory="64MiB")


def _unexpected(usage: Usage, expected: int) -> str:
    return f"{usage.experts_missed} experts were missing and {usage.experts_hit} there, not {expected} missing"
