"""Weights of any shape that stay packed and are decoded when they are used: the experts of a mixture, [experts, rows,
columns], which transformers' modules read as parameters of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..backends.weight import as_float
from ..errors import LayoutError, UnsupportedDtypeError
from ..tensor import QuantTensor

_SCALES = ("absmax", "codebook", "nested_absmax", "nested_map", "nested_offset")


class _OnUse(nn.Module):
    """A parametrization that computes a weight, whole, whenever the module reads its parameter.

    While the module's forward runs, the weight is kept: a loop over the experts reads the parameter once for each.

    Attributes:
        shape: of the weight. dtype: what it is decoded to; casting the module changes it.
    """

    shape: tuple[int, ...]

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._kept: dict[int, Tensor | None] = {}  # by thread, while a forward runs there

    @property
    def dtype(self) -> torch.dtype:
        like: Any = self.like
        return like.dtype

    def decode(self, packed: Tensor) -> Tensor:
        raise NotImplementedError

    def expert(self, packed: Tensor, e: int) -> list[QuantTensor] | None:
        """Packed weights, of views, whose rows one after the other are those of expert e [rows, columns]; None where
        the bytes cannot be cut so."""
        raise NotImplementedError

    def place(self, packed: Tensor, e: int) -> int:
        """An address that changes when the tensors of `expert` do."""
        raise NotImplementedError

    def forward(self, packed: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.decode(packed)
        thread = threading.get_ident()
        kept = self._kept.get(thread)
        if kept is None:
            kept = self.decode(packed)
            if thread in self._kept:
                self._kept[thread] = kept
        return kept

    def begin(self) -> None:
        """A forward of the module that reads this weight runs in this thread."""
        self._kept[threading.get_ident()] = None

    def end(self) -> None:
        """It is over."""
        self._kept.pop(threading.get_ident(), None)


class DecodedOnUse(_OnUse):
    """A packed weight. The packed bytes are the parametrization's `original`, uint8 [n / 2, 1]; scales and maps are
    buffers here, fp32 ones as int32 bit patterns, so that casting the module changes nothing of them.
    """

    def __init__(self, tensor: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__(dtype, tensor.packed.device)
        for name in _SCALES:
            self.register_buffer(name, None)
        self.take(tensor)

    def take(self, tensor: QuantTensor) -> None:
        """Describe another packed weight; its bytes are the caller's business."""
        self.shape = tuple(tensor.shape)
        self._layout = replace(
            tensor, packed=tensor.packed.new_empty(0), absmax=tensor.absmax.new_empty(0), codebook=None,
            nested_absmax=None, nested_map=None, nested_offset=None,
        )  # fmt: skip
        for name in _SCALES:
            values = getattr(tensor, name)
            floats = values is not None and values.dtype == torch.float32
            setattr(self, name, values.contiguous().view(torch.int32) if floats else values)

    def quant_tensor(self, packed: Tensor) -> QuantTensor:
        """The weight as a QuantTensor of views."""
        values = {name: getattr(self, name) for name in _SCALES}
        floats: dict[str, Any] = {name: None if value is None else as_float(value) for name, value in values.items()}
        return replace(self._layout, packed=packed, **floats)

    def decode(self, packed: Tensor) -> Tensor:
        return self.quant_tensor(packed).dequantize(self.dtype)

    def expert(self, packed: Tensor, e: int) -> list[QuantTensor] | None:
        whole = self.quant_tensor(packed)
        if len(whole.shape) != 3 or not whole.block_size:
            return None
        size = whole.shape[1] * whole.shape[2]
        blocks, rest = divmod(size, whole.block_size)
        if rest or size % 2 or (whole.is_nested and blocks % whole.nested_block_size):
            return None
        nested = whole.nested_absmax
        if nested is not None:
            groups = blocks // whole.nested_block_size
            nested = nested[e * groups : (e + 1) * groups]
        return [
            replace(
                whole,
                shape=whole.shape[1:],
                packed=whole.packed[e * size // 2 : (e + 1) * size // 2],
                absmax=whole.absmax[e * blocks : (e + 1) * blocks],
                nested_absmax=nested,
            )
        ]

    def place(self, packed: Tensor, e: int) -> int:
        absmax: Any = self.absmax
        return int(packed.data_ptr() ^ absmax.data_ptr())


class _Part(DecodedOnUse):
    """One of the packed weights that a parameter is made of, with its bytes."""

    packed: Tensor

    def __init__(self, tensor: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__(tensor, dtype)
        self.register_buffer("packed", tensor.packed)


class FusedOnUse(_OnUse):
    """A parameter that a model makes of several weights (each expert's matrices), which are packed one by one.

    Args:
        parts: module path, relative to the module that has the parameter -> its weight.
        make: from the weights, by the same paths, to the parameter; can be copied.
    """

    def __init__(
        self,
        parts: Mapping[str, QuantTensor],
        make: Callable[[Mapping[str, Tensor]], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(dtype, next(iter(parts.values())).packed.device)
        self.shape, self.names, self._make = shape, list(parts), make
        self.parts = nn.ModuleList(_Part(tensor, dtype) for tensor in parts.values())
        self._numbers = _rows_of(make, parts, shape)

    def tensors(self) -> dict[str, QuantTensor]:
        """The packed weights, of views."""
        parts: Any = self.parts
        return {name: part.quant_tensor(part.packed) for name, part in zip(self.names, parts, strict=True)}

    def expert(self, packed: Tensor, e: int) -> list[QuantTensor] | None:
        if self._numbers is None:
            return None
        parts: Any = self.parts
        return [parts[number].quant_tensor(parts[number].packed) for number in self._numbers[e]]

    def place(self, packed: Tensor, e: int) -> int:
        assert self._numbers is not None
        parts: Any = self.parts
        place = 0
        for number in self._numbers[e]:
            place ^= parts[number].packed.data_ptr() ^ parts[number].absmax.data_ptr()
        return place

    def decode(self, packed: Tensor) -> Tensor:
        return self._make({name: tensor.dequantize(self.dtype) for name, tensor in self.tensors().items()})


def _rows_of(
    make: Callable[[Mapping[str, Tensor]], Tensor], parts: Mapping[str, QuantTensor], shape: tuple[int, ...]
) -> list[list[int]] | None:
    """For each expert the numbers of the parts whose rows, one after the other, are its own; None if it is made in
    another way. Found out on small stand-ins that hold their numbers."""
    rows, columns = 2, 3
    stand_ins = {name: torch.full((rows, columns), float(i)) for i, name in enumerate(parts)}
    if len(shape) != 3 or len(parts) % shape[0] or any(len(tensor.shape) != 2 for tensor in parts.values()):
        return None
    each = len(parts) // shape[0]
    made = make(stand_ins)
    if made.shape != (shape[0], each * rows, columns):
        return None
    found = made.view(shape[0], each, rows * columns)
    if not torch.equal(found, found[..., :1].expand_as(found)):
        return None
    numbers = [[int(i) for i in expert] for expert in found[..., 0].tolist()]
    sizes = [tensor.shape for tensor in parts.values()]
    fits = all(sum(sizes[i][0] for i in own) == shape[1] and sizes[own[0]][1] == shape[2] for own in numbers)
    return numbers if fits and sorted(i for own in numbers for i in own) == list(range(len(parts))) else None


def keep_packed(module: nn.Module, name: str, tensor: QuantTensor, dtype: torch.dtype) -> None:
    """Let the parameter `name` of `module` be a packed weight that is decoded on use.

    `state_dict` has the keys and dtypes of the checkpoint ("name", "name.absmax", ...), and so takes `load_state_dict`.
    """
    original = nn.Parameter(tensor.packed, requires_grad=False)
    present = packed_parameters(module)
    if name in present:
        _held(module, name).original = original
        present[name].take(tensor)
        return
    _parametrize(module, name, original, DecodedOnUse(tensor, dtype))


def keep_fused(module: nn.Module, name: str, decoder: FusedOnUse) -> None:
    """Let the parameter `name` of `module` be made of packed weights when it is used; `state_dict` has the weights."""
    nothing = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    _parametrize(module, name, nothing, decoder)


def _parametrize(module: nn.Module, name: str, original: nn.Parameter, decoder: _OnUse) -> None:
    first = not computed_parameters(module)
    module._parameters.pop(name, None)
    module.register_parameter(name, original)
    parametrize.register_parametrization(module, name, decoder, unsafe=True)
    if first:
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)


def computed_parameters(module: nn.Module) -> dict[str, _OnUse]:
    """Name -> parametrization of the parameters of this module itself that are packed."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict):
        return {}
    held: dict[str, Any] = {name: _held(module, name)[0] for name in lists}
    return {name: decoder for name, decoder in held.items() if isinstance(decoder, _OnUse)}


def packed_parameters(module: nn.Module) -> dict[str, DecodedOnUse]:
    """Those of them that `keep_packed` packed."""
    return {name: d for name, d in computed_parameters(module).items() if isinstance(d, DecodedOnUse)}


def _held(module: nn.Module, name: str) -> Any:
    """torch's ParametrizationList: `original`, and the parametrization as its only item."""
    lists: Any = module.parametrizations
    return lists[name]


def _begin(module: nn.Module, inputs: Any) -> None:
    if not torch.compiler.is_compiling():
        for decoder in computed_parameters(module).values():
            decoder.begin()


def _end(module: nn.Module, inputs: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for decoder in computed_parameters(module).values():
            decoder.end()


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name, decoder in computed_parameters(module).items():
        inner = f"{prefix}parametrizations.{name}."
        for key in [key for key in state if key.startswith(inner)]:
            del state[key]
        if isinstance(decoder, DecodedOnUse):
            tensor = decoder.quant_tensor(_held(module, name).original.detach())
            state.update({f"{prefix}{name}{key.removeprefix('weight')}": v for key, v in tensor.state().items()})
        elif isinstance(decoder, FusedOnUse):
            for path, tensor in decoder.tensors().items():
                state.update({f"{prefix}{path}.{key}": value for key, value in tensor.state().items()})


def _load(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Turn a checkpoint's keys into the parametrizations' own."""
    assign = bool(metadata.get("assign_to_params_buffers", False))
    for name, decoder in computed_parameters(module).items():
        held, inner = _held(module, name), f"{prefix}parametrizations.{name}"
        if isinstance(decoder, DecodedOnUse):
            full = f"{prefix}{name}"
            parts = {f"weight{k.removeprefix(full)}": k for k in state if k == full or k.startswith(f"{full}.")}
            tensor = _taken(state, parts, full, decoder, held.original.device, assign, missing, errors)
            if tensor is not None:
                keep_packed(module, name, tensor, decoder.dtype)
            state.update({f"{inner}.0.{key}": value for key, value in decoder.named_buffers() if key != "like"})
        elif isinstance(decoder, FusedOnUse):
            decoders: Any = decoder.parts
            for number, (path, part) in enumerate(zip(decoder.names, decoders, strict=True)):
                full = f"{prefix}{path}."
                parts = {key.removeprefix(full): key for key in state if key.startswith(full)}
                tensor = _taken(state, parts, f"{full}weight", part, part.packed.device, assign, missing, errors)
                if tensor is not None:
                    part.packed = tensor.packed
                    part.take(tensor)
                buffers = {key: value for key, value in part.named_buffers() if key != "like"}
                state.update({f"{inner}.0.parts.{number}.{key}": value for key, value in buffers.items()})
        state[f"{inner}.original"] = held.original  # the children find what they have


def _taken(
    state: dict[str, Any],
    parts: dict[str, str],
    full: str,
    decoder: DecodedOnUse,
    device: torch.device,
    assign: bool,
    missing: list[str],
    errors: list[str],
) -> QuantTensor | None:
    """The weight `full` out of a state dict, None with an entry in one of the two lists."""
    if "weight" not in parts:
        missing.append(full)
        return None
    values = {key: state.pop(name) for key, name in parts.items()}
    try:
        tensor = QuantTensor.from_state(values, full, decoder.dtype if "SCB" in values else None)
    except (LayoutError, UnsupportedDtypeError) as error:
        errors.append(str(error))
        return None
    if tuple(tensor.shape) != decoder.shape:
        errors.append(f"{full} has shape {list(tensor.shape)}; it must be {list(decoder.shape)}")
        return None
    if not assign:
        tensor = tensor.to(device)
        clones: dict[str, Any] = {key: v.clone() for key, v in vars(tensor).items() if isinstance(v, Tensor)}
        tensor = replace(tensor, **clones)
    return tensor
