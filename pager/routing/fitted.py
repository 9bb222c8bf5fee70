"""`router.safetensors`: maps fitted beside a checkpoint, from token counts (and trunk scores) to a document's experts.

Numpy only: the lexical pass runs without torch. Fitting is in `pager.routing.fit` and `pager.engine.fitting`.
Legend: V vocabulary, Z latent features, L layers, R routed experts of a layer, O outputs (R of every layer in a row).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pager.errors import CheckpointError, ConfigError, InvalidRequest
from pager.types import ExpertPool, RoutingScores

ROUTER_NAME = "router.safetensors"
FORMAT = "expert-pager-router-1"
FLOOR = 1e-6  # of a probability: logarithms stay finite, and every expert keeps a place in the order
TENSORS = ("lexical.tokens", "lexical.head", "lexical.mean", "fitted.down", "fitted.up", "fitted.trunk_mean")


@dataclass(frozen=True, slots=True, eq=False)
class RouterFile:
    """The fitted maps of one model. Immutable, thread-safe.

    `routed_per_layer` says how O is cut into layers. `weights` are the tensors by name, in float32.
    """

    fingerprint: str
    routed_per_layer: tuple[int, ...]
    weights: Mapping[str, np.ndarray]
    facts: Mapping[str, str]  # how it was fitted, for people

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> RouterFile:
        """`path` is the file or the model's folder. Raises CheckpointError: missing, damaged, or another model's."""
        file = path / ROUTER_NAME if path.is_dir() else path
        again = "make it with `expert-pager fit-router`"
        if not file.is_file():
            raise CheckpointError(f"there is no {file}; {again}")
        try:
            with safe_open(file, framework="numpy") as stored:
                header = (stored.metadata() or {}).get(FORMAT)
                weights = {name: stored.get_tensor(name).astype(np.float32) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} can not be read ({error}); {again}") from error
        if header is None:
            raise CheckpointError(f"{file} is not a fitted router in the format {FORMAT}; {again}")
        try:
            facts = json.loads(header)
            found, routed = facts["fingerprint"], tuple(int(count) for count in facts["routed_per_layer"])
            made = cls(str(found), routed, _checked(weights, sum(routed)), facts["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); {again}") from error
        if found != fingerprint:
            raise CheckpointError(f"{file} was fitted to the model {found} and this one is {fingerprint}; {again}")
        return made

    def save(self, path: Path) -> int:
        """Writes the file whole or not at all; returns its bytes. Raises ConfigError where it can not be written."""
        header = {"fingerprint": self.fingerprint, "routed_per_layer": self.routed_per_layer, "facts": dict(self.facts)}
        tensors = {name: _stored(name, weight) for name, weight in self.weights.items()}
        partial = path.with_name(f"{path.name}.partial")
        try:
            # One entry: safetensors writes several in any order, and the same fit should be the same bytes.
            save_file(tensors, partial, metadata={FORMAT: json.dumps(header, sort_keys=True)})
            partial.replace(path)
            return path.stat().st_size
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error

    def as_scores(self, logits_O: np.ndarray, source: str, num_tokens: int) -> RoutingScores:
        """Probabilities, layer by layer, from outputs that are probabilities up to an error."""
        layers, start = [], 0
        for count in self.routed_per_layer:
            layer_R = np.maximum(logits_O[start : start + count], FLOOR).astype(np.float64)
            layers.append(layer_R / layer_R.sum() if count else layer_R)
            start += count
        return RoutingScores(tuple(layers), source, num_tokens)

    def expected_recall(self, scores: RoutingScores, pool: ExpertPool) -> float:
        """The share of the fused pool of `pool`'s sizes that `pool`, picked by `scores`, is expected to hold.

        Raises InvalidRequest for scores from a source that the file knows nothing of.
        """
        weights = self.weights.get(f"recall.{scores.source}")
        if scores.source in ("prefill", "fused"):
            return 1.0
        if weights is None:
            known = ", ".join(sorted(name.removeprefix("recall.") for name in self.weights if "recall." in name))
            raise InvalidRequest(f"no recall is known of {scores.source!r} scores; known are {known}")
        return float(np.clip(recall_features(scores, pool) @ weights, 0.0, 1.0))


class LexicalRouter:
    """Scores a prompt from its token counts alone: tokens → Z features, normed, → O. Thread-safe."""

    def __init__(self, file: RouterFile) -> None:
        self.file = file
        self._tokens_VZ = file.weights["lexical.tokens"]
        self._head_ZO = file.weights["lexical.head"]
        self._mean_O = file.weights["lexical.mean"]

    def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        """Raises InvalidRequest for an empty prompt and for token ids that the vocabulary does not have."""
        features_Z = self.features(token_ids)
        return self.file.as_scores(self._mean_O + features_Z @ self._head_ZO, "lexical", len(token_ids))

    def features(self, token_ids: Sequence[int]) -> np.ndarray:
        ids, counts = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
        vocabulary = len(self._tokens_VZ)
        if not len(ids) or ids[0] < 0 or ids[-1] >= vocabulary:
            bad = "it is empty" if not len(ids) else f"token id {ids[0] if ids[0] < 0 else ids[-1]} is unknown"
            raise InvalidRequest(f"the prompt can not be scored: {bad} (vocabulary of {vocabulary})", field="prompt")
        weights = np.log1p(counts).astype(np.float32)
        features_Z: np.ndarray = (weights @ self._tokens_VZ[ids]) / np.float32(math.sqrt(weights @ weights))
        return features_Z


def combine(file: RouterFile, lexical: RoutingScores, trunk: RoutingScores) -> RoutingScores:
    """The fitted pass: what both sources together say of the whole document."""
    weights = file.weights
    trunk_O = np.log(np.maximum(np.concatenate(trunk.mean_LR), FLOOR)).astype(np.float32) - weights["fitted.trunk_mean"]
    correction_O = trunk_O @ weights["fitted.down"] @ weights["fitted.up"]
    return file.as_scores(np.concatenate(lexical.mean_LR) + correction_O, "fitted", trunk.num_tokens)


def recall_features(scores: RoutingScores, pool: ExpertPool) -> np.ndarray:
    """[F]: what recall can be told from. Length of the prompt, size of the pool, and how clear the cut is."""
    sizes, masses, cuts, entropies = [], [], [], []
    for mean_R, experts in zip(scores.mean_LR, pool.experts, strict=True):
        if not len(mean_R) or not experts:
            continue
        inside = np.zeros(len(mean_R), bool)
        inside[list(experts)] = True
        sizes.append(len(experts) / len(mean_R))
        masses.append(mean_R[inside].sum())
        # How much less the best expert outside weighs than the least inside, softened over the neighbours of the cut.
        order = np.sort(mean_R)[::-1]
        low, high = max(0, len(experts) // 2), min(len(order) - 1, len(experts) + len(experts) // 2)
        cuts.append(math.log(max(order[low], FLOOR)) - math.log(max(order[high], FLOOR)))
        entropies.append(-(mean_R * np.log(np.maximum(mean_R, FLOOR))).sum())
    size, mass = float(np.mean(sizes)), float(np.mean(masses))
    length = math.log(max(scores.num_tokens, 1))
    cut, entropy = float(np.mean(cuts)), float(np.mean(entropies))
    return np.array([1.0, length, length**2, size, size**2, mass, mass**2, cut, entropy, length * size, length * mass])


def _checked(weights: Mapping[str, np.ndarray], num_outputs: int) -> Mapping[str, np.ndarray]:
    """Raises ValueError or KeyError unless the tensors are there, finite, and fit together."""
    for name in TENSORS:
        if not np.isfinite(weights[name]).all():
            raise ValueError(f"{name} is not finite")
    latent = weights["lexical.tokens"].shape[1]
    rank = weights["fitted.down"].shape[1]
    shapes = {
        "lexical.head": (latent, num_outputs),
        "lexical.mean": (num_outputs,),
        "fitted.trunk_mean": (num_outputs,),
        "fitted.down": (num_outputs, rank),
        "fitted.up": (rank, num_outputs),
    }
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} is {weights[name].shape}, not {shape}")
    return weights


def _stored(name: str, weight: np.ndarray) -> np.ndarray:
    """Half precision for what is large; estimators are small and stay as they are."""
    kind = np.float16 if weight.ndim == 2 else np.float32
    return np.ascontiguousarray(weight, dtype=kind)
