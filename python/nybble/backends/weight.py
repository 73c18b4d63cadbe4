"""How a kernel sees a quantized weight: the tensors of one 2-D weight and the sizes that they must fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LayoutError, UnsupportedDtypeError
from .addresses import address_of

#: The core's codes of what activations are multiplied in, by the name that `QuantConfig.compute` has.
COMPUTES: dict[str | None, int] = {None: 0, "int8": 1}

#: fp32 values may also be held as their int32 bit patterns, which no `.to(dtype)` or mixed-precision policy rounds.
_FLOAT_BITS = (torch.float32, torch.int32)

#: Tensors that nobody has taught to do something else.
PLAIN = (Tensor, torch.nn.Parameter)


class PackedWeight(NamedTuple):
    """The tensors of a weight [out_features, in_features]; see `nybble.tensor.QuantTensor` for the layout.

    Attributes:
        packed: uint8 with ceil(out * in / 2) elements (4-bit), or int8 [out, in].
        absmax: fp32 [nb] or its int32 bits, or uint8 [nb] when double-quantized; int8: fp32 [out] or its bits.
        codebook: fp32 [16] or its bits; None for int8.
        nested_absmax, nested_map, nested_offset: fp32 or bits [ceil(nb / nested_block_size)], [256], [1]; None when
            the scales are plain.
        out_features, in_features, block_size, nested_block_size: sizes; block_size is 0 for int8.
        compute: one of `COMPUTES`: 0, activations keep their precision; 1, `linear` rounds each row of x to int8.
        outlier_threshold: with compute 1: columns of x that reach it are not rounded; 0: all are.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor | None
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    out_features: int
    in_features: int
    block_size: int
    nested_block_size: int
    compute: int = 0
    outlier_threshold: float = 0.0

    @property
    def is_int8(self) -> bool:
        """Row-wise int8 rather than 4 bits."""
        return self.codebook is None

    def check(self) -> None:
        """Raises LayoutError or UnsupportedDtypeError unless each tensor has the size and dtype that kernels read."""
        if self.compute not in (0, 1):
            raise LayoutError(f"compute is {self.compute}; allowed are 0 (native) and 1 (int8 activations)")
        if not 0.0 <= self.outlier_threshold < math.inf or (self.outlier_threshold and self.compute != 1):
            raise LayoutError(
                f"outlier_threshold is {self.outlier_threshold} with compute {self.compute}; it must be 0 (none), or "
                "above 0 with compute 1"
            )
        count = self.out_features * self.in_features
        for name, tensor in zip(self._fields[1:6], self[1:6], strict=True):
            if tensor is not None and tensor.device != self.packed.device:
                raise LayoutError(
                    f"{name} is on {tensor.device}, but packed is on {self.packed.device}; move one of them"
                )
        if self.codebook is None:
            _expect("packed", self.packed, (torch.int8,), count)
            _expect("absmax", self.absmax, _FLOAT_BITS, self.out_features)
            return
        if self.block_size < 1 or self.nested_block_size < 1:
            raise LayoutError(f"block_size is {self.block_size}, nested {self.nested_block_size}; both must be above 0")
        blocks = -(-count // self.block_size)
        _expect("packed", self.packed, (torch.uint8,), (count + 1) // 2)
        _expect("codebook", self.codebook, _FLOAT_BITS, 16)
        if self.nested_absmax is None:
            _expect("absmax", self.absmax, _FLOAT_BITS, blocks)
            return
        _expect("absmax", self.absmax, (torch.uint8,), blocks)
        _expect("nested_absmax", self.nested_absmax, _FLOAT_BITS, -(-blocks // self.nested_block_size))
        _expect("nested_map", self.nested_map, _FLOAT_BITS, 256)
        _expect("nested_offset", self.nested_offset, _FLOAT_BITS, 1)


class BoundWeight(PackedWeight):
    """A PackedWeight of plain tensors that also keeps a core's handle to their addresses.

    The handle is made at the first call, after a full `check`, and again whenever one of the tensors has moved
    (`.data =`, share_memory, a resized storage, another device): addresses are compared in every call. All of it can be
    derived from the tensors, so it is never copied or saved. One attribute holds it, which threads read and replace as
    a whole.
    """

    #: The core, its handle, and what to compare: each tensor's data_ptr and what it returned when the handle was made.
    bound: tuple[Any, Any, list[tuple[Callable[[], int], int]]] = (None, None, [])

    @classmethod
    def of(cls, weight: PackedWeight) -> PackedWeight:
        """`weight` as a BoundWeight, or as it is if its tensors are of a subclass or on a device without a core."""
        plain = all(t is None or (type(t) in PLAIN and (t.is_cpu or t.is_cuda)) for t in weight[:6])
        return cls(*weight) if plain else weight


def handle_of(weight: PackedWeight, core: Any) -> Any:
    """The handle of `core` to a checked weight; a BoundWeight is checked again when one of its tensors has moved."""
    if not isinstance(weight, BoundWeight):
        return _new_handle(weight, core)
    owner, handle, places = weight.bound
    if owner is not core:
        handle = None
    for data_ptr, address in places:
        if data_ptr() != address:
            handle = None
    if handle is None:
        weight.check()
        handle = _new_handle(weight, core)
        weight.bound = core, handle, [(t.data_ptr, t.data_ptr()) for t in weight[:6] if t is not None]
    return handle


def _new_handle(weight: PackedWeight, core: Any) -> Any:
    if weight.codebook is None:
        return core.Weight.int8_rows(
            weight.packed.data_ptr(), weight.absmax.data_ptr(), weight.out_features, weight.in_features
        )
    return core.Weight.four_bit(
        weight.packed.data_ptr(),
        weight.absmax.data_ptr(),
        address_of(weight.nested_absmax),
        address_of(weight.nested_map),
        address_of(weight.nested_offset),
        weight.nested_block_size,
        weight.codebook.data_ptr(),
        weight.block_size,
        weight.out_features,
        weight.in_features,
    )


def decoded_columns(weight: PackedWeight, columns: Tensor) -> Tensor:
    """The weight's columns [out_features, len(columns)] in fp32, the bits that `dequantize` gives; columns int64."""
    at = columns + torch.arange(weight.out_features, device=columns.device).unsqueeze(1) * weight.in_features
    packed = weight.packed.reshape(-1)
    if weight.codebook is None:
        return packed[at].float() * as_float(weight.absmax).unsqueeze(1) / 127.0
    codes = torch.where(at % 2 == 0, packed[at // 2] >> 4, packed[at // 2] & 15)
    blocks = at // weight.block_size
    scales = as_float(weight.absmax)[blocks] if weight.nested_absmax is None else _nested_scales(weight, blocks)
    return as_float(weight.codebook)[codes.long()] * scales


def _nested_scales(weight: PackedWeight, blocks: Tensor) -> Tensor:
    nested, nested_map, offset = weight.nested_absmax, weight.nested_map, weight.nested_offset
    assert nested is not None and nested_map is not None and offset is not None  # `check` saw to it
    factors = as_float(nested)[blocks // weight.nested_block_size]
    return as_float(nested_map)[weight.absmax[blocks].long()] * factors + as_float(offset)


def as_float(bits: Tensor) -> Tensor:
    """fp32 as it is, int32 bit patterns as the fp32 values that they stand for (a view)."""
    return bits.view(torch.float32) if bits.dtype == torch.int32 else bits


def _expect(name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], size: int) -> None:
    if tensor is None:
        raise LayoutError(f"{name} is None; a tensor of {size} elements is needed")
    if tensor.dtype not in dtypes:
        raise UnsupportedDtypeError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if tensor.numel() != size:
        raise LayoutError(f"{name} has {tensor.numel()} elements; the weight's shape and block size need {size}")
    if not tensor.is_contiguous():
        raise LayoutError(f"{name} is not contiguous; its strides are {tensor.stride()}")
