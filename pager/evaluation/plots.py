"""The figures as pictures, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pager.evaluation.report import Evaluation, Figures

SMALLEST_RISE = 1e-3  # nats; what is below is drawn there, on a logarithmic axis


def write_plots(evaluation: Evaluation, folder: Path) -> list[Path]:
    """PNGs: rise against size, rise against bytes read, rise by domain. Nothing where there is only the full model."""
    if not evaluation.figures:
        return []
    return [
        plot_rises([evaluation], folder / "rise.png"),
        plot_paging(evaluation, folder / "paging.png"),
        plot_domains(evaluation, folder / "domains.png"),
    ]


def plot_rises(evaluations: Sequence[Evaluation], path: Path) -> Path:
    """A panel a model: rise of the loss against the share of experts kept, a line a method, with intervals."""
    figure = Figure(figsize=(6.5 * len(evaluations), 5), layout="constrained")
    panels = figure.subplots(1, len(evaluations), squeeze=False, sharey=True)[0]
    for axes, evaluation in zip(panels, evaluations, strict=True):
        for style, (method, found) in zip(_styles(evaluation), _by_method(evaluation), strict=True):
            rise = np.maximum([each.rise.mean for each in found], SMALLEST_RISE)
            low = np.maximum([each.rise.low for each in found], SMALLEST_RISE)
            high = np.maximum([each.rise.high for each in found], SMALLEST_RISE)
            percents = [each.percent for each in found]
            axes.errorbar(percents, rise, yerr=[rise - np.minimum(low, rise), np.maximum(high, rise) - rise],
                          label=method, capsize=2, linewidth=1.3, markersize=4, **style)  # fmt: skip
        _logarithmic(axes, "experts kept, % of a layer", "rise of the loss, nats a token")
        ticks = sorted({each.percent for each in evaluation.figures})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(evaluation.name)
        axes.legend(fontsize=8)
    return _save(figure, path)


def plot_paging(evaluation: Evaluation, path: Path) -> Path:
    """What a document costs in bytes read against what it costs in loss: down and left is better."""
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for style, (method, found) in zip(_styles(evaluation), _by_method(evaluation), strict=True):
        rise = np.maximum([each.rise.mean for each in found], SMALLEST_RISE)
        axes.plot(
            [each.bytes_paged / 2**20 for each in found], rise, label=method, linewidth=1.3, markersize=4, **style
        )
    _logarithmic(axes, "expert bytes read a document, MiB", "rise of the loss, nats a token")
    axes.set_xscale("linear")
    axes.set_title(f"{evaluation.name}: a cache of one pool's size")
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_domains(evaluation: Evaluation, path: Path) -> Path:
    """Heat map: rise by domain, a column a method and size."""
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


def _by_method(evaluation: Evaluation) -> list[tuple[str, list[Figures]]]:
    methods = dict.fromkeys(each.method for each in evaluation.figures)
    return [(method, [each for each in evaluation.figures if each.method == method]) for method in methods]


def _styles(evaluation: Evaluation) -> list[dict[str, Any]]:
    markers, colours = "os^vD<>pPX*h", mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    return [
        {"marker": markers[index % len(markers)], "color": colours[(2 * index) % 20 + (2 * index) // 20 % 2]}
        for index in range(len(_by_method(evaluation)))
    ]


def _logarithmic(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
