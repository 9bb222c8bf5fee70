"""Fits a codebook: clusters of documents by the gate mass that a cluster's shared pool leaves outside, in numpy alone.

And shows what a fitted one learns from a stream of prompts.

Legend: N prompts, D documents, C codewords, O routed experts of all layers side by side, S shares of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pager.predict.fitted import (
    COVERAGE_SHARE,
    LENGTHS,
    MEANS,
    THRESHOLDS,
    Codebook,
    Codeword,
    inside_share,
    own_scores,
)
from pager.predict.learning import Learned, Observation, observed, revise
from pager.types import RoutingScores, Share

CHOICES = (8, 16, 32, 64, 96)  # numbers of codewords to choose from
SHARES_S = (1 / 4, 1 / 8, 1 / 16)  # shares of a layer's experts in the pools by which codewords are judged
MIN_GAIN = 0.1  # relative gain in the mass lost to sharing that justifies twice as many codewords
ROUNDS = 20
MIN_MEMBERS = 4  # documents of a codeword
MAX_FALLBACK = 0.1  # of prompts like those that were fitted to
MIN_DOCUMENTS = 8
FOLDS = 4
JUDGED_SHARE = 1 / 8
COARSE = 16  # clusters, of which some are held out as unknown documents


_Judged = tuple[np.ndarray, np.ndarray]
"""Coverage, gain and length of prompts, [3, N], by a pass's scores and by the trunk's."""


@dataclass(frozen=True, slots=True)
class CodebookFit:
    """The tensors of a codebook, and its results on held-out documents.

    `lost_mass`: by number of codewords, the gate mass that documents unknown to the clusters lose to sharing (an eighth
    of the experts): outside of the codeword's pool, but inside a pool of their own scores.
    """

    weights: dict[str, np.ndarray]
    lost_mass: dict[int, float]

    @property
    def num_codewords(self) -> int:
        return len(self.weights[MEANS])


class CodebookFitter:
    """Fits to documents, by what their gates wanted, [D, O], and prompts of them, by the scores of a pass and the
    trunk, [N, O].
    """

    def __init__(
        self,
        wanted_DO: np.ndarray,
        scored_NO: np.ndarray,
        trunk_NO: np.ndarray,
        document_N: np.ndarray,
        length_N: np.ndarray,
        routed_per_layer: Sequence[int],
        scores_after: Callable[[np.ndarray], np.ndarray],
        seed: int = 0,
    ) -> None:
        """Takes scores that should be as good as those of prompts that were not fitted to.

        `scores_after` takes numbers of documents and returns [N, O] scores by a pass fitted to these alone.
        """
        self._scores_after = scores_after
        self._wanted_DO = wanted_DO.astype(np.float32)
        self._scored_NO, self._trunk_NO = (np.maximum(each, 0).astype(np.float32) for each in (scored_NO, trunk_NO))
        self._document_N, self._length_N = document_N, length_N
        self._routed = tuple(routed_per_layer)
        self._seed = seed

    def fit(self, num_codewords: int | None = None) -> CodebookFit:
        """Fits the codebook; without a number, with the smallest that a larger one does not clearly improve on."""
        most = max(1, len(self._wanted_DO) // MIN_MEMBERS)
        choices = [min(num_codewords, most)] if num_codewords else sorted({min(choice, most) for choice in CHOICES})
        lost_mass = {choice: self._held_out_loss(choice) for choice in choices}
        chosen = choices[0]
        for larger in choices[1:]:
            if lost_mass[larger] < lost_mass[chosen] * (1 - MIN_GAIN) ** np.log2(larger / chosen):
                chosen = larger
        means_CO = self.clusters(np.arange(len(self._wanted_DO)), chosen)
        lengths_P, thresholds_2P = self._thresholds(chosen)
        return CodebookFit({MEANS: means_CO, LENGTHS: lengths_P, THRESHOLDS: thresholds_2P}, lost_mass)

    def clusters(self, of_D: np.ndarray, count: int) -> np.ndarray:
        """Returns the means [C, O] of clusters of the documents `of_D`, each in the one whose pools hold most of its
        mass.
        """
        wanted_DO = self._wanted_DO[of_D]
        random = np.random.default_rng(self._seed)
        means_CO = wanted_DO[random.permutation(len(wanted_DO))[:count]].copy()
        nearest_D = _nearest_root(wanted_DO, means_CO)
        for _ in range(ROUNDS):
            means_CO = self._means(wanted_DO, nearest_D, means_CO)
            mass_DC = sum(wanted_DO @ self.inside(means_CO, share).T for share in SHARES_S)
            before_D, nearest_D = nearest_D, mass_DC.argmax(1)
            nearest_D = _refilled(nearest_D, mass_DC.max(1), len(means_CO))
            if (before_D == nearest_D).all():
                break
        return self._means(wanted_DO, nearest_D, means_CO)

    def inside(self, rows_XO: np.ndarray, share: float) -> np.ndarray:
        """Returns [X, O]: 1 where the pool of that share, picked from each row, has an expert."""
        return inside_share(rows_XO, share, self._routed)

    def best(self, means_CO: np.ndarray, evidence_NO: np.ndarray) -> np.ndarray:
        """The number of each prompt's codeword, as a service finds it: [N]."""
        return np.asarray((evidence_NO @ self.inside(means_CO, JUDGED_SHARE).T).argmax(1))

    def coverage(self, means_CO: np.ndarray, best_N: np.ndarray, seen_NO: np.ndarray) -> np.ndarray:
        """Returns each prompt's coverage by what was seen of it, as a service finds it: [N]."""
        own_N = (seen_NO * self.inside(seen_NO, COVERAGE_SHARE)).sum(1)
        held_N = (seen_NO * self.inside(means_CO, COVERAGE_SHARE)[best_N]).sum(1)
        return np.asarray(held_N / np.maximum(own_N, 1e-9))

    def _held_out_loss(self, count: int) -> float:
        lost = []
        fold_D = np.arange(len(self._wanted_DO)) % FOLDS
        for fold in range(FOLDS):
            means_CO = self.clusters(np.flatnonzero(fold_D != fold), count)
            held_N = np.flatnonzero(fold_D[self._document_N] == fold)
            scored_NO = self._scored_NO[held_N]
            best_N = self.best(means_CO, scored_NO + self._trunk_NO[held_N])
            lost.append(self._gain(scored_NO, means_CO[best_N], held_N))
        return float(np.concatenate(lost).mean())

    def _thresholds(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths of prompts, [P], and the coverages below which such a prompt gets a pool of its own, [2,
        P]: by a pass's scores, and by the trunk's.

        Groups of clusters take turns to be unknown to codebook and pass, together with documents of the other groups
        that are left out as well. The best cut is the one that gains most gate mass if half of all prompts are unknown,
        with no more than MAX_FALLBACK of the known ones below it.
        """
        num_documents = len(self._wanted_DO)
        coarse_CO = self.clusters(np.arange(num_documents), min(COARSE, num_documents))
        coarse_D = (self._wanted_DO @ self.inside(coarse_CO, JUDGED_SHARE).T).argmax(1)
        random = np.random.default_rng(self._seed)
        group_D = random.permutation(len(coarse_CO))[coarse_D] % FOLDS
        is_spare_D = random.random(num_documents) < 1 / FOLDS
        known: list[_Judged] = []
        unknown: list[_Judged] = []
        for fold in range(FOLDS):
            fitted_to_D = np.flatnonzero((group_D != fold) & ~is_spare_D)
            if len(fitted_to_D) < MIN_DOCUMENTS:
                continue
            means_CO, scored_NO = self.clusters(fitted_to_D, count), self._scores_after(fitted_to_D)
            for found, of_D in ((known, (group_D != fold) & is_spare_D), (unknown, group_D == fold)):
                found.append(self._judge(means_CO, scored_NO, np.flatnonzero(of_D[self._document_N])))
        lengths_P = np.unique(self._length_N)
        if not known:
            return lengths_P.astype(np.float32), np.zeros((2, len(lengths_P)), np.float32)
        thresholds_2P = np.zeros((2, len(lengths_P)), np.float32)
        for row, (of_known, of_unknown) in enumerate(
            zip(zip(*known, strict=True), zip(*unknown, strict=True), strict=True)
        ):
            known_3N, unknown_3N = np.concatenate(of_known, 1), np.concatenate(of_unknown, 1)
            for column, length in enumerate(lengths_P):
                of_length = [each[:2, each[2] == length] for each in (known_3N, unknown_3N)]
                is_enough = min(each.shape[1] for each in of_length) >= MIN_DOCUMENTS
                thresholds_2P[row, column] = _cut(*of_length) if is_enough else _cut(known_3N[:2], unknown_3N[:2])
        return lengths_P.astype(np.float32), thresholds_2P

    def _judge(self, means_CO: np.ndarray, scored_NO: np.ndarray, of_N: np.ndarray) -> _Judged:
        scored_NO, trunk_NO = scored_NO[of_N], self._trunk_NO[of_N]
        found = []
        for seen_NO in (scored_NO, trunk_NO):
            best_N = self.best(means_CO, scored_NO + seen_NO)
            coverage_N = self.coverage(means_CO, best_N, seen_NO)
            own_NO = own_scores(coverage_N[:, None], scored_NO, seen_NO, means_CO[best_N])
            gain_N = self._gain(own_NO, means_CO[best_N], of_N)
            found.append(np.stack([coverage_N, gain_N, self._length_N[of_N]]))
        return found[0], found[1]

    def _gain(self, own_NO: np.ndarray, shared_NO: np.ndarray, of_N: np.ndarray) -> np.ndarray:
        """The mass of its document, by layer, that each prompt has in its own pool beyond the shared one: [N].

        Both are given by the scores that they are picked from.
        """
        more_NO = self.inside(own_NO, JUDGED_SHARE) - self.inside(shared_NO, JUDGED_SHARE)
        gain_N = (self._wanted_DO[self._document_N[of_N]] * more_NO).sum(1)
        return np.asarray(gain_N / max(sum(count > 0 for count in self._routed), 1))

    def _means(self, wanted_DO: np.ndarray, nearest_D: np.ndarray, before_CO: np.ndarray) -> np.ndarray:
        """Returns the mean of each cluster: of all pools of a size, the one picked from it holds most of the members'
        mass.
        """
        counts_C = np.bincount(nearest_D, minlength=len(before_CO))
        sums_CO = np.zeros_like(before_CO)
        np.add.at(sums_CO, nearest_D, wanted_DO)
        return np.asarray(np.where(counts_C[:, None] > 0, sums_CO / np.maximum(counts_C, 1)[:, None], before_CO))


def _nearest_root(rows_DO: np.ndarray, points_CO: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Returns each row's cluster after k-means of the square roots, which gives rare experts more weight: [D]."""
    roots_DO, points_CO = np.sqrt(rows_DO), np.sqrt(points_CO)
    for _ in range(rounds):
        nearest_D = ((points_CO**2).sum(1) - 2 * roots_DO @ points_CO.T).argmin(1)
        counts_C = np.bincount(nearest_D, minlength=len(points_CO))
        sums_CO = np.zeros_like(points_CO)
        np.add.at(sums_CO, nearest_D, roots_DO)
        points_CO = np.where(counts_C[:, None] > 0, sums_CO / np.maximum(counts_C, 1)[:, None], points_CO)
    return np.asarray(nearest_D)


def _refilled(nearest_D: np.ndarray, mass_D: np.ndarray, count: int) -> np.ndarray:
    """Gives each cluster without members the document that its own cluster suits worst."""
    nearest_D = nearest_D.copy()
    worst_D = iter(np.argsort(mass_D, kind="stable"))
    for empty in np.flatnonzero(np.bincount(nearest_D, minlength=count) == 0):
        nearest_D[next(worst_D)] = empty
    return nearest_D


def _cut(known_2N: np.ndarray, unknown_2N: np.ndarray) -> float:
    """Returns the coverage that separates known from unknown prompts, each given by its coverage and its own pool's
    gain.
    """
    coverage_N, gain_N = np.concatenate([known_2N, unknown_2N], 1)
    weight_N = np.repeat(
        [1 / max(known_2N.shape[1], 1), 1 / max(unknown_2N.shape[1], 1)], [known_2N.shape[1], unknown_2N.shape[1]]
    )
    order_N = np.argsort(coverage_N, kind="stable")
    total_N = np.cumsum((gain_N * weight_N)[order_N])
    if total_N.max(initial=0) <= 0:
        return 0.0
    best = float(coverage_N[order_N[min(int(total_N.argmax()) + 1, len(order_N) - 1)]])
    return min(best, float(np.quantile(known_2N[0], MAX_FALLBACK))) if known_2N.shape[1] else best


# --- a codebook that learns -------------------------------------------------------------------------------------------

SIZE = Share(1 / 8)  # of the pools that a stream of prompts asks for
REVISE_EVERY = 32  # observations, as a router does


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a stream, as the passes score it."""

    domain: str
    lexical: RoutingScores
    trunk: RoutingScores


class TrafficStream:
    """Serves prompts one after the other with a codebook that learns from them, as a router does."""

    def __init__(self, codebook: Codebook, routed_per_layer: Sequence[int]) -> None:
        self.codebook = codebook
        self.learned = Learned()
        self._routed = tuple(routed_per_layer)
        self._waiting: list[Observation] = []
        self._num_others = 0

    def serve(self, prompt: Prompt) -> Codeword:
        """The codeword that the prompt gets, which is learned from."""
        codeword = self.look(prompt)
        observation = observed(codeword)
        if observation is None:
            self._num_others += 1
        else:
            self._waiting.append(observation)
        if len(self._waiting) >= REVISE_EVERY:
            self.learned = revise(self.learned, self._waiting, self._routed, self._num_others)
            self.codebook = self.codebook.with_learned(self.learned.names, self.learned.means)
            self._waiting, self._num_others = [], 0
        return codeword

    def look(self, prompt: Prompt) -> Codeword:
        """The codeword that the prompt would get."""
        return self.codebook.assign(prompt.lexical, SIZE, prompt.trunk)

    def shared(self, prompts: Sequence[Prompt]) -> float:
        """The share of prompts that a codeword covers; nothing is learned from them."""
        return float(np.mean([self.look(prompt).is_covered for prompt in prompts]))
