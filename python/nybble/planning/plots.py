"""Plots of rank.json and intrinsic.json. matplotlib is imported in here and nowhere else."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import IO, Any


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names of weights with their numbers as numbers: block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _figure(width: float, height: float) -> Any:
    """An empty figure that needs no display. Raises ImportError saying what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'nybble[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path | IO[bytes]) -> None:
    """As the file's ending says (.svg, .png, .pdf); SVG into a stream. The same figure gives the same bytes."""
    import matplotlib

    ending = "svg" if not isinstance(path, str | os.PathLike) else Path(path).suffix.lstrip(".") or "svg"
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nybble"}):
        metadata = {"Date": None} if ending == "svg" else None
        figure.savefig(buffer, format=ending, dpi=120, metadata=metadata)
    if not isinstance(path, str | os.PathLike):
        path.write(buffer.getvalue())
        return
    from ..checkpoint.writer import Staging

    target = Path(path)
    with Staging(target.parent) as staging:
        staging.write(target.name, buffer.getvalue())
        staging.commit()


def plot_spectra(report: dict[str, Any], path: str | Path | IO[bytes]) -> None:
    """Singular values by kind of layer, and how much of the rank keeps 90% of the energy, block by block.

    Left: the median over a kind's layers of every singular value, relative to the layer's largest, over its place as a
    share of the full rank. Right: rank_90 of every layer, in the order of the blocks; the dashed lines are the full
    ranks.

    Args:
        report: what rank.json holds. path: a file (.svg, .png, .pdf), or a binary stream for SVG.

    Raises:
        ValueError: the report has no changed weight.
        ImportError: matplotlib is missing; says what to install.
    """
    if not report["layers"]:
        raise ValueError("report: no weight changed, there is nothing to plot")
    figure = _figure(11, 4.6)
    import matplotlib

    left, right = figure.subplots(1, 2)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(report["layers"], key=lambda row: in_order(row["name"])):
        groups.setdefault(row["kind"], []).append(row)
    colors = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"]
    for index, (kind, rows) in enumerate(groups.items()):
        color = colors(index % colors.N)
        places, medians = _median_curve([row["singular_values"] for row in rows])
        left.plot(places, medians, color=color, linewidth=1.6, label=kind)
        right.plot(range(len(rows)), [row["rank_90"] for row in rows], "o-", color=color, markersize=3, label=kind)
    left.set(
        xlabel="place, share of the full rank", ylabel="singular value, share of the largest", yscale="log",
        title="singular values of what training changed",
    )  # fmt: skip
    left.set_xscale("log")
    left.set_ylim(bottom=max(1e-6, left.get_ylim()[0]), top=1.3)
    for full in sorted({min(row["shape"]) for row in report["layers"]}):
        right.axhline(full, color="0.6", linewidth=0.8, linestyle="--")
    right.set(
        xlabel="layer of its kind", ylabel="rank", yscale="log", title="rank that keeps 90% of the energy"
    )  # fmt: skip
    right.set_ylim(bottom=0.9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def _median_curve(spectra: list[list[float]]) -> tuple[list[float], list[float]]:
    """(place / n, median of sigma / sigma_1) over spectra, interpolated where their lengths differ."""
    from statistics import median

    n = max(map(len, spectra))
    medians = []
    for place in range(n):
        values = []
        for one in spectra:
            at = place * (len(one) - 1) / max(1, n - 1)
            low = math.floor(at)
            high = min(low + 1, len(one) - 1)
            values.append((one[low] + (at - low) * (one[high] - one[low])) / one[0])
        medians.append(median(values))
    return [(place + 1) / n for place in range(n)], medians


def plot_intrinsic(report: dict[str, Any], path: str | Path | IO[bytes]) -> None:
    """Held-out accuracy over the dimensions of the subspace, beside full fine-tuning, a linear probe and the most
    frequent class; circles mark d90.

    Args:
        report: what intrinsic.json holds. path: a file (.svg, .png, .pdf), or a binary stream for SVG.

    Raises:
        ValueError: the report has no run in a subspace.
        ImportError: matplotlib is missing; says what to install.
    """
    curve = sorted((run for run in report["runs"] if run["dims"]), key=lambda run: run["dims"])
    if not curve:
        raise ValueError("report: no run in a subspace, there is nothing to plot")
    figure = _figure(8, 5.6)
    axes = figure.subplots()
    axes.plot(
        [run["dims"] for run in curve], [100 * run["accuracy"] for run in curve], "o-", color="#1f4e8c",
        label="random subspace of d dimensions",
    )  # fmt: skip
    lines = {run["name"]: run["accuracy"] for run in report["runs"] if run["name"] in ("full", "probe")}
    for name, label, color in (
        ("full", f"full fine-tuning ({report['size']:,} parameters)", "#c0392b"),
        ("probe", "linear probe", "#2e7d32"),
    ):
        if name in lines:
            axes.axhline(100 * lines[name], color=color, linewidth=1.4, label=label)
    axes.axhline(100 * report["majority"], color="0.5", linewidth=1.2, label="most frequent class")
    for index, reading in enumerate(report["readings"]):
        color = ("#8e44ad", "#d35400", "#16a085")[index % 3]
        found = "not reached" if reading["crossing"] is None else f"d90 = {reading['crossing']:,.0f}"
        threshold = 100 * reading["threshold"]
        axes.axhline(threshold, color=color, linewidth=0.9, linestyle="--", label=f"{reading['what']}: {found}")
        if reading["crossing"] is not None:
            axes.plot([reading["crossing"]], [threshold], "o", color=color, markersize=9, markerfacecolor="none")
    axes.set(xscale="log", xlabel="d, trained numbers", ylabel="held-out accuracy, %", title="intrinsic dimension")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    _save(figure, path)
