"""`QuantLinear`: a frozen linear layer over a 4-bit or int8 weight that computes on the packed bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import BoundWeight, PackedWeight
from ..backends.weight import COMPUTES, as_float
from ..errors import LayoutError, UnsupportedDtypeError
from ..formats import NESTED_BLOCK_SIZE, QuantConfig
from ..tensor import QuantTensor

_BITS = torch.int32


def _bits(values: Tensor) -> Tensor:
    """fp32 as int32 bit patterns (a view): no `.to(dtype)`, `.half()` or mixed-precision policy can round them."""
    return values.contiguous().view(_BITS) if values.dtype == torch.float32 else values


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class QuantLinear(nn.Module):
    """y = x W^T + bias with a quantized W, forward and backward on the same bytes; W and the scales are frozen.

    Parameters (all `requires_grad=False`):
        weight: uint8 [ceil(out * in / 2), 1] (4-bit, bitsandbytes' bytes) or int8 [out, in].
        absmax: scales of the blocks: uint8 [nb] when double-quantized, else the int32 bits of fp32 [nb]; int8: [out].
        nested_absmax: int32 bits of fp32 [ceil(nb / 256)]; None unless double-quantized.
        bias: [out] or None; may be trained.

    Buffers: codebook [16], nested_map [256] and nested_offset [1], int32 bits of fp32, or None.

    fp32 scales are held as int32 bit patterns, so casting the module (`.to(torch.bfloat16)`) changes the bias and
    nothing else. `state_dict()` has bitsandbytes' keys and dtypes ("weight", "weight.absmax", ...), bit for bit what
    was loaded, whatever ran in between.

    Attributes:
        in_features, out_features: sizes.
        config: the QuantConfig that made it, or that describes what was loaded.
        dtype: what `dequantize` returns by default, the dtype of the original weight.
    """

    weight: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    codebook: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None

    _kept: tuple[QuantConfig | None, Any] = (None, None)  # see `operands`

    def __init__(self, in_features: int, out_features: int, config: QuantConfig | None = None) -> None:
        """An empty layer (no weight yet); use `from_linear`, `from_quant_tensor` or `empty`."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.config = QuantConfig() if config is None else config
        self.dtype = torch.float32
        self.nested_block_size = NESTED_BLOCK_SIZE
        for name in ("weight", "absmax", "nested_absmax", "bias"):
            self.register_parameter(name, None)
        for name in ("codebook", "nested_map", "nested_offset"):
            self.register_buffer(name, None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig | None = None, name: str = "weight") -> QuantLinear:
        """Quantizes an nn.Linear's weight (fp32, fp16 or bf16); the bias is shared as it is.

        Raises:
            NonFiniteError: the weight holds NaN or Inf; the message says `name`.
            TypeError: not an nn.Linear. UnsupportedDtypeError: a weight of another dtype.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; an nn.Linear is needed")
        tensor = QuantTensor.quantize(linear.weight, config, name)
        return cls.from_quant_tensor(tensor, linear.bias, config).train(linear.training)

    @classmethod
    def from_quant_tensor(
        cls, tensor: QuantTensor, bias: Tensor | None = None, config: QuantConfig | None = None
    ) -> QuantLinear:
        """A layer that holds `tensor`'s tensors (shape [out, in]) without copying them."""
        if len(tensor.shape) != 2:
            raise LayoutError(f"tensor has shape {list(tensor.shape)}; a linear layer's weight is [out, in]")
        layer = cls(tensor.shape[1], tensor.shape[0], config)
        layer.load_quant_tensor(tensor, bias)
        return layer

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        config: QuantConfig,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """A layer with uninitialised tensors of the right sizes, to be filled by `load_state_dict` or by a loader."""
        layer = cls(in_features, out_features, config)
        layer.dtype = dtype
        count = in_features * out_features

        def new(*shape: int, kind: torch.dtype) -> nn.Parameter:
            return _frozen(torch.empty(*shape, dtype=kind, device=device))

        if config.is_4bit:
            blocks = -(-count // config.block_size)
            layer.weight = new(-(-count // 2), 1, kind=torch.uint8)
            layer.absmax = new(blocks, kind=torch.uint8 if config.double_quant else _BITS)
            layer.codebook = torch.empty(16, dtype=_BITS, device=device)
            if config.double_quant:
                layer.nested_absmax = new(-(-blocks // NESTED_BLOCK_SIZE), kind=_BITS)
                layer.nested_map = torch.empty(256, dtype=_BITS, device=device)
                layer.nested_offset = torch.empty(1, dtype=_BITS, device=device)
        else:
            layer.weight = new(out_features, in_features, kind=torch.int8)
            layer.absmax = new(out_features, kind=_BITS)
        if bias:
            layer.bias = _frozen(torch.empty(out_features, dtype=dtype, device=device))
        return layer

    def load_quant_tensor(self, tensor: QuantTensor, bias: Tensor | None = None) -> None:
        """Takes over `tensor`'s tensors (no copy) as this layer's weight, and `bias` if given.

        Raises:
            LayoutError: the shape is not [out_features, in_features].
        """
        if tuple(tensor.shape) != (self.out_features, self.in_features):
            raise LayoutError(
                f"weight has shape {list(tensor.shape)}; this layer needs {[self.out_features, self.in_features]}"
            )
        tensor.validate()
        self.config = _describe(tensor, self.config)
        self.dtype = tensor.dtype
        self.nested_block_size = tensor.nested_block_size
        self.weight = _frozen(tensor.packed.contiguous())
        self.absmax = _frozen(_bits(tensor.absmax.contiguous()))
        self.nested_absmax = None if tensor.nested_absmax is None else _frozen(_bits(tensor.nested_absmax))
        self.codebook = None if tensor.codebook is None else _bits(tensor.codebook)
        self.nested_map = None if tensor.nested_map is None else _bits(tensor.nested_map)
        self.nested_offset = None if tensor.nested_offset is None else _bits(tensor.nested_offset.reshape(1))
        if bias is not None:
            if tuple(bias.shape) != (self.out_features,):
                raise LayoutError(f"bias has shape {list(bias.shape)}; it must be [{self.out_features}]")
            self.bias = bias if isinstance(bias, nn.Parameter) else _frozen(bias)

    def share_weight(self, other: QuantLinear) -> None:
        """Ties this layer to `other`: the very same Parameters, so that copies and moves keep them one."""
        self.config, self.dtype, self.nested_block_size = other.config, other.dtype, other.nested_block_size
        self.weight, self.absmax, self.nested_absmax = other.weight, other.absmax, other.nested_absmax
        self.codebook, self.nested_map, self.nested_offset = other.codebook, other.nested_map, other.nested_offset

    def packed_weight(self) -> PackedWeight:
        """The weight as kernels take it."""
        if self.weight is None:
            raise LayoutError("this QuantLinear has no weight yet: use from_linear, from_quant_tensor or a state dict")
        return PackedWeight(
            self.weight,
            self.absmax,
            self.codebook,
            self.nested_absmax,
            self.nested_map,
            self.nested_offset,
            self.out_features,
            self.in_features,
            self.config.block_size if self.codebook is not None else 0,
            self.nested_block_size,
            COMPUTES[self.config.compute],
            self.config.outlier_threshold or 0.0,
        )

    def operands(self) -> tuple[PackedWeight, Tensor | None]:
        """packed_weight() and the bias, by the shortest way: asking an nn.Module for a parameter takes 0.5 us.

        The packed weight is kept for as long as this layer's tensors and configuration are the very same objects; what
        it derives from their addresses, it checks in every call (`BoundWeight`).
        """
        if torch.compiler.is_compiling():
            return self.packed_weight(), self.bias
        try:
            parameters, buffers = self._parameters, self._buffers
            weight: PackedWeight
            config, weight = self._kept
            if (
                config is self.config
                and parameters["weight"] is weight[0]
                and parameters["absmax"] is weight[1]
                and buffers["codebook"] is weight[2]
                and parameters["nested_absmax"] is weight[3]
                and buffers["nested_map"] is weight[4]
                and buffers["nested_offset"] is weight[5]
            ):
                return weight, parameters["bias"]
        except KeyError:  # a parametrized tensor: it is computed anew in every call
            return self.packed_weight(), self.bias
        weight = BoundWeight.of(self.packed_weight())
        self.__dict__["_kept"] = self.config, weight
        return weight, self.bias

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: everything but what is derived."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self.__dict__.pop("_kept", None)  # or the tensors from before a move would live on until the next call
        return super()._apply(fn, recurse)

    def quant_tensor(self) -> QuantTensor:
        """The weight as a QuantTensor of views: no copy."""
        if self.weight is None:
            raise LayoutError("this QuantLinear has no weight yet: use from_linear, from_quant_tensor or a state dict")

        def view(bits: Tensor | None) -> Tensor | None:
            return None if bits is None else as_float(bits.detach())

        return QuantTensor(
            packed=self.weight.detach(),
            absmax=as_float(self.absmax.detach()),
            codebook=view(self.codebook),
            block_size=self.config.block_size if self.codebook is not None else 0,
            shape=(self.out_features, self.in_features),
            dtype=self.dtype,
            format=self.config.format_name,
            nested_absmax=view(self.nested_absmax),
            nested_map=view(self.nested_map),
            nested_offset=None if self.nested_offset is None else as_float(self.nested_offset).reshape(()),
            nested_block_size=self.nested_block_size,
        )

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype` (default: the original weight's)."""
        return self.quant_tensor().dequantize(dtype, out=out)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype, in which it computes or better (config.compute)."""
        weight, bias = self.operands()
        return ops.linear(x, weight, bias)

    def extra_repr(self) -> str:
        scales = ", double_quant" if self.nested_absmax is not None else ""
        blocks = f", block_size={self.config.block_size}" if self.config.is_4bit else ""
        compute = "" if self.config.compute is None else f", compute={self.config.compute}"
        if self.config.outlier_threshold is not None:
            compute += f", outlier_threshold={self.config.outlier_threshold}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.config.format_name}{blocks}{scales}{compute}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.weight is None:
            return
        for key, value in self.quant_tensor().state().items():
            destination[prefix + key] = value
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        bias = state.pop("bias", None)
        if "weight" not in state:
            missing_keys.append(prefix + "weight")
        else:
            try:
                # The int8 layout does not say which dtype the weight had; the layer knows.
                dtype = self.dtype if "SCB" in state else None
                tensor = QuantTensor.from_state(state, prefix + "weight", dtype)
                self._take_over(tensor, state_dict, local_metadata)
            except (LayoutError, UnsupportedDtypeError) as error:
                error_msgs.append(str(error))
                return
            known = tensor.state()
            unexpected_keys.extend(prefix + key for key in state if key not in known)
        self._load_bias(bias, prefix, local_metadata, missing_keys, unexpected_keys, error_msgs)

    def _load_bias(
        self,
        bias: Tensor | None,
        prefix: str,
        local_metadata: Mapping[str, Any],
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.bias
        if bias is None or own is None:
            if bias is not None:
                unexpected_keys.append(prefix + "bias")
            elif own is not None:
                missing_keys.append(prefix + "bias")
        elif bias.shape != own.shape:
            error_msgs.append(f"{prefix}bias has shape {list(bias.shape)}; it must be {list(own.shape)}")
        elif own.is_meta or local_metadata.get("assign_to_params_buffers", False):
            assign = local_metadata.get("assign_to_params_buffers", False)
            self.bias = nn.Parameter(bias if assign else bias.detach().clone(), requires_grad=own.requires_grad)
        else:
            with torch.no_grad():
                own.copy_(bias)

    def _take_over(self, tensor: QuantTensor, state_dict: Mapping[str, Any], local_metadata: Mapping[str, Any]) -> None:
        """load_state_dict copies unless `assign=True`, onto the device that this layer is on."""
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        device = None if self.weight is None or self.weight.is_meta else self.weight.device
        if not assign:
            tensor = tensor.to(device) if device is not None else tensor
            tensor = _cloned(tensor)
        self.load_quant_tensor(tensor)


def _cloned(tensor: QuantTensor) -> QuantTensor:
    values: dict[str, Any] = {f.name: getattr(tensor, f.name) for f in fields(tensor)}
    clones: dict[str, Any] = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(tensor, **clones)


def _describe(tensor: QuantTensor, config: QuantConfig) -> QuantConfig:
    """`config` if it describes the tensor's layout, else one that does."""
    if tensor.codebook is None:
        if not config.is_4bit:
            return config
        return QuantConfig(
            "int8", double_quant=False, compute=config.compute, outlier_threshold=config.outlier_threshold
        )
    same = (
        config.format_name == tensor.format != "custom"
        and config.block_size == tensor.block_size
        and config.double_quant == tensor.is_nested
    )
    if same:
        return config
    codes: Any = tensor.format if tensor.format != "custom" else tuple(tensor.codebook.tolist())
    return replace(config, format=codes, block_size=tensor.block_size, double_quant=tensor.is_nested)
