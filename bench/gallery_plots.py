"""How the gallery's plots look: from what bench/gallery.py measured to SVG files, the same bytes each time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Content = dict[str, Any]
OURS = "#1f4e8c"
COLORS = (OURS, "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#16a2b8", "#7f8c8d", "#34495e")


def errors(content: Content, folder: Path) -> list[Path]:
    """Two plots: weights by format, outputs with and without calibration."""
    return [_weight_errors(content["weights"], folder), _output_errors(content["outputs"], folder)]


def _weight_errors(weights: dict[str, dict[str, float]], folder: Path) -> Path:
    figure, axes = _figure(10, 4.2)
    layers = list(next(iter(weights.values())))
    for color, (name, rows) in zip(COLORS, weights.items(), strict=False):
        axes.plot(range(len(layers)), [rows[layer] for layer in layers], ".-", color=color, label=name, linewidth=1)
    _blocks(axes, layers)
    axes.set(
        title="Error of the weights of all-MiniLM-L6-v2, layer by layer", yscale="log", ylabel="||W - Wq|| / ||W||"
    )
    axes.legend(ncols=3, fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.45))
    return _save(figure, folder / "errors-weights.svg")


def _output_errors(outputs: dict[str, tuple[float | None, float | None]], folder: Path) -> Path:
    figure, axes = _figure(10, 4.2)
    layers = [name for name, pair in outputs.items() if None not in pair]
    for index, (name, color) in enumerate(
        (("nearest codes (as bitsandbytes writes them)", COLORS[1]), ("calibrated", OURS))
    ):
        axes.plot(
            [outputs[layer][index] for layer in layers], ".-", color=color, label=name, linewidth=0.8, markersize=4
        )
    _blocks(axes, layers)
    axes.set(
        title="Error of the outputs of SmolLM2-135M in NF4, layer by layer", ylabel="relative RMS error", yscale="log"
    )
    axes.legend(fontsize=8)
    return _save(figure, folder / "errors-outputs.svg")


def _blocks(axes: Any, layers: list[str]) -> None:
    """Names on the x axis: the number of the block where it begins."""
    numbers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", layer)) else None for layer in layers]
    starts = [i for i, number in enumerate(numbers) if number is not None and (i == 0 or numbers[i - 1] != number)]
    every = max(1, len(starts) // 15)
    axes.set_xticks(
        starts[::every], [f"block {numbers[i]}" if i == starts[0] else str(numbers[i]) for i in starts[::every]]
    )
    axes.set_xlabel("linear layers in their order; a mark where a block begins")


def methods(content: Content, folder: Path) -> list[Path]:
    """Two plots: the loss by step, the memory."""
    rows = content["rows"]
    figure, axes = _figure(10, 4.8)
    for color, row in zip(COLORS, rows, strict=False):
        losses = _running_mean(row["losses"])
        style = "--" if row["method"].startswith("QLoRA") else "-"
        axes.plot(range(1, len(losses) + 1), losses, style, color=color, label=row["method"], linewidth=1.6)
    axes.set(
        title="Fine-tuning SmolLM2-135M on verses: training loss, running mean",
        xlabel="step of 1,024 tokens",
        ylabel="cross-entropy (nats per token)",
    )
    axes.legend(fontsize=8, ncols=2)
    paths = [_save(figure, folder / "methods-loss.svg")]
    figure, axes = _figure(10, 3.8)
    names = [row["method"] for row in rows]
    peaks = [row["peak MB above imports"] / 1000 for row in rows]
    bars = axes.barh(names, peaks, color=[OURS if "QLoRA" in name else "#9db4d0" for name in names])
    labels = [
        f"{gb:.2f} GB, {_millions(row['trained parameters'])} trained" for gb, row in zip(peaks, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Fine-tuning SmolLM2-135M: peak memory above imports", xlabel="GB", xlim=(0, max(peaks) * 1.25))
    return [*paths, _save(figure, folder / "methods-memory.svg")]


def speed(content: Content, folder: Path) -> list[Path]:
    """One plot: how many times as long as nybble each peer takes, over M."""
    rows = sorted(content["rows"], key=lambda row: row["m"])
    figure, axes = _figure(10, 4.8)
    names = dict.fromkeys(name for row in rows for name in row["timings"])
    for index, name in enumerate(names):
        points = [(r["m"], r["timings"][name]["median"] * 1e3) for r in rows if name in r["timings"]]
        ours = name == "nybble"
        style = {"linewidth": 2.6, "zorder": 3} if ours else {"linewidth": 1.2}
        axes.plot(
            *zip(*points, strict=True), "o-", color=COLORS[index % len(COLORS)], label=name, markersize=4, **style
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["m"] for row in rows], [str(row["m"]) for row in rows])
    n, k = rows[0]["n"], rows[0]["k"]
    axes.set(title=f"A layer of {n} x {k}, forward", yscale="log", xlabel="M, rows of the input", ylabel="ms, median")
    axes.legend(fontsize=8)
    return [_save(figure, folder / "speed.svg")]


def rank(content: Content, folder: Path) -> list[Path]:
    """One plot: what a full fine-tune's change is worth as a LoRA, and how much of its energy that is."""
    rows = {row["what"]: row for row in content["rows"]}
    figure, axes = _figure(10, 4.2)
    cuts = [row for row in content["rows"] if re.fullmatch(r"LoRA of rank \d+", row["what"])]
    ranks = [int(row["what"].rpartition(" ")[2]) for row in cuts]
    axes.plot(ranks, [row["perplexity"] for row in cuts], "o-", color=OURS, label="LoRA of the linear layers")
    for number, row in zip(ranks, cuts, strict=True):
        share = f"{row['energy kept']:.0%} of the energy"
        axes.annotate(share, (number, row["perplexity"]), xytext=(0, 8), textcoords="offset points", fontsize=8)
    for what, color in (("before", COLORS[6]), ("every weight trained", COLORS[1])):
        axes.axhline(rows[what]["perplexity"], color=color, linestyle="--", linewidth=1.2, label=what)
    others = [row for row in content["rows"] if "in full" in row["what"]]
    numbers = [int(row["what"].split(",")[0].rpartition(" ")[2]) for row in others]
    values = [row["perplexity"] for row in others]
    axes.plot(numbers, values, "s", color=COLORS[2], label="embedding and norms in full beside it")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set(title="A full fine-tune of SmolLM2-135M as a LoRA", xlabel="rank", ylabel="perplexity of 1 John, held out")
    axes.legend(fontsize=8)
    return [_save(figure, folder / "rank-perplexity.svg")]


def intrinsic(content: Content, folder: Path) -> list[Path]:
    """One plot, `nybble intrinsic`'s own."""
    from nybble.planning.plots import plot_intrinsic

    path = folder / "intrinsic.svg"
    plot_intrinsic(content, path)
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


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    """As SVG with text as text; neither a date nor random ids, so that the same figures give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
