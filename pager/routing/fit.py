"""Fits `router.safetensors` in closed form: ridge regression, cut to a low rank. Numpy only, deterministic.

Legend: N prompts, V vocabulary, C columns (tokens common enough to be fitted), Z latent features, O outputs (routed
experts of every layer in a row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pager.errors import InvalidRequest
from pager.routing.fitted import FLOOR, LexicalRouter, RouterFile, combine, recall_features
from pager.types import ExpertPool, RoutingScores

MAX_COLUMNS = 8192
MIN_DOCUMENTS = 8
FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class DocumentReading:
    """A document as its model read it.

    `wanted_O`: each routed expert's mean probability over all of the document. `trunk`: the trunk's scores of some of
    its beginnings, each a prompt of `num_tokens`. `fused`: the pool that a prefill chose for the first `fused_tokens`,
    one of those lengths.
    """

    token_ids: tuple[int, ...]
    wanted_O: np.ndarray
    trunk: tuple[RoutingScores, ...]
    fused_tokens: int
    fused: ExpertPool


@dataclass(frozen=True, slots=True)
class FitOptions:
    """`rank` latent features; ridge penalties relative to the mean square of the features."""

    rank: int = 64
    lexical_penalty: float = 1.0
    fitted_rank: int = 64
    fitted_penalty: float = 10.0


@dataclass(frozen=True, slots=True)
class Fit:
    """The file, and the mean recall of fused pools on documents that its maps had not seen, by source."""

    file: RouterFile
    held_out_recall: dict[str, float]
    recall_error: dict[str, float]


def fit_router(
    readings: Sequence[DocumentReading],
    vocabulary: int,
    routed_per_layer: tuple[int, ...],
    fingerprint: str,
    options: FitOptions | None = None,
) -> Fit:
    """Folds of documents take turns at being unseen: what the second map and the estimates learn from is predicted.

    Raises InvalidRequest for too few documents.
    """
    if len(readings) < MIN_DOCUMENTS:
        raise InvalidRequest(f"a router is fitted to at least {MIN_DOCUMENTS} documents; {len(readings)} were given")
    fitter = _Fitter(readings, vocabulary, routed_per_layer, fingerprint, options or FitOptions())
    return fitter.fit()


class _Fitter:
    def __init__(
        self,
        readings: Sequence[DocumentReading],
        vocabulary: int,
        routed_per_layer: tuple[int, ...],
        fingerprint: str,
        options: FitOptions,
    ) -> None:
        self._options = options
        self._facts = (fingerprint, routed_per_layer)
        self._vocabulary = vocabulary
        prompts = [(n, reading, trunk) for n, reading in enumerate(readings) for trunk in reading.trunk]
        self._trunk = [trunk for _, _, trunk in prompts]
        self._fused = [
            reading.fused if trunk.num_tokens == reading.fused_tokens else None for _, reading, trunk in prompts
        ]
        self._tokens = [reading.token_ids[: trunk.num_tokens] for _, reading, trunk in prompts]
        self._fold_N = np.array([n % FOLDS for n, _, _ in prompts])
        self._wanted_NO = np.stack([reading.wanted_O for _, reading, _ in prompts])
        trunk_NO = np.stack([np.concatenate(trunk.mean_LR) for trunk in self._trunk])
        self._trunk_NO = np.log(np.maximum(trunk_NO, FLOOR)).astype(np.float32)
        self._columns_C, self._idf_C = _columns(self._tokens, vocabulary)
        self._counts_NC = _counts(self._tokens, self._columns_C, vocabulary) * self._idf_C

    def fit(self) -> Fit:
        lexical_NO = np.empty_like(self._wanted_NO)
        for fold in range(FOLDS):
            seen_N = self._fold_N != fold
            router = LexicalRouter(self._file(self._fit_lexical(seen_N)))
            for row in np.flatnonzero(~seen_N):
                lexical_NO[row] = np.concatenate(router.scores(self._tokens[row]).mean_LR)
        weights = self._fit_lexical(np.ones(len(self._fold_N), bool)) | self._fit_combined(lexical_NO)
        estimates, recall, error = self._fit_recall(self._file(weights), lexical_NO)
        return Fit(self._file(weights | estimates), recall, error)

    def _file(self, weights: dict[str, np.ndarray]) -> RouterFile:
        empty = np.zeros((len(self._wanted_NO[0]), 1), np.float32)
        blank = {"fitted.down": empty, "fitted.up": empty.T, "fitted.trunk_mean": empty[:, 0]}
        facts = {"prompts": str(len(self._trunk))}
        return RouterFile(*self._facts, blank | weights, facts)

    def _fit_lexical(self, rows_N: np.ndarray) -> dict[str, np.ndarray]:
        wanted_NO = self._wanted_NO[rows_N]
        mean_O = wanted_NO.mean(0)
        map_CO = ridge(self._counts_NC[rows_N], wanted_NO - mean_O, self._options.lexical_penalty)
        down_CZ, head_ZO = low_rank(self._counts_NC[rows_N], map_CO, self._options.rank)
        tokens_VZ = np.zeros((self._vocabulary, down_CZ.shape[1]), np.float32)
        tokens_VZ[self._columns_C] = self._idf_C[:, None] * down_CZ
        return {"lexical.tokens": tokens_VZ, "lexical.head": head_ZO, "lexical.mean": mean_O.astype(np.float32)}

    def _fit_combined(self, lexical_NO: np.ndarray) -> dict[str, np.ndarray]:
        mean_O = self._trunk_NO.mean(0)
        trunk_NO = self._trunk_NO - mean_O
        map_OO = ridge(trunk_NO, (self._wanted_NO - lexical_NO).astype(np.float32), self._options.fitted_penalty)
        down_OZ, up_ZO = low_rank(trunk_NO, map_OO, self._options.fitted_rank)
        return {"fitted.down": down_OZ, "fitted.up": up_ZO, "fitted.trunk_mean": mean_O}

    def _fit_recall(
        self, file: RouterFile, lexical_NO: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]]:
        """From predictions for documents unseen by the lexical map; the combined map is too small to learn them."""
        by_source: dict[str, tuple[list[np.ndarray], list[float]]] = {}
        for trunk, fused, lexical_O in zip(self._trunk, self._fused, lexical_NO, strict=True):
            if fused is None:
                continue
            lexical = file.as_scores(lexical_O, "lexical", trunk.num_tokens)
            for scores in (lexical, trunk, combine(file, lexical, trunk)):
                experts = tuple(
                    tuple(sorted(np.argsort(-mean_R, kind="stable")[: len(layer)].tolist()))
                    for mean_R, layer in zip(scores.mean_LR, fused.experts, strict=True)
                )
                pool = ExpertPool(experts)
                features, recalls = by_source.setdefault(scores.source, ([], []))
                features.append(recall_features(scores, pool))
                recalls.append(pool.recall_of(fused))
        weights, means, errors = {}, {}, {}
        for source, (features, recalls) in by_source.items():
            features_NF, recall_N = np.stack(features), np.asarray(recalls)
            gram_FF = features_NF.T @ features_NF + 1e-4 * len(recall_N) * np.eye(features_NF.shape[1])
            found_F = np.linalg.solve(gram_FF, features_NF.T @ recall_N)
            weights[f"recall.{source}"] = found_F
            means[source] = float(recall_N.mean())
            errors[source] = float(np.abs(features_NF @ found_F - recall_N).mean())
        return weights, means, errors


def ridge(inputs_NC: np.ndarray, outputs_NO: np.ndarray, penalty: float) -> np.ndarray:
    """[C, O]: the least-squares map with `penalty` in units of the inputs' mean squared norm."""
    num_rows, num_columns = inputs_NC.shape
    strength = penalty * float((inputs_NC.astype(np.float64) ** 2).sum() / num_rows)
    if num_rows <= num_columns:
        gram = inputs_NC @ inputs_NC.T
        gram[np.diag_indices(num_rows)] += strength
        return np.asarray(inputs_NC.T @ np.linalg.solve(gram, outputs_NO))
    gram = inputs_NC.T @ inputs_NC
    gram[np.diag_indices(num_columns)] += strength
    return np.asarray(np.linalg.solve(gram, inputs_NC.T @ outputs_NO))


def low_rank(inputs_NC: np.ndarray, map_CO: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`(down [C, Z], up [Z, O])` whose product comes nearest to the map on these inputs."""
    found_NO = inputs_NC @ map_CO
    _, vectors_OO = np.linalg.eigh(found_NO.T @ found_NO)
    up_OZ = vectors_OO[:, ::-1][:, :rank]
    return (map_CO @ up_OZ).astype(np.float32), np.ascontiguousarray(up_OZ.T, dtype=np.float32)


def _columns(prompts: Sequence[Sequence[int]], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that occur in at least two prompts, most widespread first, and their weights."""
    spread_V = np.zeros(vocabulary, np.int64)
    for ids in prompts:
        spread_V[np.unique(np.asarray(ids))] += 1
    order = np.argsort(-spread_V, kind="stable")[:MAX_COLUMNS]
    columns = order[spread_V[order] >= 2]
    idf = np.log(len(prompts) / spread_V[columns]) + 1.0
    return columns, idf.astype(np.float32)


def _counts(prompts: Sequence[Sequence[int]], columns_C: np.ndarray, vocabulary: int) -> np.ndarray:
    """[N, C]: sublinear counts, every prompt of length 1 over all its tokens."""
    column_V = np.full(vocabulary, -1)
    column_V[columns_C] = np.arange(len(columns_C))
    rows_NC = np.zeros((len(prompts), len(columns_C)), np.float32)
    for row, ids in enumerate(prompts):
        found, counts = np.unique(np.asarray(ids), return_counts=True)
        weights = np.log1p(counts)
        known = column_V[found] >= 0
        rows_NC[row, column_V[found[known]]] = weights[known] / np.sqrt(weights @ weights)
    return rows_NC
