"""What full fine-tuning changed, as a LoRA: each weight's difference cut to its largest singular directions."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.adapter import PREFIX, write_adapter
from ..checkpoint.bnb import module_of
from ..checkpoint.files import check_outside
from ..checkpoint.peft import task_type
from ..checkpoint.select import _architecture, is_linear_by_name
from ..checkpoint.update import FiniteReader
from ..checkpoint.writer import Staging
from ..errors import CheckpointError, NonFiniteError
from ..nn.names import matches, patterns_of, require_matches
from .difference import Pairs, pair, tied_table
from .plots import in_order
from .rank import Progress, check_device, check_method, ratio
from .spectrum import energy_rank, factors, spectrum

if TYPE_CHECKING:
    from rich.table import Table

ALL_LINEAR = "all-linear"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ExtractRow:
    """One layer of the adapter.

    Attributes:
        path: of the layer in the model. rank: of its factors. kept: share of the energy ||D||_F^2 that is in them.
        error: ||D - B A||_F / ||D||_F, the root of the rest. relative: ||D||_F / ||W||_F.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    kept: float
    error: float
    relative: float


@dataclass
class ExtractReport:
    """Returned by `extract`.

    Attributes:
        rows: the layers that the adapter has. saved: modules whose tensors it holds in full.
        uncovered: changed tensors that it does not hold -> (||D|| / ||W||, why). unchanged: how many did not change.
        kept: share of the energy of all changes, covered or not, that is in the low-rank updates; kept_covered: of the
            covered layers alone. parameters: of the low-rank updates.
    """

    base: str
    tuned: str
    destination: str
    rows: list[ExtractRow] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    uncovered: dict[str, tuple[float, str]] = field(default_factory=dict)
    unchanged: int = 0
    kept: float = 0.0
    kept_covered: float = 0.0
    parameters: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON-able values; an infinite relative size is None."""
        content = asdict(self)
        for row in content["rows"]:
            row["relative"] = row["relative"] if math.isfinite(row["relative"]) else None
        content["uncovered"] = {
            name: [value if math.isfinite(value) else None, why] for name, (value, why) in self.uncovered.items()
        }
        return content

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        with Staging(path.parent) as staging:
            staging.write(path.name, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
            staging.commit()

    def table(self) -> Table:
        """A row a layer, for `rich.print`."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, padding=0)
        table.add_column("layer", overflow="fold")
        for name in ("rank", "full", "energy", "|D-BA|/|D|", "|D|/|W|"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.path, f"{row.rank}", f"{min(row.shape)}", f"{row.kept:.2%}", f"{row.error:.3f}",
                f"{row.relative:.2e}",
            )  # fmt: skip
        return table


class _Layers:
    """What the model makes of a checkpoint's tensors, by its class or, where it cannot be built, by their names."""

    def __init__(self, pairs: Pairs, notes: list[str]) -> None:
        self._pairs, self._source = pairs, pairs.base.source
        self._known = _architecture(self._source, notes)
        self._model_type = (self._source.config() or {}).get("model_type")

    def path(self, name: str) -> str:
        """Of the module that has the tensor `name`, in the model."""
        module = name.rpartition(".")[0]
        if self._known is None:
            return module
        return self._known.names.resolve_module(module, self._known.modules) or module

    def kind(self, name: str) -> tuple[str, str]:
        """("linear", ""), ("embedding", ""), or ("", why a LoRA cannot change this matrix)."""
        if not name.endswith(".weight"):
            return "", "not a layer's weight"
        if self._known is None:
            return self._kind_by_name(name)
        path = self.path(name)
        if path in self._known.tied:
            return "", "the head shares it"
        if path in self._known.linear:
            return "linear", ""
        if path in self._known.transposed:
            return "", "held [inputs, outputs], as GPT-2's Conv1D is"
        return ("embedding", "") if path in self._known.embeddings else ("", "no linear layer of the model class")

    def _kind_by_name(self, name: str) -> tuple[str, str]:
        if tied_table(self._source, [name]) == name:
            return "", "the head shares it"
        if is_linear_by_name(module_of(name), self._model_type):
            return "linear", ""
        return ("embedding", "") if "embed" in name.lower() else ("", "not called as a linear layer is")

    def is_module(self, path: str) -> bool:
        """Whether the model has a module of this path, as far as that is known."""
        return self._known is None or path in self._known.modules

    def taken(self, paths: Iterable[str]) -> set[str]:
        """Last parts of the names of modules with a weight that are not among `paths`."""
        known = self._known.modules if self._known is not None else map(self.path, self._pairs.base.shapes)
        return {path.rpartition(".")[2] for path in set(known) - set(paths)}

    def tied_to(self, path: str) -> list[str]:
        """The other modules that share the weight of the embedding `path`."""
        if self._known is None or path not in self._known.tied:
            return []
        return sorted(self._known.tied - {path})


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    rank: int | None = None,
    *,
    energy: float | None = None,
    target: str | tuple[str, ...] = ALL_LINEAR,
    dtype: torch.dtype = torch.float32,
    save_others: bool = False,
    device: str = "cpu",
    method: str = "auto",
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the difference of two checkpoints as a LoRA in PEFT's layout, for the base.

    Every layer's B A is the best approximation of its difference of that rank (Eckart and Young, 1936); the scale is 1
    (alpha = r). Over a quantized base the difference is to what its codes stand for, so it holds what quantizing lost.

    Args:
        base, tuned: a directory or a .safetensors file each, plain, in fp8 or quantized; tuned may also be the
            directory of a LoRA for the base, whose rank is then cut.
        dst: a directory for the adapter, which replaces one that is there.
        rank: of every layer, at most its full rank, or an adapter's. energy: each layer has the least rank that keeps
            this share of its energy, above 0 and at most 1; together with rank at most that.
        target: "all-linear", or name patterns of linear layers and embeddings (`nybble.formats.match_module`).
        dtype: of the factors: torch.float32, bfloat16 or float16.
        save_others: hold the other modules that changed (embeddings, norms) in full, as `modules_to_save`.
        device: "cpu" or a CUDA device. method, progress: see `nybble.planning.rank.rank`; the factors are as good by
            either method, and "gram" is several times as fast.

    Raises:
        ValueError: neither rank nor energy, or one of them, dtype or device is not allowed.
        PatternError: a pattern of `target` matches no layer.
        CheckpointNotFoundError, CheckpointError: see `pair`; or no layer of the target changed.
        NonFiniteError: a weight holds NaN or infinity, or a factor does in fp16; names it.
        StorageFullError: the disk is full; what was there is untouched.
    """
    _check_arguments(rank, energy, dtype)
    check_device(device)
    check_method(method)
    pairs = pair(base, tuned)
    for origin in (base, tuned):
        check_outside(Path(origin), Path(dst))
    report = ExtractReport(str(base), str(tuned), str(dst), notes=list(pairs.notes))
    for what, odd in (("only in BASE", pairs.missing), ("only in TUNED", pairs.extra), ("reshaped", pairs.reshaped)):
        if odd:
            report.notes.append(f"{what}, and not in the adapter: {', '.join(odd)}")
    layers = _Layers(pairs, report.notes)
    chosen = _chosen(pairs, layers, target)
    work = _Work(pairs, layers, report, dtype, device, method)
    names = sorted(pairs.matrices, key=in_order)
    for done, name in enumerate(names):
        if progress is not None:
            progress(name, done, len(names))
        if name in chosen:
            work.cut(name, *chosen[name], rank, energy)
        else:
            why = layers.kind(name)[1]
            work.leave(name, why or ("an embedding; name it in target" if target == ALL_LINEAR else "not in target"))
    if progress is not None:
        progress("", len(names), len(names))
    if not work.ranks:
        raise CheckpointError(_nothing_to_hold(tuned, base, target, report))
    for name in pairs.others:
        work.leave(name, "not a matrix")
    if work.beyond:
        report.notes.append(
            f"{len(work.beyond)} layers have a larger rank than TUNED's rounding leaves to be seen, the first "
            f"{work.beyond[0]}: some of their directions may be rounding (nybble rank)"
        )
    report.kept, report.kept_covered = work.kept / work.total, work.kept / work.covered
    if save_others:
        work.save_others()
    write_adapter(Path(dst), work.config(), work.tensors)
    return report


def _nothing_to_hold(tuned: object, base: object, target: str | tuple[str, ...], report: ExtractReport) -> str:
    what = f"{tuned}: no layer of the target ({_shown(target)}) differs from {base}"
    if not report.uncovered:
        return what
    first, (_, why) = next(iter(report.uncovered.items()))
    return f"{what}; {len(report.uncovered)} other tensors do, among them {first} ({why})"


class _Work:
    """What is made so far: the adapter's tensors by their names in the file, ranks by layer, and sums of energies."""

    def __init__(
        self, pairs: Pairs, layers: _Layers, report: ExtractReport, dtype: torch.dtype, device: str, method: str
    ) -> None:
        self._pairs, self._layers, self._report = pairs, layers, report
        self._dtype, self._device, self._method = dtype, device, method
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.total = self.covered = self.kept = 0.0
        self.beyond: list[str] = []  # layers whose rank takes rounding in

    def cut(self, name: str, path: str, kind: str, rank: int | None, energy: float | None) -> None:
        """The low-rank update of a layer, if it changed."""
        difference = self._pairs.difference(name)
        found = spectrum(difference, vectors=True, device=self._device, method=self._method)
        if not found.norm:
            self._report.unchanged += 1
            return
        rows, columns = difference.shape
        assert found.vectors is not None
        most = found.vectors.shape[1]  # an adapter's own rank, or the shorter side
        r = most if rank is None else min(rank, most)
        r = r if energy is None else min(r, energy_rank(found.values, energy))
        a, b = factors(difference, found, r, self._device)
        self._put(path, kind, a, b)
        if found.noise.known and r > int((found.values > found.noise.edge).sum()):
            self.beyond.append(path)
        energies = found.values.square()
        rest = float(energies[r:].sum() / energies.sum())
        self.ranks[path] = r
        self._report.rows.append(
            ExtractRow(path, (rows, columns), r, 1 - rest, rest**0.5, ratio(found.norm, found.weight_norm))
        )
        self._report.parameters += a.numel() + b.numel()
        self.total += found.norm**2
        self.covered += found.norm**2
        self.kept += (1 - rest) * found.norm**2

    def _put(self, path: str, kind: str, a: Tensor, b: Tensor) -> None:
        """B A of a linear layer; of an embedding PEFT has the update as (B A)^T."""
        if kind == "embedding":
            named = {"lora_embedding_A": b.T.contiguous(), "lora_embedding_B": a.T.contiguous()}
        else:
            named = {"lora_A.weight": a, "lora_B.weight": b}
        for part, values in named.items():
            stored = values.to(self._dtype)
            bad = ~torch.isfinite(stored)
            if bool(bad.any()):
                index, count = int(bad.reshape(-1).to(torch.uint8).argmax()), int(bad.sum())
                detail = f"the value at flat index {index} overflows {self._dtype}"
                raise NonFiniteError(f"{path}.{part}", index, count, detail)
            self.tensors[f"{PREFIX}{path}.{part}"] = stored

    def leave(self, name: str, why: str) -> None:
        """A tensor that gets no update; if it changed, the report says so."""
        squares = weight = 0.0
        for _, base, part in self._pairs.difference(name).slabs():
            squares += float(part.square().sum())
            weight += float(base.square().sum())
        self.total += squares
        if squares:
            self._report.uncovered[name] = (ratio(squares**0.5, weight**0.5), why)
        else:
            self._report.unchanged += 1

    def save_others(self) -> None:
        """Every tensor of the modules that changed without an update, as it is in the tuned checkpoint."""
        pairs, layers, report = self._pairs, self._layers, self._report
        for name in list(report.uncovered):
            path = layers.path(name)
            own = [other for other in pairs.names if layers.path(other) == path]
            blocked = "its layer has a low-rank update, beside which no copy can be" if path in self.ranks else ""
            if not path or any(other in pairs.base.packed for other in own):
                blocked = "its module is quantized, or has no name"
            elif not layers.is_module(path):
                blocked = f"the model has no module {path} that a copy could be for"
            if blocked:
                report.uncovered[name] = (report.uncovered[name][0], blocked)
                continue
            for module in (path, *layers.tied_to(path)):
                for other in own:
                    self.tensors[f"{PREFIX}{module}.{other.rpartition('.')[2]}"] = _whole(pairs, other)
                if module not in report.saved:
                    report.saved.append(module)
            del report.uncovered[name]

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        ranks = self.ranks
        most = Counter(ranks.values()).most_common(1)[0][0]
        others = {path: r for path, r in ranks.items() if r != most}
        taken = self._layers.taken(ranks)
        classes = (self._pairs.base.source.config() or {}).get("architectures") or []
        return {
            "peft_type": "LORA",
            "task_type": next((task for name in classes if (task := task_type(name))), None),
            "base_model_name_or_path": self._report.base,
            "inference_mode": True,
            "r": most,
            "lora_alpha": most,
            "lora_dropout": 0.0,
            "target_modules": sorted({path if (leaf := path.rpartition(".")[2]) in taken else leaf for path in ranks}),
            "exclude_modules": None,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": self._report.saved or None,
            "init_lora_weights": True,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": others,
            "alpha_pattern": others,
            "fan_in_fan_out": False,
        }


def _check_arguments(rank: int | None, energy: float | None, dtype: torch.dtype) -> None:
    if rank is None and energy is None:
        raise ValueError("rank: give a rank, a share of the energy, or both; got neither")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if energy is not None and not (isinstance(energy, int | float) and 0 < energy <= 1):
        raise ValueError(f"energy must be a number above 0 and at most 1, got {energy!r}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")


def _shown(target: str | tuple[str, ...]) -> str:
    return ", ".join(patterns_of(target))


def _chosen(pairs: Pairs, layers: _Layers, target: str | tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Weight name -> (path of its layer in the model, "linear" or "embedding"), for those that `target` names."""
    kinds = {name: (layers.path(name), layers.kind(name)[0]) for name in pairs.matrices}
    able = {name: (path, kind) for name, (path, kind) in kinds.items() if kind}
    if target == ALL_LINEAR:
        return {name: one for name, one in able.items() if one[1] == "linear"}
    patterns = patterns_of(target)
    require_matches("target", patterns, {path: None for path, _ in able.values()})
    return {name: one for name, one in able.items() if matches(one[0], patterns)}


def _whole(pairs: Pairs, name: str) -> Tensor:
    """The tuned tensor, in the dtype that it is stored in (fp32 if that is fp64, bf16 if fp8)."""
    reader = FiniteReader(pairs.tuned_reader(name))
    values = reader.read(0, math.prod(reader.shape))
    return values.to(reader.dtype, copy=True).view(reader.shape)
