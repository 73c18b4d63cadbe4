"""NVIDIA GPUs: addresses of torch tensors to the kernels of `nybble._cuda`, on torch's current stream.

Kernels allocate nothing and wait for nothing, so all of it can be captured in a CUDA graph; outputs and the workspace
come from torch's allocator. Only quantizing waits: it reads back whether the input was finite, unless it is captured.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..formats import NESTED_BLOCK_SIZE, dynamic_map
from . import codec
from .addresses import DTYPE_CODES, SEARCHES, address_of, linear_operands, new_output
from .weight import PackedWeight, handle_of

__all__ = [
    "dequantize",
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_int8",
    "explain_linear",
    "grad_input",
    "linear",
    "nested_dequantize",
    "nested_quantize",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_int8",
    "round_descent",
    "round_feedback",
    "serves",
]

round_descent, round_feedback = reference.round_descent, reference.round_feedback

#: The oldest GPUs that kernels are compiled for: 10 * major + minor.
OLDEST = 80
_FINITE = torch.iinfo(torch.int64).max


# ---- the compiled part and the GPU -----------------------------------------------------------------------------------


@functools.cache
def core() -> ModuleType:
    """The compiled kernels; raises ImportError where this installation has none."""
    return importlib.import_module("nybble._cuda")


@functools.cache
def _missing(index: int) -> str:
    """Why this GPU is not served; empty if it is."""
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs"
    try:
        core()
    except ImportError as error:
        return (
            f"this installation of nybble has no CUDA kernels ({error}); building needs nvcc, NYBBLE_CUDA=ON says why"
        )
    capability = 10 * (found := torch.cuda.get_device_capability(index))[0] + found[1]
    return f"compute capability {capability / 10} is below {OLDEST / 10}" if capability < OLDEST else ""


def serves(device: torch.device) -> bool:
    """Whether there are kernels for this GPU; `missing` says why not."""
    return not missing(device)


def missing(device: torch.device) -> str:
    """Why nybble has no kernels for this GPU; empty if it has."""
    return _missing(torch.cuda.current_device() if device.index is None else device.index)


def place(device: torch.device) -> tuple[int, int]:
    """The number of the GPU and the address of torch's current stream on it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def is_capturing(device: torch.device) -> bool:
    """Whether work on the current stream is recorded into a graph rather than done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_workspaces: dict[tuple[int, int], Tensor] = {}


def workspace(device: torch.device, index: int, stream: int) -> Tensor:
    """Memory that only this stream uses, its counters 0; see csrc/cuda/kernels.h.

    One that is first wanted while a graph is captured belongs to that graph, which zeroes its counters in every replay.
    """
    found = _workspaces.get((index, stream))
    if found is None:
        capturing = is_capturing(device)
        found = _new_workspace(device) if capturing else _lasting_workspace(device)
        found[: 4 * core().COUNTERS].zero_()
        if not capturing:
            _workspaces[index, stream] = found
    return found


def _new_workspace(device: torch.device) -> Tensor:
    return torch.empty(core().WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _lasting_workspace(device: torch.device) -> Tensor:
    """One from torch's general memory, even while this thread and stream allocate from a private pool.

    torch.compile's CUDA graphs warm up in such a pool and raise when something in it outlives the call. Allocators
    choose pools by thread or by stream, so another thread on its default stream asks for the memory.
    """
    if device.type != "cuda":
        return _new_workspace(device)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(_new_workspace, device).result()
    # Whatever that memory was used for before may still be under way there.
    torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    return found


# ---- codecs ----------------------------------------------------------------------------------------------------------


def _checked(device: torch.device, start: Callable[[int, int, int], None], find: Callable[[], Any]) -> None:
    """start(failed, index, stream), then `find`, which names the element, if a block was not all finite."""
    index, stream = place(device)
    failed = torch.full((1,), _FINITE, dtype=torch.int64, device=device)
    start(failed.data_ptr(), index, stream)
    if not is_capturing(device) and int(failed) != _FINITE:
        find()
        raise AssertionError(f"block {int(failed)} was reported as not finite, but is")


def quantize_4bit(
    x: Tensor,
    codebook: Tensor,
    block_size: int,
    search: str = "absmax",
    name: str = "x",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_4bit`. Waits for the GPU; while a graph is captured nothing tells of a NaN."""
    x, codebook, packed, absmax = codec.quantize_4bit_tensors(x, codebook, block_size, search, name, importance)
    columns = 0 if importance is None else importance.numel()
    _checked(
        x.device,
        lambda failed, index, stream: core().quantize_4bit(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            x.numel(),
            block_size,
            codebook.data_ptr(),
            SEARCHES[search],
            address_of(importance),
            columns,
            packed.data_ptr(),
            absmax.data_ptr(),
            failed,
            index,
            stream,
        ),
        lambda: reference.check_finite(x, block_size, name),
    )
    return packed, absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """See `nybble.reference.dequantize_4bit`."""
    weight = codec.flat_weight(packed, absmax, codebook, block_size, shape, dtype)
    return dequantize(weight, dtype).reshape(tuple(shape))


def dequantize(weight: PackedWeight, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The weight [out_features, in_features] in `dtype`, its scales decoded inside the kernel, in one launch.

    Written to `out` if that is given (see `nybble.reference.check_out`), which is then returned.
    """
    out = codec.dequantized(weight, dtype, out)
    index, stream = place(out.device)
    if weight.codebook is None:
        core().dequantize_int8(
            weight.packed.data_ptr(),
            weight.absmax.data_ptr(),
            weight.out_features,
            weight.in_features,
            out.data_ptr(),
            DTYPE_CODES[dtype],
            index,
            stream,
        )
        return out
    core().dequantize_4bit(
        weight.packed.data_ptr(),
        weight.absmax.data_ptr(),
        address_of(weight.nested_absmax),
        address_of(weight.nested_map),
        address_of(weight.nested_offset),
        weight.nested_block_size,
        weight.codebook.data_ptr(),
        weight.block_size,
        out.numel(),
        out.data_ptr(),
        DTYPE_CODES[dtype],
        index,
        stream,
    )
    return out


def nested_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `nybble.reference.nested_quantize`."""
    offset = reference.nested_offset(absmax)
    code = dynamic_map().to(absmax.device)
    q, nested_absmax = quantize_8bit(absmax - offset, code, NESTED_BLOCK_SIZE, name="absmax")
    return q, nested_absmax, offset


def nested_dequantize(
    q: Tensor, nested_absmax: Tensor, nested_map: Tensor, offset: Tensor, nested_block_size: int = NESTED_BLOCK_SIZE
) -> Tensor:
    """See `nybble.reference.nested_dequantize`."""
    return dequantize_8bit(q, nested_absmax, nested_map, nested_block_size, torch.float32) + offset


def quantize_8bit(x: Tensor, code: Tensor, block_size: int, name: str = "x") -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_8bit`; waits as `quantize_4bit` does."""
    x, code, q, absmax = codec.quantize_8bit_tensors(x, code, block_size, name)
    _checked(
        x.device,
        lambda failed, index, stream: core().quantize_8bit(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            x.numel(),
            block_size,
            code.data_ptr(),
            q.data_ptr(),
            absmax.data_ptr(),
            failed,
            index,
            stream,
        ),
        lambda: reference.check_finite(x, block_size, name),
    )
    return q, absmax


def dequantize_8bit(q: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """See `nybble.reference.dequantize_8bit`."""
    q, absmax, code, out = codec.dequantize_8bit_tensors(q, absmax, code, block_size, dtype)
    core().dequantize_8bit(
        q.data_ptr(),
        absmax.data_ptr(),
        code.data_ptr(),
        q.numel(),
        block_size,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        *place(q.device),
    )
    return out


def quantize_int8(x: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_int8`; waits as `quantize_4bit` does."""
    x, q, scb = codec.quantize_int8_tensors(x, name)
    rows, cols = x.shape
    _checked(
        x.device,
        lambda failed, index, stream: core().quantize_int8(
            x.data_ptr(), DTYPE_CODES[x.dtype], rows, cols, q.data_ptr(), scb.data_ptr(), failed, index, stream
        ),
        lambda: reference.quantize_int8(x, name),
    )
    return q, scb


def dequantize_int8(q: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """See `nybble.reference.dequantize_int8`."""
    return dequantize(codec.int8_weight(q, scb, dtype), dtype)


# ---- contractions ----------------------------------------------------------------------------------------------------


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    """x W^T + side side_weight^T + bias in x's dtype; x [..., in_features], side [..., R].

    bf16 and fp16 inputs are multiplied by the tensor cores as pairs of their own dtype and accumulated in fp32, the
    weight rounded to that dtype as `dequantize` rounds it (by `linear_small_m` its codes, which scales then multiply in
    fp32); fp32 inputs are multiplied in fp32. Where weight.compute is 1, rows of x are rounded to int8; which columns
    reach weight.outlier_threshold, the GPU alone gets to know.
    """
    return _run(x, weight, bias, side, side_weight, False)


def grad_input(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    """g W + side side_weight in g's dtype; g [..., out_features], side [..., R], side_weight [R, in_features]."""
    return _run(g, weight, None, side, side_weight, True)


def _run(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    side: Tensor | None,
    side_weight: Tensor | None,
    transposed: bool,
) -> Tensor:
    native, device = core(), x.device
    out = new_output(x, weight.in_features if transposed else weight.out_features)
    # _kept: not given back to the allocator before the kernel is on the stream
    _kept, operands = linear_operands(x, bias, side, side_weight)
    index, stream = place(device)
    if not native.linear(
        handle_of(weight, native),
        transposed,
        0 if transposed else weight.compute,
        *operands,
        out.data_ptr(),
        index,
        stream,
        workspace(device, index, stream).data_ptr(),
        0.0 if transposed else weight.outlier_threshold,
    ):
        _multiply(x, weight, bias, side, side_weight, transposed, out)
    return out


def _multiply(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    side: Tensor | None,
    side_weight: Tensor | None,
    transposed: bool,
    out: Tensor,
) -> None:
    """One dequantized weight for all rows, and torch's own product."""
    x = x.detach().reshape(-1, x.shape[-1])
    right, flat = dequantize(weight, x.dtype), out.view(-1, out.shape[-1])
    right = right if transposed else right.t()
    if bias is None:
        torch.mm(x, right, out=flat)
    else:
        torch.addmm(bias.detach().to(x.dtype), x, right, out=flat)
    if side is not None and side_weight is not None:
        left = side.detach().reshape(-1, side.shape[-1])
        extra = side_weight.detach() if transposed else side_weight.detach().t()
        if x.dtype == torch.float16 and side.dtype == torch.float32:  # whose range the scaled product may leave
            flat.add_(left @ extra.to(torch.float32))
        else:
            flat.addmm_(left.to(x.dtype), extra.to(x.dtype))


def explain_linear(
    out_features: int,
    in_features: int,
    m: int,
    dtype: torch.dtype,
    int8: bool,
    grad_input: bool,
    compute: int = 0,
    block_size: int = 64,
    device: torch.device | None = None,
) -> dict[str, str]:
    """Which kernel `linear` (or `grad_input`) would run, and why: kernel, isa, compute, reason.

    Operands are taken to be aligned to 16 bytes, as torch allocates them. `device`: the current GPU unless given.
    """
    compute = 0 if grad_input else compute
    index, _ = place(device or torch.device("cuda"))
    found = core().properties(index)
    return core().explain_linear(
        out_features, in_features, m, DTYPE_CODES[dtype], int8, grad_input, compute, block_size, *found
    )
