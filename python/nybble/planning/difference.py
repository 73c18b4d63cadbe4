"""Two checkpoints of one model: which of their tensors are the same weight, and the difference of a weight by rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.adapter import CONFIG_NAME, AdapterFile, AdapterLayer, match_names, read_adapter
from ..checkpoint.files import Source, TensorInfo, open_source, read_bytes
from ..checkpoint.slabs import FLOAT_DTYPES, FP8_DTYPES, PlainReader, Reader
from ..checkpoint.update import FiniteReader
from ..checkpoint.weights import Weights
from ..errors import CheckpointError

#: Elements of a weight that are read at once; with both weights and their difference in fp64 they take 128 MB.
ELEMENTS = 1 << 22
_HEAD = "lm_head.weight"
# What model classes call the table of the embedding that a head may share.
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


class Difference:
    """D = tuned - base of one weight, whatever either is stored in; a quantized one is what its codes stand for.

    Attributes:
        name: in the base. shape: of the weight, or of one matrix of a stack.
        rounded_to: the dtype that the tuned weight is stored in, None if it is quantized, in fp8 or not stored.
    """

    def __init__(
        self, name: str, base: Reader, tuned: Reader, rounded_to: torch.dtype | None = None, index: int | None = None
    ) -> None:
        """index: which matrix of a stack [number, rows, columns]; None for the whole tensor."""
        self.name, self.rounded_to = name, rounded_to
        self.shape = tuple(base.shape) if index is None else tuple(base.shape[1:])
        self._first = 0 if index is None else index * math.prod(self.shape)
        self._readers = FiniteReader(base), FiniteReader(tuned)

    @property
    def rows(self) -> int:
        """Of a matrix; the elements of any other tensor count as one row each."""
        return self.shape[0] if len(self.shape) == 2 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    def slabs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, rows of the base, the same rows of D), fp64 [rows, columns], from the first row to the last.

        Raises:
            NonFiniteError: one of the two holds NaN or infinity; names the tensor and its file.
        """
        for first, part in self._ranges():
            base, tuned = (reader.read(*part).double().view(-1, self.columns) for reader in self._readers)
            yield first, base, tuned - base

    def _ranges(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """(first row, its elements' range in the tensor) of each slab."""
        step = max(1, ELEMENTS // max(1, self.columns))
        for row in range(0, self.rows, step):
            end = min(self.rows, row + step)
            yield row, (self._first + row * self.columns, self._first + end * self.columns)


class Update(Difference):
    """D = scaling * B A of an adapter's layer, of an embedding (scaling * B A)^T.

    Attributes:
        left, right: fp64 [rows, r] and [r, columns], whose product is D.
    """

    def __init__(self, name: str, base: Reader, layer: AdapterLayer) -> None:
        super().__init__(name, base, base)
        a, b = (part.double() for part in layer.factors())
        left, right = (b, a) if layer.kind == "linear" else (a.T, b.T)
        self.left, self.right = layer.scaling * left, right

    def slabs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first, part in self._ranges():
            base = self._readers[0].read(*part).double().view(-1, self.columns)
            yield first, base, self.left[first : first + len(base)] @ self.right


@dataclass
class Pairs:
    """Which tensors of two checkpoints belong together, by the names of the base.

    Attributes:
        base, tuned: their tensors; tuned is None for an adapter. names: name in the base -> name in the tuned one, of
            floating tensors of one shape.
        updates: name in the base -> the adapter's layer that changes it, no others than `names`. saved: the adapter's
            full copies, by their names there.
        missing: names that only the base has; extra: that only the tuned one has.
        reshaped: name -> shape in the base, shape in the tuned one.
        tied: name -> the table whose values it repeats, in both: a head that shares the embedding's weight.
        notes: sentences worth a reader's attention.
    """

    base: Weights
    tuned: Weights | None
    names: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    updates: dict[str, AdapterLayer] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def matrices(self) -> list[str]:
        """Names of weights of two dimensions that are not empty."""
        return [name for name in self.names if self._dimensions(name) == 2]

    @property
    def stacks(self) -> list[str]:
        """Names of stacks of experts, [number, rows, columns]; they are among `others` too."""
        return [name for name in self.names if self._dimensions(name) == 3 and "expert" in name.lower()]

    @property
    def others(self) -> list[str]:
        """Names of tensors of other dimensions: norms, biases, stacked experts."""
        return [name for name in self.names if self._dimensions(name) not in (None, 2)]

    def _dimensions(self, name: str) -> int | None:
        """How many a tensor has, None if it is empty."""
        shape = self.base.shapes[name]
        return len(shape) if math.prod(shape) else None

    def difference(self, name: str, index: int | None = None) -> Difference:
        """Of the weight with this name in the base; index: which matrix of a stack."""
        if name in self.updates:
            return Update(name, self.base.reader(name), self.updates[name])
        return Difference(name, self.base.reader(name), self.tuned_reader(name), self._rounded_to(name), index)

    def tuned_reader(self, name: str) -> Reader:
        """Of the tuned tensor, by its name in the base. There is none of a layer that an adapter updates."""
        other = self.names[name]
        return PlainReader(self.saved[other]) if self.tuned is None else self.tuned.reader(other)

    def _rounded_to(self, name: str) -> torch.dtype | None:
        other = self.names[name]
        if self.tuned is None:
            return FLOAT_DTYPES.get(self.saved[other].dtype)
        return FLOAT_DTYPES.get(_dtype(self.tuned, other))


def pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> Pairs:
    """Find what two checkpoints (a directory or a .safetensors file each) have in common, from their headers.

    Names may differ as transformers renames while loading, or by the base model's prefix. `tuned` may also be the
    directory of a LoRA for the base: then the difference is what it adds.

    Raises:
        CheckpointNotFoundError, CheckpointError: one cannot be read (see `open_source`, `read_adapter`); or they are
            one directory, or have no weight of two dimensions in common; or the adapter is DoRA, or for another model.
    """
    if Path(base).resolve() == Path(tuned).resolve():
        raise CheckpointError(f"{tuned}: BASE and TUNED are the same checkpoint")
    for given in (base, tuned):
        _refuse_gguf(Path(given))
    first = Weights(open_source(base))
    if (Path(tuned) / CONFIG_NAME).is_file():
        result = _with_adapter(first, read_adapter(Path(tuned)))
    else:
        result = _with_checkpoint(first, Weights(open_source(tuned)))
    if not result.matrices and not result.stacks:
        reshaped = f"; {len(result.reshaped)} have other shapes there" if result.reshaped else ""
        raise CheckpointError(f"{tuned}: has no weight of two dimensions in common with {base}{reshaped}")
    for which, weights in (("BASE", first), ("TUNED", result.tuned)):
        if weights is not None and weights.packed and not result.updates:
            result.notes.append(
                f"{which} is quantized: differences are to what its codes stand for, and hold what quantizing lost"
            )
    return result


def _refuse_gguf(path: Path) -> None:
    if path.suffix.lower() == ".gguf" and path.is_file():
        raise CheckpointError(f"{path}: a GGUF file; `nybble import` makes a checkpoint of it that can be compared")


def _with_checkpoint(first: Weights, second: Weights) -> Pairs:
    result = Pairs(first, second)
    found = match_names(list(first.shapes), second.shapes, second.source.root)
    known = set(found.values())
    result.extra = [name for name in second.shapes if name not in known]
    for name, shape in first.shapes.items():
        other = found.get(name)
        if other is None:
            result.missing.append(name)
        elif second.shapes[other] != shape:
            result.reshaped[name] = (shape, second.shapes[other])
        elif _floating(first, name) and _floating(second, other):
            result.names[name] = other
    _set_tied_heads_apart(result, second)
    return result


def _with_adapter(base: Weights, adapter: AdapterFile) -> Pairs:
    result = Pairs(base, None, saved=dict(adapter.saved))
    shapes: dict[str, tuple[int, ...]] = {f"{path}.weight": layer.shape for path, layer in adapter.layers.items()}
    shapes |= {name: info.shape for name, info in adapter.saved.items()}
    found = match_names(list(shapes), base.shapes, base.source.root)
    for wanted, shape in shapes.items():
        name, layer = found.get(wanted), adapter.layers.get(wanted.removesuffix(".weight"))
        if layer is not None and layer.magnitude is not None:
            raise CheckpointError(
                f"{adapter.directory}: {layer.path}: DoRA rescales whole weights; merge the adapter (nybble merge) and "
                "give the merged checkpoint as TUNED"
            )
        if name is None and layer is not None:
            raise CheckpointError(f"{adapter.directory}: has an update of {wanted!r}, which {base.source.root} has not")
        if name is None:
            result.extra.append(wanted)
        elif base.shapes[name] != shape:
            result.reshaped[name] = (base.shapes[name], shape)
        elif _floating(base, name):
            result.names[name] = wanted
            if layer is not None:
                result.updates[name] = layer
    result.notes.append("TUNED is an adapter: differences are what it adds to BASE, before any rounding")
    return result


def _dtype(weights: Weights, name: str) -> str:
    return "packed" if name in weights.packed else weights.source.tensors[name].dtype


def _floating(weights: Weights, name: str) -> bool:
    return name in weights.packed or _dtype(weights, name) in (*FLOAT_DTYPES, *FP8_DTYPES)


def _set_tied_heads_apart(pairs: Pairs, tuned: Weights) -> None:
    """A head that repeats the embedding's table, in a file or by config.json alone, is counted with the table."""
    table = next((name for name in pairs.names if name.endswith(_TABLES)), None)
    if table is None:
        return
    for name in list(pairs.names):
        if (
            is_head(name)
            and _repeats(pairs.base, name, table)
            and _repeats(tuned, pairs.names[name], pairs.names[table])
        ):
            pairs.tied[name] = table
            del pairs.names[name]
    # One of the two files may have left the copy out.
    for names, weights, known in ((pairs.missing, pairs.base, table), (pairs.extra, tuned, pairs.names[table])):
        for name in [name for name in names if is_head(name) and _repeats(weights, name, known)]:
            names.remove(name)
            pairs.tied[name] = table


def is_head(name: str) -> bool:
    """Whether a tensor is called as the weight of a language model's head."""
    return name == _HEAD or name.endswith(f".{_HEAD}")


def tied_table(source: Source, names: list[str]) -> str | None:
    """The embedding's tensor among `names` if config.json says that the head shares it."""
    if not (source.config() or {}).get("tie_word_embeddings", False):
        return None
    return next((name for name in names if name.endswith(_TABLES)), None)


def _repeats(weights: Weights, name: str, table: str) -> bool:
    tensors = weights.source.tensors
    if name in weights.packed or table in weights.packed:
        return False
    one, other = tensors[name], tensors[table]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        a == b for a, b in zip(read_bytes(one), read_bytes(other), strict=True)
    )
