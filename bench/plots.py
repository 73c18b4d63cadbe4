"""One plot an op: time over M, a line for each contestant, the ceilings dashed."""

from __future__ import annotations

import statistics
from pathlib import Path


def draw(op: str, rows: list[dict], folder: Path) -> Path | None:
    """Writes `op`.png from rows that have an M; returns None where there are fewer than two M, or no matplotlib."""
    rows = [row for row in rows if row["op"] == op and row.get("m")]
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if len({row["m"] for row in rows}) < 2:
        return None
    wide = min(3, len(groups))
    high = -(-len(groups) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(6.5 * wide + 2.5, 5.5 * high), sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    colors = pyplot.get_cmap("tab20").colors
    for axis, group in zip(axes.flat, groups, strict=False):
        own = sorted((row for row in rows if row["group"] == group), key=lambda row: row["m"])
        for index, name in enumerate(names):
            points = [(row["m"], row["timings"][name]["median"] * 1e3) for row in own if name in row["timings"]]
            bold = name.startswith("nybble")
            style = {"linewidth": 2.6 if bold else 1.2, "marker": "o", "markersize": 5 if bold else 3}
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=name, color=colors[index % 20], **style)
        _ceilings(axis, own)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([row["m"] for row in own], [str(row["m"]) for row in own])
        axis.set_xlabel("M")
        axis.set_title(f"{op}, {group}")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("ms a call, median")
    axes.flat[wide - 1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    path = folder / f"{op}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _ceilings(axis: object, rows: list[dict]) -> None:
    m = [row["m"] for row in rows]
    for key, work, dashes in (("read_gbs", "bytes", (4, 2)), ("peak_gflops", "operations", (1, 1))):
        rates: dict[str, list[float]] = {}
        for row in rows:
            for name, rate in row[key].items():
                rates.setdefault(name, []).append(rate)
        best = {name: statistics.median(values) for name, values in rates.items()}
        if key == "read_gbs" and len(best) > 2:
            plain = next(iter(best))
            fastest = max(best, key=lambda name: best[name])
            best = {name: best[name] for name in dict.fromkeys((plain, fastest))}
        for name, shade in zip(best, ("black", "grey"), strict=False):
            times = [row[work] / best[name] / 1e6 for row in rows]
            axis.plot(m, times, dashes=dashes, color=shade, linewidth=1.2, label=name)
