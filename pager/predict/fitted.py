"""Predictors fitted in closed form and kept beside a checkpoint: `router.safetensors`, and the codebook in it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pager.errors import CheckpointError, ConfigError, InvalidRequest
from pager.pools.pick import largest_counts, pick_layer, pick_pool, share_out
from pager.reading import one_line, parse_json
from pager.types import Count, ExpertPool, PoolSize, RoutingFacts, RoutingScores, Share

PENALTIES = (0.1, 1.0, 10.0)
"""Of the regression, in observations: with few of them only the larger keep the estimate near their mean."""


def recall_features(scores: RoutingScores, pool: ExpertPool) -> np.ndarray:
    """Returns [F] features, all of about 1: the length of the prompt, the size of the pool, how clear the scores' cut
    is in every layer, and the scores themselves, because some kinds of text are told more easily than others. Scores
    that look ahead are also held against those of the prompt, which are nearer to what its prefill will choose.
    """
    layers = list(zip(scores.mean_LR, pool.experts, strict=True))
    by_layer_L4 = np.array([_layer_features(*layer) for layer in layers])
    share, mass, cut, _ = by_layer_L4[[len(mean_R) > 0 for mean_R, _ in layers]].mean(0)
    length, size = math.log(max(scores.num_tokens, 1)) / 4, 1 + math.log(max(share, FLOOR)) / 2
    plain = np.array([1.0, length, size, mass, cut])
    uneven = np.concatenate([mean_R * len(mean_R) - 1 for mean_R, _ in layers])
    detail = np.concatenate([by_layer_L4[:, 1:].ravel(), uneven / math.sqrt(len(uneven))])
    parts = [np.outer(plain, plain)[np.triu_indices(len(plain))], detail, size * detail, length * detail]
    if scores.of_prompt is not None:
        parts.append(5 * _overlap(pool, pool_like(scores.of_prompt, pool)))
    return np.concatenate(parts)


def num_features(routed_per_layer: Sequence[int], looks_ahead: bool) -> int:
    """Returns F, the number of features of `recall_features`."""
    num_layers = len(routed_per_layer)
    return 15 + 3 * (3 * num_layers + sum(routed_per_layer)) + (1 + num_layers if looks_ahead else 0)


def fit_recall(features_NF: np.ndarray, recall_N: np.ndarray, penalty: float) -> np.ndarray:
    """Fits [F] weights by ridge regression of what differs from the mean."""
    mean = float(recall_N.mean())
    gram_FF = features_NF.T @ features_NF + penalty * np.eye(features_NF.shape[1])
    weights_F = np.asarray(np.linalg.solve(gram_FF, features_NF.T @ (recall_N - mean)))
    weights_F[0] += mean  # the first feature is 1
    return weights_F


def pool_like(scores: RoutingScores, pool: ExpertPool) -> ExpertPool:
    """Returns the pool that the scores pick, with the sizes of `pool`."""
    layers = zip(scores.mean_LR, pool.experts, strict=True)
    return ExpertPool(tuple(pick_layer(mean_R, Count(len(experts)), len(experts), 0) for mean_R, experts in layers))


def expected_recall(weights_F: np.ndarray, scores: RoutingScores, pool: ExpertPool) -> float:
    return float(np.clip(recall_features(scores, pool) @ weights_F, 0.0, 1.0))


def _layer_features(mean_R: np.ndarray, experts: Sequence[int]) -> tuple[float, float, float, float]:
    """Returns the share of experts, the share of mass, the factor by which scores fall at the cut, and their
    unevenness.
    """
    count, routed = len(experts), len(mean_R)
    if not routed:
        return 0.0, 0.0, 0.0, 0.0
    order_R = np.maximum(np.sort(mean_R)[::-1], FLOOR)
    high, low = order_R[count // 2], order_R[min(routed - 1, count + count // 2)]
    spread = math.log(routed) + float((order_R * np.log(order_R)).sum())
    return count / routed, float(mean_R[list(experts)].sum()), math.log(high / low), spread


def _overlap(pool: ExpertPool, other: ExpertPool) -> np.ndarray:
    """Returns [1 + L]: the share of `pool` that is in `other`, in all and by layer."""
    shares = [
        len(set(ours) & set(theirs)) / max(len(ours), 1)
        for ours, theirs in zip(pool.experts, other.experts, strict=True)
    ]
    return np.array([pool.recall_of(other), *shares])


PREDICTOR_NAME = "router.safetensors"
FORMAT = "expert-pager-router-2"
AGAIN = "make it with `expert-pager fit-router`"
FLOOR = 1e-6  # of a probability: every expert keeps a place in the order
PASSES = ("lexical", "fitted")
STAND_IN = "stand_in."
RECALL = "recall."
MEANS, LENGTHS, THRESHOLDS = "codebook.means", "codebook.lengths", "codebook.thresholds"


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A fitted map from features to outputs: linear in the features and in their nearness (a softmax) to typical
    points.

    `keys` [Z, M] and `offsets` [M] make the logits of nearness, `head` [M + Z, O] and `mean` [O] the outputs.
    """

    keys: np.ndarray
    offsets: np.ndarray
    head: np.ndarray
    mean: np.ndarray

    def outputs(self, features_Z: np.ndarray) -> np.ndarray:
        """Maps features [..., Z] to outputs [..., O]."""
        return np.asarray(self.mean + self.inner(features_Z) @ self.head)

    def inner(self, features_Z: np.ndarray) -> np.ndarray:
        """Returns [..., M + Z]: nearness to the typical points, then the features."""
        logits_M = features_Z @ self.keys + self.offsets
        near_M = np.exp(logits_M - logits_M.max(-1, keepdims=True))
        return np.concatenate([near_M / near_M.sum(-1, keepdims=True), features_Z], -1)


@dataclass(frozen=True, slots=True, eq=False)
class PredictorFile:
    """The fitted maps of one model, as kept in `router.safetensors`. Immutable, thread-safe.

    `routed_per_layer` says how O is cut into layers. `weights` are the tensors by name, in float32: `lexical.tokens`
    [V, Z]; `fitted.trunk_mean` [O] and `fitted.down` [Z + O, Z']; the Stage of either pass; `recall.SOURCE` of every
    source whose recall can be estimated; `stand_in.LAYER` [R, D], what the trunk has in place of a layer's experts;
    `codebook.means` [C, O], `codebook.lengths` [P] and `codebook.thresholds` [2, P] where there is a codebook.
    """

    fingerprint: str
    routed_per_layer: tuple[int, ...]
    weights: Mapping[str, np.ndarray]
    facts: Mapping[str, str]  # how it was fitted, for people

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None) -> PredictorFile:
        """Reads the file; `path` may be the model's folder. Without a fingerprint, the model is left to be checked.

        Raises CheckpointError if missing, damaged or another model's.
        """
        file = path / PREDICTOR_NAME if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"there is no {file}; {AGAIN}")
        try:
            with safe_open(file, framework="numpy") as stored:
                header = (stored.metadata() or {}).get(FORMAT)
                weights = {name: stored.get_tensor(name).astype(np.float32) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:  # a dtype that numpy lacks
            raise CheckpointError(f"{file} cannot be read ({one_line(error)}); {AGAIN}") from error
        if header is None:
            raise CheckpointError(f"{file} is not a file of fitted predictors in the format {FORMAT}; {AGAIN}")
        try:
            facts = parse_json(header)
            found, routed = str(facts["fingerprint"]), tuple(int(count) for count in facts["routed_per_layer"])
            made = cls(found, routed, _checked(weights, routed), facts["facts"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); {AGAIN}") from error
        if fingerprint is not None:
            made.check_model(fingerprint, file)
        return made

    def check_model(self, fingerprint: str, file: Path) -> None:
        """Checks that the maps in `file` were fitted to the model of this fingerprint. Raises CheckpointError."""
        if self.fingerprint != fingerprint:
            raise CheckpointError(
                f"{file} was fitted to the model {self.fingerprint} and this one is {fingerprint}; {AGAIN}"
            )

    def save(self, path: Path) -> int:
        """Writes the file whole or not at all and returns its size in bytes.

        Raises ConfigError where it cannot be written.
        """
        header = {"fingerprint": self.fingerprint, "routed_per_layer": self.routed_per_layer, "facts": dict(self.facts)}
        tensors = {name: _stored(weight) for name, weight in self.weights.items()}
        partial = path.with_name(f"{path.name}.partial")
        try:
            # One entry: safetensors writes several in any order, and the same fit should be the same bytes.
            save_file(tensors, partial, metadata={FORMAT: json.dumps(header, sort_keys=True)})
            partial.replace(path)
            return path.stat().st_size
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ConfigError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error

    def stage(self, name: str) -> Stage:
        return Stage(*(self.weights[f"{name}.{part}"] for part in ("keys", "offsets", "head", "mean")))

    @property
    def has_codebook(self) -> bool:
        return MEANS in self.weights

    @property
    def stand_ins(self) -> dict[int, np.ndarray]:
        """Returns the stand-ins [R, D] by layer; none in a file fitted to scores of the bare trunk."""
        layers = range(len(self.routed_per_layer))
        return {layer: self.weights[name] for layer in layers if (name := f"{STAND_IN}{layer}") in self.weights}

    def as_scores(
        self, outputs_O: np.ndarray, source: str, num_tokens: int, of_prompt: RoutingScores | None = None
    ) -> RoutingScores:
        """Turns outputs, which are probabilities up to an error, into probabilities by layer."""
        positive_O = np.maximum(outputs_O, FLOOR).astype(np.float64)
        ends = np.cumsum(self.routed_per_layer)
        layers = (positive_O[end - count : end] for end, count in zip(ends, self.routed_per_layer, strict=True))
        mean_LR = tuple(layer_R / max(layer_R.sum(), FLOOR) for layer_R in layers)
        return RoutingScores(mean_LR, source, num_tokens, of_prompt)

    def expected_recall(self, scores: RoutingScores, pool: ExpertPool) -> float:
        """Estimates the share of the prefill's pool of `pool`'s sizes that `pool`, picked by `scores`, is expected to
        hold.

        Raises InvalidRequest for scores from a source that the file knows nothing of.
        """
        if scores.source == "prefill":
            return 1.0
        weights_F = self.weights.get(f"{RECALL}{scores.source}")
        if weights_F is None:
            known = ", ".join(sorted(name.removeprefix(RECALL) for name in self.weights if name.startswith(RECALL)))
            raise InvalidRequest(f"no recall is known of {scores.source!r} scores; known are {known}")
        return expected_recall(weights_F, scores, pool)


class LexicalPredictor:
    """Scores a prompt from its token counts alone. Thread-safe."""

    def __init__(self, file: PredictorFile) -> None:
        self.file = file
        self._tokens_VZ = file.weights["lexical.tokens"]
        self._stage = file.stage("lexical")

    def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        """Scores a prompt. Raises InvalidRequest for an empty one and for token ids outside the vocabulary."""
        return self.file.as_scores(self._stage.outputs(self.features(token_ids)), "lexical", len(token_ids))

    def features(self, token_ids: Sequence[int]) -> np.ndarray:
        """Returns features [Z], from sublinear counts of unit length. Raises as `scores` does."""
        ids, counts = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
        vocabulary = len(self._tokens_VZ)
        if not len(ids) or ids[0] < 0 or ids[-1] >= vocabulary:
            bad = "it is empty" if not len(ids) else f"token id {ids[0] if ids[0] < 0 else ids[-1]} is unknown"
            raise InvalidRequest(f"the prompt cannot be scored: {bad} (vocabulary of {vocabulary})", field="prompt")
        weights = np.log1p(counts).astype(np.float32)
        features_Z: np.ndarray = (weights @ self._tokens_VZ[ids]) / np.float32(math.sqrt(weights @ weights))
        return features_Z


class CombinedMap:
    """The fitted pass behind its two sources: lexical features and trunk scores together. Thread-safe."""

    def __init__(self, file: PredictorFile) -> None:
        self.file = file
        self._trunk_mean_O = file.weights["fitted.trunk_mean"]
        self._down_IZ = file.weights["fitted.down"]
        self._stage = file.stage("fitted")

    def scores(self, features_Z: np.ndarray, trunk: RoutingScores) -> RoutingScores:
        trunk_O = np.concatenate(trunk.mean_LR).astype(np.float32) - self._trunk_mean_O
        inputs_I = np.concatenate([features_Z, trunk_O])
        return self.file.as_scores(self._stage.outputs(inputs_I @ self._down_IZ), "fitted", trunk.num_tokens, trunk)


class TrunkScorer(Protocol):
    """The pass that runs the model's trunk: a `TrunkPredictor`, wherever it runs."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def has_stand_ins(self) -> bool: ...
    def scores(self, token_ids: Sequence[int], /) -> RoutingScores: ...


class FittedPredictor:
    """Scores prompts with a model's trunk and its `router.safetensors`. As the trunk, not thread-safe."""

    def __init__(self, file: PredictorFile, trunk: TrunkScorer) -> None:
        """Combines file and trunk. Raises CheckpointError unless both are of the same model."""
        if file.fingerprint != trunk.fingerprint:
            raise CheckpointError(
                f"the predictor was fitted to the model {file.fingerprint} and the trunk is of {trunk.fingerprint}; "
                "fit it again with `expert-pager fit-router`"
            )
        if bool(file.stand_ins) != trunk.has_stand_ins:
            raise CheckpointError(
                "the trunk must be loaded with the stand-ins of its predictor file, and only with those"
            )
        self.file = file
        self.trunk = trunk
        self._lexical = LexicalPredictor(file)
        self._map = CombinedMap(file)

    def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        """Scores a prompt. Raises InvalidRequest for an empty one and for token ids outside the vocabulary."""
        return self._map.scores(self._lexical.features(token_ids), self.trunk.scores(token_ids))


def _checked(weights: Mapping[str, np.ndarray], routed_per_layer: Sequence[int]) -> Mapping[str, np.ndarray]:
    """Returns the tensors. Raises ValueError, KeyError or IndexError unless all are there, finite, and fit together."""
    num_outputs = sum(routed_per_layer)
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise ValueError(f"{name} is not finite")
    num_lexical = weights["lexical.tokens"].shape[1]
    inputs_of = {"lexical": num_lexical, "fitted": weights["fitted.down"].shape[1]}
    shapes: dict[str, tuple[int, ...]] = {"fitted.down": (num_lexical + num_outputs, inputs_of["fitted"])}
    shapes["fitted.trunk_mean"] = (num_outputs,)
    for name in PASSES:
        points = len(weights[f"{name}.offsets"])
        shapes[f"{name}.keys"] = (inputs_of[name], points)
        shapes[f"{name}.head"] = (points + inputs_of[name], num_outputs)
        shapes[f"{name}.mean"] = (num_outputs,)
    for name in weights:
        if name.startswith(RECALL):
            shapes[name] = (num_features(routed_per_layer, name == f"{RECALL}fitted"),)
    if any(name.startswith(STAND_IN) for name in weights):
        sparse = [layer for layer, routed in enumerate(routed_per_layer) if routed]
        hidden = weights[f"{STAND_IN}{sparse[0]}"].shape[1]
        shapes |= {f"{STAND_IN}{layer}": (routed_per_layer[layer], hidden) for layer in sparse}
    if MEANS in weights:
        shapes[MEANS] = (max(1, len(weights[MEANS])), num_outputs)
        shapes[LENGTHS] = (max(1, len(weights[LENGTHS])),)
        shapes[THRESHOLDS] = (2, *shapes[LENGTHS])
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} is {weights[name].shape}, not {shape}")
    return weights


def _stored(weight: np.ndarray) -> np.ndarray:
    """Returns the weight as it is stored: large ones in half precision."""
    return np.ascontiguousarray(weight, dtype=np.float16 if weight.ndim == 2 else np.float32)


# --- the codebook -----------------------------------------------------------------------------------------------------
#
# A codebook: a few pools that requests share, each picked for a cluster of documents. Numpy alone.
#
# Legend: C codewords, O routed experts of all layers side by side, K those in a pool, P prompt lengths, X rows.


COVERAGE_SHARE = 1 / 16  # of the experts, in the pools that tell whether a prompt is covered: the smallest tell it best
LAYER_POWER = 0.5  # how far a share of all experts is shared out over the layers by what they need: half way
MAX_SIZES = 32  # whose pools are kept; sizes are the callers' choice


@dataclass(frozen=True, slots=True, eq=False)
class Codeword:
    """The codeword that suits a prompt best at one size, and the pool that the prompt gets.

    `coverage` is the mass of what was seen of the prompt that a small pool of the codeword holds, over what a pool of
    that size picked for the prompt alone holds: low for a prompt unlike anything that was fitted to. `pool` is the
    codeword's where the coverage is at least `threshold`, else one between the codeword's and what the trunk saw of the
    prompt, `seen_O`; None where no trunk looked, and the prefill should choose.
    """

    name: str
    pool: ExpertPool | None
    coverage: float
    threshold: float
    seen_O: np.ndarray | None = None
    is_learned: bool = False  # from traffic, not from the documents that were fitted to

    @property
    def is_covered(self) -> bool:
        return self.coverage >= self.threshold


@dataclass(frozen=True, slots=True, eq=False)
class _Pools:
    """The pools of all codewords at one size. `inside_CO` is 1 where a pool has an expert."""

    pools: tuple[ExpertPool, ...]
    inside_CO: np.ndarray


class Codebook:
    """The codewords of one model: those fitted to documents, then those learned from traffic.

    Immutable but for the pools of the sizes asked for last, which it keeps; owned by one thread.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], facts: RoutingFacts) -> None:
        """`weights` are those of a predictor file that has a codebook."""
        self._facts = facts
        self._means_CO = weights[MEANS].astype(np.float64)
        # By the scores alone and by the trunk's, [2, P]: the fewer tokens were seen, the less their scores agree.
        self._thresholds_2P, self._log_lengths_P = weights[THRESHOLDS], np.log(weights[LENGTHS])
        self._covering_CO = inside_share(self._means_CO, COVERAGE_SHARE, facts.routed_per_layer)
        self._sizes: dict[PoolSize, _Pools] = {}  # replaced as a whole: another thread may read it
        self.names = codeword_names(weights[MEANS])
        self.num_fitted = len(self.names)

    @classmethod
    def of(cls, file: PredictorFile, facts: RoutingFacts) -> Codebook | None:
        """The codebook of a file; None where the file was fitted without one."""
        return cls(file.weights, facts) if file.has_codebook else None

    def with_learned(self, names: Sequence[str], means: Sequence[np.ndarray]) -> Codebook:
        """The fitted codewords with learned ones of these means [O], and pools of all sizes that this codebook has.

        May be called in another thread than the owner's.
        """
        made = copy(self)
        made.names = (*self.names[: self.num_fitted], *names)
        made._means_CO = np.stack([*self._means_CO[: self.num_fitted], *means])
        made._covering_CO = inside_share(made._means_CO, COVERAGE_SHARE, self._facts.routed_per_layer)
        made._sizes = {
            size: made._make(size, of_size.pools[: self.num_fitted]) for size, of_size in self._sizes.items()
        }
        return made

    def assign(self, scores: RoutingScores, size: PoolSize, trunk: RoutingScores | None = None) -> Codeword:
        """The codeword whose pool of `size` holds the most mass of the lexical scores and the trunk's together.

        Whether it covers the prompt is judged by the trunk's scores where there are any: a map that was fitted to
        documents makes whatever it is asked into something like them, and the trunk does not agree with it then. For
        the same reason the trunk alone finds a learned codeword, which is taken where it covers more.
        Raises PoolTooSmall.
        """
        lexical_O = np.concatenate(scores.mean_LR)
        seen_O = lexical_O if trunk is None else np.concatenate(trunk.mean_LR)
        inside_CO, num = self._of_size(size).inside_CO, self.num_fitted
        nearest = [int((inside_CO[:num] @ (lexical_O + seen_O)).argmax())]
        if trunk is not None and len(self.names) > num:
            nearest.append(num + int((inside_CO[num:] @ seen_O).argmax()))
        best, coverage = max(zip(nearest, self._coverages(nearest, seen_O), strict=True), key=itemgetter(1))
        threshold = self._threshold(scores.num_tokens, trunk is not None)
        pool: ExpertPool | None = self._of_size(size).pools[best]
        if coverage < threshold:
            own_O = own_scores(coverage, lexical_O, seen_O, self._means_CO[best])
            pool = None if trunk is None else self._pick(own_O, size)
        seen = None if trunk is None else seen_O
        return Codeword(self.names[best], pool, coverage, threshold, seen, best >= num)

    def best_coverage(self, seen_O: np.ndarray) -> float:
        """The coverage of the codeword that covers most of what was seen of a prompt."""
        return self._coverages([int((self._covering_CO @ seen_O).argmax())], seen_O)[0]

    def pool(self, name: str, size: PoolSize) -> ExpertPool:
        """The pool of a codeword. Smaller pools of a codeword lie inside its larger ones. Raises InvalidRequest."""
        if name not in self.names:
            raise InvalidRequest(f"{name[:60]!r} is not a codeword of this model; GetModel lists them")
        return self._of_size(size).pools[self.names.index(name)]

    def name_of(self, pool: ExpertPool, size: PoolSize) -> str:
        """Returns the name of the codeword whose pool of a size asked for before this is; empty for any other pool."""
        found = self._sizes.get(size)
        pools = () if found is None else found.pools
        return next((name for name, each in zip(self.names, pools, strict=False) if each == pool), "")

    def _coverages(self, codewords: Sequence[int], seen_O: np.ndarray) -> list[float]:
        own_O = inside_share(seen_O[None], COVERAGE_SHARE, self._facts.routed_per_layer)[0]
        most = max(own_O @ seen_O, 1e-300)
        return [min(1.0, float(self._covering_CO[codeword] @ seen_O / most)) for codeword in codewords]

    def _threshold(self, num_tokens: int, by_trunk: bool) -> float:
        return float(np.interp(np.log(max(num_tokens, 1)), self._log_lengths_P, self._thresholds_2P[int(by_trunk)]))

    def _of_size(self, size: PoolSize) -> _Pools:
        found = self._sizes.pop(size, None) or self._make(size)
        self._sizes[size] = found  # the one asked for last is the last
        if len(self._sizes) > MAX_SIZES:
            del self._sizes[next(iter(self._sizes))]
        return found

    def _make(self, size: PoolSize, known: Sequence[ExpertPool] = ()) -> _Pools:
        """The pools of one size, of which the first are known."""
        pools = (*known, *(self._pick(mean_O, size) for mean_O in self._means_CO[len(known) :]))
        return _Pools(pools, np.stack([_inside(pool, self._facts.routed_per_layer) for pool in pools]))

    def _pick(self, scores_O: np.ndarray, size: PoolSize) -> ExpertPool:
        """The pool of these scores; a share of all experts is shared out over the layers half way to what they need."""
        ends = np.cumsum(self._facts.routed_per_layer)[:-1]
        scores = RoutingScores(tuple(np.split(scores_O, ends)), "codebook", 1)
        if isinstance(size, Share):
            size = share_out(scores, sum(largest_counts(size, self._facts)), self._facts, LAYER_POWER)
        return pick_pool(scores, size, self._facts)


def own_scores(
    coverage: float | np.ndarray, lexical_O: np.ndarray, seen_O: np.ndarray, mean_O: np.ndarray
) -> np.ndarray:
    """Returns what a prompt that a codeword does not cover is expected to want: [O], or [N, O] with `coverage` [N, 1].

    The less the codeword covers, the more counts what the trunk saw of the prompt itself; the more, the rest: half
    the lexical scores, half the codeword, of which the prompt's own pool then shares a core.
    """
    trust = coverage**2
    return np.asarray((1 - trust) * seen_O + trust / 2 * (lexical_O + mean_O))


def wanted_by(pool: ExpertPool, routed_per_layer: Sequence[int]) -> np.ndarray:
    """Returns what a prompt wants whose prefill chose this pool: [O], each of a layer's experts alike."""
    inside_O = _inside(pool, routed_per_layer)
    counts_O = np.repeat([max(len(layer), 1) for layer in pool.experts], routed_per_layer)
    return np.asarray(inside_O / counts_O)


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
