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
    share of the full rank; dotted, where rounding is a part of the change: what rounding alone reaches at most. Right:
    rank_90 of every layer as a share of its full rank, in the order of the blocks.

    Args:
        report: what rank.json holds. path: a file (.svg, .png, .pdf), or a binary stream for SVG.

    Raises:
        ValueError: the report has no changed weight.
        ImportError: matplotlib is missing; says what to install.
    """
    draw_spectra(spectra_curves(report), path)


#: Singular values that a curve keeps, at places that are evenly spread on the logarithmic axis.
_POINTS = 96


def spectra_curves(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `draw_spectra` draws of a report, by kind of layer, in numbers of four digits.

    Raises:
        ValueError: the report has no changed weight.
    """
    if not report["layers"]:
        raise ValueError("report: no weight changed, there is nothing to plot")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(report["layers"], key=lambda row: in_order(row["name"])):
        groups.setdefault(row["kind"], []).append(row)
    return {kind: _curve(rows) for kind, rows in groups.items()}


def _curve(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from statistics import median

    places, medians = _median_curve([row["singular_values"] for row in rows])
    n = len(places)
    kept = sorted({min(n - 1, round(n ** (i / (_POINTS - 1))) - 1) for i in range(_POINTS)})
    edges = [
        row["noise_edge"] / row["singular_values"][0]
        for row in rows
        if row.get("noise_edge") is not None and row["noise_share"] >= 1e-3
    ]
    return {
        "places": [_short(places[i]) for i in kept],
        "values": [_short(medians[i]) for i in kept],
        "rounding": _short(median(edges)) if edges else None,
        "rank_90": [_short(row["rank_90"] / min(row["shape"])) for row in rows],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def draw_spectra(curves: dict[str, dict[str, Any]], path: str | Path | IO[bytes]) -> None:
    """See `plot_spectra`; curves: what `spectra_curves` makes of a report."""
    figure = _figure(7.6, 4.4)
    import matplotlib
    from matplotlib.ticker import NullLocator, PercentFormatter

    left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["tab10" if len(curves) <= 10 else "tab20"]
    for index, (kind, curve) in enumerate(curves.items()):
        color, shares = colors(index % colors.N), curve["rank_90"]
        left.plot(curve["places"], curve["values"], color=color, linewidth=1.8, label=kind)
        if curve["rounding"] is not None:
            left.axhline(curve["rounding"], color=color, linewidth=1, linestyle=":")
        style = "o-" if len(shares) > 1 else "D"
        right.plot(range(len(shares)), shares, style, color=color, markersize=3 if len(shares) > 1 else 6)
    left.set(xscale="log", yscale="log", xlabel="place, share of the full rank", ylabel="share of the largest")
    left.set_title("Singular values of the change", loc="left", fontsize=10.5, fontweight="bold")
    left.set_ylim(bottom=max(1e-4, left.get_ylim()[0]), top=1.4)
    ticks = [tick for tick in (0.001, 0.01, 0.1, 1) if tick >= min(min(curve["places"]) for curve in curves.values())]
    left.set_xticks(ticks, [f"{tick:.1%}".replace(".0%", "%") for tick in ticks])
    left.xaxis.set_minor_locator(NullLocator())
    right.set(ylim=(0, 1), xlabel="block", ylabel="share of the full rank")
    right.set_title("Rank that keeps 90% of the energy", loc="left", fontsize=10.5, fontweight="bold")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    dotted = any(curve["rounding"] is not None for curve in curves.values())
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(curves)), frameon=False,
        title="dotted: what rounding alone reaches at most" if dotted else None,
    )  # fmt: skip
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


def plot_intrinsic(report: dict[str, Any], path: str | Path | IO[bytes], said: dict[str, Any] | None = None) -> None:
    """Held-out accuracy over the dimensions of the subspace, with its standard error, beside full fine-tuning, a linear
    probe and the most frequent class; circles mark d90.

    Args:
        report: what intrinsic.json holds. said: the same of a sweep with structure, whose curve goes beside.
        path: a file (.svg, .png, .pdf), or a binary stream for SVG.

    Raises:
        ValueError: the report has no run in a subspace.
        ImportError: matplotlib is missing; says what to install.
    """
    curve = sorted((run for run in report["runs"] if run["dims"]), key=lambda run: run["dims"])
    if not curve:
        raise ValueError("report: no run in a subspace, there is nothing to plot")
    figure = _figure(8, 5.6)
    axes = figure.subplots()
    curves = [(report, "o-", "#1f4e8c", "random subspace of d dimensions")]
    if said is not None:
        curves.append((said, "s--", "#7f8c8d", "the same with a scale for every block (SAID)"))
    for source, style, color, label in curves:
        runs = sorted((run for run in source["runs"] if run["dims"]), key=lambda run: run["dims"])
        shares = [run["accuracy"] for run in runs]
        errors = [100 * math.sqrt(share * (1 - share) / source["held_out"]) for share in shares]
        axes.errorbar(
            [run["dims"] for run in runs], [100 * share for share in shares], errors, fmt=style, color=color, capsize=3,
            label=label,
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
