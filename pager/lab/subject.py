"""The model under evaluation, its texts, and what the methods ask of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest
from pager.lab.corpus import Cut, Text, domains_of, read_texts
from pager.lab.forwards import Forwards, GateMeans, PooledOutcome, experts_in_bulk
from pager.lab.recording import Probe
from pager.memory.plan import Budgets
from pager.models.open_model import OpenModel
from pager.predict.fitted import PREDICTOR_NAME, LexicalPredictor, PredictorFile
from pager.predict.trunk import FittedPredictor, TrunkPredictor
from pager.types import RoutingScores

FEW_EXAMPLES = 5  # of a domain, for the methods that the paper gives one to five
SAMPLE_PER_DOMAIN = 20  # documents that the global frequency is counted over
OTHERS_PER_DOMAIN = 16  # documents that take turns to be the one example of their domain
PERCENTS = (50.0, 25.0, 12.5, 6.25)


def parse_percents(text: str) -> tuple[float, ...]:
    """Pool sizes in percent of a layer's experts, from "25,12.5%". Raises InvalidRequest."""
    try:
        percents = tuple(float(part) for part in text.replace("%", "").split(","))
    except ValueError:
        percents = ()
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise InvalidRequest(f"--sizes {text!r} is not a list of percentages above 0 and up to 100, like 25,12.5")
    return percents


@dataclass(frozen=True, slots=True)
class EvaluationAsk:
    """An evaluation to be made: of which model, on which documents, how. `methods` None: all that are to be had."""

    model: Path
    documents: tuple[str, ...]
    calibration: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    percents: tuple[float, ...] = PERCENTS
    cut: Cut = field(default_factory=Cut)
    max_documents: int | None = None
    calibration_documents: int = 160
    expert_memory: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    resamples: int = 1000


class Subject:
    """The model and its texts. What was computed once is remembered; nothing else of it changes."""

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
        """`calibration` are other documents of the same domains; empty where none were given."""
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
        """The other documents of a domain. Raises InvalidRequest where there are none."""
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
    def full(self) -> tuple[list[PooledOutcome], list[GateMeans]]:
        """The outcome of every text with all experts, and what the gates wanted."""
        return self.forwards.full(self.ids)

    @cached_property
    def calibration_means(self) -> Mapping[str, Sequence[RoutingScores]]:
        """Each calibration document's mean gate probabilities, over all of it."""
        return {domain: self._mean_scores(self.calibration(domain)) for domain in self.domains}

    @cached_property
    def probe(self) -> Probe:
        """The probe of the methods that need more than scores.

        `frequency` counts over all domains' calibration documents.
        """
        sample = [ids for domain in self.domains for ids in self.calibration(domain)[:SAMPLE_PER_DOMAIN]]
        return Probe(self.paged, sample=sample)

    @cached_property
    def easy_ep(self) -> Mapping[str, RoutingScores]:
        """EASY-EP's scores of a few examples of each domain, good for every size."""
        examples = {domain: self.few(domain) for domain in self.domains}
        return {
            domain: RoutingScores(self.probe.easy_ep(few), "easy-ep", sum(map(len, few)))
            for domain, few in examples.items()
        }

    def few(self, domain: str) -> Sequence[tuple[int, ...]]:
        """As many examples of a domain as the paper gives a method."""
        return self.calibration(domain)[:FEW_EXAMPLES]

    def predicted(self, source: str) -> Sequence[RoutingScores]:
        """The scores that a routing-only pass gives each prompt. Raises InvalidRequest as `router` does."""
        if source not in self._predicted:
            score = self.router(source)
            self._predicted[source] = [score(prompt) for prompt in self.prompts]
        return self._predicted[source]

    def router(self, source: str) -> Callable[[Sequence[int]], RoutingScores]:
        """The routing-only pass of this name. Raises InvalidRequest where the checkpoint has none fitted."""
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
        """One other document of its domain for every text: of the calibration where given, else of the texts."""
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


@contextmanager
def open_subject(ask: EvaluationAsk, tokenizer: Tokenizer) -> Iterator[tuple[Subject, list[Text]]]:
    """Opens the model with its texts and the calibration texts, and closes it at the end.

    Experts that do not fit into memory are paged. Raises InvalidRequest, CheckpointError, BudgetError.
    """
    budgets = Budgets(expert_memory=ask.expert_memory)
    paged = load_paged_model(ask.model, device=ask.device, dtype=ask.dtype, budgets=budgets)
    try:
        cut = ask.cut.check(int(paged.config.max_position_embeddings))
        texts = read_texts(ask.documents, tokenizer, cut, max_documents=ask.max_documents, seed=ask.seed)
        calibration: list[Text] = []
        if ask.calibration:
            calibration = read_texts(
                ask.calibration, tokenizer, cut, max_documents=ask.calibration_documents, seed=ask.seed
            )
        with experts_in_bulk(paged):
            yield Subject(ask.model, paged, texts, cut, calibration=calibration, seed=ask.seed), calibration
    finally:
        paged.close()
