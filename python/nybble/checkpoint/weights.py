"""The tensors of a source as the weights that they stand for: packed, in fp8 with scales, or plain."""

from __future__ import annotations

from ..errors import CheckpointError
from .bnb import group, source_quantization
from .files import Source
from .select import Selection, _find_scales, _refuse_quantized
from .slabs import PlainReader, QuantizedReader, Reader, ScaledReader


class Weights:
    """How each weight of a source is read.

    Attributes:
        packed: name of a quantized weight, of any shape -> {part: tensor's name}. fp8: names of weights in fp8.
        parts: names of tensors that only belong to a weight: scales, codebooks.
        shapes: of every other tensor, of what it stands for.

    Raises:
        CheckpointError: it is quantized by a method whose layout nybble does not read.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.groups = group(source.tensors, str(source.root))
        self.packed = {m["weight"]: m for m in (*self.groups.quantized.values(), *self.groups.others.values())}
        self._fp8 = Selection()
        if self.packed:
            method = source_quantization(source.config())
            if method not in (None, "bitsandbytes", "nybble"):
                raise CheckpointError(
                    f"{source.root / 'config.json'}: quantized by {method!r}, whose layout nybble does not read"
                )
        else:
            _refuse_quantized(source)
            _find_scales(source, self._fp8)
        self.fp8 = self._fp8.scales.keys()
        parts = {part for members in self.packed.values() for part in members.values()}
        self.parts = (parts - self.packed.keys()) | self._fp8.dropped  # of a weight; no tensors of their own
        self.shapes = {name: i.shape for name, i in source.tensors.items() if name not in self.parts}
        self.shapes |= {name: self.quantized(name).shape for name in self.packed}

    def quantized(self, name: str) -> QuantizedReader:
        return QuantizedReader({part: self.source.tensors[member] for part, member in self.packed[name].items()})

    def reader(self, name: str) -> Reader:
        """Of any floating tensor."""
        if name in self.packed:
            return self.quantized(name)
        info = self.source.tensors[name]
        return ScaledReader(info, self._fp8.scales[name], self._fp8.tile) if name in self.fp8 else PlainReader(info)

    def nbytes(self, name: str) -> int:
        members = self.packed[name].values() if name in self.packed else (name,)
        return sum(self.source.tensors[member].nbytes for member in members)
