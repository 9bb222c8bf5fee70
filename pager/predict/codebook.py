"""A codebook: a few pools that requests share, each picked for a cluster of documents. Numpy alone.

Legend: C codewords, O routed experts of all layers side by side, K those in a pool, P prompt lengths, X rows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pager.errors import InvalidRequest
from pager.pools.pick import pick_pool
from pager.predict.fitted import LENGTHS, MEANS, THRESHOLDS, PredictorFile
from pager.types import ExpertPool, PoolSize, RoutingFacts, RoutingScores

COVERAGE_SHARE = 1 / 16  # of the experts, in the pools that tell whether a prompt is covered: the smallest tell it best
MAX_SIZES = 32  # whose pools are kept; sizes are the callers' choice


@dataclass(frozen=True, slots=True)
class Codeword:
    """The codeword that suits a prompt best at one size.

    `coverage` is the mass of what was seen of the prompt that a small pool of the codeword holds, over what a pool of
    that size picked for the prompt alone holds: low for a prompt unlike anything that was fitted to.
    """

    name: str
    pool: ExpertPool
    coverage: float
    is_covered: bool  # the coverage is at least the codebook's threshold


@dataclass(frozen=True, slots=True, eq=False)
class _Pools:
    """The pools of all codewords at one size. `inside_CO` is 1 where a pool has an expert."""

    pools: tuple[ExpertPool, ...]
    inside_CO: np.ndarray


class Codebook:
    """The codewords of one model. Keeps the pools of the sizes asked for last; owned by one thread, else immutable."""

    def __init__(self, weights: Mapping[str, np.ndarray], facts: RoutingFacts) -> None:
        """`weights` are those of a predictor file that has a codebook."""
        self._facts = facts
        self._means_CO = weights[MEANS].astype(np.float64)
        # By the scores alone and by the trunk's, [2, P]: the fewer tokens were seen, the less their scores agree.
        self._thresholds_2P, self._log_lengths_P = weights[THRESHOLDS], np.log(weights[LENGTHS])
        self._covering_CO = inside_share(self._means_CO, COVERAGE_SHARE, facts.routed_per_layer)
        self._sizes: OrderedDict[PoolSize, _Pools] = OrderedDict()
        self.names = codeword_names(weights[MEANS])

    @classmethod
    def of(cls, file: PredictorFile, facts: RoutingFacts) -> Codebook | None:
        """The codebook of a file; None where the file was fitted without one."""
        return cls(file.weights, facts) if MEANS in file.weights else None

    def assign(self, scores: RoutingScores, size: PoolSize, trunk: RoutingScores | None = None) -> Codeword:
        """The codeword whose pool of `size` holds the most mass of the lexical scores. Raises PoolTooSmall.

        Whether it covers the prompt is judged by the trunk's scores where there are any: a map that was fitted to
        documents makes whatever it is asked into something like them, and the trunk does not agree with it then.
        """
        of_size = self._of_size(size)
        best = int((of_size.inside_CO @ np.concatenate(scores.mean_LR)).argmax())
        seen_O = np.concatenate((trunk or scores).mean_LR)
        own_O = inside_share(seen_O[None], COVERAGE_SHARE, self._facts.routed_per_layer)[0]
        coverage = min(1.0, float(self._covering_CO[best] @ seen_O / max(own_O @ seen_O, 1e-300)))
        thresholds_P = self._thresholds_2P[int(trunk is not None)]
        is_covered = coverage >= np.interp(np.log(max(scores.num_tokens, 1)), self._log_lengths_P, thresholds_P)
        return Codeword(self.names[best], of_size.pools[best], coverage, bool(is_covered))

    def pool(self, name: str, size: PoolSize) -> ExpertPool:
        """The pool of a codeword. Smaller pools of a codeword lie inside its larger ones. Raises InvalidRequest."""
        if name not in self.names:
            raise InvalidRequest(f"{name[:60]!r} is not a codeword of this model; GetModel lists them")
        return self._of_size(size).pools[self.names.index(name)]

    def _of_size(self, size: PoolSize) -> _Pools:
        if size not in self._sizes:
            self._sizes[size] = self._make(size)
            if len(self._sizes) > MAX_SIZES:
                self._sizes.popitem(last=False)
        self._sizes.move_to_end(size)
        return self._sizes[size]

    def _make(self, size: PoolSize) -> _Pools:
        routed = self._facts.routed_per_layer
        ends = np.cumsum(routed)[:-1]
        means = (RoutingScores(tuple(np.split(mean_O, ends)), "codebook", 1) for mean_O in self._means_CO)
        pools = tuple(pick_pool(mean, size, self._facts) for mean in means)
        return _Pools(pools, np.stack([_inside(pool, routed) for pool in pools]))


def codeword_names(means_CO: np.ndarray) -> tuple[str, ...]:
    """The names of codewords: a number, and a digest that changes whenever the codeword's mean does."""
    stored_CO = np.ascontiguousarray(means_CO, dtype="<f2")
    digests = (hashlib.blake2b(mean_O.tobytes(), digest_size=2).hexdigest() for mean_O in stored_CO)
    return tuple(f"c{number:02d}-{digest}" for number, digest in enumerate(digests))


def inside_share(rows_XO: np.ndarray, share: float, routed_per_layer: Sequence[int]) -> np.ndarray:
    """1 where the pool with that share of every layer, picked from each row, has an expert: [X, O]."""
    inside_XO = np.zeros_like(rows_XO)
    start = 0
    for routed in routed_per_layer:
        if routed:
            count = max(1, round(share * routed))
            best_XK = start + np.argpartition(-rows_XO[:, start : start + routed], count - 1, 1)[:, :count]
            np.put_along_axis(inside_XO, best_XK, 1, 1)
        start += routed
    return inside_XO


def _inside(pool: ExpertPool, routed_per_layer: Sequence[int]) -> np.ndarray:
    inside_O = np.zeros(sum(routed_per_layer))
    start = 0
    for experts, routed in zip(pool.experts, routed_per_layer, strict=True):
        inside_O[[start + expert for expert in experts]] = 1
        start += routed
    return inside_O
