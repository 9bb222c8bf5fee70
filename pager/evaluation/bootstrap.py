"""How far a mean over documents can be trusted: percentile bootstrap, documents resampled within their domains.

Legend: N documents, M resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the bounds of its central 95 %."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, replicates_M: np.ndarray) -> Interval:
        low, high = np.percentile(replicates_M, (2.5, 97.5))
        return cls(float(mean), float(low), float(high))

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


class Bootstrap:
    """Every quantity sees the same resamples, so that differences and quotients of two are paired by document."""

    def __init__(self, domains: Sequence[str], *, resamples: int = 1000, seed: int = 0) -> None:
        """`domains` [N]: each document's."""
        random = np.random.default_rng(seed)
        of_document = np.asarray(domains)
        self.domains = sorted(set(domains))
        self._index_of = {domain: np.flatnonzero(of_document == domain) for domain in self.domains}
        self._draws_MN = {
            domain: random.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples).astype(float)
            for domain, index in self._index_of.items()
        }

    def of_domain(self, domain: str, values_N: np.ndarray, weights_N: np.ndarray) -> Interval:
        """Sum of the values over sum of the weights, of this domain's documents."""
        return Interval.of(*self._ratio(domain, values_N, weights_N))

    def mean_over_domains(self, values_N: np.ndarray, weights_N: np.ndarray) -> Interval:
        """The plain mean over the domains of what `of_domain` gives."""
        return Interval.of(*self.replicates(values_N, weights_N))

    def replicates(self, values_N: np.ndarray, weights_N: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean over domains, and its resamples [M], for what is made of several such means."""
        ratios = [self._ratio(domain, values_N, weights_N) for domain in self.domains]
        mean = float(np.mean([ratio for ratio, _ in ratios]))
        return mean, np.mean([replicates for _, replicates in ratios], axis=0)

    def _ratio(self, domain: str, values_N: np.ndarray, weights_N: np.ndarray) -> tuple[float, np.ndarray]:
        index, draws = self._index_of[domain], self._draws_MN[domain]
        values, weights = np.asarray(values_N, float)[index], np.asarray(weights_N, float)[index]
        return float(values.sum() / weights.sum()), (draws @ values) / (draws @ weights)
