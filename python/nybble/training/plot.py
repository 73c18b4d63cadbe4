"""The loss plot. matplotlib is imported here and nowhere else, and drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def plot_loss(
    losses: Sequence[float], evaluations: Sequence[tuple[int, float]], path: str | Path, title: str = "Training loss"
) -> Path:
    """Draw the loss of each step (1 is the first) and the evaluations [(step, mean loss)] into a PNG file.

    Losses are natural-log cross-entropy a token. Raises ImportError, saying what to install, without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the loss plot needs matplotlib: pip install 'nybble[plot]', or plot=False") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="#9db4d0", linewidth=1, label="training, each step")
    axes.plot(range(1, len(losses) + 1), _smooth(losses), color="#1f4e8c", linewidth=2, label="training, running mean")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="#c0392b", linewidth=1.5, label="held out")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed
