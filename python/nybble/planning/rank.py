"""How low-rank fine-tuning was: the singular values of what it changed, weight by weight."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.writer import Staging
from .difference import Pairs, pair
from .plots import in_order, plot_spectra
from .spectrum import ENERGIES, Spectrum, effective_rank, energy_rank, spectrum, stable_rank

if TYPE_CHECKING:
    from rich.table import Table

JSON_NAME = "rank.json"
_COLUMNS = ("full", "|D|/|W|", "effective", "stable", "90%", "95%", "99%")
_NOISE_COLUMNS = ("noise", "above")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RankRow:
    """One weight of two dimensions that training changed, or one matrix of a stack of experts.

    Attributes:
        name: in the base, of a stack with the number of the matrix behind it, "...[3]".
        kind: of layer, such as "q_proj", the same in every block.
        norm: ||D||_F of the difference D. relative: ||D||_F / ||W||_F, W the base's weight (infinite for W = 0).
        effective_rank, stable_rank: see `nybble.planning.spectrum`.
        rank_90, rank_95, rank_99: how many singular values have that share of the energy ||D||_F^2.
        noise_edge: rounding alone has no singular value above it (`RoundingNoise`). above_noise: how many are above.
        noise_share: expected energy of the rounding / ||D||_F^2; above 1 where changes are too small to be stored. All
            three are None where nothing is known of it: the tuned weight is quantized, in fp8, or an adapter's.
        singular_values: all of them, descending. method: how they were computed, "svd", "gram" or "factors"
            (`Spectrum`).
    """

    name: str
    kind: str
    shape: tuple[int, int]
    norm: float
    relative: float
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    method: str
    noise_edge: float | None
    above_noise: int | None
    noise_share: float | None
    singular_values: list[float] = field(repr=False)

    @property
    def full_rank(self) -> int:
        """The most that the rank could be."""
        return min(self.shape)


@dataclass(frozen=True)
class Kind:
    """The means over the layers of one kind; `largest_90`: the largest rank_90; `full_rank`: the largest possible.

    above_noise and noise_share are None if they are for one of its layers.
    """

    kind: str
    layers: int
    full_rank: int
    relative: float
    effective_rank: float
    stable_rank: float
    rank_90: float
    rank_95: float
    rank_99: float
    largest_90: int
    above_noise: float | None
    noise_share: float | None


@dataclass
class RankReport:
    """Returned by `rank`.

    Attributes:
        layers: a row a changed weight. unchanged: names of weights whose difference is exactly 0.
        others: changed tensors of other dimensions (norms, biases) -> ||D|| / ||W||.
        missing, extra, reshaped, tied: see `Pairs`. notes: sentences worth a reader's attention.
    """

    base: str
    tuned: str
    layers: list[RankRow] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    others: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def kinds(self) -> list[Kind]:
        """A row a kind of layer, in the order of the checkpoint."""
        groups: dict[str, list[RankRow]] = {}
        for row in self.layers:
            groups.setdefault(row.kind, []).append(row)
        return [_kind(name, rows) for name, rows in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values; an infinite relative size is None."""
        content = asdict(self)
        content["kinds"] = [asdict(kind) for kind in self.kinds()]
        for row in (*content["layers"], *content["kinds"]):
            row["relative"] = _finite(row["relative"])
        content["others"] = {name: _finite(value) for name, value in self.others.items()}
        return content

    def write(self, directory: Path) -> list[Path]:
        """rank.json and, with matplotlib, rank.svg in `directory`; returns their paths.

        Raises:
            StorageFullError: the disk is full; files that were there are untouched.
        """
        content = self.to_dict()
        names = [JSON_NAME]
        with Staging(directory) as staging:
            staging.write(JSON_NAME, (json.dumps(content, indent=1) + "\n").encode())
            if self.layers:
                try:
                    from io import BytesIO

                    picture = BytesIO()
                    plot_spectra(content, picture)
                    staging.write("rank.svg", picture.getvalue())
                    names.append("rank.svg")
                except ImportError:
                    pass  # the command says that there is no plot
            staging.commit()
        return [directory / name for name in names]

    def table(self) -> Table:
        """The means of every kind of layer, for `rich.print`."""
        return self._table([(kind, (kind.kind, f"{kind.layers}")) for kind in self.kinds()], "kind of layer", "layers")

    def layer_table(self) -> Table:
        """The same figures of every weight."""
        return self._table([(row, (row.name.removesuffix(".weight"),)) for row in self.layers], "weight")

    @property
    def noisy(self) -> bool:
        """Whether rounding is so much of a change that the tables tell it: a thousandth of the energy or more."""
        return any(row.noise_share is not None and row.noise_share >= 1e-3 for row in self.layers)

    def _table(self, rows: Sequence[tuple[Kind | RankRow, tuple[str, ...]]], *first: str) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        # All of it within 80 columns, so that no header is cut where that is all there is.
        table = Table(box=SIMPLE_HEAD, padding=0)
        table.add_column(first[0], overflow="fold")
        for name in (*first[1:], *_COLUMNS, *(_NOISE_COLUMNS if self.noisy else ())):
            table.add_column(name, justify="right", no_wrap=True)
        for row, names in rows:
            table.add_row(*_cells(row, *names), *(_noise_cells(row) if self.noisy else ()))
        return table


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cells(row: Kind | RankRow, *first: str) -> list[str]:
    return [
        *first, f"{row.full_rank}", f"{row.relative:.1e}", f"{row.effective_rank:.1f}", f"{row.stable_rank:.1f}",
        *(f"{value:.0f}" for value in (row.rank_90, row.rank_95, row.rank_99)),
    ]  # fmt: skip


def _noise_cells(row: Kind | RankRow) -> tuple[str, str]:
    if row.noise_share is None or row.above_noise is None:
        return "-", "-"
    return f"{min(row.noise_share, 1):.1%}", f"{row.above_noise:.0f}"


def _kind(name: str, rows: list[RankRow]) -> Kind:
    def mean(attribute: str) -> float:
        return sum(getattr(row, attribute) for row in rows) / len(rows)

    known = all(row.noise_share is not None for row in rows)
    means = {key: mean(key) for key in ("relative", "effective_rank", "stable_rank", "rank_90", "rank_95", "rank_99")}
    return Kind(
        name, len(rows), max(row.full_rank for row in rows), **means, largest_90=max(row.rank_90 for row in rows),
        above_noise=mean("above_noise") if known else None, noise_share=mean("noise_share") if known else None,
    )  # fmt: skip


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Weight name -> kind of layer: what is left of its path without the numbers of blocks, as short as it stays clear.

    >>> kinds_of(["h.0.attn.q_proj.weight", "h.1.attn.q_proj.weight", "h.0.attn.out.weight", "h.0.mlp.out.weight"])
    {'h.0.attn.q_proj.weight': 'q_proj', 'h.1.attn.q_proj.weight': 'q_proj', 'h.0.attn.out.weight': 'attn.out', \
'h.0.mlp.out.weight': 'mlp.out'}
    """
    paths = {name: _without_numbers(name) for name in names}
    whole = set(paths.values())
    endings = Counter(path[-length:] for path in whole for length in range(1, len(path) + 1))
    short = {
        path: next(
            (path[-length:] for length in range(1, len(path) + 1) if endings[path[-length:]] == 1), path
        )  # a path that is another one's ending stays whole
        for path in whole
    }
    return {name: ".".join(short[path]) for name, path in paths.items()}


def _without_numbers(name: str) -> tuple[str, ...]:
    parts = name.removesuffix(".weight").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return tuple(part for part in parts[first or 0 :] if not part.isdigit()) or (name,)


def rank(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    device: str = "cpu",
    method: str = "auto",
    progress: Progress | None = None,
) -> RankReport:
    """Decompose the difference of two checkpoints, a weight at a time.

    Args:
        base, tuned: a directory or a .safetensors file each, plain, in fp8 or quantized (then its codes' values count);
            tuned may also be the directory of a LoRA for the base.
        device: "cpu" or a CUDA device, where the decompositions run, in fp64.
        method: "svd", "gram", or "auto": the first up to a shorter side of 2,048 (see `Spectrum`).
        progress: called with (weight, how many are done, how many there are) before each and at the end.

    Raises:
        ValueError: an unknown method, or a device without fp64.
        CheckpointNotFoundError, CheckpointError: see `pair`.
        NonFiniteError: a weight holds NaN or infinity; names it and its file.
    """
    check_method(method)
    check_device(device)
    pairs = pair(base, tuned)
    report = RankReport(
        str(base), str(tuned), missing=pairs.missing, extra=pairs.extra, reshaped=pairs.reshaped, tied=pairs.tied,
        notes=list(pairs.notes),
    )  # fmt: skip
    jobs = _jobs(pairs)
    kinds = kinds_of([*pairs.matrices, *pairs.stacks])
    for done, (label, name, index) in enumerate(jobs):
        if progress is not None:
            progress(label, done, len(jobs))
        difference = pairs.difference(name, index)
        found = spectrum(difference, device=device, method=method)
        if not found.norm:
            report.unchanged.append(label)
            continue
        report.layers.append(_row(label, kinds[name], difference.shape, found))
    if progress is not None:
        progress("", len(jobs), len(jobs))
    report.others = changed_others(pairs)
    if report.others:
        report.notes.append(
            f"{len(report.others)} tensors of other dimensions changed too (norms, biases ...): they have no rank"
        )
    report.notes += _about_rounding(report.layers)
    if any(row.method == "gram" for row in report.layers):
        report.notes.append("singular values below 1e-6 of the largest are rounding where the method is gram")
    return report


def _jobs(pairs: Pairs) -> list[tuple[str, str, int | None]]:
    """(label, weight's name, which matrix of a stack) in the order of the blocks."""
    jobs: list[tuple[str, str, int | None]] = [(name, name, None) for name in pairs.matrices]
    for name in pairs.stacks:
        jobs += [(f"{name}[{index}]", name, index) for index in range(pairs.base.shapes[name][0])]
    return sorted(jobs, key=lambda job: (in_order(job[1]), job[2] or 0))


def _about_rounding(rows: list[RankRow]) -> list[str]:
    """A sentence where the rounding of the tuned weights is a part of what the table shows."""
    shares = [row.noise_share for row in rows if row.noise_share is not None]
    if not shares or max(shares) < 1e-3:
        return []
    return [
        f"rounding to the dtype that TUNED is stored in is {min(min(shares), 1):.1%} to {min(max(shares), 1):.1%} of "
        "|D|^2 (column noise) and has full rank: it raises the columns before. above: how many singular values are "
        "larger than any of rounding alone"
    ]


def _row(name: str, kind: str, shape: tuple[int, ...], found: Spectrum) -> RankRow:
    values = found.values
    noise = found.noise
    edge = noise.edge if noise.known else None
    at_90, at_95, at_99 = (energy_rank(values, share) for share in ENERGIES)
    return RankRow(
        name, kind, (shape[0], shape[1]), found.norm, ratio(found.norm, found.weight_norm), effective_rank(values),
        stable_rank(values), at_90, at_95, at_99, found.method, edge,
        None if edge is None else int((values > edge).sum()), noise.energy / found.norm**2 if noise.known else None,
        values.tolist(),
    )  # fmt: skip


def check_method(method: str) -> None:
    """Raises ValueError for a method that `spectrum` does not have."""
    if method not in ("auto", "svd", "gram"):
        raise ValueError(f"method must be 'auto', 'svd' or 'gram', got {method!r}")


def check_device(device: str) -> None:
    """Raises ValueError unless torch computes in fp64 there."""
    import torch

    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, which names no device; cpu, cuda and cuda:N do") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked.type == "cpu" or (asked.type == "cuda" and (asked.index or 0) < count):
        return
    reason = "has no fp64" if asked.type == "mps" else "is not there"
    raise ValueError(f"device is {device!r}, which {reason}; cpu{' or cuda' if torch.cuda.is_available() else ''} is")


def changed_others(pairs: Pairs) -> dict[str, float]:
    """||D|| / ||W|| of tensors that are no matrices and that changed."""
    result = {}
    stacks = set(pairs.stacks)
    for name in (name for name in pairs.others if name not in stacks):
        squares = weight = 0.0
        for _, base, part in pairs.difference(name).slabs():
            weight += float(base.square().sum())
            squares += float(part.square().sum())
        if squares:
            result[name] = ratio(squares**0.5, weight**0.5)
    return result


def ratio(norm: float, weight_norm: float) -> float:
    """norm / weight_norm; infinite for a weight of zeros."""
    return norm / weight_norm if weight_norm else math.inf
