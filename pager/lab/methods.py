"""The selection methods, every way to choose a pool by name, and the grid of all of them at every size.

A method chooses from example texts (`select`, as `expert-pager calibrate` does), for each document of an evaluation
(`choose`), or both. A method knows only the prompt of a document, unless it says otherwise. Rules 17 to 20 of EMO name
the paper's methods. Legend: L layers, R routed experts of a layer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from pager.errors import ConfigError, InvalidRequest, PoolTooSmall
from pager.lab.corpus import Subject, Text, digest_of
from pager.lab.recording import Examples, Layers, PooledOutcome, Probe
from pager.pools.pick import largest_counts, mean_scores, pick_layer, pick_pool, resolve_size, share_out
from pager.predict.fitted import MEANS, Codebook
from pager.types import Bytes, ExpertPool, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores, Share

FULL = "full"
BY_LAYER = "+layers"
"""The suffix of a method's name for the same bytes in all, shared out over the layers."""
RENAMED = {"fused": "prefill"}
"""Names of earlier versions, which are still accepted."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy per document; pools that are still open are chosen by the first `voters` tokens (None: the prompt)."""

    policies: Sequence[PoolPolicy]
    voters: int | None = None


Choose = Callable[[Subject, PoolSize], Choice]
OfDocuments = Callable[[Subject], list[RoutingScores]]
OfExamples = Callable[[Probe, Examples, PoolSize, int], Layers]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to choose a pool.

    `says` completes "chosen by ..." in a report. `examples` scores the experts for some examples, and `documents` for
    each document of an evaluation, at every size. `choose` chooses for each document of an evaluation where that is
    more than taking the best of `documents`. `shared_out_by` is the method whose scores share experts out over layers,
    where it is another one. `needs`: maps fitted to the checkpoint, a codebook fitted with them, or other documents of
    the domain.
    """

    says: str
    examples: OfExamples | None = None
    documents: OfDocuments | None = None
    choose: Choose | None = None
    needs: Literal["router", "codebook", "others"] | None = None
    shared_out_by: str | None = None
    is_mass: bool = True  # its scores are gate probabilities
    is_layer_by_layer: bool = False  # a layer's scores depend on what the layers below it chose


def current_name(name: str) -> str:
    """Returns the current name for `name`, with its suffix."""
    base = name.removesuffix(BY_LAYER)
    return RENAMED.get(base, base) + name[len(base) :]


# --- methods that choose from examples --------------------------------------------------------------------------------


def select(method: str, probe: Probe, examples: Examples, size: PoolSize, *, seed: int = 0) -> ExpertPool:
    """Returns the pool of `size` that `method` chooses from one or more examples, as token ids. Only `random` has a
    seed.

    Raises InvalidRequest for an unknown method and for examples that the method cannot use, PoolTooSmall.
    """
    chosen = method_of(method)
    if chosen.is_layer_by_layer and isinstance(size, Bytes):
        # Bytes are shared out before the first layer can choose, by the probabilities with all experts.
        size = resolve_size(size, RoutingScores(probe.mean_probabilities(examples), "mean", 1), probe.facts)
    pool = pick_pool(score(method, probe, examples, size, seed=seed), size, probe.facts)
    return pool if chosen.is_mass else replace(pool, covered_mass=None)


def score(method: str, probe: Probe, examples: Examples, size: PoolSize, *, seed: int = 0) -> RoutingScores:
    """Returns the scores behind `select`. Those of `prefill` and `greedy` hold for this size alone, which is not in
    bytes.
    """
    of_examples = method_of(method).examples
    assert of_examples is not None
    if not examples or not all(examples):
        what = "one of them is empty" if examples else "there are none"
        raise InvalidRequest(
            f"a pool is made from examples, and {what}; give at least one token each", field="examples"
        )
    layers = of_examples(probe, examples, size, seed)
    return RoutingScores(layers, source=current_name(method), num_tokens=sum(map(len, examples)))


def method_of(name: str) -> Method:
    """Returns the method that chooses from examples under this name. Raises InvalidRequest where there is none."""
    name = current_name(name)
    if name not in FROM_EXAMPLES:
        known = ", ".join(FROM_EXAMPLES)
        raise InvalidRequest(f"{name!r} is not a selection method; known are {known}", field="method")
    return METHODS[name]


def _mean(probe: Probe, examples: Examples, _: PoolSize, __: int) -> Layers:
    return probe.mean_probabilities(examples)


def _greedy(probe: Probe, examples: Examples, size: PoolSize, _: int) -> Layers:
    """Scores layer by layer, each with the layers below pruned to what they chose from all the examples together."""
    facts, counts = probe.facts, largest_counts(size, probe.facts)
    means: list[np.ndarray] = []
    chosen: list[tuple[int, ...]] = []
    for layer, routed in enumerate(facts.routed_per_layer):
        means.append(probe.layer_probabilities(examples, chosen) if routed else np.zeros(0))
        chosen.append(pick_layer(means[-1], size, counts[layer], facts.top_k_per_layer[layer]))
    return tuple(means)


def _prefill(probe: Probe, examples: Examples, size: PoolSize, _: int) -> Layers:
    """Averages what each example would choose for itself as a prompt: for one example, the pool of that request."""
    return _average([probe.prefill_probabilities(example, size) for example in examples], examples)


def _predicted(source: str) -> OfExamples:
    def predict(probe: Probe, examples: Examples, _: PoolSize, __: int) -> Layers:
        return _average([probe.predicted(source, example).mean_LR for example in examples], examples)

    return predict


def random_layers(facts: RoutingFacts, seed: int) -> Layers:
    """Returns scores whose order is a shuffle of each layer's experts: a larger pool holds the smaller ones of the same
    seed.

    Numpy's legacy generator draws the same numbers in every version, and those of `torch.randperm` after
    `torch.manual_seed(seed)`, which the reference implementation used.
    """
    draw = np.random.RandomState(seed)
    layers = []
    for routed in facts.routed_per_layer:
        order = list(range(routed))
        for place in range(routed - 1):
            other = place + int(draw.randint(0, 2**32, dtype=np.uint32)) % (routed - place)
            order[place], order[other] = order[other], order[place]
        scores_R = np.empty(routed)
        scores_R[order] = np.arange(routed, 0, -1.0)
        layers.append(scores_R / max(scores_R.sum(), 1.0))
    return tuple(layers)


def _average(layers_of: Sequence[Layers], examples: Examples) -> Layers:
    """Returns the mean over all tokens, from each example's own."""
    weights = np.array([len(example) for example in examples], dtype=np.float64)
    weights /= weights.sum()
    return tuple(np.tensordot(weights, np.stack(layer), axes=1) for layer in zip(*layers_of, strict=True))


# --- methods for the documents of an evaluation -----------------------------------------------------------------------


def methods_for(subject: Subject, names: Sequence[str] | None) -> list[str]:
    """Returns `names`, checked; None: all that this checkpoint and these documents allow. Raises InvalidRequest."""
    if names is None:
        return [name for name in METHODS if _obstacle(subject, name) is None]
    names = [current_name(name) for name in names]
    for name in names:
        base = name.removesuffix(BY_LAYER)
        if base not in METHODS:
            raise InvalidRequest(
                f"{name!r} is not a method; known are {', '.join(METHODS)}, and with {BY_LAYER} behind it any "
                "that has scores"
            )
        if name.endswith(BY_LAYER) and _sharing(base) is None:
            raise InvalidRequest(f"{base!r} has no scores by which to share experts out over layers")
        if (obstacle := _obstacle(subject, base)) is not None:
            raise InvalidRequest(f"method {name!r} {obstacle}")
    return names


def choose(subject: Subject, name: str, size: PoolSize) -> Choice:
    """Returns a policy for each document. Raises PoolTooSmall for a size below what a gate picks for one token."""
    counts = largest_counts(size, subject.facts)
    base = name.removesuffix(BY_LAYER)
    method = METHODS[base]
    if base == name:
        return method.choose(subject, size) if method.choose is not None else _best(method, subject, size)
    sharing = _sharing(base)
    assert sharing is not None, "checked by methods_for"
    by_document = sharing(subject)
    sizes = [share_out(scores, sum(counts), subject.facts) for scores in by_document]
    if method.documents is None:
        return Choice([PoolPolicy(size) for size in sizes])
    pairs = zip(by_document, sizes, strict=True)
    return Choice([_fixed(pick_pool(scores, size, subject.facts)) for scores, size in pairs])


def size_of(percent: float) -> PoolSize:
    """Returns a share of all experts of a layer, shared ones included."""
    return Share(percent / 100)


def _sharing(base: str) -> OfDocuments | None:
    """Returns the scores that share experts out over layers for a method."""
    method = METHODS[base]
    return METHODS[method.shared_out_by].documents if method.shared_out_by else method.documents


def _obstacle(subject: Subject, name: str) -> str | None:
    method = METHODS[name]
    if method.needs == "router" and subject.predictor_file is None:
        return f"needs a router fitted to {subject.path}; run expert-pager fit-router"
    if method.needs == "codebook" and not (subject.predictor_file and MEANS in subject.predictor_file.weights):
        return f"needs a codebook fitted to {subject.path}; run expert-pager fit-router"
    if method.needs == "others" and not subject.is_calibrated:
        return "chooses from other documents of each domain; give --calibration"
    return None


def _best(method: Method, subject: Subject, size: PoolSize) -> Choice:
    assert method.documents is not None
    return Choice([_fixed(pick_pool(scores, size, subject.facts)) for scores in method.documents(subject)])


def _fixed(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(source=PoolSource.FIXED, fixed=pool)


def _from_prompt(subject: Subject, size: PoolSize) -> Choice:
    return Choice([PoolPolicy(size)] * len(subject.texts))


def _from_whole(subject: Subject, size: PoolSize) -> Choice:
    return Choice([PoolPolicy(size)] * len(subject.texts), subject.cut.context_tokens)


def _one_example(subject: Subject, size: PoolSize) -> Choice:
    """Chooses the pool of one other document, layer by layer over all of it; examples that occur often run once."""
    examples = subject.one_example_each()
    distinct = list(dict.fromkeys(examples))
    pools = dict(zip(distinct, subject.forwards.pools(distinct, size), strict=True))
    return Choice([_fixed(pools[example]) for example in examples])


def _named(subject: Subject, size: PoolSize) -> Choice:
    """Chooses as `expert-pager calibrate` does from one example where no method is given."""
    examples, score = subject.one_example_each(), subject.router("fitted")
    pools = {ids: pick_pool(score(ids), size, subject.facts) for ids in dict.fromkeys(examples)}
    return Choice([_fixed(pools[ids]) for ids in examples])


def _greedy_of_domain(subject: Subject, size: PoolSize) -> Choice:
    pools = {domain: select("greedy", subject.probe, subject.few(domain), size) for domain in subject.domains}
    return Choice([_fixed(pools[text.domain]) for text in subject.texts])


def _frequency(subject: Subject, size: PoolSize) -> Choice:
    pool = select("frequency", subject.probe, subject.prompts[:1], size)
    return Choice([_fixed(pool)] * len(subject.texts))


def _predicted_of_prompt(source: str) -> OfDocuments:
    return lambda subject: list(subject.predicted(source))


def _codebook(subject: Subject, size: PoolSize) -> Choice:
    """Returns what a service gives each prompt: the pool of the codeword that covers it, else one of its own."""
    assert subject.predictor_file is not None, "checked by methods_for"
    codebook = Codebook.of(subject.predictor_file, subject.facts)
    assert codebook is not None, "checked by methods_for"
    pools = [
        codebook.assign(lexical, size, trunk).pool
        for lexical, trunk in zip(subject.predicted("lexical"), subject.predicted("trunk"), strict=True)
    ]
    return Choice([_fixed(pool) for pool in pools if pool is not None])


def _mean_of_prompt(subject: Subject) -> list[RoutingScores]:
    return [RoutingScores(mean.prompt_LR, "mean", subject.cut.prompt_tokens) for mean in subject.full[1]]


def _mean_of_domain(subject: Subject) -> list[RoutingScores]:
    of_domain = {domain: mean_scores(subject.calibration_means[domain]) for domain in subject.domains}
    return [of_domain[text.domain] for text in subject.texts]


def _easy_ep_of_domain(subject: Subject) -> list[RoutingScores]:
    return [subject.easy_ep[text.domain] for text in subject.texts]


def _random(subject: Subject) -> list[RoutingScores]:
    seeds = range(subject.seed, subject.seed + len(subject.texts))
    return [RoutingScores(random_layers(subject.facts, seed), "random", 1) for seed in seeds]


METHODS: dict[str, Method] = {
    "prefill": Method(
        "the prompt's prefill, layer by layer, as the worker does it",
        examples=_prefill, choose=_from_prompt, shared_out_by="trunk", is_layer_by_layer=True,
    ),
    "trunk": Method(
        "the routing-only pass over the prompt", examples=_predicted("trunk"), documents=_predicted_of_prompt("trunk")
    ),
    "lexical": Method(
        "the prompt's token counts alone",
        examples=_predicted("lexical"), documents=_predicted_of_prompt("lexical"), needs="router",
    ),
    "fitted": Method(
        "the routing-only pass and the token counts, fitted",
        examples=_predicted("fitted"), documents=_predicted_of_prompt("fitted"), needs="router",
    ),
    "codebook": Method(
        "the codeword that covers the prompt, or between it and the prompt's own where none does", choose=_codebook,
        needs="codebook",
    ),
    "mean": Method(
        "the mean gate probability over the prompt, with all experts", examples=_mean, documents=_mean_of_prompt
    ),
    "one-example": Method("one other document of the domain, layer by layer", choose=_one_example),
    "named": Method("one other document of the domain, fitted, as a named pool is", choose=_named, needs="router"),
    "greedy": Method(
        "five other documents of the domain, layer by layer",
        examples=_greedy, choose=_greedy_of_domain, needs="others", is_layer_by_layer=True,
    ),
    "easy-ep": Method(
        "five other documents of the domain, EASY-EP",
        examples=lambda probe, examples, _, __: probe.easy_ep(examples),
        documents=_easy_ep_of_domain, needs="others", is_mass=False,
    ),
    "calibrated": Method(
        "the mean gate probability over many other documents of the domain", documents=_mean_of_domain, needs="others"
    ),
    "frequency": Method(
        "how often experts are picked in all domains' documents",
        examples=lambda probe, _, __, ___: probe.frequency(), choose=_frequency, needs="others", is_mass=False,
    ),
    "random": Method(
        "a draw for every document",
        examples=lambda probe, _, __, seed: random_layers(probe.facts, seed), documents=_random, is_mass=False,
    ),
    "future": Method("the whole document, what is to be predicted included", choose=_from_whole),
}  # fmt: skip

FROM_EXAMPLES = tuple(name for name, method in METHODS.items() if method.examples is not None)
"""The methods that choose from examples."""


# --- the grid ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One method at one size over all documents. `inside_NE`: which experts each pool has; None with all experts."""

    nats_N: np.ndarray
    agreed_N: np.ndarray  # predictions that equal the full model's
    inside_NE: np.ndarray | None
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class FullCell(Cell):
    """The cell with all experts; `best_P` holds every document's predictions, one document after the other."""

    best_P: np.ndarray
    prompt_means_NE: np.ndarray
    whole_means_NE: np.ndarray


class CellStore:
    """A folder of cells made under the same conditions. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None, conditions: str) -> None:
        """Opens the folder. `conditions` names all that a cell depends on beside its method and size. Raises
        ConfigError.
        """
        self._folder = folder
        self._conditions = conditions
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{folder} cannot be made: {error.strerror}; choose another --out") from None

    def load(self, name: str) -> Cell | None:
        """Reads a cell; None where there is none, or where it was made under other conditions."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["conditions"]) != self._conditions:
                    return None
                return _one_cell({key: stored[key] for key in stored.files})
        except (OSError, ValueError, KeyError, EOFError):
            return None  # it is measured again, and overwritten

    def save(self, name: str, cell: Cell) -> None:
        """Writes a cell, whole or not at all."""
        path = self._path(name)
        if path is None:
            return
        arrays = {"nats": cell.nats_N, "agreed": cell.agreed_N, "seconds": np.asarray(cell.seconds)}
        if cell.inside_NE is not None:
            arrays |= {
                "inside": np.packbits(cell.inside_NE, axis=1),
                "num_experts": np.asarray(cell.inside_NE.shape[1]),
            }
        if isinstance(cell, FullCell):
            arrays |= {"best": cell.best_P, "prompt_means": cell.prompt_means_NE, "whole_means": cell.whole_means_NE}
        partial = path.with_name(f"{path.stem}.partial.npz")
        np.savez_compressed(partial, conditions=np.asarray(self._conditions), **arrays)  # type: ignore[arg-type]
        partial.replace(path)

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.npz"


def _one_cell(stored: dict[str, np.ndarray]) -> Cell:
    inside_NE = None
    if "inside" in stored:
        inside_NE = np.unpackbits(stored["inside"], axis=1, count=int(stored["num_experts"])).astype(bool)
    common = (stored["nats"], stored["agreed"], inside_NE, float(stored["seconds"]))
    if "best" not in stored:
        return Cell(*common)
    return FullCell(*common, stored["best"], stored["prompt_means"], stored["whole_means"])


def pack_pools(pools: list[ExpertPool], routed_per_layer: tuple[int, ...]) -> np.ndarray:
    """Returns pools as bits, one row each: bool [N, E]."""
    inside_NE = np.zeros((len(pools), sum(routed_per_layer)), bool)
    starts = np.cumsum([0, *routed_per_layer])
    for row, pool in enumerate(pools):
        for start, layer in zip(starts, pool.experts, strict=False):
            inside_NE[row, start + np.asarray(layer, dtype=int)] = True
    return inside_NE


def unpack_pools(inside_NE: np.ndarray, routed_per_layer: tuple[int, ...]) -> list[ExpertPool]:
    starts = np.cumsum([0, *routed_per_layer])
    return [
        ExpertPool(tuple(tuple(np.flatnonzero(row[start:end]).tolist()) for start, end in pairwise(starts)))
        for row in inside_NE
    ]


@dataclass(frozen=True, slots=True)
class Grid:
    """The measured cells by (method, percent of the experts), and those that could not be measured, with the reason."""

    full: FullCell
    cells: Mapping[tuple[str, float], Cell]
    left_out: Mapping[tuple[str, float], str] = field(default_factory=dict)


def run_grid(
    subject: Subject,
    methods: Sequence[str],
    percents: Sequence[float],
    store: CellStore,
    *,
    done: Callable[[str], None] = lambda _: None,
) -> Grid:
    """Measures every cell that `store` does not have. `done` is called with each cell's name.

    Raises InvalidRequest, ExpertUnavailable.
    """
    full = store.load(FULL)
    if not isinstance(full, FullCell):
        full = _full_cell(subject)
        store.save(FULL, full)
    done(FULL)
    cells: dict[tuple[str, float], Cell] = {}
    left_out: dict[tuple[str, float], str] = {}
    for method in methods:
        for percent in percents:
            if percent >= 100:
                continue
            name = f"{method}-{percent:g}"
            try:
                cell = store.load(name) or _cell(subject, method, percent, full)
            except PoolTooSmall as error:
                left_out[method, percent] = error.message
            else:
                store.save(name, cell)
                cells[method, percent] = cell
            done(name)
    return Grid(full, cells, left_out)


def conditions_of(subject: Subject, calibration: Sequence[Text]) -> str:
    """Returns a digest of all that a cell depends on beside its method and size."""
    router = "none" if subject.predictor_file is None else _digest_of_weights(subject.predictor_file.weights)
    parts = (
        "expert-pager cell 1",
        subject.paged.fingerprint,
        str(subject.paged.dtype),
        router,
        f"{subject.cut.prompt_tokens} {subject.cut.context_tokens} {subject.seed}",
        digest_of(subject.texts),
        digest_of(calibration),
    )
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def predicted_tokens(texts: Sequence[Text], prompt_tokens: int) -> np.ndarray:
    """Returns the number of tokens of each document that are predicted: [N]."""
    return np.array([len(text.token_ids) - prompt_tokens for text in texts])


def _full_cell(subject: Subject) -> FullCell:
    started = time.monotonic()
    outcomes, means = subject.full
    best = np.concatenate([outcome.best_P for outcome in outcomes])
    return FullCell(
        np.array([outcome.nats for outcome in outcomes]),
        predicted_tokens(subject.texts, subject.cut.prompt_tokens),
        None,
        time.monotonic() - started,
        best,
        _stack([mean.prompt_LR for mean in means]),
        _stack([mean.whole_LR for mean in means]),
    )


def _cell(subject: Subject, method: str, percent: float, full: FullCell) -> Cell:
    started = time.monotonic()
    choice = choose(subject, method, size_of(percent))
    outcomes = subject.forwards.outcomes(subject.ids, choice.policies, voters=choice.voters)
    pools = [outcome.pool for outcome in outcomes if outcome.pool is not None]
    return Cell(
        np.array([outcome.nats for outcome in outcomes]),
        _agreed(outcomes, full.best_P),
        pack_pools(pools, subject.facts.routed_per_layer),
        time.monotonic() - started,
    )


def _agreed(outcomes: Sequence[PooledOutcome], best_P: np.ndarray) -> np.ndarray:
    ends = np.cumsum([len(outcome.best_P) for outcome in outcomes])
    same_P = np.concatenate([outcome.best_P for outcome in outcomes]) == best_P
    return np.array([int(part.sum()) for part in np.split(same_P, ends[:-1])])


def _stack(layers_N: Sequence[Layers]) -> np.ndarray:
    return np.stack([np.concatenate(layers) for layers in layers_N]).astype(np.float32)


def _digest_of_weights(weights: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()
