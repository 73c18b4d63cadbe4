"""Weights of any shape that stay packed and are decoded when they are used: the experts of a mixture, [experts, rows,
columns], which transformers' modules read as parameters of their own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..tensor import QuantTensor


class DecodedOnUse(nn.Module):
    """The parametrization of a packed weight: decodes it, whole, whenever the module reads its parameter.

    The packed bytes are the parametrization's `original`; scales and maps are buffers here.
    """

    def __init__(self, tensor: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._layout = replace(
            tensor, packed=tensor.packed[:0], absmax=tensor.absmax[:0], codebook=None, nested_absmax=None,
            nested_map=None, nested_offset=None,
        )  # fmt: skip
        self._dtype = dtype
        for name in ("absmax", "codebook", "nested_absmax", "nested_map", "nested_offset"):
            self.register_buffer(name, getattr(tensor, name))

    def forward(self, packed: Tensor) -> Tensor:
        """packed: uint8 [n / 2, 1]; returns the weight in the dtype that the model wants."""
        values = {
            name: getattr(self, name) for name in ("absmax", "codebook", "nested_absmax", "nested_map", "nested_offset")
        }
        return replace(self._layout, packed=packed, **values).dequantize(self._dtype)


def keep_packed(module: nn.Module, name: str, tensor: QuantTensor, dtype: torch.dtype) -> None:
    """Let the parameter `name` of `module` be a packed weight that is decoded on use."""
    del module._parameters[name]
    module.register_parameter(name, nn.Parameter(tensor.packed, requires_grad=False))
    parametrize.register_parametrization(module, name, DecodedOnUse(tensor, dtype), unsafe=True)
