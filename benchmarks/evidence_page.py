"""docs/evidence.md from what was measured: nothing in it is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence_claims import LEAST_RISE, Claim
from benchmarks.evidence_measure import Measured
from pager.lab.methods import BY_LAYER, METHODS
from pager.lab.report import Evaluation, rise_table, table
from pager.memory import format_bytes


def page(emo: Measured, std: Measured, claims: Sequence[Claim], others: Mapping[str, str], command: str) -> str:
    """Markdown; pictures are beside it in `evidence/`. `others` are sections by heading."""
    short = sum(claim.short_by is None or claim.short_by > 0 for claim in claims)
    sections = [
        "# Evidence",
        f"Written by `{command}`; do not edit. Can a pool of experts be chosen from each prompt alone, and the "
        "answer's quality be kept? Measured on the two reference models, which differ in one thing: `emo-tiny` was "
        "trained with document pools, `stdmoe-tiny` without.",
        "A rise is the loss after the prompt under a pool minus the loss with all experts, in nats a token. In "
        "brackets the central 95 % of resamples of the documents; what compares two things resamples both together. "
        f"A promise is judged by the mean; where one rise is held against another, less than {LEAST_RISE:g} counts as "
        "that much.",
        "## Claims and verdicts",
        f"{len(claims) - short} of {len(claims)} hold.",
        _claims(claims),
        "That every selection method gives the scores and sets that the authors' code gives is a test: "
        "`tests/library/test_library_probe.py` and `tests/models/test_emo_picking.py`.",
        "## Rise of the loss by method and size",
        "![rise](evidence/rise.png)",
        f"On {len(emo.main.subject.texts)} documents (50 and 6.25 % in the plot on {len(emo.side.subject.texts)}):",
        rise_table([emo.main, std.main]),
        f"Other sizes, on {len(emo.side.subject.texts)} of the documents:",
        rise_table([emo.side, std.side]),
        _methods(emo.main),
        "## Memory and reads saved",
        "Experts in memory, and what a cache of just that size reads from one document to the next when domains come "
        "mixed (least recently used goes first).",
        "![paging](evidence/paging.png)",
        _memory(emo),
        "## Pool sizes chosen by layer",
        "The same bytes, shared out over the layers by where they bring most gate mass into the pool "
        f"(`{BY_LAYER}`), against as many experts in every layer; {len(emo.layered.subject.texts)} documents.",
        rise_table([emo.layered, std.layered]),
        "## Predictors",
        _passes([emo, std]),
        "## Domains",
        "![domains](evidence/domains-emo-tiny.png)",
        _domains(emo, std),
        _specialisation([emo, std]),
    ]
    sections += [part for heading, text in others.items() for part in (f"## {heading}", text)]
    sections += ["## Conditions", _conditions([emo, std])]
    return "\n\n".join(section for section in sections if section) + "\n"


def _claims(claims: Sequence[Claim]) -> str:
    return table(
        ["at", "must hold", "measured", "verdict"],
        [[claim.at, claim.says, claim.figure, claim.verdict] for claim in claims],
    )


def _methods(evaluation: Evaluation) -> str:
    there = dict.fromkeys(each.method for each in evaluation.figures)
    return "Chosen by\n\n" + "\n".join(f"- `{name}`: {METHODS[name].says}" for name in there)


def _memory(measured: Measured) -> str:
    found = {(each.method, each.percent): each for each in (*measured.side.figures, *measured.main.figures)}
    percents = sorted({percent for _, percent in found}, reverse=True)
    resident = [format_bytes(round(found["prefill", percent].bytes_resident)) for percent in percents]
    rows = [["in memory", *resident]]
    for method in dict.fromkeys(method for method, _ in found):
        paged = [found.get((method, percent)) for percent in percents]
        rows.append(
            [f"read, {method}", *("-" if each is None else format_bytes(round(each.bytes_paged)) for each in paged)]
        )
    full = measured.main.full
    header = [f"of {format_bytes(round(full.bytes_resident))} of experts", *(f"{percent:g} %" for percent in percents)]
    return table(header, rows)


def _passes(models: Sequence[Measured]) -> str:
    rows = []
    for measured in models:
        speed = measured.facts["speed"]
        for name, found in measured.facts["passes"].items():
            source, _, percent = name.partition("_")
            seconds = speed.get(source)
            rows.append(
                [
                    f"{measured.main.name}: {source} at {percent} %",
                    _interval(found["recall"]),
                    _interval(found["estimate_error"]) if "estimate_error" in found else "-",
                    "-" if seconds is None else f"{seconds * 1e3:.2f} ms",
                ]
            )
    tokens = models[0].facts["speed"]["tokens"]
    header = ["", "recall of the prefill's pool", "mean error of its estimate", f"time for {tokens} tokens, one thread"]
    return table(header, rows)


def _domains(emo: Measured, std: Measured) -> str:
    rows = []
    for domain in emo.main.bootstrap.domains:
        row = [domain]
        for measured in (emo, std):
            row.append(f"{measured.main.full.domains[domain].loss:.3f}")
            for percent in (25.0, 12.5):
                found = measured.main.find("prefill", percent)
                row.append("-" if found is None else f"{found.domains[domain].rise.mean:+.3f}")
            row.append(f"{measured.facts['continuations']['by_domain'].get(domain, float('nan')):.0%}")
        rows.append(row)
    columns = ["loss, all experts", "prefill 25 %", "prefill 12.5 %", "continuations recognised"]
    header = ["domain", *(f"{measured.main.name}: {column}" for measured in (emo, std) for column in columns)]
    return table(header, rows)


def _specialisation(models: Sequence[Measured]) -> str:
    rows: list[list[str]] = []
    for measured in models:
        facts = measured.facts["specialisation"]
        overlaps = [facts[f"overlap_{part}_{percent}"] for part in ("whole", "prompt") for percent in ("25", "12.5")]
        rows.append(
            [
                measured.main.name,
                _interval(facts["accuracy_whole"]),
                _interval(facts["accuracy_prompt"]),
                *(f"{each['same']:.2f} / {each['cross']:.2f}" for each in overlaps),
            ]
        )
    header = [
        "",
        "domain found from the whole document's gate probabilities",
        "from the prompt's",
        *(
            f"{part}, {percent} %"
            for part in ("whole documents' pools", "prompts' pools")
            for percent in ("25", "12.5")
        ),
    ]
    said = (
        "Which domain a document belongs to, by the nearest mean (Hellinger distance) of training documents' router "
        "probabilities; and how much two documents' pools share (Jaccard), within a domain / across:"
    )
    return f"{said}\n\n{table(header, rows)}"


def _conditions(models: Sequence[Measured]) -> str:
    lines = []
    for measured in models:
        main, subject = measured.main, measured.main.subject
        written: dict[str, Any] = measured.facts["continuations"]
        lines.append(
            f"- `{main.name}`, fingerprint {subject.paged.fingerprint}, float32 on a CPU. {len(subject.texts)} "
            f"validation documents of {len(subject.domains)} domains, cut at {subject.cut.context_tokens} tokens; "
            f"{int(main.tokens_N.sum())} tokens predicted after prompts of {subject.cut.prompt_tokens}. Pools hold for "
            f"the prompt and what follows. Loss with all experts {main.full.loss.mean:.3f}."
        )
        lines.append(
            f"- its continuations: {written['documents']} of {written['tokens']} tokens, temperature "
            f"{written['temperature']:g}, all experts. The classifier names the domain of the real text there in "
            f"{written['real_text']['mean']:.1%}."
        )
    lines.append(
        f"- {models[0].main.resamples} resamples, seed {models[0].main.seed}. Losses are means over a domain's tokens, "
        "then over domains. Calibration and classifier use training documents alone."
    )
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
