"""`QuantTensor`: one quantized weight as plain tensors, in memory as on disk (the bitsandbytes layout)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import LayoutError, UnsupportedDtypeError
from .formats import BLOCK_SIZES, NESTED_BLOCK_SIZE, QuantConfig, dynamic_map
from .reference import check_out

if TYPE_CHECKING:
    from .backends import PackedWeight

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

#: Formats that bitsandbytes reads; the others are marked as nybble's own so that no reader mistakes one for another.
_BITSANDBYTES_FORMATS = ("nf4", "fp4")
_OWN_FORMATS = ("int4", "custom")
_STATE_KEYS = {
    **{f"weight.quant_state.bitsandbytes__{name}": name for name in _BITSANDBYTES_FORMATS},
    **{f"weight.quant_state.nybble__{name}": name for name in _OWN_FORMATS},
}


def _backend(tensor: Tensor) -> ModuleType:
    # Imported on use: backends stand above this file.
    from nybble import backends

    return backends.of(tensor)


@dataclass(eq=False)
class QuantTensor:
    """A quantized weight: packed codes, scales and what it takes to decode them. Tensors are held, not copied.

    Attributes:
        packed: uint8 [ceil(n / 2), 1] (4-bit, even element in the high nibble), or int8 [N, K].
        absmax: scales of the blocks: fp32 [nb], or uint8 [nb] when double-quantized; int8: fp32 [N], one a row.
        codebook: fp32 [16]; None for int8.
        block_size: elements that share a scale; 0 for int8.
        shape: shape of the weight.
        dtype: what `dequantize` returns by default.
        format: "nf4", "fp4", "int4", "custom" or "int8".
        nested_absmax: fp32 [ceil(nb / 256)], double-quantized only.
        nested_map: fp32 [256], double-quantized only.
        nested_offset: fp32 0-dim, double-quantized only.
        nested_block_size: scales that share a nested scale.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor | None
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_block_size: int = NESTED_BLOCK_SIZE

    @classmethod
    def quantize(cls, weight: Tensor, config: QuantConfig | None = None, name: str = "weight") -> QuantTensor:
        """Quantizes `weight` (fp32, fp16 or bf16, any strides; 4-bit: any shape, int8: [N, K]).

        Args:
            weight: the values; not kept, and no gradient flows.
            config: `QuantConfig()` by default. `skip` and `overrides` are for whole models and not looked at.
            name: what error messages call the weight.

        Raises:
            NonFiniteError: the weight holds NaN or Inf (int8: or exceeds fp16).
            UnsupportedDtypeError: another dtype.

        >>> QuantTensor.quantize(torch.ones(3, 5)).dequantize().shape
        torch.Size([3, 5])
        """
        config = QuantConfig() if config is None else config
        weight = weight.detach()
        if weight.dtype not in _DTYPE_NAMES:
            raise UnsupportedDtypeError(f"{name} has dtype {weight.dtype}; allowed are {', '.join(_DTYPES)}")
        shape, dtype, backend = tuple(weight.shape), weight.dtype, _backend(weight)
        codes = config.codebook
        if codes is None:
            q, scb = backend.quantize_int8(weight, name)
            return cls(q, scb, None, 0, shape, dtype, "int8")
        codes = codes.to(weight.device)
        packed, absmax = backend.quantize_4bit(weight, codes, config.block_size, config.search, name)
        result = cls(packed, absmax, codes, config.block_size, shape, dtype, config.format_name)
        if config.double_quant:
            result.absmax, result.nested_absmax, result.nested_offset = backend.nested_quantize(absmax)
            result.nested_map = dynamic_map().to(weight.device)
        return result

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """The weight, of shape `shape`; computed in fp32, then cast.

        Args:
            dtype: fp32, fp16 or bf16; by default that of `out`, without one `self.dtype`.
            out: where to write it: a contiguous tensor of shape `shape` and dtype `dtype` on this weight's device,
                without gradient; returned. A buffer used again saves a large new one's page faults.

        Raises:
            UnsupportedDtypeError: another dtype, or one that is not `out`'s.
            LayoutError: `out` has another shape or device, is not contiguous, or requires a gradient.
        """
        if dtype is None:
            dtype = self.dtype if out is None else out.dtype
        if dtype not in _DTYPE_NAMES:
            raise UnsupportedDtypeError(f"dtype is {dtype}; allowed are {', '.join(_DTYPES)}")
        weight, backend = self.packed_weight(), _backend(self.packed)
        if out is None:
            return backend.dequantize(weight, dtype).reshape(self.shape)
        check_out(out, self.shape, dtype, self.packed.device)
        backend.dequantize(weight, dtype, out=out.view(weight.out_features, weight.in_features))
        return out

    def packed_weight(self) -> PackedWeight:
        """The tensors as kernels take them: [out, in], else one row of all elements."""
        from nybble.backends import PackedWeight

        rows, columns = self.shape if len(self.shape) == 2 else (1, self.numel)
        return PackedWeight(
            packed=self.packed,
            absmax=self.absmax,
            codebook=self.codebook,
            nested_absmax=self.nested_absmax,
            nested_map=self.nested_map,
            nested_offset=self.nested_offset,
            out_features=rows,
            in_features=columns,
            block_size=self.block_size,
            nested_block_size=self.nested_block_size,
        )

    def absmax_float(self) -> Tensor:
        """The scales as fp32, decoded if they are double-quantized."""
        if not self.is_nested:
            return self.absmax
        return _backend(self.packed).nested_dequantize(
            self.absmax, self.nested_absmax, self.nested_map, self.nested_offset, self.nested_block_size
        )

    @property
    def is_nested(self) -> bool:
        """Whether the scales are double-quantized."""
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def to(self, device: torch.device | str | int) -> QuantTensor:
        """The same weight with its tensors on `device` (shared where they are there already)."""
        moved: dict[str, Any] = {key: tensor.to(device) for key, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {key: value for key, value in values if isinstance(value, Tensor)}

    def state(self) -> dict[str, Tensor]:
        """The tensors under the keys of a bitsandbytes state dict, "weight" standing for the weight's own key.

        4-bit: "weight", "weight.absmax", "weight.quant_map", with double quantization "weight.nested_absmax" and
        "weight.nested_quant_map", and the JSON in "weight.quant_state.bitsandbytes__nf4" (or `__fp4`; formats that
        bitsandbytes does not have: "weight.quant_state.nybble__int4" or `__custom`). int8: "weight", "SCB",
        "weight_format". Tensors are shared, not copied. `from_state` is the inverse.
        """
        if self.packed.is_meta:
            raise LayoutError("the weight is on the meta device: it has no values to save")
        if self.codebook is None:
            row_format = torch.zeros((), dtype=torch.uint8, device=self.packed.device)
            return {"weight": self.packed, "SCB": self.absmax, "weight_format": row_format}
        state = {"weight": self.packed, "weight.absmax": self.absmax, "weight.quant_map": self.codebook}
        offset = None
        if self.nested_absmax is not None and self.nested_map is not None and self.nested_offset is not None:
            state["weight.nested_absmax"] = self.nested_absmax
            state["weight.nested_quant_map"] = self.nested_map
            offset = self.nested_offset.item()
        text = quant_state_text(self.format, self.block_size, self.dtype, self.shape, offset, self.nested_block_size)
        owner = "bitsandbytes" if self.format in _BITSANDBYTES_FORMATS else "nybble"
        state[f"weight.quant_state.{owner}__{self.format}"] = torch.tensor(
            list(text.encode()), dtype=torch.uint8, device=self.packed.device
        )
        return state

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], name: str = "weight", dtype: torch.dtype | None = None
    ) -> QuantTensor:
        """Reads what `state` wrote, or bitsandbytes. Tensors are shared, not copied, and checked against each other.

        Args:
            state: keys as `state` gives them; others (such as "bias") are not looked at. A 4-bit "weight" may have any
                dtype ("quant_storage"): the same bytes reinterpreted.
            name: what error messages call the weight.
            dtype: overrides what `dequantize` returns; by default the dtype that the file states, for int8 (whose
                layout states none) fp16.

        Raises:
            LayoutError: a key is missing, or a size, shape or the JSON does not fit; the message names the tensor.
            UnsupportedDtypeError: a tensor has the wrong dtype.
        """
        if "weight" not in state:
            raise LayoutError(f"{name}: there is no packed tensor under the key 'weight'; keys are {sorted(state)}")
        headers = [key for key in state if key.startswith("weight.quant_state.")]
        if not headers and "SCB" in state:
            result = cls._from_int8_state(state, name)
        else:
            if len(headers) != 1 or headers[0] not in _STATE_KEYS:
                allowed = ", ".join(_STATE_KEYS)
                raise LayoutError(
                    f"{name}: found {headers or 'no quant_state key'}; exactly one is needed of {allowed}"
                )
            result = cls._from_4bit_state(state, headers[0], name)
        if dtype is not None:
            result.dtype = dtype
        result.validate(name)
        result._check_finite(name)
        return result

    @classmethod
    def _from_int8_state(cls, state: Mapping[str, Tensor], name: str) -> QuantTensor:
        weight, order = state["weight"], state.get("weight_format")
        if order is not None and (order.numel() != 1 or int(order) != 0):
            raise LayoutError(f"{name}: weight_format is {order.tolist()}; only 0 (row-major) is supported")
        return cls(weight, state["SCB"], None, 0, tuple(weight.shape), torch.float16, "int8")

    @classmethod
    def _from_4bit_state(cls, state: Mapping[str, Tensor], header_key: str, name: str) -> QuantTensor:
        header = _parse_header(
            state[header_key], f"{name}.{header_key.removeprefix('weight.')}", _STATE_KEYS[header_key]
        )
        nested = "weight.nested_absmax" in state
        needed = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
        missing = [f"{name}.{key}" for key in needed if f"weight.{key}" not in state]
        if missing:
            raise LayoutError(f"{name}: missing {', '.join(missing)}")
        if nested and "nested_offset" not in header:
            raise LayoutError(f"{name}: there is a nested_absmax, but quant_state has no nested_offset")
        weight = state["weight"]
        if weight.dtype != torch.uint8:
            held, need = weight.numel() * weight.element_size(), -(-math.prod(header["shape"]) // 2)
            if held != need:
                raise LayoutError(
                    f"{name} has dtype {weight.dtype} and shape {list(weight.shape)}, which is {held} bytes; the codes "
                    f"of shape {header['shape']} are {need} bytes"
                )
            weight = weight.contiguous().reshape(-1).view(torch.uint8)
        result = cls(
            weight.reshape(-1, 1),
            state["weight.absmax"],
            state["weight.quant_map"],
            header["blocksize"],
            tuple(header["shape"]),
            _DTYPES[header["dtype"]],
            header["quant_type"],
        )
        if nested:
            result.nested_absmax = state["weight.nested_absmax"]
            result.nested_map = state["weight.nested_quant_map"]
            result.nested_block_size = header.get("nested_blocksize", NESTED_BLOCK_SIZE)
            result.nested_offset = torch.tensor(
                float(header["nested_offset"]), dtype=torch.float32, device=result.packed.device
            )
        return result

    def validate(self, name: str = "weight") -> None:
        """Raises LayoutError or UnsupportedDtypeError unless sizes, shapes and dtypes fit together (not the values)."""
        if self.dtype not in _DTYPE_NAMES:
            raise UnsupportedDtypeError(f"{name}: dtype is {self.dtype}; allowed are {', '.join(_DTYPES)}")
        if self.codebook is None:
            _expect(f"{name}", self.packed, torch.int8, self.shape)
            if len(self.shape) != 2:
                raise LayoutError(f"{name} has shape {self.shape}; the int8 layout is a matrix [N, K]")
            _expect(f"{name}: SCB", self.absmax, torch.float32, self.shape[:1])
            return
        if self.block_size not in BLOCK_SIZES:
            raise LayoutError(
                f"{name}: block size is {self.block_size}; allowed are {', '.join(map(str, BLOCK_SIZES))}"
            )
        why = f" for shape {list(self.shape)} in blocks of {self.block_size}"
        blocks = math.ceil(self.numel / self.block_size)
        _expect(f"{name}", self.packed, torch.uint8, (math.ceil(self.numel / 2), 1), why)
        _expect(f"{name}.absmax", self.absmax, torch.uint8 if self.is_nested else torch.float32, (blocks,), why)
        _expect(f"{name}.quant_map", self.codebook, torch.float32, (16,))
        if self.nested_absmax is None:
            return
        if self.nested_map is None or self.nested_offset is None:
            raise LayoutError(f"{name}: nested_absmax needs a nested map and a nested offset beside it")
        if self.nested_block_size != NESTED_BLOCK_SIZE:
            raise LayoutError(
                f"{name}: nested block size is {self.nested_block_size}; only {NESTED_BLOCK_SIZE} is allowed"
            )
        nested_blocks = math.ceil(blocks / NESTED_BLOCK_SIZE)
        _expect(f"{name}.nested_absmax", self.nested_absmax, torch.float32, (nested_blocks,), why)
        _expect(f"{name}.nested_quant_map", self.nested_map, torch.float32, (256,))
        _expect(f"{name}: nested_offset", self.nested_offset, torch.float32, ())

    def _check_finite(self, name: str) -> None:
        """Raises LayoutError if a scale or a code is NaN or Inf: one would poison its block, or every weight."""
        for key in ("absmax", "codebook", "nested_absmax", "nested_map", "nested_offset"):
            values = getattr(self, key)
            if values is None or values.is_meta or not values.is_floating_point() or not values.numel():
                continue
            if not bool(torch.isfinite(values).all()):
                stored = {"codebook": "quant_map", "nested_map": "nested_quant_map"}.get(key, key)
                raise LayoutError(f"{name}.{stored} holds NaN or Inf; every value must be finite")

    def __repr__(self) -> str:
        scales = ", double_quant" if self.is_nested else ""
        blocks = f", block_size={self.block_size}" if self.block_size else ""
        dtype = _DTYPE_NAMES.get(self.dtype, str(self.dtype))
        return f"QuantTensor({self.format}{blocks}{scales}, shape={list(self.shape)}, dtype={dtype})"


def quant_state_text(
    format: str,
    block_size: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    nested_offset: float | None = None,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> str:
    """The JSON of a 4-bit weight's quant_state; `nested_offset` is None without double quantization."""
    header: dict[str, Any] = {
        "quant_type": format,
        "blocksize": block_size,
        "dtype": _DTYPE_NAMES[dtype],
        "shape": list(shape),
    }
    if nested_offset is not None:
        header["nested_blocksize"] = nested_block_size
        header["nested_dtype"] = "float32"
        header["nested_offset"] = nested_offset
    # Keys in this order with Python's default separators: the bytes that bitsandbytes itself writes.
    return json.dumps(header)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], why: str = "") -> None:
    if tensor.dtype != dtype:
        raise UnsupportedDtypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise LayoutError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}{why}")


def _parse_header(tensor: Tensor, name: str, quant_type: str) -> dict[str, Any]:
    """The JSON object of a quant_state tensor with the fields that decoding needs, checked."""
    if tensor.dtype != torch.uint8:
        raise UnsupportedDtypeError(
            f"{name} has dtype {tensor.dtype}; it must be torch.uint8 (the bytes of a JSON object)"
        )
    try:
        header = json.loads(bytes(tensor.flatten().tolist()))
    except ValueError as error:
        raise LayoutError(f"{name} does not hold JSON: {error}") from error
    if not isinstance(header, dict):
        raise LayoutError(f"{name} holds JSON of type {type(header).__name__}; it must be an object")
    shape, offset = header.get("shape"), header.get("nested_offset", 0.0)
    checks = {
        "quant_type": header.get("quant_type") == quant_type,
        "blocksize": type(header.get("blocksize")) is int and header["blocksize"] in BLOCK_SIZES,
        "dtype": isinstance(header.get("dtype"), str) and header["dtype"] in _DTYPES,
        "shape": isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape),
        "nested_blocksize": header.get("nested_blocksize", NESTED_BLOCK_SIZE) == NESTED_BLOCK_SIZE,
        "nested_dtype": header.get("nested_dtype", "float32") == "float32",
        "nested_offset": type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max,
    }
    allowed = {
        "quant_type": repr(quant_type),
        "blocksize": f"one of {', '.join(map(str, BLOCK_SIZES))}",
        "dtype": f"one of {', '.join(_DTYPES)}",
        "shape": "a list of sizes",
        "nested_blocksize": str(NESTED_BLOCK_SIZE),
        "nested_dtype": "'float32'",
        "nested_offset": "a finite number",
    }
    for key, valid in checks.items():
        if not valid:
            raise LayoutError(f"{name}: {key!r} is {header.get(key)!r}; it must be {allowed[key]}")
    return header
