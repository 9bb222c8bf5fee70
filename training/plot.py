"""Plots the training loss of one or more runs.

python -m training.plot --run RUN --run RUN-STD --to loss.png
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMOOTHING = 0.01  # of a run's steps, averaged on both sides


def plot_losses(runs: Sequence[Path], to: Path) -> None:
    """Plots next-token loss against tokens seen, one smoothed curve per run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        tokens, losses = read_losses(run / "loss.csv")
        width = max(1, round(len(losses) * SMOOTHING)) * 2 + 1
        if len(losses) < width:
            continue
        smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        middle = tokens[width // 2 : width // 2 + len(smooth)]
        axes.plot(middle / 1e6, smooth, linewidth=1, label=f"{run.name}: {smooth[-1]:.3f} at the end")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(to, dpi=110, metadata={"Software": None})


def read_losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens seen and loss of every step; a step that was run again after a resumption counts once."""
    by_tokens: dict[int, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            by_tokens[int(row["tokens"])] = float(row["loss"])
    tokens = sorted(by_tokens)
    return np.array(tokens, dtype=float), np.array([by_tokens[number] for number in tokens])


def main(
    run: Annotated[list[Path], typer.Option(help="Run folder of training.train; several make several curves.")],
    to: Annotated[Path, typer.Option(help="PNG to write.")],
) -> None:
    """Draws the training loss."""
    plot_losses(run, to)


if __name__ == "__main__":
    typer.run(main)
