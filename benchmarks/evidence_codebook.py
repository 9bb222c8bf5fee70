"""Pools that prompts share: their claims, domains that the router was not fitted to, and what it learns of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.evidence_claims import Claim, minus
from benchmarks.evidence_facts import MAIN_PERCENTS, Facts, Scale, console
from pager.engine.paged_model import load_paged_model
from pager.lab.codebook import Prompt, TrafficStream
from pager.lab.corpus import Cut, EvaluationAsk, Subject, open_subject, read_texts, sample_texts
from pager.lab.fit import fit_checkpoint
from pager.lab.report import Evaluation, Interval, evaluate_subject, table
from pager.predict.fitted import PREDICTOR_NAME, Codebook
from pager.tokenizing import encode

HELD_OUT = ("latex_math", "legal", "reviews", "rust")
METHODS = ("prefill", "codebook")
CODEWORDS = 64
FIT_DOCUMENTS, FIT_TOKENS = 960, 192
STAGES = ((0, 50), (50, 100), (100, 200))  # documents of a new domain, in the order in which they come
LOOKED_AT = 100  # documents after those, from which nothing is learned
KNOWN_BEFORE = 100  # documents of known domains that are served before the first new one


def measure_held_out(model: Path, corpus: Path, folder: Path, scale: Scale) -> Facts:
    """Measures with a router that knows nothing of some domains; once, the result is kept in `folder`.

    Without any of these domains in the corpus there is nothing to measure: an empty value.
    """
    held_out = [domain for domain in HELD_OUT if list(corpus.glob(f"{domain}.valid.jsonl*"))]
    if not held_out:
        return {}
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ask = EvaluationAsk(
        _fit_without(held_out, model, corpus, folder / "held-out-model", tokenizer),
        tuple(str(corpus / f"{domain}.valid.jsonl*") for domain in held_out),
        methods=METHODS,
        percents=MAIN_PERCENTS,
        max_documents=scale.max_documents,
    )
    path = folder / "held-out.json"
    with open_subject(ask, tokenizer) as (subject, _):
        evaluation = evaluate_subject(ask, subject, (), folder / "held-out", done=lambda *_: None)
        facts = _rises(evaluation)
        stored: Facts = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("rises") == facts["rises"]:
            return stored
        facts["covered"] = {domain: _covered(subject, domain) for domain in held_out}
        facts |= _stream(subject, corpus, tokenizer, held_out)
    path.write_text(json.dumps(facts, indent=1))
    return facts


def codebook_claims(emo: Evaluation, facts: Facts) -> list[Claim]:
    claims = []
    for percent, most in zip(MAIN_PERCENTS, (0.004, 0.010), strict=True):
        says = f"emo-tiny, `codebook` minus `lexical` at {percent:g} %: at most {most:g}"
        claims.append(Claim("codebook", says, minus(emo, "codebook", "lexical", percent), most))
        says = f"emo-tiny, `codebook` minus `prefill` at {percent:g} %: below 0"
        claims.append(Claim("codebook", says, minus(emo, "codebook", "prefill", percent), 0))
    for percent, most in zip(MAIN_PERCENTS, (0.0, 0.045), strict=True):
        found = facts.get("rises", {}).get(f"codebook_{percent:g}")
        says = f"domains held out of every fit, `codebook` at {percent:g} %: at most {most:g}"
        claims.append(Claim("codebook", says, found and Interval(**found["all"]), most))
    for domain, found in facts.get("stream", {}).items():
        says = f"after 200 documents of {domain}: at least 0.8 of its next ones share a codeword"
        share = found["after"]
        claims.append(Claim("codebook", says, Interval(share, share, share), 0.8, "{:.2f}", at_least=True))
    return claims


def codebook_section(facts: Facts) -> str:
    """The section of docs/evidence.md in Markdown."""
    domains = list(facts["covered"])
    columns = [f"{method}_{percent:g}" for percent in MAIN_PERCENTS for method in METHODS]
    rises = facts["rises"]
    rows = [
        [domain, *(f"{rises[column]['domains'][domain]:+.3f}" for column in columns), f"{facts['covered'][domain]:.0%}"]
        for domain in domains
    ]
    rows.append(["all", *(_interval(rises[column]["all"]) for column in columns), ""])
    stages = [f"{first + 1} to {last}" for first, last in STAGES]
    learned = [
        [domain, *(f"{share:.0%}" for share in found["stages"]), f"{found['after']:.0%}", f"{found['at the end']:.0%}"]
        for domain, found in facts["stream"].items()
    ]
    known = facts["known"]
    return "\n\n".join(
        [
            f"`emo-tiny` with a router whose stand-ins, maps and codewords were fitted to {facts['fit documents']} "
            f"documents of all domains but {', '.join(domains)}; rises of the loss on validation documents of these, "
            "and how many of their prompts a codeword covers.",
            table(
                ["rise of the loss", *(f"{column.replace('_', ' ')} %" for column in columns), "covered"],
                rows,
            ),
            "Then the codebook learns: training documents of one such domain after the other are served, each after "
            "one of a known domain. The share of prompts of the new domain that get a codeword's pool, as it is served "
            f"(its documents by number), of {LOOKED_AT} more documents after 200, and of these when all domains have "
            f"been served. Of prompts of known domains a codeword covers {known['before']:.0%} before and "
            f"{known['after']:.0%} at the end; {facts['codewords']} codewords were learned.",
            table(["shared", *stages, "after 200", "at the end"], learned),
        ]
    )


def _fit_without(held_out: Sequence[str], model: Path, corpus: Path, made: Path, tokenizer: Tokenizer) -> Path:
    """A folder with the model and a router that was fitted without these domains, which is done once."""
    if (made / PREDICTOR_NAME).is_file():
        return made
    made.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != PREDICTOR_NAME and not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())
    known = [str(file) for file in sorted(corpus.glob("*.train.jsonl*")) if file.name.split(".")[0] not in held_out]
    texts = sample_texts(known, FIT_DOCUMENTS, 0)
    documents = [encode(tokenizer, text, add_special_tokens=False).ids[:FIT_TOKENS] for text in texts]
    paged = load_paged_model(made, dtype="float32")
    try:
        fit_checkpoint(made, paged, documents, 0, _silently, CODEWORDS).file.save(made / PREDICTOR_NAME)
    finally:
        paged.close()
    return made


@contextmanager
def _silently(name: str, _: int) -> Iterator[Any]:
    console.print(f"held out: {name}")
    yield lambda: None


def _rises(evaluation: Evaluation) -> Facts:
    """The rises by method and size, and how much the router was fitted to."""
    rises = {
        f"{figures.method}_{figures.percent:g}": {
            "all": figures.rise.to_dict(),
            "domains": {domain: each.rise.mean for domain, each in figures.domains.items()},
        }
        for figures in evaluation.figures
    }
    file = evaluation.subject.predictor_file
    assert file is not None
    return {"rises": rises, "fit documents": int(file.facts["documents"])}


def _covered(subject: Subject, domain: str) -> float:
    """The share of the domain's prompts that a codeword covers."""
    codebook = _codebook(subject)
    pairs = zip(subject.texts, subject.predicted("lexical"), subject.predicted("trunk"), strict=True)
    prompts = [Prompt(text.domain, *scores) for text, *scores in pairs if text.domain == domain]
    return TrafficStream(codebook, subject.facts.routed_per_layer).shared(prompts)


def _stream(subject: Subject, corpus: Path, tokenizer: Tokenizer, held_out: Sequence[str]) -> Facts:
    """Serves training documents of one domain after the other, each after one of a domain that is known."""
    known_files = [str(f) for f in sorted(corpus.glob("*.train.jsonl*")) if f.name.split(".")[0] not in held_out]
    stream = TrafficStream(_codebook(subject), subject.facts.routed_per_layer)
    num_served = STAGES[-1][1]
    # Another draw than that of the documents that the router was fitted to.
    known = _prompts(subject, known_files, tokenizer, max(1, num_served * len(held_out) // 8), seed=1)
    order = np.random.default_rng(0).permutation(len(known))
    before = stream.shared([known[number] for number in order[:KNOWN_BEFORE]])
    for number in order[:KNOWN_BEFORE]:
        stream.serve(known[number])
    turns = iter(np.resize(order, num_served * len(held_out)))
    found: dict[str, Facts] = {}
    looked_at: dict[str, list[Prompt]] = {}
    for domain in held_out:
        files = [str(corpus / f"{domain}.train.jsonl*")]
        prompts = _prompts(subject, files, tokenizer, num_served + LOOKED_AT, seed=1)
        is_shared: list[float] = []
        for prompt in prompts[:num_served]:
            stream.serve(known[next(turns)])
            is_shared.append(float(stream.serve(prompt).is_covered))
        looked_at[domain] = prompts[num_served:] or prompts
        found[domain] = {
            "stages": [float(np.mean(is_shared[first:last] or [0.0])) for first, last in STAGES],
            "after": stream.shared(looked_at[domain]),
        }
    for domain, prompts in looked_at.items():
        found[domain]["at the end"] = stream.shared(prompts)
    after = stream.shared([known[number] for number in order[:KNOWN_BEFORE]])
    return {"stream": found, "known": {"before": before, "after": after}, "codewords": len(stream.learned.codewords)}


def _codebook(subject: Subject) -> Codebook:
    assert subject.predictor_file is not None, "it was fitted"
    codebook = Codebook.of(subject.predictor_file, subject.facts)
    assert codebook is not None, "it was fitted with the rest"
    return codebook


def _prompts(subject: Subject, files: Sequence[str], tokenizer: Tokenizer, of_domain: int, seed: int) -> list[Prompt]:
    """The first tokens of so many documents of each domain, scored."""
    length = subject.cut.prompt_tokens
    texts = read_texts(files, tokenizer, Cut(length, 2 * length), max_documents=of_domain, seed=seed)
    lexical, trunk = subject.router("lexical"), subject.router("trunk")
    return [Prompt(text.domain, lexical(text.token_ids[:length]), trunk(text.token_ids[:length])) for text in texts]


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
