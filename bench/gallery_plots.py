"""How the gallery's plots look: from what bench/gallery.py measured to SVG files, the same bytes each time.

They are drawn at the width of the manual's column, so that letters keep the size that they are given here. A title says
what there is to see, with figures from the data; lines are named at their ends or beside the plot, never on top of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

Content = dict[str, Any]
Draw = Callable[[Content, Path], list[Path]]
#: Okabe and Ito's colours, which people who are blind to some colours tell apart; nybble's own first.
OURS = "#0072b2"
COLORS = (OURS, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#222222")
WIDTH = 7.6
_STYLE = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
    "axes.edgecolor": "#666666", "axes.linewidth": 0.8, "axes.axisbelow": True, "svg.fonttype": "none",
}  # fmt: skip


def styled(draw: Draw) -> Draw:
    """The same with the gallery's letters and lines."""

    @functools.wraps(draw)
    def inner(content: Content, folder: Path) -> list[Path]:
        with matplotlib.rc_context(_STYLE):
            return draw(content, folder)

    return inner


@styled
def errors(content: Content, folder: Path) -> list[Path]:
    """Two plots: weights by format, outputs with and without calibration."""
    return [_weight_errors(content["weights"], folder), _output_errors(content["outputs"], folder)]


def _weight_errors(weights: dict[str, dict[str, float]], folder: Path) -> Path:
    figure, axes = _figure(WIDTH, 3.6)
    layers = list(next(iter(weights.values())))
    middles = {name: median(rows[layer] for layer in layers) for name, rows in weights.items()}
    order = sorted(weights, key=lambda name: -middles[name])
    for color, (name, rows) in zip(COLORS, weights.items(), strict=False):
        values = [rows[layer] for layer in layers]
        axes.plot(range(len(layers)), values, ".-", color=color, label=f"{name}: {middles[name]:.1%}", linewidth=1.2)
    handles, labels = axes.get_legend_handles_labels()
    places = {name: index for index, name in enumerate(weights)}
    axes.legend(
        [handles[places[name]] for name in order], [labels[places[name]] for name in order], title="median",
        alignment="left", loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    _blocks(axes, layers)
    axes.set(title="Relative error of every weight of all-MiniLM-L6-v2", yscale="log", ylabel="||W - Wq|| / ||W||")
    _plain_numbers(axes.yaxis, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2], "{:.1%}")
    return _save(figure, folder / "errors-weights.svg")


def _output_errors(outputs: dict[str, tuple[float | None, float | None]], folder: Path) -> Path:
    """A panel a kind of layer, since kinds differ more than blocks do."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, (plain, calibrated) in outputs.items():
        if plain is not None and calibrated is not None:
            kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append((plain, calibrated))
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, (kind, pairs) in zip(panels, kinds.items(), strict=True):
        _tidy(axes)
        for index, (name, color) in enumerate((("nearest codes", COLORS[1]), ("calibrated", OURS))):
            axes.plot([pair[index] for pair in pairs], color=color, linewidth=1.4, label=name)
        axes.set_title(kind, fontsize=9.5, fontweight="normal", loc="center")
        axes.set_xticks([0, len(pairs) - 1])
        axes.set_yscale("log")
    _plain_numbers(panels[0].yaxis, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2], "{:.1%}")
    panels[0].set_ylabel("RMS error / RMS of outputs")
    figure.supxlabel("block, in each kind of layer", fontsize=9.5)
    before, after = (median(pair[index] for pairs in kinds.values() for pair in pairs) for index in (0, 1))
    figure.suptitle(
        f"SmolLM2-135M in NF4: calibration takes a layer's error from {before:.1%} to {after:.1%} (medians)",
        fontsize=10.5, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2)
    return _save(figure, folder / "errors-outputs.svg")


def _blocks(axes: Any, layers: list[str]) -> None:
    """Names on the x axis: the number of the block where it begins."""
    numbers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", layer)) else None for layer in layers]
    starts = [i for i, number in enumerate(numbers) if number is not None and (i == 0 or numbers[i - 1] != number)]
    every = max(1, len(starts) // 15)
    axes.set_xticks(starts[::every], [str(numbers[i]) for i in starts[::every]])
    axes.set_xlabel("linear layers in their order; the number of a block where it begins")


@styled
def methods(content: Content, folder: Path) -> list[Path]:
    """Two plots: the loss by step, the memory."""
    rows = content["rows"]
    figure, axes = _figure(WIDTH, 3.8)
    curves = {row["method"]: _running_mean(row["losses"]) for row in rows}
    colors = dict(zip(curves, COLORS, strict=False))
    for name in sorted(curves, key=lambda name: -curves[name][-1]):  # as the lines end, from the top
        losses = curves[name]
        # DoRA's line lies on LoRA's.
        style, order = ((0, (4, 2)), 3) if name == "DoRA" else ("-", 2)
        label = f"{name}: {losses[-1]:.2f}"
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            linestyle=style,
            color=colors[name],
            label=label,
            linewidth=1.8,
            zorder=order,
        )
    axes.set(
        title="Fine-tuning SmolLM2-135M on verses: training loss by method",
        xlabel="step of 1,024 tokens",
        ylabel="nats per token, running mean",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="at the last step", alignment="left")
    paths = [_save(figure, folder / "methods-loss.svg")]
    figure, axes = _figure(WIDTH, 3.0)
    rows = sorted(rows, key=lambda row: -row["peak MB above imports"])
    peaks = {row["method"]: row["peak MB above imports"] / 1000 for row in rows}
    bars = axes.barh(list(peaks), list(peaks.values()), color=[OURS if "QLoRA" in n else "#b5c9dc" for n in peaks])
    labels = [f"{peaks[row['method']]:.2f} GB, {_millions(row['trained parameters'])} trained" for row in rows]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    title = "Peak memory of a process above its imports, by method"
    if {"QLoRA", "full"} <= peaks.keys():
        title = f"Peak memory above imports: QLoRA takes {peaks['QLoRA'] / peaks['full']:.0%} of full fine-tuning's"
    axes.set(title=title, xlabel="GB", xlim=(0, max(peaks.values()) * 1.38))
    return [*paths, _save(figure, folder / "methods-memory.svg")]


@styled
def speed(content: Content, folder: Path) -> list[Path]:
    """One plot: how long a layer takes, over M."""
    rows = sorted(content["rows"], key=lambda row: row["m"])
    figure, axes = _figure(WIDTH, 4.2)
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    colors = dict(zip(names, COLORS, strict=False))
    last = {name: [row["timings"][name]["median"] for row in rows if name in row["timings"]][-1] for name in names}
    for name in sorted(names, key=lambda name: -last[name]):  # as the lines end, from the top
        points = [(r["m"], r["timings"][name]["median"] * 1e3) for r in rows if name in r["timings"]]
        style = {"linewidth": 3.0, "zorder": 3} if name == "nybble" else {"linewidth": 1.3}
        axes.plot(*zip(*points, strict=True), "o-", color=colors[name], label=name, markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["m"] for row in rows], [str(row["m"]) for row in rows])
    n, k = rows[0]["n"], rows[0]["k"]
    axes.set(
        title=f"Forward pass of one layer of {n} x {k}", yscale="log", xlabel="M, rows of the input",
        ylabel="median time, ms (lower is better)",
    )  # fmt: skip
    _plain_numbers(axes.yaxis, [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000], "{:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)
    return [_save(figure, folder / "speed.svg")]


@styled
def rank(content: Content, folder: Path) -> list[Path]:
    """What a full fine-tune's change is worth as a LoRA, how much of its energy that is, and its singular values."""
    rows = {row["what"]: row for row in content["rows"]}
    figure, axes = _figure(WIDTH, 3.8)
    cuts = [row for row in content["rows"] if re.fullmatch(r"LoRA of rank \d+", row["what"])]
    ranks = [int(row["what"].rpartition(" ")[2]) for row in cuts]
    axes.plot(ranks, [row["perplexity"] for row in cuts], "o-", color=OURS, linewidth=2)
    for number, row in zip(ranks, cuts, strict=True):
        share = f"{row['perplexity']:.2f}\n{row['energy kept']:.0%} of energy"
        axes.annotate(share, (number, row["perplexity"]), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set_xlim(ranks[0] / 2, ranks[-1] * 2)
    before, after = rows["before"]["perplexity"], rows["every weight trained"]["perplexity"]
    for what, value, side in (("before training", before, "top"), ("every weight trained", after, "top")):
        axes.axhline(value, color=COLORS[6] if value == before else COLORS[1], linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{what}: {value:.2f}", (ranks[0] / 2, value), xytext=(4, -3), textcoords="offset points", va=side
        )
    others = [row for row in content["rows"] if "in full" in row["what"]]
    numbers = [int(row["what"].split(",")[0].rpartition(" ")[2]) for row in others]
    axes.plot(
        numbers, [row["perplexity"] for row in others], "D", color=COLORS[2], markersize=7,
        label="embedding and norms in full beside the LoRA",
    )  # fmt: skip
    axes.plot([], [], "o-", color=OURS, label="LoRA on the linear layers alone")
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
    low, high = min(after, *(row["perplexity"] for row in content["rows"])), before
    axes.set_ylim(low - 0.12 * (high - low), high + 0.04 * (high - low))
    gain = (before - cuts[0]["perplexity"]) / (before - after)
    axes.set(
        title=f"A full fine-tune of SmolLM2-135M cut to a LoRA: rank {ranks[0]} keeps {gain:.0%} of the gain",
        xlabel="rank", ylabel="perplexity of 1 John, held out",
    )  # fmt: skip
    paths = [_save(figure, folder / "rank-perplexity.svg")]
    if "curves" in content:  # what was measured before they were kept has none
        from nybble.planning.plots import draw_spectra

        draw_spectra(content["curves"], folder / "rank-spectra.svg")
        paths.append(folder / "rank-spectra.svg")
    return paths


def intrinsic(content: Content, folder: Path) -> list[Path]:
    """One plot, `nybble intrinsic`'s own, of the sweep and of the one with SAID beside it."""
    from nybble.planning.plots import plot_intrinsic

    path = folder / "intrinsic.svg"
    plot_intrinsic(content, path, content.get("said"))
    return [path]


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count:,}"


def _running_mean(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential, corrected for its start."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def _plain_numbers(axis: Any, ticks: list[float], form: str) -> None:
    """Numbers as people write them on an axis of powers."""
    low, high = axis.get_view_interval()
    axis.set_ticks([tick for tick in ticks if low <= tick <= high])
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value).replace(".0%", "%")))
    axis.set_minor_locator(NullLocator())


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _tidy(axes)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    """As SVG with text as text; neither a date nor random ids, so that the same figures give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
