"""Fits `router.safetensors` in closed form, from documents that a model has read.

The first part reads documents with a model; the second is the fit: ridge regressions around typical points, in numpy
only. Legend: T tokens, K experts a token picks, R routed experts of a layer, O those of all layers side by side, D
hidden, N prompts, I inputs, Z features, M typical points, C columns of tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.lab.codebook import CodebookFit, CodebookFitter
from pager.lab.recording import Forwards, Ids, experts_in_bulk, mean_probabilities, recording, run_document
from pager.predict.fitted import (
    FLOOR,
    PENALTIES,
    STAND_IN,
    LexicalPredictor,
    PredictorFile,
    Stage,
    fit_recall,
    pool_like,
    recall_features,
)
from pager.predict.trunk import TrunkPredictor
from pager.types import ExpertPool, PoolPolicy, PoolSize, RoutingFacts, RoutingScores, Share

PENALTY = 1.0
PROMPT_LENGTHS = (16, 32, 64, 128, 256)
POOL_SIZES = (Share(0.125), Share(0.25), Share(0.5))
MIN_TOKENS = 32
READ_TOGETHER = 64  # documents
STAND_IN_DOCUMENTS = 320  # of those to be read: some 100,000 tokens for a vector an expert

StandIns = dict[int, np.ndarray]  # [R, D] float32 by sparse layer
Steps = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Shows progress: called with a name and a number of steps, it returns a context whose value is called after each."""


def fit_checkpoint(
    model: Path, paged: PagedModel, documents: Sequence[Ids], seed: int, steps: Steps, num_codewords: int | None = None
) -> Fit:
    """Fits the routing-only passes and the codebook of `paged`, which was loaded from `model`.

    The documents should be in random order. Raises InvalidRequest for too few.
    """
    stand_ins = _fit_stand_ins(paged, documents, seed, steps)
    trunk = TrunkPredictor.load(model, device=str(paged.device), dtype=paged.dtype, stand_ins=stand_ins)
    reader = DocumentReader(paged, trunk, seed=seed)
    readings = []
    with steps("reading documents", len(documents)) as advance:
        for ids in documents:
            reading = reader.read(ids)
            if reading is not None:
                readings.append(reading)
            advance()
    vocabulary, routed = int(paged.config.vocab_size), paged.facts.routed_per_layer
    options = FitOptions(codewords=num_codewords)
    return fit_router(readings, vocabulary, routed, paged.fingerprint, stand_ins=stand_ins, options=options)


def add_codebook(
    model: Path, paged: PagedModel, documents: Sequence[Ids], steps: Steps, num_codewords: int | None = None
) -> tuple[PredictorFile, CodebookFit]:
    """Fits only a codebook, and returns the model's file with it.

    Raises InvalidRequest for too few documents, CheckpointError where there is no file.
    """
    file = PredictorFile.load(model, paged.fingerprint)
    trunk = TrunkPredictor.load(model, device=str(paged.device), dtype=paged.dtype, stand_ins=file.stand_ins)
    kept = [tuple(ids) for ids in documents if len(ids) >= MIN_TOKENS]
    _check_documents(len(kept))
    readings = []
    forwards = Forwards(paged, MIN_TOKENS)
    with steps("reading documents", len(kept)) as advance, experts_in_bulk(paged):
        for start in range(0, len(kept), READ_TOGETHER):
            together = kept[start : start + READ_TOGETHER]
            for ids, means in zip(together, forwards.means(together), strict=True):
                lengths = prompt_lengths(len(ids))
                prompts = trunk.prefix_scores(ids[: lengths[-1]], lengths)
                readings.append(DocumentReading(ids, np.concatenate(means.whole_LR), prompts, ()))
                advance()
    return with_codebook(file, readings, int(paged.config.vocab_size), FitOptions(codewords=num_codewords))


def with_codebook(
    file: PredictorFile, readings: Sequence[DocumentReading], vocabulary: int, options: FitOptions
) -> tuple[PredictorFile, CodebookFit]:
    """Fits a codebook to readings, and returns the file with it, otherwise unchanged."""
    fitter = _Fitter(readings, vocabulary, options)
    fit = fitter.codebook(file.routed_per_layer, fitter.lexical().unseen_NO)
    facts = dict(file.facts) | {"codebook_documents": str(len(readings)), "codewords": str(fit.num_codewords)}
    return PredictorFile(file.fingerprint, file.routed_per_layer, dict(file.weights) | fit.weights, facts), fit


def _fit_stand_ins(paged: PagedModel, documents: Sequence[Ids], seed: int, steps: Steps) -> StandIns:
    sizes = sizes_of_pools(paged.facts)
    random = np.random.default_rng(seed)
    fit = StandInFit(paged)
    chosen = [ids for ids in documents if ids][:STAND_IN_DOCUMENTS]
    with steps("finding stand-ins", len(chosen)) as advance:
        for ids in chosen:
            fit.add(ids, sizes[int(random.integers(len(sizes)))])
            advance()
    return fit.fit()


# --- reading documents with a model -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class DocumentReading:
    """The reading of one document by its model.

    `wanted_O`: each routed expert's mean probability over all of the document. `trunk`: the trunk's scores of some of
    its beginnings, each a prompt of `num_tokens`. `prefill_pools`: pools that prefills chose, each with the number
    of its prompt in `trunk`.
    """

    token_ids: tuple[int, ...]
    wanted_O: np.ndarray
    trunk: tuple[RoutingScores, ...]
    prefill_pools: tuple[tuple[int, ExpertPool], ...]


class StandInFit:
    """Computes the stand-ins for routed experts: adds up documents, then fits. Owned by the model's thread."""

    def __init__(self, paged: PagedModel) -> None:
        self._paged = paged
        self._probs_TR = torch.empty(0)  # of the layer whose experts come next
        self._num_tokens = 0
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # probs.T @ probs [R, R], probs.T @ added [R, D], float64

    def add(self, token_ids: Ids, size: PoolSize) -> None:
        """Runs a document under the pool of that size that it chooses for itself."""
        with recording(self._paged, self._keep_probabilities, self._sum_up):
            run_document(self._paged, token_ids, PoolPolicy(size=size))
        self._num_tokens += len(token_ids)

    def fit(self) -> StandIns:
        """Returns the vector of each routed expert, from all documents added so far."""
        fitted = {}
        for layer, (gram_RR, cross_RD) in self._sums.items():
            fitted[layer] = ridge_of_sums(gram_RR.numpy(), cross_RD.numpy(), self._num_tokens, PENALTY)
        return fitted

    def _keep_probabilities(self, _: int, probs_TR: Tensor, __: Tensor) -> None:
        self._probs_TR = probs_TR

    def _sum_up(self, layer: int, experts: Any, inputs: tuple[Tensor, ...], moe_TD: Tensor) -> None:
        hidden_TD, index_TK, weights_TK = inputs
        added_TD = moe_TD.float()
        num_shared = self._paged.facts.shared_per_layer[layer]
        if num_shared:  # last among a token's picks; called past the hook
            shared = slice(index_TK.shape[1] - num_shared, None)
            added_TD = added_TD - experts.forward(hidden_TD, index_TK[:, shared], weights_TK[:, shared]).float()
        probs_RT = self._probs_TR.double().T
        gram_RR, cross_RD = (probs_RT @ probs_RT.T).cpu(), (probs_RT @ added_TD.double()).cpu()
        if layer in self._sums:
            self._sums[layer][0].add_(gram_RR)
            self._sums[layer][1].add_(cross_RD)
        else:
            self._sums[layer] = (gram_RR, cross_RD)


class DocumentReader:
    """Runs documents through a model with all experts and through its trunk, and prompts of them under prefills' pools.

    Owned by one thread.
    """

    def __init__(self, paged: PagedModel, trunk: TrunkPredictor, *, seed: int) -> None:
        self._paged = paged
        self._trunk = trunk
        self._random = np.random.default_rng(seed)
        self._sizes = sizes_of_pools(paged.facts)

    def read(self, token_ids: Ids) -> DocumentReading | None:
        """Reads a document; None for one that is too short to learn from."""
        ids = tuple(token_ids)
        if len(ids) < MIN_TOKENS:
            return None
        lengths = prompt_lengths(len(ids))
        trunk = self._trunk.prefix_scores(ids[: lengths[-1]], lengths)
        prompts = [int(self._random.integers(len(lengths))) for _ in self._sizes]
        pools = [self._prefill_pool(ids[: lengths[n]], size) for n, size in zip(prompts, self._sizes, strict=True)]
        return DocumentReading(
            ids, np.concatenate(mean_probabilities(self._paged, [ids])), trunk, tuple(zip(prompts, pools, strict=True))
        )

    def _prefill_pool(self, ids: Ids, size: PoolSize) -> ExpertPool:
        pool = run_document(self._paged, ids, PoolPolicy(size=size)).pool
        assert pool is not None
        return pool


def prompt_lengths(num_tokens: int) -> list[int]:
    """Returns the lengths of the beginnings of a document that are read as prompts."""
    return [length for length in PROMPT_LENGTHS if 2 * length <= num_tokens]


def sizes_of_pools(facts: RoutingFacts) -> list[Share]:
    """Returns the sizes to learn from: those of POOL_SIZES that hold a token's picks."""
    top_k, experts = max(facts.top_k_per_layer), max(facts.experts_per_layer)
    return [size for size in POOL_SIZES if size.share * experts - 1 >= top_k] or [POOL_SIZES[-1]]


# --- the fit ----------------------------------------------------------------------------------------------------------


MAX_COLUMNS = 8192
MIN_PROMPTS = 2  # prompts in which a token must occur to become a column
MAX_SAMPLE = 4096  # rows among which typical points are sought
ROUNDS = 12


def common_tokens(prompts: Sequence[np.ndarray], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most widespread tokens and the weight of each, a rarer one's larger: `(columns [C], weights [C])`."""
    spread_V = np.zeros(vocabulary, np.int64)
    for ids in prompts:
        spread_V[np.unique(ids)] += 1
    order_V = np.argsort(-spread_V, kind="stable")[:MAX_COLUMNS]
    columns_C = order_V[spread_V[order_V] >= MIN_PROMPTS]
    weights_C = np.sqrt(np.maximum(np.log((len(prompts) + 1) / (spread_V[columns_C] + 0.5)), 0.05))
    return columns_C, weights_C.astype(np.float32)


def sublinear_counts(prompts: Sequence[np.ndarray], columns_C: np.ndarray, vocabulary: int) -> np.ndarray:
    """Returns prompts' token counts as log(1 + count), each vector of length 1 over all tokens of its prompt: [N,
    C].
    """
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
    """Returns the least-squares map [I, O], with `penalty` in units of the inputs' mean squared norm."""
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
    """Returns the map of `ridge` from `inputs.T @ inputs` and `inputs.T @ outputs`, for more rows than fit: [I, O]
    float32.
    """
    strength = max(penalty * float(np.trace(gram_II)) / num_rows, 1e-12)
    return np.asarray(np.linalg.solve(gram_II + strength * np.eye(len(gram_II)), cross_IO), np.float32)


def main_directions(rows_NO: np.ndarray, count: int) -> np.ndarray:
    """Returns the orthonormal main directions, largest first, as many as the rows distinguish, at most `count`: [O,
    Z].
    """
    values_O, vectors_OO = np.linalg.eigh(rows_NO.T @ rows_NO)
    count = max(1, min(count, int((values_O > 1e-6 * values_O[-1]).sum())))
    basis_OZ = vectors_OO[:, ::-1][:, :count]
    # A direction's sign is arbitrary; fixed here, so that it does not depend on the library.
    return np.asarray(basis_OZ * np.where(basis_OZ[np.abs(basis_OZ).argmax(0), np.arange(count)] < 0, -1, 1))


def typical_points(rows_NZ: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the centres of k-means over a sample of the rows: [M, Z]."""
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
JUDGED_SHARE = 8  # an eighth of the experts, in the pools by which passes are judged
FOLDS = 3


@dataclass(frozen=True, slots=True)
class FitOptions:
    """The numbers of features and typical points; ridge penalties in units of the inputs' mean squared norm.

    `codewords` None: as many as held-out documents call for.
    """

    lexical_features: int = 48
    lexical_points: int = 128
    fitted_features: int = 64
    fitted_points: int = 256
    lexical_penalty: float = 5.0
    penalty: float = 1.0
    codewords: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """The file, and how well its passes did on documents unknown to their maps, by source.

    `recall` of prefills' pools; `recall_error`, the mean absolute error of its estimates; `mass`, the share of a
    document's gate mass that a pool of an eighth of the experts holds, over that of the best such pool.
    """

    file: PredictorFile
    recall: dict[str, float]
    recall_error: dict[str, float]
    mass: dict[str, float]
    codebook: CodebookFit


def fit_router(
    readings: Sequence[DocumentReading],
    vocabulary: int,
    routed_per_layer: tuple[int, ...],
    fingerprint: str,
    *,
    stand_ins: Mapping[int, np.ndarray] | None = None,
    options: FitOptions | None = None,
) -> Fit:
    """Fits the file. The readings should be in random order, since folds of them take turns. Raises InvalidRequest.

    `stand_ins` are those of the trunk that made the readings; the file includes them.
    """
    _check_documents(len(readings))
    return _Fitter(readings, vocabulary, options or FitOptions()).fit(routed_per_layer, fingerprint, stand_ins or {})


def _check_documents(num_documents: int) -> None:
    if num_documents < MIN_DOCUMENTS:
        raise InvalidRequest(f"a fit needs at least {MIN_DOCUMENTS} documents; {num_documents} were given")


@dataclass(frozen=True, slots=True, eq=False)
class _Lexical:
    """The lexical pass: its tensors, the prompts' features, and outputs of Stages to which the document was unknown."""

    weights: dict[str, np.ndarray]
    features_NZ: np.ndarray
    unseen_NO: np.ndarray


class _Fitter:
    def __init__(self, readings: Sequence[DocumentReading], vocabulary: int, options: FitOptions) -> None:
        prompts = [(number, reading, trunk) for number, reading in enumerate(readings) for trunk in reading.trunk]
        self._options = options
        self._readings = readings
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
        self._document_N = np.array([number for number, _, _ in prompts])
        self._wanted_DO = np.stack([reading.wanted_O for reading in readings])

    def lexical(self) -> _Lexical:
        """Fits the pass over token counts."""
        options = self._options
        columns_C, idf_C = common_tokens(self._tokens, self._vocabulary)
        counts_NC = sublinear_counts(self._tokens, columns_C, self._vocabulary) * idf_C
        down_CZ, features_NZ = self._features(counts_NC, options.lexical_features, options.lexical_penalty)
        tokens_VZ = np.zeros((self._vocabulary, down_CZ.shape[1]), np.float32)
        tokens_VZ[columns_C] = idf_C[:, None] * down_CZ
        stage, unseen_NO = self._stage(features_NZ, options.lexical_points)
        return _Lexical({"lexical.tokens": tokens_VZ} | _tensors("lexical", stage), features_NZ, unseen_NO)

    def codebook(self, routed_per_layer: tuple[int, ...], scored_NO: np.ndarray) -> CodebookFit:
        """Fits the codebook for prompts that are scored so."""
        options = self._options
        scored_NO = np.maximum(scored_NO, FLOOR)
        trunk_NO = np.stack([np.concatenate(trunk.mean_LR) for trunk in self._trunk])
        length_N = np.array([len(ids) for ids in self._tokens])
        prompts = (scored_NO, trunk_NO, self._document_N, length_N)
        fitter = CodebookFitter(self._wanted_DO, *prompts, routed_per_layer, self._scores_after, options.seed)
        return fitter.fit(options.codewords)

    def _scores_after(self, of_D: np.ndarray) -> np.ndarray:
        """Returns the prompts' scores by a lexical pass that was fitted to some of the documents alone: [N, O]."""
        fitter = _Fitter([self._readings[number] for number in of_D], self._vocabulary, self._options)
        file = PredictorFile("", (), fitter.lexical().weights, {})
        predictor, stage = LexicalPredictor(file), file.stage("lexical")
        return np.asarray(
            np.maximum(stage.outputs(np.stack([predictor.features(ids.tolist()) for ids in self._tokens])), FLOOR)
        )

    def fit(self, routed_per_layer: tuple[int, ...], fingerprint: str, stand_ins: Mapping[int, np.ndarray]) -> Fit:
        options = self._options
        lexical = self.lexical()
        lexical_NZ = lexical.features_NZ

        trunk_NO = np.stack([np.concatenate(trunk.mean_LR) for trunk in self._trunk]).astype(np.float32)
        trunk_mean_O = trunk_NO.mean(0)
        trunk_NO -= trunk_mean_O
        # both sources have equal weight
        balance = np.sqrt((trunk_NO**2).sum() / max(float((lexical_NZ**2).sum()), 1e-12))
        inputs_NI = np.concatenate([lexical_NZ * balance, trunk_NO], 1)
        down_IZ, fitted_NZ = self._features(inputs_NI, options.fitted_features, options.penalty)
        down_IZ[: lexical_NZ.shape[1]] *= balance
        fitted, unseen_fitted_NO = self._stage(fitted_NZ, options.fitted_points)

        codebook = self.codebook(routed_per_layer, lexical.unseen_NO)
        weights = lexical.weights | {"fitted.trunk_mean": trunk_mean_O, "fitted.down": down_IZ}
        weights |= _tensors("fitted", fitted) | codebook.weights
        weights |= {f"{STAND_IN}{layer}": vectors_RD for layer, vectors_RD in stand_ins.items()}
        facts = {"documents": str(self._num_documents), "prompts": str(len(self._trunk))}
        facts |= {name: str(value) for name, value in asdict(options).items()}
        facts |= {"codebook_documents": facts["documents"], "codewords": str(codebook.num_codewords)}
        file = PredictorFile(fingerprint, routed_per_layer, weights, facts)
        return self._judge(file, {"lexical": lexical.unseen_NO, "fitted": unseen_fitted_NO}, codebook)

    def _features(self, inputs_NI: np.ndarray, count: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns what ridge regression keeps of the inputs, each prompt's as if unseen: `(down [I, Z], features [N,
        Z])`.
        """
        wanted_NO = self._wanted_NO - self._mean_O
        map_IO = ridge(inputs_NI, wanted_NO, penalty)
        basis_OZ = main_directions(inputs_NI @ map_IO, count)
        features_NZ = np.empty((len(inputs_NI), basis_OZ.shape[1]), np.float32)
        for seen_N in self._turns():
            map_of_seen_IZ = ridge(inputs_NI[seen_N], wanted_NO[seen_N], penalty) @ basis_OZ
            features_NZ[~seen_N] = inputs_NI[~seen_N] @ map_of_seen_IZ
        scale = max(float(features_NZ.std()), 1e-12)  # scaled to about 1, where half precision is most accurate
        return (map_IO @ basis_OZ / scale).astype(np.float32), features_NZ / np.float32(scale)

    def _stage(self, features_NZ: np.ndarray, points: int) -> tuple[Stage, np.ndarray]:
        """Returns the Stage of all prompts, and the outputs [N, O] of Stages to which the prompt's document was
        unknown.
        """
        keys, offsets = self._nearness(features_NZ, points)
        unseen_NO = np.empty_like(self._wanted_NO)
        for seen_N in self._turns():
            unseen_NO[~seen_N] = self._head(keys, offsets, features_NZ, seen_N).outputs(features_NZ[~seen_N])
        return self._head(keys, offsets, features_NZ, np.ones(len(features_NZ), bool)), unseen_NO

    def _nearness(self, features_NZ: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits that fall with the squared distance from typical points, in units of the usual one to the
        nearest.
        """
        points_MZ = typical_points(features_NZ, min(points, self._num_documents // 4), self._options.seed)
        squares_M = (points_MZ**2).sum(1)
        distance_N = (features_NZ**2).sum(1) + (squares_M - 2 * features_NZ @ points_MZ.T).min(1)
        unit = max(float(np.median(distance_N)), 1e-6)
        return (2 * points_MZ.T / unit).astype(np.float32), (-squares_M / unit).astype(np.float32)

    def _head(self, keys: np.ndarray, offsets: np.ndarray, features_NZ: np.ndarray, seen_N: np.ndarray) -> Stage:
        blank = np.zeros((len(offsets) + features_NZ.shape[1], 0), np.float32)
        inner_NI = Stage(keys, offsets, blank, self._mean_O).inner(features_NZ[seen_N])
        halves = np.split(inner_NI, [len(offsets)], 1)
        # so that both have equal weight
        scales = [max(float(np.sqrt((half**2).sum(1).mean())), 1e-6) for half in halves]
        scale_I = np.repeat(np.array(scales, np.float32), [half.shape[1] for half in halves])
        head_IO = ridge(inner_NI / scale_I, self._wanted_NO[seen_N] - self._mean_O, self._options.penalty)
        return Stage(keys, offsets, (head_IO / scale_I[:, None]).astype(np.float32), self._mean_O)

    def _turns(self) -> list[np.ndarray]:
        """Returns the prompts of other documents, for each fold."""
        return [self._fold_N != fold for fold in range(FOLDS)]

    def _judge(self, file: PredictorFile, unseen: dict[str, np.ndarray], codebook: CodebookFit) -> Fit:
        """Fits the estimates of recall, and measures the passes."""
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
        return Fit(made, recall, error, mass, codebook)

    def _estimate(self, scores_N: Sequence[RoutingScores]) -> tuple[np.ndarray, float, float]:
        """Fits an estimate: `(weights [F], mean recall, mean absolute error)`, the error of folds that take turns."""
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


def _tensors(name: str, stage: Stage) -> dict[str, np.ndarray]:
    return {f"{name}.{part}": getattr(stage, part) for part in ("keys", "offsets", "head", "mean")}
