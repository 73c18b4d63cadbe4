"""Two checkpoints of one model: which of their tensors are the same weight, and the difference of a weight by rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..checkpoint.adapter import match_names
from ..checkpoint.files import Source, open_source, read_bytes
from ..checkpoint.slabs import FLOAT_DTYPES, FP8_DTYPES, Reader
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
        name: in the base. shape: of the weight. stored: dtypes or formats of (base, tuned), for reports.
    """

    def __init__(self, name: str, base: Reader, tuned: Reader) -> None:
        self.name, self.shape = name, tuple(base.shape)
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
        step = max(1, ELEMENTS // max(1, self.columns))
        for first in range(0, self.rows, step):
            part = first * self.columns, min(self.rows, first + step) * self.columns
            base, tuned = (reader.read(*part).double().view(-1, self.columns) for reader in self._readers)
            yield first, base, tuned - base


@dataclass
class Pairs:
    """Which tensors of two checkpoints belong together, by the names of the base.

    Attributes:
        base, tuned: their tensors. names: name in the base -> name in the tuned one, of floating tensors of one shape.
        missing: names that only the base has; extra: that only the tuned one has.
        reshaped: name -> shape in the base, shape in the tuned one.
        tied: name -> the table whose values it repeats, in both: a head that shares the embedding's weight.
        notes: sentences worth a reader's attention.
    """

    base: Weights
    tuned: Weights
    names: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def matrices(self) -> list[str]:
        """Names of weights of two dimensions that are not empty."""
        return [name for name in self.names if self._dimensions(name) == 2]

    @property
    def others(self) -> list[str]:
        """Names of tensors of other dimensions: norms, biases, stacked experts."""
        return [name for name in self.names if self._dimensions(name) not in (None, 2)]

    def _dimensions(self, name: str) -> int | None:
        """How many a tensor has, None if it is empty."""
        shape = self.base.shapes[name]
        return len(shape) if math.prod(shape) else None

    def difference(self, name: str) -> Difference:
        """Of the weight with this name in the base."""
        return Difference(name, self.base.reader(name), self.tuned.reader(self.names[name]))


def pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> Pairs:
    """Find what two checkpoints (a directory or a .safetensors file each) have in common, from their headers.

    Names may differ as transformers renames while loading, or by the base model's prefix.

    Raises:
        CheckpointNotFoundError, CheckpointError: one cannot be read (see `open_source`); or they are one directory, or
            have no weight of two dimensions in common.
    """
    if Path(base).resolve() == Path(tuned).resolve():
        raise CheckpointError(f"{tuned}: BASE and TUNED are the same checkpoint")
    first, second = Weights(open_source(base)), Weights(open_source(tuned))
    result = Pairs(first, second)
    found = match_names(list(first.shapes), second.shapes, second.source.root)
    result.extra = [name for name in second.shapes if name not in set(found.values())]
    for name, shape in first.shapes.items():
        other = found.get(name)
        if other is None:
            result.missing.append(name)
        elif second.shapes[other] != shape:
            result.reshaped[name] = (shape, second.shapes[other])
        elif _floating(first, name) and _floating(second, other):
            result.names[name] = other
    _set_tied_heads_apart(result)
    if not result.matrices:
        reshaped = f"; {len(result.reshaped)} have other shapes there" if result.reshaped else ""
        raise CheckpointError(f"{tuned}: has no weight of two dimensions in common with {base}{reshaped}")
    for which, weights in (("BASE", first), ("TUNED", second)):
        if weights.packed:
            result.notes.append(
                f"{which} is quantized: differences are to what its codes stand for, and hold what quantizing lost"
            )
    halves = sorted({d for n in result.names.values() if (d := _dtype(second, n)) in ("BF16", "F16")})
    if halves:
        result.notes.append(
            f"TUNED is stored in {' and '.join(halves).lower()}: its differences hold the rounding to it, which has "
            "full rank"
        )
    return result


def _dtype(weights: Weights, name: str) -> str:
    return "packed" if name in weights.packed else weights.source.tensors[name].dtype


def _floating(weights: Weights, name: str) -> bool:
    return name in weights.packed or _dtype(weights, name) in (*FLOAT_DTYPES, *FP8_DTYPES)


def _set_tied_heads_apart(pairs: Pairs) -> None:
    """A head that repeats the embedding's table, in a file or by config.json alone, is counted with the table."""
    table = next((name for name in pairs.names if name.endswith(_TABLES)), None)
    if table is None:
        return
    for name in list(pairs.names):
        if (
            is_head(name)
            and _repeats(pairs.base, name, table)
            and _repeats(pairs.tuned, pairs.names[name], pairs.names[table])
        ):
            pairs.tied[name] = table
            del pairs.names[name]
    # One of the two files may have left the copy out.
    for names, weights, known in ((pairs.missing, pairs.base, table), (pairs.extra, pairs.tuned, pairs.names[table])):
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
