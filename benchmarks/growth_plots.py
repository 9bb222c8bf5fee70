"""Curves of cost over what was varied, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    values: Sequence[float]


def plot(label: str, xs: Sequence[int], curves: Sequence[Curve], path: Path) -> None:
    """A panel a curve, each from zero, so that what is proportional looks it. Overwrites `path`."""
    figure = Figure(figsize=(4.2 * len(curves), 3.6), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        axes.plot(xs, curve.values, marker="o", linewidth=1.3)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.1 * max(curve.values))
        axes.set_xticks(xs)
        axes.set_xlabel(label)
        axes.set_title(curve.name, fontsize=10)
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
