"""The promises of the project about its reference models, each with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence_facts import MAIN_PERCENTS, PASSES
from benchmarks.evidence_measure import Measured
from pager.lab.report import Evaluation, Interval

LEAST_RISE = 1e-3  # nats: what is less counts as this much when another is held against it


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise and its figure.

    `unit` is how figures are written; `bound` is the most, or with `at_least` the least, that may be measured.
    """

    at: str
    says: str
    measured: Interval | None  # None where it could not be measured
    bound: float
    unit: str = "{:.3f}"
    at_least: bool = False

    @property
    def short_by(self) -> float | None:
        """The amount that is missing; 0 or less where the promise holds."""
        if self.measured is None:
            return None
        return self.bound - self.measured.mean if self.at_least else self.measured.mean - self.bound

    @property
    def verdict(self) -> str:
        if self.short_by is None:
            return "not measured"
        return "holds" if self.short_by <= 0 else f"**short by {self.unit.format(self.short_by)}**"

    @property
    def figure(self) -> str:
        if self.measured is None:
            return "-"
        mean, low, high = (
            self.unit.format(value) for value in (self.measured.mean, self.measured.low, self.measured.high)
        )
        return mean if low == mean == high else f"{mean} [{low}, {high}]"


def all_claims(emo: Measured, std: Measured, others: Sequence[Claim] = ()) -> list[Claim]:
    return [
        *_full_models(emo, std),
        *[claim for percent in MAIN_PERCENTS for claim in _rises(emo.main, std.main, percent)],
        *_routing_passes(emo),
        *_named_pools(emo.main),
        *_specialisation(emo),
        *others,
        *_selection(emo.main),
    ]


def best_pass(evaluation: Evaluation, percent: float) -> str:
    """The routing-only pass whose pools lose least."""
    there = [source for source in PASSES if (source, percent) in evaluation.grid.cells]
    return min(there, key=lambda source: evaluation.rise_replicates(source, percent)[0])


def _full_models(emo: Measured, std: Measured) -> list[Claim]:
    ours, ours_M = emo.main.bootstrap.replicates(emo.main.grid.full.nats_N, emo.main.tokens_N)
    theirs, theirs_M = std.main.bootstrap.replicates(std.main.grid.full.nats_N, std.main.tokens_N)
    worse = Interval.of(ours / theirs - 1, ours_M / theirs_M - 1)
    at = "full models"
    claims = [Claim(at, "emo-tiny's loss above stdmoe-tiny's, at most 3 %", worse, 0.03, "{:+.1%}")]
    for name, measured in (("emo-tiny", emo), ("stdmoe-tiny", std)):
        recognised = Interval(**measured.facts["continuations"]["recognised"])
        says = f"{name}'s continuations that naive Bayes gives to the prompt's domain, at least 80 %"
        claims.append(Claim(at, says, recognised, 0.8, "{:.1%}", at_least=True))
    return claims


def _rises(emo: Evaluation, std: Evaluation, percent: float) -> list[Claim]:
    at = f"{percent:g} % of the experts"
    most_prefill, most_best, times = {25.0: (0.05, 0.03, 8), 12.5: (0.15, 0.10, 5)}[percent]
    best, best_std = best_pass(emo, percent), best_pass(std, percent)
    claims = [
        Claim(
            at,
            f"emo-tiny, prefill: rise of at most {most_prefill:g} nats",
            _rise(emo, "prefill", percent),
            most_prefill,
        ),
        Claim(
            at,
            f"emo-tiny, best routing-only pass (`{best}`): at most {most_best:g}",
            _rise(emo, best, percent),
            most_best,
        ),
        Claim(
            at,
            f"stdmoe-tiny, prefill, at least {times} times as much",
            _times((std, "prefill"), (emo, "prefill"), percent),
            times,
            "{:.1f}",
            at_least=True,
        ),
        Claim(
            at,
            f"stdmoe-tiny, best pass (`{best_std}`), at least {times} times as much",
            _times((std, best_std), (emo, best), percent),
            times,
            "{:.1f}",
            at_least=True,
        ),
    ]
    if percent != 12.5:
        return claims
    claims.append(
        Claim(
            at, f"emo-tiny, `{best}` minus `calibrated` offline: at most 0", minus(emo, best, "calibrated", percent), 0
        )
    )
    for method in ("random", "frequency"):
        says = f"emo-tiny, `{method}`, at least 3 times the rise of the prefill's pool"
        measured = _times((emo, method), (emo, "prefill"), percent)
        claims.append(Claim(at, says, measured, 3, "{:.1f}", at_least=True))
    return claims


def _routing_passes(emo: Measured) -> list[Claim]:
    at, passes, claims = "routing-only passes", emo.facts["passes"], []
    for percent in MAIN_PERCENTS:
        recall = Interval(**passes[f"trunk_{percent:g}"]["recall"])
        says = f"trunk at {percent:g} %: recall of the prefill's pool at least 0.85"
        claims.append(Claim(at, says, recall, 0.85, at_least=True))
    for percent in MAIN_PERCENTS:
        says = f"lexical minus prefill at {percent:g} %: below 0 nats"
        claims.append(Claim(at, says, minus(emo.main, "lexical", "prefill", percent), 0))
    seconds = emo.facts["speed"].get("lexical")
    ms = None if seconds is None else Interval(seconds * 1e3, seconds * 1e3, seconds * 1e3)
    says = f"lexical: {emo.facts['speed']['tokens']} tokens in at most 0.3 ms on one core"
    claims.append(Claim(at, says, ms, 0.3, "{:.2f} ms"))
    for percent in MAIN_PERCENTS:
        others = [source for source in PASSES[:2] if (source, percent) in emo.main.grid.cells]
        rival = min(others, key=lambda source: emo.main.rise_replicates(source, percent)[0])
        says = f"fitted minus the better of the others (`{rival}`) at {percent:g} %: at most 0"
        claims.append(Claim(at, says, minus(emo.main, "fitted", rival, percent), 0))
    for name, found in passes.items():
        source, _, percent_text = name.partition("_")
        error = Interval(**found["estimate_error"]) if "estimate_error" in found else None
        says = f"{source} at {percent_text} %: mean error of the recall estimate at most 0.05"
        claims.append(Claim(at, says, error, 0.05))
    return claims


def _named_pools(emo: Evaluation) -> list[Claim]:
    says = "one example of the domain minus the pool of the prompt's own prefill at {:g} %: at most 0"
    return [
        Claim("named pools", says.format(percent), minus(emo, "named", "prefill", percent), 0)
        for percent in MAIN_PERCENTS
    ]


def _specialisation(emo: Measured) -> list[Claim]:
    at, facts = "specialisation", emo.facts["specialisation"]
    claims = [
        Claim(
            at,
            "emo-tiny: nearest-centroid accuracy of the domain from gate probabilities at least 0.90",
            Interval(**facts["accuracy_whole"]),
            0.9,
            at_least=True,
        )
    ]
    for percent in MAIN_PERCENTS:
        overlap = facts[f"overlap_whole_{percent:g}"]
        times = overlap["same"] / max(overlap["cross"], 1e-12)
        says = f"emo-tiny: pools of {percent:g} % overlap within a domain at least 3 times as much as across"
        claims.append(Claim(at, says, Interval(times, times, times), 3, "{:.2f}", at_least=True))
    return claims


def _selection(emo: Evaluation) -> list[Claim]:
    claims = []
    for percent in MAIN_PERCENTS:
        difference = minus(emo, "greedy", "easy-ep", percent)
        if difference is not None and difference.mean < 0:
            difference = Interval(-difference.mean, -difference.high, -difference.low)
        says = f"emo-tiny: greedy layerwise and EASY-EP at {percent:g} % apart by at most 0.02 nats"
        claims.append(Claim("selection methods", says, difference, 0.02))
    return claims


def _rise(evaluation: Evaluation, method: str, percent: float) -> Interval | None:
    found = evaluation.find(method, percent)
    return None if found is None else found.rise


def minus(evaluation: Evaluation, one: str, other: str, percent: float) -> Interval | None:
    """The rise of one method less that of another; None where one of them was not measured."""
    cells = evaluation.grid.cells
    if (one, percent) not in cells or (other, percent) not in cells:
        return None
    difference_N = cells[one, percent].nats_N - cells[other, percent].nats_N
    return evaluation.bootstrap.mean_over_domains(difference_N, evaluation.tokens_N)


def _times(one: tuple[Evaluation, str], other: tuple[Evaluation, str], percent: float) -> Interval | None:
    """Quotient of two rises; both models saw the same documents in the same resamples.

    The lower one counts as LEAST_RISE where it is less, or even a gain, so that the quotient is never made large by it.
    """
    if any((method, percent) not in evaluation.grid.cells for evaluation, method in (one, other)):
        return None
    (above, above_M), (below, below_M) = (
        evaluation.rise_replicates(method, percent) for evaluation, method in (one, other)
    )
    return Interval.of(above / max(below, LEAST_RISE), above_M / np.maximum(below_M, LEAST_RISE))
