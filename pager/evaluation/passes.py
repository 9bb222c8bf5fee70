"""What the routing-only passes are worth beside the loss: recall of the fused pool, its estimate, and their speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from pager.evaluation.subject import Subject
from pager.routing.pool import pick_pool
from pager.types import ExpertPool, PoolSize, RoutingScores


def recalls(predicted: Sequence[ExpertPool], fused: Sequence[ExpertPool]) -> np.ndarray:
    """[N]: the share of each document's fused pool that was predicted."""
    return np.array([mine.recall_of(actual) for mine, actual in zip(predicted, fused, strict=True)])


def estimate_errors(subject: Subject, source: str, size: PoolSize, fused: Sequence[ExpertPool]) -> np.ndarray:
    """[N]: how far the recall that `source` expects of its pool lies from what it is. The checkpoint has its maps."""
    assert subject.router_file is not None
    errors = []
    for scores, actual in zip(subject.predicted(source), fused, strict=True):
        pool = pick_pool(scores, size, subject.facts)
        errors.append(abs(subject.router_file.expected_recall(scores, pool) - pool.recall_of(actual)))
    return np.array(errors)


def seconds_a_prompt(
    score: Callable[[Sequence[int]], RoutingScores], prompt: Sequence[int], *, repeats: int = 200
) -> float:
    """Median time of one pass over a prompt, warm."""
    for _ in range(5):
        score(prompt)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        score(prompt)
        times.append(time.perf_counter() - started)
    return median(times)
