"""Measures one model for docs/evidence.md: the grid of methods and sizes, and the facts beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from pager.errors import InvalidRequest
from pager.lab import clusters, drift
from pager.lab.corpus import Text, sample_documents
from pager.lab.grid import conditions_of
from pager.lab.methods import BY_LAYER, methods_for, size_of
from pager.lab.report import Bootstrap, Evaluation
from pager.lab.run import Ask, evaluate_subject, open_subject
from pager.lab.subject import Subject, estimate_errors, recalls, seconds_a_prompt

MAIN_PERCENTS = (25.0, 12.5)
SIDE_PERCENTS = (50.0, 6.25)
LAYERED = ("prefill", "prefill+layers", "trunk", "trunk+layers", "fitted", "fitted+layers")
PASSES = ("trunk", "lexical", "fitted")
CLASSIFIER_DOCUMENTS = 400  # of each domain, to fit on

console = Console(soft_wrap=True, highlight=False)
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `max_documents` None: every document; the rest is of each domain."""

    max_documents: int | None = None
    side_documents: int = 16
    calibration_documents: int = 160
    prompts: int = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """`side` has the sizes, `layered` the sizes per layer, that are measured on fewer documents."""

    main: Evaluation
    side: Evaluation
    layered: Evaluation
    facts: Facts


def measure(model: Path, corpus: Path, folder: Path, scale: Scale, methods: Sequence[str] | None = None) -> Measured:
    """What is in `folder` from an earlier run under the same conditions is taken from there. `methods` None: all."""
    main, facts = measure_main(model, corpus, folder, scale, methods)
    side, layered = measure_side(model, corpus, folder, scale, methods)
    return Measured(main, side, layered, facts)


def measure_main(
    model: Path, corpus: Path, folder: Path, scale: Scale, methods: Sequence[str] | None
) -> tuple[Evaluation, Facts]:
    ask, tokenizer = _ask(model, corpus, scale), _tokenizer(model)
    with open_subject(ask, tokenizer) as (subject, calibration):
        ask = replace(ask, methods=_possible(methods, subject))
        main = evaluate_subject(ask, subject, calibration, folder / "main", done=_printer(model.name))
        return main, _facts(main, subject, calibration, corpus, tokenizer, folder, scale)


def measure_side(
    model: Path, corpus: Path, folder: Path, scale: Scale, methods: Sequence[str] | None
) -> tuple[Evaluation, Evaluation]:
    """The other sizes, and sizes per layer, on fewer documents."""
    side = replace(_ask(model, corpus, scale), max_documents=scale.side_documents, percents=SIDE_PERCENTS)
    with open_subject(side, _tokenizer(model)) as (subject, calibration):
        side = replace(side, methods=_possible(methods, subject))
        layered = replace(side, methods=_possible(LAYERED, subject), percents=MAIN_PERCENTS)
        return (
            evaluate_subject(side, subject, calibration, folder / "side", done=_printer(f"{model.name}, other sizes")),
            evaluate_subject(layered, subject, calibration, folder / "side", done=_printer(f"{model.name}, layers")),
        )


def _ask(model: Path, corpus: Path, scale: Scale) -> Ask:
    return Ask(
        model,
        (str(corpus / "*.valid.jsonl*"),),
        (str(corpus / "*.train.jsonl*"),),
        percents=MAIN_PERCENTS,
        max_documents=scale.max_documents,
        calibration_documents=scale.calibration_documents,
    )


def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def _possible(methods: Sequence[str] | None, subject: Subject) -> tuple[str, ...]:
    """Without what needs a fitted router, where there is none."""
    possible = methods_for(subject, None)
    return tuple(name for name in methods or possible if name.removesuffix(BY_LAYER) in possible)


def _facts(
    main: Evaluation,
    subject: Subject,
    calibration: Sequence[Text],
    corpus: Path,
    tokenizer: Tokenizer,
    folder: Path,
    scale: Scale,
) -> Facts:
    """One group after the other, each stored as soon as it is there."""
    path = folder / "facts.json"
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
    """The classifier sees training text alone; it is asked about what the model writes, and about what was there."""
    known = sample_documents([str(corpus / "*.train.jsonl*")], CLASSIFIER_DOCUMENTS, subject.seed)
    classifier = drift.domain_classifier([each.text for each in known], [each.domain for each in known])
    sampling = drift.Sampling(seed=subject.seed)
    asked = _some(subject.texts, scale.prompts, subject.seed)
    asked = [text for text in asked if len(text.token_ids) >= subject.cut.prompt_tokens + sampling.num_tokens] or asked
    domains = [text.domain for text in asked]
    prompts = [text.token_ids[: subject.cut.prompt_tokens] for text in asked]
    written = tokenizer.decode_batch(drift.sample(subject.paged, prompts, sampling))
    end = subject.cut.prompt_tokens + sampling.num_tokens
    real = tokenizer.decode_batch([list(text.token_ids[subject.cut.prompt_tokens : end]) for text in asked])
    bootstrap, ones = Bootstrap(domains, seed=subject.seed), np.ones(len(asked))
    of_model = drift.recognised(classifier, written, domains)
    return {
        "documents": len(asked),
        "tokens": sampling.num_tokens,
        "temperature": sampling.temperature,
        "recognised": bootstrap.mean_over_domains(of_model, ones).to_dict(),
        "real_text": bootstrap.mean_over_domains(drift.recognised(classifier, real, domains), ones).to_dict(),
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
        right = clusters.nearest_centroid(known_NE, known_domains, means_NE, domains)
        found[f"accuracy_{name}"] = main.bootstrap.mean_over_domains(right, ones).to_dict()
    for name, method in (("whole", "future"), ("prompt", "prefill")):
        for percent in MAIN_PERCENTS:
            inside_NE = main.grid.cells[method, percent].inside_NE
            assert inside_NE is not None
            overlap = clusters.pool_overlap(inside_NE, domains)
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
    """Of a prompt of 1,000 tokens, or of as many as the context holds."""
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


def _printer(name: str) -> Callable[[str, int], None]:
    started, finished = time.monotonic(), 0

    def done(cell: str, total: int) -> None:
        nonlocal finished
        finished += 1
        console.print(f"{name}: {finished}/{total} {cell}, {time.monotonic() - started:.0f} s")

    return done
