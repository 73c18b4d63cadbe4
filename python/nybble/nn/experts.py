"""Weights of any shape that stay packed and are decoded when they are used: the experts of a mixture, [experts, rows,
columns], which transformers' modules read as parameters of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..backends.weight import as_float
from ..errors import LayoutError, UnsupportedDtypeError
from ..tensor import QuantTensor

_SCALES = ("absmax", "codebook", "nested_absmax", "nested_map", "nested_offset")


class DecodedOnUse(nn.Module):
    """The parametrization of a packed weight: decodes it, whole, whenever the module reads its parameter.

    The packed bytes are the parametrization's `original`; scales and maps are buffers here, fp32 ones as int32 bit
    patterns, so that casting the module changes what it decodes to and nothing else. While the module's forward runs,
    the decoded weight is kept: a loop over the experts reads the parameter once for each of them.
    """

    def __init__(self, tensor: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=tensor.packed.device), persistent=False)
        for name in _SCALES:
            self.register_buffer(name, None)
        self._kept: dict[int, Tensor | None] = {}  # by thread, while a forward runs there
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

    @property
    def dtype(self) -> torch.dtype:
        """What it decodes to; casting the module changes it."""
        like: Any = self.like
        return like.dtype

    def quant_tensor(self, packed: Tensor) -> QuantTensor:
        """The weight as a QuantTensor of views."""
        values = {name: getattr(self, name) for name in _SCALES}
        floats: dict[str, Any] = {name: None if value is None else as_float(value) for name, value in values.items()}
        return replace(self._layout, packed=packed, **floats)

    def forward(self, packed: Tensor) -> Tensor:
        """packed: uint8 [n / 2, 1]; returns the weight in the dtype that the model computes in."""
        if torch.compiler.is_compiling():
            return self._decode(packed)
        thread = threading.get_ident()
        kept = self._kept.get(thread)
        if kept is None:
            kept = self._decode(packed)
            if thread in self._kept:
                self._kept[thread] = kept
        return kept

    def _decode(self, packed: Tensor) -> Tensor:
        return self.quant_tensor(packed).dequantize(self.dtype)

    def begin(self) -> None:
        """A forward of the module that reads this weight runs in this thread."""
        self._kept[threading.get_ident()] = None

    def end(self) -> None:
        """It is over."""
        self._kept.pop(threading.get_ident(), None)


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
    module._parameters.pop(name, None)
    module.register_parameter(name, original)
    parametrize.register_parametrization(module, name, DecodedOnUse(tensor, dtype), unsafe=True)
    if not present:
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)


def packed_parameters(module: nn.Module) -> dict[str, DecodedOnUse]:
    """Name -> parametrization of the parameters of this module itself that `keep_packed` packed."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict):
        return {}
    held: dict[str, Any] = {name: _held(module, name)[0] for name in lists}
    return {name: decoder for name, decoder in held.items() if isinstance(decoder, DecodedOnUse)}


def packed_tensors(module: nn.Module) -> Iterator[tuple[str, QuantTensor]]:
    """The same as QuantTensors of views."""
    for name, decoder in packed_parameters(module).items():
        yield name, decoder.quant_tensor(_held(module, name).original.detach())


def _held(module: nn.Module, name: str) -> Any:
    """torch's ParametrizationList: `original`, and the parametrization as its only item."""
    lists: Any = module.parametrizations
    return lists[name]


def _begin(module: nn.Module, inputs: Any) -> None:
    if not torch.compiler.is_compiling():
        for decoder in packed_parameters(module).values():
            decoder.begin()


def _end(module: nn.Module, inputs: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for decoder in packed_parameters(module).values():
            decoder.end()


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name, tensor in packed_tensors(module):
        inner = f"{prefix}parametrizations.{name}."
        for key in [key for key in state if key.startswith(inner)]:
            del state[key]
        for key, value in tensor.state().items():
            state[f"{prefix}{name}{key.removeprefix('weight')}"] = value


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
    """Turn a checkpoint's keys into the parametrization's own."""
    assign = bool(metadata.get("assign_to_params_buffers", False))
    for name, decoder in packed_parameters(module).items():
        full = f"{prefix}{name}"
        keys = [key for key in state if key == full or key.startswith(f"{full}.")]
        if full not in keys:
            continue
        parts = {f"weight{key.removeprefix(full)}": state.pop(key) for key in keys}
        held = _held(module, name)
        try:
            tensor = QuantTensor.from_state(parts, full)
        except (LayoutError, UnsupportedDtypeError) as error:
            errors.append(str(error))
        else:
            if tuple(tensor.shape) != decoder.shape:
                errors.append(f"{full} has shape {list(tensor.shape)}; it must be {list(decoder.shape)}")
            else:
                if not assign:
                    tensor = tensor.to(held.original.device)
                    clones: dict[str, Any] = {k: v.clone() for k, v in vars(tensor).items() if isinstance(v, Tensor)}
                    tensor = replace(tensor, **clones)
                keep_packed(module, name, tensor, decoder.dtype)
        # The children find what they have.
        state[f"{prefix}parametrizations.{name}.original"] = held.original
        for buffer in _SCALES:
            if getattr(decoder, buffer) is not None:
                state[f"{prefix}parametrizations.{name}.0.{buffer}"] = getattr(decoder, buffer)
