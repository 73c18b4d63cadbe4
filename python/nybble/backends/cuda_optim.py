"""The optimizer step on NVIDIA GPUs: as in `nybble.reference_optim`, bit for bit, in one pass over the memory.

Steps only start work on the GPU. What has to be read back, the blocks that 8-bit steps refuse and sums of squares, is
read once for many parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference, reference_optim
from ..errors import LayoutError
from ..formats import check_block_size, dynamic_map
from ..reference_optim import AdamWRule
from . import cuda
from .addresses import DTYPE_CODES, contiguous_values

_FINITE = torch.iinfo(torch.int64).max


def serves(tensor: Tensor) -> bool:
    """Whether there are kernels for the GPU that this tensor is on."""
    return tensor.device.type == "cuda" and cuda.serves(tensor.device)


def supports(param: Tensor) -> bool:
    """Whether the compiled step takes this parameter: a plain contiguous tensor on a GPU that is served."""
    return serves(param) and param.is_contiguous() and not param.is_neg()


class Refused:
    """The blocks that the 8-bit steps of several parameters left as they were, to be looked at once, after all."""

    _ROOM = 256

    def __init__(self) -> None:
        self._steps: list[tuple[str, int, torch.device]] = []
        self._found: dict[torch.device, list[Tensor]] = {}
        self._used: dict[torch.device, int] = {}

    def add(self, name: str, block_size: int, device: torch.device) -> int:
        """The address where a step of the parameter `name` is to write the first such block."""
        used = self._used.get(device, 0)
        if used % self._ROOM == 0:
            found = torch.full((self._ROOM,), _FINITE, dtype=torch.int64, device=device)
            self._found.setdefault(device, []).append(found)
        self._used[device] = used + 1
        self._steps.append((name, block_size, device))
        return self._found[device][-1].data_ptr() + 8 * (used % self._ROOM)

    def check(self) -> None:
        """Waits for the steps, and raises NonFiniteError for the first one that refused a block.

        While a graph is captured nothing is looked at.
        """
        if any(cuda.is_capturing(device) for device in self._found):
            return
        blocks = {device: iter(torch.cat(found).tolist()) for device, found in self._found.items()}
        for name, block_size, device in self._steps:
            block = next(blocks[device])
            if block != _FINITE:
                raise reference_optim.non_finite_moments(name, block, block_size)


def adamw_32bit(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: AdamWRule, key: int | None = None) -> None:
    """See `nybble.reference_optim.adamw_32bit`; param must be contiguous."""
    reference_optim.check_step(param, grad, key, {"m": m, "v": v})
    grad = _prepared(param, grad)
    cuda.core().adamw_32bit(
        param.data_ptr(),
        DTYPE_CODES[param.dtype],
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        param.numel(),
        rule,
        key is not None,
        key or 0,
        m.data_ptr(),
        v.data_ptr(),
        *cuda.place(param.device),
    )


def adamw_8bit(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor,
    v_absmax: Tensor,
    block_size: int,
    rule: AdamWRule,
    key: int | None = None,
    name: str = "grad",
    refused: Refused | None = None,
) -> None:
    """See `nybble.reference_optim.adamw_8bit`; param must be contiguous.

    With `refused` nothing is waited for, and `Refused.check` raises what there is to raise.
    """
    check_block_size(block_size)
    reference_optim.check_step(
        param, grad, key, {}, {"m": m, "v": v}, {"m_absmax": m_absmax, "v_absmax": v_absmax}, block_size
    )
    grad = _prepared(param, grad)
    collected = Refused() if refused is None else refused
    m_map, v_map = _maps(param.device)
    cuda.core().adamw_8bit(
        param.data_ptr(),
        DTYPE_CODES[param.dtype],
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        param.numel(),
        rule,
        key is not None,
        key or 0,
        block_size,
        m_map.data_ptr(),
        v_map.data_ptr(),
        m.data_ptr(),
        v.data_ptr(),
        m_absmax.data_ptr(),
        v_absmax.data_ptr(),
        collected.add(name, block_size, param.device),
        *cuda.place(param.device),
    )
    if refused is None:
        collected.check()


def sum_of_squares(x: Tensor) -> float:
    """The sum of the squares of all elements of `x` (fp32, fp16 or bf16), with the bits of `cpu_optim`'s."""
    return sums_of_squares([x])[0]


def sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    """The `sum_of_squares` of each tensor, all read back at once."""
    native = cuda.core()
    results = [0.0] * len(tensors)
    for device in dict.fromkeys(x.device for x in tensors):
        here = [(number, contiguous_values(x.detach())) for number, x in enumerate(tensors) if x.device == device]
        lengths = [-(-x.numel() // native.SQUARES_RUN) for _, x in here]
        sums = torch.empty(sum(lengths), dtype=torch.float64, device=device)
        address = sums.data_ptr()
        for (_, x), length in zip(here, lengths, strict=True):
            reference.check_float(x, "x")
            native.sum_of_squares(x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), address, *cuda.place(device))
            address += 8 * length
        values = sums.tolist()
        for (number, _), length in zip(here, lengths, strict=True):
            own, values = values[:length], values[length:]
            results[number] = math.fsum(own) if all(map(math.isfinite, own)) else sum(own)
    return results


@functools.cache
def _maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """The signed and the unsigned dynamic map there."""
    return dynamic_map(True).to(device), dynamic_map(False).to(device)


def _prepared(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient as its address says, and autograd told that param is about to change."""
    if not param.is_contiguous() or param.is_neg():
        raise LayoutError(f"param has strides {param.stride()}; the step takes contiguous tensors")
    if not param.is_inference():
        torch.autograd.graph.increment_version(param)
    return contiguous_values(grad)
