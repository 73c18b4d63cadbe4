"""Which kernel would run, and why: `explain` for one operation, `isas` and `active_isa` for the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import _core, backends
from .backends.weight import COMPUTES
from .formats import QuantConfig
from .nn import QuantLinear
from .nn.adapters import Adapted


@dataclass(frozen=True)
class Explanation:
    """The kernel of one linear operation.

    Attributes:
        operation: "forward" or "grad_input". out_features, in_features, m: sizes; m is the number of rows of x.
        dtype, device: of x. format: of the weight.
        kernel: the kernel's name in the core. isa: instruction set. compute: what is multiplied and accumulated.
        reason: why this one. threads: torch's thread count, of which small problems take one; for the CPU.
    """

    operation: str
    out_features: int
    in_features: int
    m: int
    dtype: torch.dtype
    device: str
    format: str
    kernel: str
    isa: str
    compute: str
    reason: str
    threads: int

    def __str__(self) -> str:
        shape = f"[{self.m}, {self.in_features}] x [{self.out_features}, {self.in_features}]"
        dtype = str(self.dtype).removeprefix("torch.")
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        return (
            f"{self.operation} {shape} {self.format}, {dtype} on {self.device}: {self.kernel} ({self.isa}, "
            f"{self.compute}{threads}): {self.reason}"
        )


def explain(
    module_or_shape: nn.Module | tuple[int, int],
    m: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    grad_input: bool = False,
    format: str | None = None,
    device: str | torch.device | None = None,
    compute: str | None = None,
    block_size: int | None = None,
    outlier_threshold: float | None = None,
) -> Explanation:
    """Which kernel would run a quantized linear operation, and why.

    Args:
        module_or_shape: a QuantLinear, one with adapters around it, or (out_features, in_features).
        m: rows of x, all leading dimensions together. dtype: of x: float32, float16 or bfloat16.
        grad_input: ask about the backward with respect to x instead of the forward.
        format: of the weight, when a shape is given ("nf4" by default). device: likewise ("cpu"), such as "cuda".
            compute: likewise, None or "int8" (`QuantConfig.compute`). block_size: likewise (64), of 4-bit formats.
            outlier_threshold: likewise, of `QuantConfig`.

    >>> explain((4096, 4096), m=1).kernel
    'linear_small_m'
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype is {dtype}; allowed are torch.float32, torch.float16, torch.bfloat16")
    if isinstance(m, bool) or not isinstance(m, int) or m < 0:
        raise ValueError(f"m is {m!r}; it must be an integer, 0 or more")
    if isinstance(module_or_shape, nn.Module):
        layer: nn.Module | None = module_or_shape
        while isinstance(layer, Adapted):
            layer = layer.unwrapped()
        if not isinstance(layer, QuantLinear):
            raise TypeError(
                f"module is a {type(layer).__name__}; a QuantLinear, or a LoRALinear or the like over one, is needed"
            )
        out_features, in_features = layer.out_features, layer.in_features
        format, device = layer.config.format_name, layer.packed_weight().packed.device
        compute, block_size = layer.config.compute, layer.config.block_size
        outlier_threshold = layer.config.outlier_threshold
    else:
        if not isinstance(module_or_shape, Sequence) or len(module_or_shape) != 2:
            raise TypeError(
                f"module_or_shape is {module_or_shape!r}; a QuantLinear or (out_features, in_features) is needed"
            )
        shape = tuple(int(size) for size in module_or_shape)
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"shape is {shape}; it must be (out_features, in_features), sizes of 0 or more")
        out_features, in_features = shape
        config = QuantConfig(
            format=format or "nf4",
            compute=compute,
            block_size=block_size or 64,
            outlier_threshold=outlier_threshold,
        )
        format, block_size = config.format_name, config.block_size
    device = torch.device(device or "cpu")
    found = backends.of(device).explain_linear(
        out_features, in_features, m, dtype, format == "int8", grad_input, COMPUTES[compute], block_size or 64, device
    )
    if outlier_threshold is not None and "int8" in found["compute"]:
        found["reason"] += f"; columns of x that reach {outlier_threshold} are multiplied in its own precision"
    return Explanation(
        operation="grad_input" if grad_input else "forward",
        out_features=out_features,
        in_features=in_features,
        m=m,
        dtype=dtype,
        device=str(device),
        format=format,
        threads=torch.get_num_threads(),
        **found,
    )


def isas() -> list[str]:
    """The instruction sets that nybble has kernels for and this machine can run, best first."""
    return _core.isas()


def active_isa() -> str:
    """The instruction set in use: the best one, or what the environment variable NYBBLE_FORCE_ISA names.

    Raises:
        ValueError: NYBBLE_FORCE_ISA names one that this machine does not have.
    """
    return _core.active_isa()
