"""The facts beside the grid of docs/evidence.md: continuations, specialisation, routing-only passes and their speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline
from tokenizers import Tokenizer

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.lab.corpus import Subject, Text, sample_documents
from pager.lab.methods import conditions_of, size_of
from pager.lab.recording import EVERY_EXPERT
from pager.lab.report import Bootstrap, Evaluation
from pager.pools.pick import pick_pool
from pager.types import ExpertPool, PoolSize, RoutingScores

MAIN_PERCENTS = (25.0, 12.5)
PASSES = ("trunk", "lexical", "fitted")
CLASSIFIER_DOCUMENTS = 400  # of each domain, to fit on
WORDS_AND_SIGNS = r"\w+|[^\w\s]"

console = Console(soft_wrap=True, highlight=False)
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """The extent of a measurement. `max_documents` None: every document; the rest is of each domain."""

    max_documents: int | None = None
    side_documents: int = 16
    calibration_documents: int = 160
    prompts: int = 16


def measure_facts(
    main: Evaluation,
    subject: Subject,
    calibration: Sequence[Text],
    corpus: Path,
    tokenizer: Tokenizer,
    path: Path,
    scale: Scale,
) -> Facts:
    """Measures one group after the other that `path` does not have yet, and stores each as soon as it is there."""
    conditions = f"{conditions_of(subject, calibration)} {scale}"
    facts: Facts = json.loads(path.read_text()) if path.exists() else {}
    if facts.get("conditions") != conditions:
        facts = {"conditions": conditions}
    groups: dict[str, Callable[[], Facts]] = {
        "continuations": lambda: _continuations(subject, corpus, tokenizer, scale),
        "specialisation": lambda: _specialisation(main, subject, calibration),
        "passes": lambda: _passes(main, subject),
        "speed": lambda: _speed(subject),
    }
    for name, group in groups.items():
        if name not in facts:
            started = time.monotonic()
            facts[name] = group()
            path.write_text(json.dumps(facts, indent=1))
            console.print(f"{subject.path.name}: {name}, {time.monotonic() - started:.0f} s")
    return facts


def _continuations(subject: Subject, corpus: Path, tokenizer: Tokenizer, scale: Scale) -> Facts:
    """How often a classifier of training texts recognises the domain of what the model writes, and of the real text."""
    known = sample_documents([str(corpus / "*.train.jsonl*")], CLASSIFIER_DOCUMENTS, subject.seed)
    classifier = domain_classifier([each.text for each in known], [each.domain for each in known])
    sampling = Sampling(seed=subject.seed)
    asked = _some(subject.texts, scale.prompts, subject.seed)
    asked = [text for text in asked if len(text.token_ids) >= subject.cut.prompt_tokens + sampling.num_tokens] or asked
    domains = [text.domain for text in asked]
    prompts = [text.token_ids[: subject.cut.prompt_tokens] for text in asked]
    written = tokenizer.decode_batch(sample(subject.paged, prompts, sampling))
    end = subject.cut.prompt_tokens + sampling.num_tokens
    real = tokenizer.decode_batch([list(text.token_ids[subject.cut.prompt_tokens : end]) for text in asked])
    bootstrap, ones = Bootstrap(domains, seed=subject.seed), np.ones(len(asked))
    of_model = recognised(classifier, written, domains)
    return {
        "documents": len(asked),
        "tokens": sampling.num_tokens,
        "temperature": sampling.temperature,
        "recognised": bootstrap.mean_over_domains(of_model, ones).to_dict(),
        "real_text": bootstrap.mean_over_domains(recognised(classifier, real, domains), ones).to_dict(),
        "by_domain": {domain: bootstrap.of_domain(domain, of_model, ones).mean for domain in bootstrap.domains},
    }


def _specialisation(main: Evaluation, subject: Subject, calibration: Sequence[Text]) -> Facts:
    full = main.grid.full
    domains = [text.domain for text in subject.texts]
    known = [
        (np.concatenate(scores.mean_LR), domain)
        for domain, of_domain in subject.calibration_means.items()
        for scores in of_domain
    ]
    known_NE, known_domains = np.stack([mean for mean, _ in known]), [domain for _, domain in known]
    ones = np.ones(len(domains))
    found: Facts = {"known_documents": len(calibration)}
    for name, means_NE in (("whole", full.whole_means_NE), ("prompt", full.prompt_means_NE)):
        right = nearest_centroid(known_NE, known_domains, means_NE, domains)
        found[f"accuracy_{name}"] = main.bootstrap.mean_over_domains(right, ones).to_dict()
    for name, method in (("whole", "future"), ("prompt", "prefill")):
        for percent in MAIN_PERCENTS:
            inside_NE = main.grid.cells[method, percent].inside_NE
            assert inside_NE is not None
            overlap = pool_overlap(inside_NE, domains)
            found[f"overlap_{name}_{percent:g}"] = {"same": overlap.same_domain, "cross": overlap.cross_domain}
    return found


def _passes(main: Evaluation, subject: Subject) -> Facts:
    ones = np.ones(len(subject.texts))
    found: Facts = {}
    for source in PASSES:
        for percent in MAIN_PERCENTS:
            if (source, percent) not in main.grid.cells:
                continue
            chosen = main.pools("prefill", percent)
            recall = main.bootstrap.mean_over_domains(recalls(main.pools(source, percent), chosen), ones).to_dict()
            found[f"{source}_{percent:g}"] = {"recall": recall}
            if subject.predictor_file is not None:
                errors = estimate_errors(subject, source, size_of(percent), chosen)
                estimate = main.bootstrap.mean_over_domains(errors, ones).to_dict()
                found[f"{source}_{percent:g}"]["estimate_error"] = estimate
    return found


def _speed(subject: Subject) -> Facts:
    """The time of each pass over a prompt of 1,000 tokens, or of as many as the context holds."""
    length = min(1000, int(subject.paged.config.max_position_embeddings))
    joined = [token for text in subject.texts for token in text.token_ids]
    prompt = tuple(joined[:length])
    found: Facts = {"tokens": length}
    for source in PASSES:
        try:
            score = subject.router(source)
        except InvalidRequest:
            continue
        found[source] = seconds_a_prompt(score, prompt, repeats=200 if source == "lexical" else 20)
    return found


def _some(texts: Sequence[Text], per_domain: int, seed: int) -> list[Text]:
    random = np.random.default_rng(seed)
    order = [texts[index] for index in random.permutation(len(texts))]
    return [
        text
        for domain in sorted({text.domain for text in texts})
        for text in [each for each in order if each.domain == domain][:per_domain]
    ]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters of plain sampling: nothing is cut off the distribution."""

    num_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    batch_rows: int = 64


@torch.inference_mode()
def sample(paged: PagedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continues prompts of one length, with all experts; an end of text does not end them."""
    torch.manual_seed(sampling.seed)
    continued: list[list[int]] = []
    for start in range(0, len(prompts), sampling.batch_rows):
        inputs = torch.tensor([list(prompt) for prompt in prompts[start : start + sampling.batch_rows]])
        inputs = inputs.to(paged.device)
        with paged.step([paged.routing(EVERY_EXPERT)], prefill=True):
            output: Any = paged.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                top_p=1.0,
                min_new_tokens=sampling.num_tokens,
                max_new_tokens=sampling.num_tokens,
            )
        continued += output[:, inputs.shape[1] :].tolist()
    return continued


def domain_classifier(texts: Sequence[str], domains: Sequence[str]) -> Pipeline:
    """Fits multinomial naive Bayes over counts of words and signs; every domain is as likely beforehand."""
    counts = CountVectorizer(token_pattern=WORDS_AND_SIGNS, lowercase=False, min_df=2)
    classifier = make_pipeline(counts, MultinomialNB(alpha=0.1, fit_prior=False))
    return classifier.fit(list(texts), list(domains))


def recognised(classifier: Pipeline, texts: Sequence[str], domains: Sequence[str]) -> np.ndarray:
    """Whether the classifier names each text's domain: bool [N]."""
    return np.asarray(classifier.predict(list(texts)) == np.asarray(domains))


@dataclass(frozen=True, slots=True)
class Overlap:
    """The experts that two documents' pools share, over those in either: means over pairs, domains alike."""

    same_domain: float
    cross_domain: float

    @property
    def times(self) -> float:
        return self.same_domain / max(self.cross_domain, 1e-12)


def nearest_centroid(
    known_NE: np.ndarray, known_domains: Sequence[str], asked_NE: np.ndarray, asked_domains: Sequence[str]
) -> np.ndarray:
    """Whether the nearest domain is the right one, bool [N]. A domain is the mean of its known documents.

    The distance is Hellinger's, the natural one between probabilities: between their square roots.
    """
    names = sorted(set(known_domains))
    of_known = np.asarray(known_domains)
    centroids = np.sqrt(np.stack([known_NE[of_known == name].mean(0) for name in names]))
    distances = ((np.sqrt(asked_NE)[:, None] - centroids[None]) ** 2).sum(-1)
    nearest = np.asarray(names)[distances.argmin(1)]
    return np.asarray(nearest == np.asarray(asked_domains))


def pool_overlap(inside_NE: np.ndarray, domains: Sequence[str]) -> Overlap:
    """The overlap of all pairs of different documents. Needs two documents of every domain, and two domains."""
    pools = inside_NE.astype(np.float32)
    shared = pools @ pools.T
    sizes = pools.sum(1)
    jaccard = shared / np.maximum(sizes[:, None] + sizes[None] - shared, 1)
    of_document = np.asarray(domains)
    members = [np.flatnonzero(of_document == name) for name in sorted(set(domains))]
    same, cross = [], []
    for number, mine in enumerate(members):
        block = jaccard[np.ix_(mine, mine)]
        same.append((block.sum() - np.trace(block)) / (len(mine) * (len(mine) - 1)))
        cross += [jaccard[np.ix_(mine, other)].mean() for other in members[number + 1 :]]
    return Overlap(float(np.mean(same)), float(np.mean(cross)))


def recalls(predicted: Sequence[ExpertPool], chosen: Sequence[ExpertPool]) -> np.ndarray:
    """The share of each document's own prefill's pool that was predicted: [N]."""
    return np.array([mine.recall_of(actual) for mine, actual in zip(predicted, chosen, strict=True)])


def estimate_errors(subject: Subject, source: str, size: PoolSize, chosen: Sequence[ExpertPool]) -> np.ndarray:
    """The error of the recall that `source` expects of its pool, [N]. The checkpoint has its maps."""
    assert subject.predictor_file is not None
    errors = []
    for scores, actual in zip(subject.predicted(source), chosen, strict=True):
        pool = pick_pool(scores, size, subject.facts)
        errors.append(abs(subject.predictor_file.expected_recall(scores, pool) - pool.recall_of(actual)))
    return np.array(errors)


def seconds_a_prompt(
    score: Callable[[Sequence[int]], RoutingScores], prompt: Sequence[int], *, repeats: int = 200
) -> float:
    """The median time of one pass over a prompt, warm."""
    for _ in range(5):
        score(prompt)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        score(prompt)
        times.append(time.perf_counter() - started)
    return median(times)
