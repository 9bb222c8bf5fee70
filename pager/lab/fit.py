"""Fits `router.safetensors` in closed form: ridge regressions around typical points. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pager.errors import InvalidRequest
from pager.predict.fitted import PENALTIES, STAND_IN, PredictorFile, Stage, fit_recall, pool_like, recall_features
from pager.types import ExpertPool, RoutingScores

MAX_COLUMNS = 8192
MIN_PROMPTS = 2  # that a token must occur in, to be a column
MAX_SAMPLE = 4096  # rows that typical points are sought among
ROUNDS = 12


def common_tokens(prompts: Sequence[np.ndarray], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """`(columns [C], weights [C])`: the most widespread tokens, and how much more a rare one says."""
    spread_V = np.zeros(vocabulary, np.int64)
    for ids in prompts:
        spread_V[np.unique(ids)] += 1
    order_V = np.argsort(-spread_V, kind="stable")[:MAX_COLUMNS]
    columns_C = order_V[spread_V[order_V] >= MIN_PROMPTS]
    weights_C = np.sqrt(np.maximum(np.log((len(prompts) + 1) / (spread_V[columns_C] + 0.5)), 0.05))
    return columns_C, weights_C.astype(np.float32)


def sublinear_counts(prompts: Sequence[np.ndarray], columns_C: np.ndarray, vocabulary: int) -> np.ndarray:
    """[N, C]: log(1 + count), a prompt's vector of length 1 over all its tokens, columns or not."""
    column_V = np.full(vocabulary, -1)
    column_V[columns_C] = np.arange(len(columns_C))
    rows_NC = np.zeros((len(prompts), len(columns_C)), np.float32)
    for row, ids in enumerate(prompts):
        found, counts = np.unique(ids, return_counts=True)
        weights = np.log1p(counts)
        known = column_V[found] >= 0
        rows_NC[row, column_V[found[known]]] = weights[known] / np.sqrt(weights @ weights)
    return rows_NC


def ridge(inputs_NI: np.ndarray, outputs_NO: np.ndarray, penalty: float) -> np.ndarray:
    """[I, O]: the least-squares map with `penalty` in units of the inputs' mean squared norm."""
    num_rows, num_inputs = inputs_NI.shape
    strength = np.float32(max(penalty * float((inputs_NI**2).sum(dtype=np.float64)) / num_rows, 1e-12))
    if num_rows <= num_inputs:
        gram_NN = inputs_NI @ inputs_NI.T
        gram_NN[np.diag_indices(num_rows)] += strength
        return np.asarray(inputs_NI.T @ np.linalg.solve(gram_NN, outputs_NO))
    gram_II = inputs_NI.T @ inputs_NI
    gram_II[np.diag_indices(num_inputs)] += strength
    return np.asarray(np.linalg.solve(gram_II, inputs_NI.T @ outputs_NO))


def ridge_of_sums(gram_II: np.ndarray, cross_IO: np.ndarray, num_rows: int, penalty: float) -> np.ndarray:
    """[I, O] float32: `ridge` from `inputs.T @ inputs` and `inputs.T @ outputs`, for rows too many to keep."""
    strength = max(penalty * float(np.trace(gram_II)) / num_rows, 1e-12)
    return np.asarray(np.linalg.solve(gram_II + strength * np.eye(len(gram_II)), cross_IO), np.float32)


def main_directions(rows_NO: np.ndarray, count: int) -> np.ndarray:
    """[O, Z]: orthonormal, largest first; as many as the rows can tell apart, at most `count`."""
    values_O, vectors_OO = np.linalg.eigh(rows_NO.T @ rows_NO)
    count = max(1, min(count, int((values_O > 1e-6 * values_O[-1]).sum())))
    basis_OZ = vectors_OO[:, ::-1][:, :count]
    # A direction's sign is arbitrary; pin it, so that it does not depend on the library.
    return np.asarray(basis_OZ * np.where(basis_OZ[np.abs(basis_OZ).argmax(0), np.arange(count)] < 0, -1, 1))


def typical_points(rows_NZ: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[M, Z]: k-means of a sample of the rows."""
    random = np.random.default_rng(seed)
    sample_NZ = rows_NZ[random.permutation(len(rows_NZ))[:MAX_SAMPLE]]
    points_MZ = sample_NZ[: max(1, min(count, len(sample_NZ)))].copy()
    for _ in range(ROUNDS):
        nearest_N = ((points_MZ**2).sum(1) - 2 * sample_NZ @ points_MZ.T).argmin(1)
        counts_M = np.bincount(nearest_N, minlength=len(points_MZ))
        sums_MZ = np.zeros_like(points_MZ)
        np.add.at(sums_MZ, nearest_N, sample_NZ)
        points_MZ = np.where(counts_M[:, None] > 0, sums_MZ / np.maximum(counts_M, 1)[:, None], points_MZ)
    return np.asarray(points_MZ, np.float32)


MIN_DOCUMENTS = 8
JUDGED_SHARE = 8  # of experts, in the pools by which passes are judged
FOLDS = 3


@dataclass(frozen=True, slots=True, eq=False)
class DocumentReading:
    """A document as its model read it.

    `wanted_O`: each routed expert's mean probability over all of the document. `trunk`: the trunk's scores of some of
    its beginnings, each a prompt of `num_tokens`. `prefill_pools`: pools that prefills chose, each with the number
    of its prompt in `trunk`.
    """

    token_ids: tuple[int, ...]
    wanted_O: np.ndarray
    trunk: tuple[RoutingScores, ...]
    prefill_pools: tuple[tuple[int, ExpertPool], ...]


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Features and typical points of both passes; ridge penalties in units of the inputs' mean squared norm."""

    lexical_features: int = 48
    lexical_points: int = 128
    fitted_features: int = 64
    fitted_points: int = 256
    lexical_penalty: float = 5.0
    penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """The file, and how its passes did on documents that their maps had not seen, by source.

    `recall` of prefills' pools; `recall_error`, the mean absolute error of its estimates; `mass`, how much of a
    document's gate mass a pool of an eighth of the experts holds, over what the best such pool does.
    """

    file: PredictorFile
    recall: dict[str, float]
    recall_error: dict[str, float]
    mass: dict[str, float]


def fit_router(
    readings: Sequence[DocumentReading],
    vocabulary: int,
    routed_per_layer: tuple[int, ...],
    fingerprint: str,
    *,
    stand_ins: Mapping[int, np.ndarray] | None = None,
    options: FitOptions | None = None,
) -> Fit:
    """The readings should be in random order: folds of them take turns. Raises InvalidRequest for too few.

    `stand_ins` are those of the trunk that made the readings; the file takes them along.
    """
    if len(readings) < MIN_DOCUMENTS:
        raise InvalidRequest(f"a router is fitted to at least {MIN_DOCUMENTS} documents; {len(readings)} were given")
    return _Fitter(readings, vocabulary, options or FitOptions()).fit(routed_per_layer, fingerprint, stand_ins or {})


class _Fitter:
    def __init__(self, readings: Sequence[DocumentReading], vocabulary: int, options: FitOptions) -> None:
        prompts = [(number, reading, trunk) for number, reading in enumerate(readings) for trunk in reading.trunk]
        self._options = options
        self._vocabulary = vocabulary
        self._num_documents = len(readings)
        self._trunk = [trunk for _, _, trunk in prompts]
        starts = np.cumsum([0] + [len(reading.trunk) for reading in readings])
        self._prefill_pools = [
            [(int(start) + prompt, pool) for prompt, pool in reading.prefill_pools]
            for start, reading in zip(starts, readings, strict=False)
        ]
        self._tokens = [np.asarray(reading.token_ids[: trunk.num_tokens]) for _, reading, trunk in prompts]
        self._fold_N = np.array([number % FOLDS for number, _, _ in prompts])
        self._wanted_NO = np.stack([reading.wanted_O for _, reading, _ in prompts]).astype(np.float32)
        self._mean_O = self._wanted_NO.mean(0)

    def fit(self, routed_per_layer: tuple[int, ...], fingerprint: str, stand_ins: Mapping[int, np.ndarray]) -> Fit:
        options = self._options
        columns_C, idf_C = common_tokens(self._tokens, self._vocabulary)
        counts_NC = sublinear_counts(self._tokens, columns_C, self._vocabulary) * idf_C
        down_CZ, lexical_NZ = self._features(counts_NC, options.lexical_features, options.lexical_penalty)
        tokens_VZ = np.zeros((self._vocabulary, down_CZ.shape[1]), np.float32)
        tokens_VZ[columns_C] = idf_C[:, None] * down_CZ
        lexical, unseen_lexical_NO = self._stage(lexical_NZ, options.lexical_points)

        trunk_NO = np.stack([np.concatenate(trunk.mean_LR) for trunk in self._trunk]).astype(np.float32)
        trunk_mean_O = trunk_NO.mean(0)
        trunk_NO -= trunk_mean_O
        balance = np.sqrt((trunk_NO**2).sum() / max(float((lexical_NZ**2).sum()), 1e-12))  # both sources weigh alike
        inputs_NI = np.concatenate([lexical_NZ * balance, trunk_NO], 1)
        down_IZ, fitted_NZ = self._features(inputs_NI, options.fitted_features, options.penalty)
        down_IZ[: lexical_NZ.shape[1]] *= balance
        fitted, unseen_fitted_NO = self._stage(fitted_NZ, options.fitted_points)

        weights = {"lexical.tokens": tokens_VZ, "fitted.trunk_mean": trunk_mean_O, "fitted.down": down_IZ}
        for name, stage in (("lexical", lexical), ("fitted", fitted)):
            parts = {"keys": stage.keys, "offsets": stage.offsets, "head": stage.head, "mean": stage.mean}
            weights |= {f"{name}.{part}": weight for part, weight in parts.items()}
        weights |= {f"{STAND_IN}{layer}": vectors_RD for layer, vectors_RD in stand_ins.items()}
        facts = {"documents": str(self._num_documents), "prompts": str(len(self._trunk))}
        facts |= {name: str(value) for name, value in asdict(options).items()}
        file = PredictorFile(fingerprint, routed_per_layer, weights, facts)
        return self._judge(file, {"lexical": unseen_lexical_NO, "fitted": unseen_fitted_NO})

    def _features(self, inputs_NI: np.ndarray, count: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """`(down [I, Z], features [N, Z])`: what ridge regression keeps of the inputs; each prompt's as if unseen."""
        wanted_NO = self._wanted_NO - self._mean_O
        map_IO = ridge(inputs_NI, wanted_NO, penalty)
        basis_OZ = main_directions(inputs_NI @ map_IO, count)
        features_NZ = np.empty((len(inputs_NI), basis_OZ.shape[1]), np.float32)
        for seen_N in self._turns():
            map_of_seen_IZ = ridge(inputs_NI[seen_N], wanted_NO[seen_N], penalty) @ basis_OZ
            features_NZ[~seen_N] = inputs_NI[~seen_N] @ map_of_seen_IZ
        scale = max(float(features_NZ.std()), 1e-12)  # to about 1, where half precision is at its best
        return (map_IO @ basis_OZ / scale).astype(np.float32), features_NZ / np.float32(scale)

    def _stage(self, features_NZ: np.ndarray, points: int) -> tuple[Stage, np.ndarray]:
        """The Stage of all prompts, and the outputs [N, O] of Stages that had not seen the prompt's document."""
        keys, offsets = self._nearness(features_NZ, points)
        unseen_NO = np.empty_like(self._wanted_NO)
        for seen_N in self._turns():
            unseen_NO[~seen_N] = self._head(keys, offsets, features_NZ, seen_N).outputs(features_NZ[~seen_N])
        return self._head(keys, offsets, features_NZ, np.ones(len(features_NZ), bool)), unseen_NO

    def _nearness(self, features_NZ: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits that fall with the squared distance from typical points, in units of the usual one to the nearest."""
        points_MZ = typical_points(features_NZ, min(points, self._num_documents // 4), self._options.seed)
        squares_M = (points_MZ**2).sum(1)
        distance_N = (features_NZ**2).sum(1) + (squares_M - 2 * features_NZ @ points_MZ.T).min(1)
        unit = max(float(np.median(distance_N)), 1e-6)
        return (2 * points_MZ.T / unit).astype(np.float32), (-squares_M / unit).astype(np.float32)

    def _head(self, keys: np.ndarray, offsets: np.ndarray, features_NZ: np.ndarray, seen_N: np.ndarray) -> Stage:
        blank = np.zeros((len(offsets) + features_NZ.shape[1], 0), np.float32)
        inner_NI = Stage(keys, offsets, blank, self._mean_O).inner(features_NZ[seen_N])
        halves = np.split(inner_NI, [len(offsets)], 1)
        scales = [max(float(np.sqrt((half**2).sum(1).mean())), 1e-6) for half in halves]  # so that both weigh alike
        scale_I = np.repeat(np.array(scales, np.float32), [half.shape[1] for half in halves])
        head_IO = ridge(inner_NI / scale_I, self._wanted_NO[seen_N] - self._mean_O, self._options.penalty)
        return Stage(keys, offsets, (head_IO / scale_I[:, None]).astype(np.float32), self._mean_O)

    def _turns(self) -> list[np.ndarray]:
        """For each fold, which prompts are of other documents."""
        return [self._fold_N != fold for fold in range(FOLDS)]

    def _judge(self, file: PredictorFile, unseen: dict[str, np.ndarray]) -> Fit:
        """Fits the estimates of recall, and says what the passes are worth."""
        predictions: dict[str, list[RoutingScores]] = {"trunk": self._trunk}
        for source, outputs_NO in unseen.items():
            rows = zip(outputs_NO, self._trunk, strict=True)
            sees_trunk = source == "fitted"
            predictions[source] = [
                file.as_scores(outputs_O, source, trunk.num_tokens, trunk if sees_trunk else None)
                for outputs_O, trunk in rows
            ]
        estimates, recall, error, mass = {}, {}, {}, {}
        for source, scores_N in predictions.items():
            estimates[f"recall.{source}"], recall[source], error[source] = self._estimate(scores_N)
            mass[source] = self._mass(file, scores_N)
        made = PredictorFile(file.fingerprint, file.routed_per_layer, dict(file.weights) | estimates, file.facts)
        return Fit(made, recall, error, mass)

    def _estimate(self, scores_N: Sequence[RoutingScores]) -> tuple[np.ndarray, float, float]:
        """`(weights [F], mean recall, mean absolute error of its estimates)`; the error is of folds taking turns."""
        pairs = [(scores_N[row], chosen) for document in self._prefill_pools for row, chosen in document]
        pools = [pool_like(scores, chosen) for scores, chosen in pairs]
        features_NF = np.stack([recall_features(scores, pool) for (scores, _), pool in zip(pairs, pools, strict=True)])
        recall_N = np.array([pool.recall_of(chosen) for (_, chosen), pool in zip(pairs, pools, strict=True)])
        fold_N = np.array([number % FOLDS for number, document in enumerate(self._prefill_pools) for _ in document])

        def error_with(penalty: float) -> float:
            error_N = np.empty_like(recall_N)
            for fold in range(FOLDS):
                seen_N = fold_N != fold
                weights_F = fit_recall(features_NF[seen_N], recall_N[seen_N], penalty)
                error_N[~seen_N] = np.clip(features_NF[~seen_N] @ weights_F, 0, 1) - recall_N[~seen_N]
            return float(np.abs(error_N).mean())

        error, penalty = min((error_with(penalty), penalty) for penalty in PENALTIES)
        return fit_recall(features_NF, recall_N, penalty), float(recall_N.mean()), error

    def _mass(self, file: PredictorFile, scores_N: Sequence[RoutingScores]) -> float:
        shares = []
        for scores, wanted_O in zip(scores_N, self._wanted_NO, strict=True):
            wanted = file.as_scores(wanted_O, "wanted", scores.num_tokens)
            for mean_R, wanted_R in zip(scores.mean_LR, wanted.mean_LR, strict=True):
                count = len(wanted_R) // JUDGED_SHARE
                if count:
                    found = wanted_R[np.argsort(-mean_R)[:count]].sum()
                    shares.append(found / np.sort(wanted_R)[-count:].sum())
        return float(np.mean(shares)) if shares else 1.0
