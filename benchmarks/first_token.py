"""Time to first token beside the raw read of the pool and the prefill that finds it there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.engine_run import EngineRun, fixed, load_engine, pools_beside
from benchmarks.measure import alternate
from benchmarks.page_cache import drop
from benchmarks.prompts import prompts_of
from benchmarks.raw_read import RawReader, extents_of
from benchmarks.report import Table, console, figure, ratio
from pager.memory import Budgets, format_bytes
from pager.models.open_model import OpenModel
from pager.pools.pick import largest_counts
from pager.types import ExpertPool, PoolPolicy, Share

POOL_SHARE = 0.125
PROMPT_TOKENS = 64
RECALL = 0.9  # of the prediction: what the trunk's pass reaches on models/emo-tiny at this size
LARGEST = 1.15


@dataclass(frozen=True, slots=True)
class Request:
    """One way to have the pool. `recall` is that of `predicted`, 1 where nothing is left to predict."""

    policy: PoolPolicy
    predicted: ExpertPool | None = None
    recall: float = 1.0


def first_token_table(path: Path, dtype: torch.dtype, num_rounds: int, num_readers: int, *, direct: bool) -> Table:
    """A pool that is fixed before the prompt, and one that the prefill chooses, each missing and each held.

    `direct`: past the page cache, the raw read too.
    """
    prompt = prompts_of(path, 1, PROMPT_TOKENS)[0]
    with (
        # What the engine computes in the file stays in the page cache.
        load_engine(
            path, dtype, _pools(path, dtype, 2), num_readers, bypass_page_cache=direct, in_place=False
        ) as engine,
        console.status("time to first token"),
    ):
        by_prefill = PoolPolicy(Share(POOL_SHARE))
        _, usage = engine.first_token(prompt, by_prefill)
        assert usage.pool is not None
        chosen = usage.pool
        others = pools_beside(chosen, engine.paged.facts, 3)
        guess = _guess(chosen, others[2])
        requests = {
            "fixed": Request(fixed(chosen)),
            "prefill, predicted": Request(by_prefill, guess, guess.recall_of(chosen)),
            "prefill": Request(by_prefill, recall=0.0),
        }
        with RawReader(extents_of(path, chosen.keys()), num_readers, direct=direct) as raw:
            runs = {}
            for name, request in requests.items():
                empty = partial(_make_cold, engine, prompt, others[:2], raw.paths)
                runs[f"{name} cold"] = partial(_after, empty, partial(_first_token_s, engine, prompt, request, chosen))
                runs[f"{name} warm"] = partial(_first_token_s, engine, prompt, request, None)
            runs["raw"] = partial(_after, partial(drop, raw.paths), raw.read)
            seconds = alternate(runs, num_rounds)
            nbytes = raw.nbytes
    return Table(
        f"Time to first token, {path.name}, {'past' if direct else 'through'} the page cache",
        (
            "pool",
            "recall",
            "cold ms",
            "warm ms",
            "raw read ms",
            "cold / max(raw, warm)",
            "less what was not predicted",
            f"at most {LARGEST}",
        ),
        [_first_token_row(name, request, seconds) for name, request in requests.items()],
        (
            f"Prompt of {PROMPT_TOKENS} tokens, pool of {POOL_SHARE:.1%} of the experts ({format_bytes(nbytes)}), "
            f"slots for two, {num_rounds} repeats, alternating.",
            "Cold: no expert of the pool in a slot, its files not in the page cache. Warm: all in slots. The raw read "
            "takes the same way, with as many reads at a time.",
            "Fixed: known before the prefill, read from the start. Fused: the prefill chooses it layer by layer; with "
            f"a prediction that is right about {RECALL:.0%} of it, those are read from the start. Raw: the pool's "
            "bytes alone.",
            "Less what was not predicted: cold less (1 - recall) of the raw read, over the same. Without any "
            "prediction there is nothing to aim at.",
        ),
    )


def _first_token_row(name: str, request: Request, seconds: dict[str, list[float]]) -> Sequence[str]:
    cold, warm, raw = ([1e3 * value for value in seconds[kind]] for kind in (f"{name} cold", f"{name} warm", "raw"))
    bound = max(raw, warm, key=statistics.median)
    late = (1 - request.recall) * statistics.median(raw)
    rest = (statistics.median(cold) - late) / statistics.median(bound)
    verdict = ("ok" if rest <= LARGEST else "more") if request.recall else "-"
    recall = f"{request.recall:.2f}" if request.predicted else "-"
    return name, recall, figure(cold, 0), figure(warm, 0), figure(raw, 0), ratio(cold, bound), f"{rest:.2f}", verdict


def _first_token_s(engine: EngineRun, prompt: Sequence[int], request: Request, missing: ExpertPool | None) -> float:
    """Checks that it was as cold, or as warm, as the table says."""
    seconds, usage = engine.first_token(prompt, request.policy, request.predicted)
    num_read = usage.bytes_from_disk // engine.paged.facts.expert_bytes
    num_wrong = round((1 - request.recall) * request.predicted.num_experts) if request.predicted else 0
    least, most = (missing.num_experts, missing.num_experts + num_wrong) if missing else (0, 0)
    assert least <= num_read <= most, f"{num_read} experts were read, not {least} to {most}"
    while request.predicted and engine.paged.pager.prefetch_pending(request.predicted.keys()):
        time.sleep(1e-3)  # what was predicted and not chosen
    return seconds


def _make_cold(engine: EngineRun, prompt: Sequence[int], others: Sequence[ExpertPool], paths: Sequence[Path]) -> None:
    for other in others:
        engine.first_token(prompt, fixed(other))
    drop(paths)


def _after(prepare: Callable[[], None], run: Callable[[], float]) -> float:
    prepare()
    return run()


def _guess(pool: ExpertPool, other: ExpertPool) -> ExpertPool:
    """`pool`, of which a part is `other`'s instead."""
    layers = []
    for right, wrong in zip(pool.experts, other.experts, strict=True):
        num_right = round(RECALL * len(right))
        layers.append(tuple(sorted((*right[:num_right], *wrong[num_right:]))))
    return ExpertPool(tuple(layers))


def _pools(path: Path, dtype: torch.dtype, count: int) -> Budgets:
    """Slots for so many pools and not one more, so that others evict all of it."""
    opened = OpenModel.open(path, dtype)
    opened.checkpoint.close()
    num_slots = count * sum(largest_counts(Share(POOL_SHARE), opened.facts))
    return Budgets(expert_memory=num_slots * opened.expert_bytes, host_memory=0, kv_memory="64MiB")
