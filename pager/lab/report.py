"""Evaluations: from a checkpoint to figures with intervals, as one JSON object, Markdown tables and plots."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from pager.cache.index import CacheIndex, make_policy
from pager.lab.corpus import EvaluationAsk, Subject, Text, digest_of, open_subject
from pager.lab.methods import (
    BY_LAYER,
    FULL,
    METHODS,
    Cell,
    CellStore,
    Grid,
    conditions_of,
    methods_for,
    predicted_tokens,
    run_grid,
    unpack_pools,
)
from pager.memory import format_bytes
from pager.types import ExpertPool


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the bounds of its central 95 %."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, replicates_M: np.ndarray) -> Interval:
        low, high = np.percentile(replicates_M, (2.5, 97.5))
        return cls(float(mean), float(low), float(high))

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


class Bootstrap:
    """Resamples of the documents, the same for every quantity: differences and quotients are paired by document."""

    def __init__(self, domains: Sequence[str], *, resamples: int = 1000, seed: int = 0) -> None:
        """Draws the resamples. `domains` [N] names each document's domain."""
        random = np.random.default_rng(seed)
        of_document = np.asarray(domains)
        self.domains = sorted(set(domains))
        self._index_of = {domain: np.flatnonzero(of_document == domain) for domain in self.domains}
        self._draws_MN = {
            domain: random.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples).astype(float)
            for domain, index in self._index_of.items()
        }

    def of_domain(self, domain: str, values_N: np.ndarray, weights_N: np.ndarray) -> Interval:
        """Returns the sum of the values over the sum of the weights, of this domain's documents."""
        return Interval.of(*self._ratio(domain, values_N, weights_N))

    def mean_over_domains(self, values_N: np.ndarray, weights_N: np.ndarray) -> Interval:
        """Returns the plain mean over the domains of what `of_domain` returns."""
        return Interval.of(*self.replicates(values_N, weights_N))

    def replicates(self, values_N: np.ndarray, weights_N: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the mean over domains, and its resamples [M], for quantities made of several such means."""
        ratios = [self._ratio(domain, values_N, weights_N) for domain in self.domains]
        mean = float(np.mean([ratio for ratio, _ in ratios]))
        return mean, np.mean([replicates for _, replicates in ratios], axis=0)

    def _ratio(self, domain: str, values_N: np.ndarray, weights_N: np.ndarray) -> tuple[float, np.ndarray]:
        index, draws = self._index_of[domain], self._draws_MN[domain]
        values, weights = np.asarray(values_N, float)[index], np.asarray(weights_N, float)[index]
        return float(values.sum() / weights.sum()), (draws @ values) / (draws @ weights)


def experts_read(pools: Sequence[ExpertPool], num_slots: int, policy: str = "lru") -> list[int]:
    """Returns the number of experts that each pool finds missing, when each is released before the next is taken.

    `num_slots` holds the largest pool. Starts empty.
    """
    index = CacheIndex(num_slots, make_policy(policy))
    read = []
    for pool in pools:
        keys = pool.keys()
        plan = index.plan(keys)
        assert plan is not None, f"a pool of {len(keys)} experts and {num_slots} slots"
        index.commit(plan)
        for load in plan.loads:
            index.installed(load.key)
        for key in keys:
            index.unpin(key)
        read.append(len(plan.loads))
    return read


SCHEMA = "expert-pager/evaluation/1"
NOTHING = "-"
SHARED_OUT = "; the same bytes shared out over layers"


@dataclass(frozen=True, slots=True)
class DomainFigures:
    loss: float
    rise: Interval
    agreement: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one method at one size, means over domains of means over their tokens, in nats a token.

    `rise` is the loss minus the full model's on the same documents. `bytes_paged` a document: what a cache of the
    largest pool's size reads when the documents come in a shuffled order.
    """

    method: str
    percent: float
    loss: Interval
    rise: Interval
    agreement: Interval
    experts_kept: float
    bytes_resident: float
    bytes_paged: float
    domains: dict[str, DomainFigures]


class Evaluation:
    """All figures of one model on some documents."""

    def __init__(self, name: str, subject: Subject, grid: Grid, *, resamples: int, seed: int) -> None:
        self.name = name
        self.grid = grid
        self.seed = seed
        self.resamples = resamples
        self.subject = subject
        self.tokens_N = predicted_tokens(subject.texts, subject.cut.prompt_tokens)
        self.bootstrap = Bootstrap([text.domain for text in subject.texts], resamples=resamples, seed=seed)
        self.full = self._figures(FULL, 100.0, grid.full)
        self.figures = [self._figures(method, percent, cell) for (method, percent), cell in grid.cells.items()]

    def find(self, method: str, percent: float) -> Figures | None:
        return next((each for each in self.figures if (each.method, each.percent) == (method, percent)), None)

    def rise_replicates(self, method: str, percent: float) -> tuple[float, np.ndarray]:
        """Returns the rise and its resamples, to be compared with another's."""
        cell = self.grid.cells[method, percent]
        return self.bootstrap.replicates(cell.nats_N - self.grid.full.nats_N, self.tokens_N)

    def pools(self, method: str, percent: float) -> list[ExpertPool]:
        inside_NE = self.grid.cells[method, percent].inside_NE
        assert inside_NE is not None
        return unpack_pools(inside_NE, self.subject.facts.routed_per_layer)

    def _figures(self, method: str, percent: float, cell: Cell) -> Figures:
        bootstrap, tokens_N = self.bootstrap, self.tokens_N
        rises_N = cell.nats_N - self.grid.full.nats_N
        domains = {
            domain: DomainFigures(
                bootstrap.of_domain(domain, cell.nats_N, tokens_N).mean,
                bootstrap.of_domain(domain, rises_N, tokens_N),
                bootstrap.of_domain(domain, cell.agreed_N, tokens_N).mean,
            )
            for domain in bootstrap.domains
        }
        kept, resident, paged = self._memory(cell)
        return Figures(
            method,
            percent,
            bootstrap.mean_over_domains(cell.nats_N, tokens_N),
            bootstrap.mean_over_domains(rises_N, tokens_N),
            bootstrap.mean_over_domains(cell.agreed_N, tokens_N),
            kept,
            resident,
            paged,
            domains,
        )

    def _memory(self, cell: Cell) -> tuple[float, float, float]:
        """Returns means per document: the routed experts kept, bytes of experts resident and bytes paged."""
        plan, facts = self.subject.paged.plan, self.subject.facts
        routed = sum(facts.routed_per_layer)
        order = np.random.default_rng(self.seed).permutation(len(self.tokens_N))
        if cell.inside_NE is None:
            kept, read = float(routed), routed / len(order)
        else:
            pools = unpack_pools(cell.inside_NE[order], facts.routed_per_layer)
            kept = float(cell.inside_NE.sum(1).mean())
            read = float(np.mean(experts_read(pools, max(pool.num_experts for pool in pools))))
        return kept, plan.resident_bytes + kept * plan.expert_bytes, read * plan.expert_bytes


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the content of the JSON file."""
    subject = evaluation.subject
    plan = subject.paged.plan
    texts = subject.texts
    return {
        "schema": SCHEMA,
        "model": {
            "name": evaluation.name,
            "fingerprint": subject.paged.fingerprint,
            "model_type": subject.paged.family.model_type,
            "dtype": str(subject.paged.dtype).removeprefix("torch."),
            "experts_per_layer": list(subject.facts.experts_per_layer),
            "shared_per_layer": list(subject.facts.shared_per_layer),
            "top_k_per_layer": list(subject.facts.top_k_per_layer),
            "expert_bytes": plan.expert_bytes,
            "trunk_bytes": plan.trunk_bytes,
        },
        "conditions": {
            "documents": len(texts),
            "documents_digest": digest_of(texts),
            "predicted_tokens": int(evaluation.tokens_N.sum()),
            "prompt_tokens": subject.cut.prompt_tokens,
            "context_tokens": subject.cut.context_tokens,
            "seed": evaluation.seed,
            "bootstrap_resamples": evaluation.resamples,
            "domains": {
                domain: sum(text.domain == domain for text in texts) for domain in evaluation.bootstrap.domains
            },
        },
        "results": [_figures_dict(figures) for figures in (evaluation.full, *evaluation.figures)],
        "left_out": [
            {"method": method, "percent": percent, "why": why}
            for (method, percent), why in evaluation.grid.left_out.items()
        ],
    }


def to_markdown(evaluation: Evaluation) -> str:
    """Returns the report in Markdown: rises by method and size, agreement and memory, losses by domain."""
    return (
        "\n\n".join(
            [
                f"# {evaluation.name}",
                _conditions(evaluation),
                rise_table([evaluation]),
                _agreement_table(evaluation),
                _memory_table(evaluation),
                _domain_table(evaluation),
                _legend(evaluation),
            ]
        )
        + "\n"
    )


def rise_table(evaluations: Sequence[Evaluation]) -> str:
    """Returns a table of the rise of the loss in nats a token with its 95 % interval, a row a method, a column a
    size.
    """
    rows = []
    for evaluation in evaluations:
        for method in _methods(evaluation):
            name = f"{evaluation.name}: {method}" if len(evaluations) > 1 else method
            found = [evaluation.find(method, percent) for percent in _percents(evaluations)]
            rows.append([name, *(NOTHING if each is None else _with_interval(each.rise) for each in found)])
    return table(["rise of the loss at", *(f"{percent:g} %" for percent in _percents(evaluations))], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown, its first column text and the others figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _conditions(evaluation: Evaluation) -> str:
    subject = evaluation.subject
    full = evaluation.full
    return (
        f"{len(subject.texts)} documents of {len(subject.domains)} domains, {int(evaluation.tokens_N.sum())} tokens "
        f"predicted after prompts of {subject.cut.prompt_tokens}, documents cut at {subject.cut.context_tokens}; "
        f"{str(subject.paged.dtype).removeprefix('torch.')}. Loss with all experts {_with_interval(full.loss)} nats a "
        f"token: means over each domain's tokens, then over domains; in brackets the central 95 % of "
        f"{evaluation.resamples} resamples of the documents."
    )


def _agreement_table(evaluation: Evaluation) -> str:
    percents = _percents([evaluation])
    rows = []
    for method in _methods(evaluation):
        found = [evaluation.find(method, percent) for percent in percents]
        rows.append([method, *(NOTHING if each is None else f"{each.agreement.mean:.1%}" for each in found)])
    return table(["likeliest token is the full model's, at", *(f"{percent:g} %" for percent in percents)], rows)


def _memory_table(evaluation: Evaluation) -> str:
    percents = _percents([evaluation])
    rows = []
    for method in _methods(evaluation):
        found = [evaluation.find(method, percent) for percent in percents]
        figures = [
            NOTHING
            if each is None
            else f"{format_bytes(round(each.bytes_resident))} / {format_bytes(round(each.bytes_paged))}"
            for each in found
        ]
        rows.append([method, *figures])
    return table(["experts in memory / read a document, at", *(f"{percent:g} %" for percent in percents)], rows)


def _domain_table(evaluation: Evaluation) -> str:
    columns = evaluation.figures
    header = ["domain", "loss, all experts", *(f"{each.method} {each.percent:g} %" for each in columns)]
    rows = [
        [domain, f"{evaluation.full.domains[domain].loss:.3f}"]
        + [f"{each.domains[domain].rise.mean:+.3f}" for each in columns]
        for domain in evaluation.bootstrap.domains
    ]
    return table(header, rows)


def _legend(evaluation: Evaluation) -> str:
    said = [(method, METHODS[method.removesuffix(BY_LAYER)].says) for method in _methods(evaluation)]
    lines = [
        f"- `{method}`: chosen by {says}{SHARED_OUT if method.endswith(BY_LAYER) else ''}" for method, says in said
    ]
    lines += [
        f"- left out: `{method}` at {percent:g} %: {why}" for (method, percent), why in evaluation.grid.left_out.items()
    ]
    return "\n".join(lines)


def _methods(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(each.method for each in evaluation.figures))


def _percents(evaluations: Sequence[Evaluation]) -> list[float]:
    return sorted({each.percent for evaluation in evaluations for each in evaluation.figures}, reverse=True)


def _with_interval(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _figures_dict(figures: Figures) -> dict[str, Any]:
    return {
        "method": figures.method,
        "percent": figures.percent,
        "loss": figures.loss.to_dict(),
        "rise": figures.rise.to_dict(),
        "agreement": figures.agreement.to_dict(),
        "routed_experts_kept": figures.experts_kept,
        "bytes_resident": round(figures.bytes_resident),
        "bytes_paged": round(figures.bytes_paged),
        "domains": {
            domain: {"loss": each.loss, "rise": each.rise.to_dict(), "agreement": each.agreement}
            for domain, each in figures.domains.items()
        },
    }


# --- from a checkpoint to its report --------------------------------------------------------------------------------


def evaluate(
    ask: EvaluationAsk,
    tokenizer: Tokenizer,
    cells: Path | None = None,
    *,
    done: Callable[[str, int], None] = lambda *_: None,
) -> Evaluation:
    """Opens the model and measures it. `cells` is a folder that keeps results for another try.

    `done` is called with each cell's name and the number of cells.

    Raises InvalidRequest, CheckpointError, BudgetError, ExpertUnavailable.
    """
    with open_subject(ask, tokenizer) as (subject, calibration):
        return evaluate_subject(ask, subject, calibration, cells, done=done)


def evaluate_subject(
    ask: EvaluationAsk,
    subject: Subject,
    calibration: Sequence[Text],
    cells: Path | None = None,
    *,
    done: Callable[[str, int], None] = lambda *_: None,
) -> Evaluation:
    """Measures a subject that is open already."""
    methods = methods_for(subject, ask.methods)
    store = CellStore(cells, conditions_of(subject, calibration))
    total = 1 + len(methods) * sum(percent < 100 for percent in ask.percents)
    grid = run_grid(subject, methods, ask.percents, store, done=lambda name: done(name, total))
    return Evaluation(ask.model.resolve().name, subject, grid, resamples=ask.resamples, seed=ask.seed)


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes `evaluation.json`, `evaluation.md` and plots into a folder that exists."""
    written = [folder / "evaluation.json", folder / "evaluation.md"]
    written[0].write_text(json.dumps(to_dict(evaluation), indent=1) + "\n", encoding="utf-8")
    plots = write_plots(evaluation, folder)
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in plots)
    written[1].write_text(f"{to_markdown(evaluation)}\n{pictures}\n", encoding="utf-8")
    return [*written, *plots]


# --- plots ------------------------------------------------------------------------------------------------------------


SMALLEST_RISE = 1e-3  # nats; smaller values are drawn there, on a logarithmic axis


def write_plots(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draws PNGs: rise against size, against bytes read, and by domain. Nothing where there is the full model only."""
    if not evaluation.figures:
        return []
    return [
        plot_rises([(evaluation.name, evaluation.figures)], folder / "rise.png"),
        plot_paging(evaluation.name, evaluation.figures, folder / "paging.png"),
        plot_domains(evaluation, folder / "domains.png"),
    ]


def plot_rises(panels: Sequence[tuple[str, Sequence[Figures]]], path: Path) -> Path:
    """Draws a panel a model: rise of the loss against the share of experts kept, a line a method, with intervals."""
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, figures) in zip(all_axes, panels, strict=True):
        for style, (method, found) in zip(_styles(), _by_method(figures).items(), strict=False):
            rise, low, high = (
                np.maximum([getattr(each.rise, bound) for each in found], SMALLEST_RISE)
                for bound in ("mean", "low", "high")
            )
            errors = [rise - np.minimum(low, rise), np.maximum(high, rise) - rise]
            percents = [each.percent for each in found]
            axes.errorbar(percents, rise, yerr=errors, label=method, capsize=2, linewidth=1.3, markersize=4, **style)
        _label(axes, name, "experts kept, % of a layer")
        axes.set_xscale("log")
        ticks = sorted({each.percent for each in figures})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    return _save(figure, path)


def plot_paging(name: str, figures: Sequence[Figures], path: Path) -> Path:
    """Draws the loss of a document against its bytes read: down and left is better."""
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for style, (method, found) in zip(_styles(), _by_method(figures).items(), strict=False):
        rise = np.maximum([each.rise.mean for each in found], SMALLEST_RISE)
        read = [each.bytes_paged / 2**20 for each in found]
        axes.plot(read, rise, label=method, linewidth=1.3, markersize=4, **style)
    _label(axes, f"{name}: a cache of one pool's size", "expert bytes read a document, MiB")
    return _save(figure, path)


def plot_domains(evaluation: Evaluation, path: Path) -> Path:
    """Draws a heat map of the rise by domain, a column a method and size."""
    domains, columns = evaluation.bootstrap.domains, evaluation.figures
    rises = np.array([[each.domains[domain].rise.mean for each in columns] for domain in domains])
    figure = Figure(figsize=(2 + 0.42 * len(columns), 1.8 + 0.3 * len(domains)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.clip(rises, 0, 0.3), aspect="auto", cmap="viridis_r")
    axes.set_xticks(
        range(len(columns)), [f"{each.method} {each.percent:g}" for each in columns], rotation=90, fontsize=7
    )
    axes.set_yticks(range(len(domains)), domains, fontsize=8)
    axes.set_title(evaluation.name, fontsize=10)
    figure.colorbar(image, label="rise, nats a token (0.3 and more alike)")
    return _save(figure, path)


def _by_method(figures: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Returns the figures of each method, by ascending size."""
    return {
        method: sorted((each for each in figures if each.method == method), key=lambda each: each.percent)
        for method in dict.fromkeys(each.method for each in figures)
    }


def _styles() -> Iterator[dict[str, Any]]:
    """Yields line styles without end; neighbours differ in colour and marker."""
    colours = mpl.colormaps["tab10"]
    for number in itertools.count():
        yield {"color": colours(number % 10), "marker": "os^vD<>pPX"[number % 10], "linestyle": "-:"[number // 10 % 2]}


def _label(axes: Any, title: str, x: str) -> None:
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel("rise of the loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
