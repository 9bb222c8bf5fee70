"""The figures as pictures, drawn without a display."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pager.lab.report import Evaluation, Figures

SMALLEST_RISE = 1e-3  # nats; what is below is drawn there, on a logarithmic axis


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
    """The figures of each method, by ascending size."""
    return {
        method: sorted((each for each in figures if each.method == method), key=lambda each: each.percent)
        for method in dict.fromkeys(each.method for each in figures)
    }


def _styles() -> Iterator[dict[str, Any]]:
    """Line styles without end; neighbours differ in colour and marker."""
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
