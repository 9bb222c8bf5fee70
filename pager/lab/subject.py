"""The model under evaluation, its texts, and what the methods ask of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.lab.corpus import Cut, Text, domains_of
from pager.lab.forwards import Forwards, GateMeans, Outcome
from pager.lab.probe import PagedProbe
from pager.lab.selection import score
from pager.models.open_model import OpenModel
from pager.pools.pick import pick_pool
from pager.predict.fitted import PREDICTOR_NAME, LexicalPredictor, PredictorFile
from pager.predict.trunk import FittedPredictor, TrunkPredictor
from pager.types import ExpertPool, Full, PoolSize, RoutingScores

FEW_EXAMPLES = 5  # of a domain, for the methods that the paper gives one to five
SAMPLE_PER_DOMAIN = 20  # documents that the global frequency is counted over
OTHERS_PER_DOMAIN = 16  # documents that take turns to be the one example of their domain


class Subject:
    """Mutable only in what it remembers. `calibration` are other documents, by domain; empty where none were given."""

    def __init__(
        self,
        path: Path,
        paged: PagedModel,
        texts: Sequence[Text],
        cut: Cut,
        *,
        calibration: Sequence[Text] = (),
        seed: int = 0,
    ) -> None:
        self.path = path
        self.paged = paged
        self.facts = paged.facts
        self.texts = tuple(texts)
        self.cut = cut
        self.seed = seed
        self.forwards = Forwards(paged, cut.prompt_tokens)
        self.ids = [text.token_ids for text in texts]
        self.prompts = [text.token_ids[: cut.prompt_tokens] for text in texts]
        self.domains = domains_of(texts)
        self._calibration: dict[str, list[tuple[int, ...]]] = {domain: [] for domain in domains_of(calibration)}
        for text in calibration:
            self._calibration[text.domain].append(text.token_ids)
        self._predicted: dict[str, list[RoutingScores]] = {}

    def calibration(self, domain: str) -> Sequence[tuple[int, ...]]:
        """Other documents of a domain. Raises InvalidRequest where there are none."""
        found = self._calibration.get(domain, [])
        if not found:
            given = "no calibration documents were given" if not self._calibration else f"none are of {domain!r}"
            raise InvalidRequest(
                f"this method chooses from other documents of a domain, and {given}; give --calibration"
            )
        return found

    @property
    def is_calibrated(self) -> bool:
        return all(self._calibration.get(domain) for domain in self.domains)

    @cached_property
    def predictor_file(self) -> PredictorFile | None:
        """The maps fitted to this checkpoint; None where there are none. Raises CheckpointError for damaged ones."""
        present = (self.path / PREDICTOR_NAME).is_file()
        return PredictorFile.load(self.path, self.paged.fingerprint) if present else None

    @cached_property
    def full(self) -> tuple[list[Outcome], list[GateMeans]]:
        """Every text with all experts."""
        return self.forwards.full(self.ids)

    @cached_property
    def calibration_means(self) -> Mapping[str, Sequence[RoutingScores]]:
        """Each calibration document's mean gate probabilities, over all of it."""
        return {domain: self._mean_scores(self.calibration(domain)) for domain in self.domains}

    @cached_property
    def probe(self) -> PagedProbe:
        """For the methods that need more than scores. `frequency` counts over all domains' calibration documents."""
        sample = [ids for domain in self.domains for ids in self.calibration(domain)[:SAMPLE_PER_DOMAIN]]
        return PagedProbe(self.paged, sample=sample)

    @cached_property
    def easy_ep(self) -> Mapping[str, RoutingScores]:
        """EASY-EP's scores of a few examples of each domain, good for every size."""
        return {domain: score("easy-ep", self.probe, self.few(domain), Full()) for domain in self.domains}

    def few(self, domain: str) -> Sequence[tuple[int, ...]]:
        """As many examples as the paper gives a method."""
        return self.calibration(domain)[:FEW_EXAMPLES]

    def predicted(self, source: str) -> Sequence[RoutingScores]:
        """What a routing-only pass says of each prompt. Raises InvalidRequest where the checkpoint has none fitted."""
        if source not in self._predicted:
            score = self.router(source)
            self._predicted[source] = [score(prompt) for prompt in self.prompts]
        return self._predicted[source]

    def router(self, source: str) -> Callable[[Sequence[int]], RoutingScores]:
        """The pass itself. Raises InvalidRequest."""
        if source == "trunk":
            return self._trunk.scores
        if self.predictor_file is None:
            raise InvalidRequest(
                f"{self.path} has no {PREDICTOR_NAME}, which {source!r} needs; run expert-pager fit-router"
            )
        if source == "lexical":
            return LexicalPredictor(self.predictor_file).scores
        return FittedPredictor(self.predictor_file, self._trunk).scores

    def one_example_each(self) -> list[tuple[int, ...]]:
        """For every text one other document of its domain: of the calibration where given, else of the texts."""
        turns = dict.fromkeys(self.domains, 0)
        return [self._another(text, turns) for text in self.texts]

    def _another(self, text: Text, turns: dict[str, int]) -> tuple[int, ...]:
        found = self._calibration.get(text.domain) or [
            other.token_ids for other in self.texts if other.domain == text.domain
        ]
        others = [ids for ids in found[: OTHERS_PER_DOMAIN + 1] if ids != text.token_ids]
        if not others:
            raise InvalidRequest(f"domain {text.domain!r} has one document only, and none to calibrate on")
        turns[text.domain] += 1
        return others[turns[text.domain] % min(len(others), OTHERS_PER_DOMAIN)]

    @cached_property
    def _trunk(self) -> TrunkPredictor:
        opened = OpenModel.open(self.path, self.paged.dtype)
        with opened.checkpoint:
            return TrunkPredictor(
                opened, self.paged.device, self.predictor_file.stand_ins if self.predictor_file else None
            )

    def _mean_scores(self, texts: Sequence[tuple[int, ...]]) -> list[RoutingScores]:
        means = self.forwards.means(texts)
        return [RoutingScores(mean.whole_LR, "mean", len(ids)) for mean, ids in zip(means, texts, strict=True)]


def pools_of_examples(subject: Subject, examples: Sequence[tuple[int, ...]], size: PoolSize) -> list[ExpertPool]:
    """The pool of each example, layer by layer over all of it; examples that occur often run once."""
    distinct = list(dict.fromkeys(examples))
    pools = dict(zip(distinct, subject.forwards.pools(distinct, size), strict=True))
    return [pools[example] for example in examples]


def recalls(predicted: Sequence[ExpertPool], chosen: Sequence[ExpertPool]) -> np.ndarray:
    """[N]: the share of each document's own prefill's pool that was predicted."""
    return np.array([mine.recall_of(actual) for mine, actual in zip(predicted, chosen, strict=True)])


def estimate_errors(subject: Subject, source: str, size: PoolSize, chosen: Sequence[ExpertPool]) -> np.ndarray:
    """[N]: how far the recall that `source` expects of its pool lies from what it is. The checkpoint has its maps."""
    assert subject.predictor_file is not None
    errors = []
    for scores, actual in zip(subject.predicted(source), chosen, strict=True):
        pool = pick_pool(scores, size, subject.facts)
        errors.append(abs(subject.predictor_file.expected_recall(scores, pool) - pool.recall_of(actual)))
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
