"""Apple GPUs: torch tensors to the kernels of csrc/metal, which `torch.mps.compile_shader` compiles on first use.

Kernels run on torch's MPS stream, in its order; nothing here waits, but for quantizing, which reads back whether the
input was finite. What needs float64, which these GPUs have not (searches for a scale, data-aware rounding, the mean of
many scales), is computed by the CPU's kernels on a copy: memory is the same, and quantizing happens once.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _core, reference
from ..formats import NESTED_BLOCK_SIZE, dynamic_map
from . import codec, cpu
from .addresses import DTYPE_CODES, contiguous_rows, contiguous_values, new_output
from .weight import BoundWeight, PackedWeight

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

#: The oldest macOS whose compiler has bfloat.
OLDEST = 14

#: What the kernels' names call a dtype.
_NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
_FINITE = -1  # as uint32 the largest number of a block


# ---- the text and the GPU --------------------------------------------------------------------------------------------


def source(name: str) -> str:
    """The text of a library: what all share, then csrc/metal/NAME.metal.

    A checkout's own, which an editable installation runs from, else the copy beside the compiled core.
    """
    checkout = Path(__file__).resolve().parents[3] / "csrc" / "metal"
    folder = checkout if checkout.is_dir() else Path(_core.__file__).parent / "metal"
    return "\n".join((folder / f"{part}.metal").read_text(encoding="ascii") for part in ("decode", name))


def compile_shader(text: str) -> Any:
    """`torch.mps.compile_shader`; tests put another one here."""
    return torch.mps.compile_shader(text)


@functools.cache
def _library(name: str) -> Any:
    return compile_shader(source(name))


@functools.cache
def _kernel(library: str, name: str) -> Any:
    return getattr(_library(library), name)


@functools.cache
def _missing() -> str:
    if not torch.backends.mps.is_available():
        return "torch sees no GPU of Apple's"
    if not hasattr(torch.mps, "compile_shader"):
        return f"torch {torch.__version__} cannot compile Metal kernels; 2.7 can"
    found = platform.mac_ver()[0]
    return f"macOS {found} is older than {OLDEST}" if int(found.split(".")[0] or 0) < OLDEST else ""


def missing(device: torch.device) -> str:
    """Why nybble has no kernels for this GPU; empty if it has."""
    return _missing()


def serves(device: torch.device) -> bool:
    """Whether there are kernels for this GPU; `missing` says why not."""
    return not missing(device)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether kernels may load and store 16 bytes of it at once: buffers begin at pages."""
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it, where kernels may load 16 bytes at once."""
    return tensor if _is_aligned(tensor) else tensor.clone()


# ---- geometry --------------------------------------------------------------------------------------------------------

_DEQUANTIZE_THREADS = 256
_QUANTIZE_SIMDGROUPS = 8
_SMALL_M_SIMDGROUPS, _SMALL_M_ROWS = 2, 4
_TILE_THREADS, _TILE_COLUMNS = 128, 64
_MOST_SMALL_M = 8


class Choice(NamedTuple):
    """A kernel for a linear operation: `rows` of x at once, and why it."""

    kernel: str
    library: str
    rows: int
    why: str


def choose(m: int, grad_input: bool) -> Choice:
    """The only heuristic: by rows of x.

    One geometry for all chips, from M1 to M4: all have 32 lanes, 32 KB of threadgroup memory, simdgroup matrices, and
    about the same ratio of arithmetic to bandwidth. Nothing has been measured that would tell them apart.
    """
    if m <= _MOST_SMALL_M and not grad_input:
        rows = 1 << max(0, m - 1).bit_length()
        return Choice("linear_small_m", "linear_small_m", rows, f"at most {_MOST_SMALL_M} rows: memory decides")
    rows = 32 if m <= 32 else 64
    why = (
        f"tiles of {rows} rows x {_TILE_COLUMNS} columns on simdgroup matrices: each decoded weight serves {rows} rows"
    )
    return Choice("grad_input_tiles" if grad_input else "linear_tiles", "linear_tiles", rows, why)


# ---- codecs ----------------------------------------------------------------------------------------------------------


def _checked(device: torch.device, start: Callable[[Tensor], None], find: Callable[[], Any]) -> None:
    """start(failed), then `find`, which names the element, if a block was not all finite."""
    failed = torch.full((1,), _FINITE, dtype=torch.int32, device=device)
    start(failed)
    if int(failed) != _FINITE:
        find()
        raise AssertionError(f"block {int(failed) % 2**32} was reported as not finite, but is")


def _quantize(name: str, dtype: torch.dtype, blocks: int, *args: Any) -> None:
    """A simdgroup a block."""
    group = 32 * _QUANTIZE_SIMDGROUPS
    kernel = _kernel("quantize", f"{name}_{_NAMES[dtype]}")
    kernel(*args, threads=-(-blocks // _QUANTIZE_SIMDGROUPS) * group, group_size=group)


def quantize_4bit(
    x: Tensor,
    codebook: Tensor,
    block_size: int,
    search: str = "absmax",
    name: str = "x",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_4bit`. Waits for the GPU; searches run on the CPU."""
    x, codebook, packed, absmax = codec.quantize_4bit_tensors(x, codebook, block_size, search, name, importance)
    if search != "absmax":
        host = None if importance is None else importance.cpu()
        found = cpu.quantize_4bit(x.detach().cpu(), codebook.cpu(), block_size, search, name, host)
        return packed.copy_(found[0]), absmax.copy_(found[1])
    if x.numel():
        sizes = [x.numel(), _log2(block_size)]
        _checked(
            x.device,
            lambda failed: _quantize(
                "quantize_4bit", x.dtype, absmax.numel(), x, codebook, packed, absmax, failed, sizes
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
    result = out if _is_aligned(out) else torch.empty_like(out)
    count = result.numel()
    if count and weight.codebook is None:
        _kernel("dequantize", f"dequantize_int8_{_NAMES[dtype]}")(
            weight.packed,
            weight.absmax,
            result,
            [weight.out_features, weight.in_features],
            threads=weight.out_features * _DEQUANTIZE_THREADS,
            group_size=_DEQUANTIZE_THREADS,
        )
    elif count:
        _kernel("dequantize", f"dequantize_4bit_{_NAMES[dtype]}")(
            _aligned(weight.packed),
            *_scales(weight, result),
            result,
            [count, _log2(weight.block_size), _nested_shift(weight)],
            threads=_threads(count, 8),
            group_size=_DEQUANTIZE_THREADS,
        )
    return result if result is out else out.copy_(result)


def _scales(weight: PackedWeight, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """absmax, the three nested tensors and the codebook; `unused` stands for those that are not there."""
    rest = (weight.nested_absmax, weight.nested_map, weight.nested_offset, weight.codebook)
    nested, nested_map, offset, codebook = (unused if tensor is None else tensor for tensor in rest)
    return weight.absmax, nested, nested_map, offset, codebook


def _log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def _nested_shift(weight: PackedWeight) -> int:
    return -1 if weight.nested_absmax is None else _log2(weight.nested_block_size)


def _threads(count: int, each: int) -> int:
    """Whole threadgroups of threads that take so many elements each."""
    return -(-count // (each * _DEQUANTIZE_THREADS)) * _DEQUANTIZE_THREADS


def nested_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `nybble.reference.nested_quantize`; the mean, whose order of summation the format fixes, is the CPU's."""
    offset = reference.nested_offset(absmax.cpu()).to(absmax.device)
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
    if x.numel():
        sizes = [x.numel(), _log2(block_size)]
        _checked(
            x.device,
            lambda failed: _quantize("quantize_8bit", x.dtype, absmax.numel(), x, code, q, absmax, failed, sizes),
            lambda: reference.check_finite(x, block_size, name),
        )
    return q, absmax


def dequantize_8bit(q: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """See `nybble.reference.dequantize_8bit`."""
    q, absmax, code, out = codec.dequantize_8bit_tensors(q, absmax, code, block_size, dtype)
    if out.numel():
        _kernel("dequantize", f"dequantize_8bit_{_NAMES[dtype]}")(
            _aligned(q),
            absmax,
            code,
            out,
            [q.numel(), _log2(block_size), -1],
            threads=_threads(q.numel(), 4),
            group_size=_DEQUANTIZE_THREADS,
        )
    return out


def quantize_int8(x: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
    """See `nybble.reference.quantize_int8`; waits as `quantize_4bit` does."""
    x, q, scb = codec.quantize_int8_tensors(x, name)
    rows, cols = x.shape
    if x.numel():
        _checked(
            x.device,
            lambda failed: _quantize("quantize_int8", x.dtype, rows, x, q, scb, failed, [rows, cols]),
            lambda: reference.quantize_int8(x, name),
        )
    else:
        scb.zero_()
    return q, scb


def dequantize_int8(q: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """See `nybble.reference.dequantize_int8`."""
    return dequantize(codec.int8_weight(q, scb, dtype), dtype)


def round_feedback(target: Tensor, factor: Tensor, absmax: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See `nybble.reference.round_feedback`; on the CPU."""
    return _on_cpu(cpu.round_feedback, target, factor, absmax, *args, **kwargs)


def round_descent(codes: Tensor, target: Tensor, hessian: Tensor, absmax: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See `nybble.reference.round_descent`; on the CPU."""
    return _on_cpu(cpu.round_descent, codes, target, hessian, absmax, *args, **kwargs)


def _on_cpu(function: Callable[..., Tensor], first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def host(value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    return function(first.cpu(), *map(host, args), **{key: host(value) for key, value in kwargs.items()}).to(
        first.device
    )


# ---- contractions ----------------------------------------------------------------------------------------------------


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, side: Tensor | None, side_weight: Tensor | None
) -> Tensor:
    """x W^T + side side_weight^T + bias in x's dtype; x [..., in_features], side [..., R].

    Sums are fp32. For at most 8 rows so is everything; for more, the weight is rounded to x's dtype as `dequantize`
    rounds it, and multiplied by simdgroup matrices. The side path is fp32 always. weight.compute as on the CPU.
    """
    if weight.compute == 1:
        rounded = _rounded_rows(x.detach(), weight.outlier_threshold)
        return _run(rounded, weight, bias, side, side_weight, False).to(x.dtype)
    return _run(x, weight, bias, side, side_weight, False)


def grad_input(g: Tensor, weight: PackedWeight, side: Tensor | None, side_weight: Tensor | None) -> Tensor:
    """g W + side side_weight in g's dtype; g [..., out_features], side [..., R], side_weight [R, in_features]."""
    return _run(g, weight, None, side, side_weight, True)


def _rounded_rows(x: Tensor, outlier_threshold: float) -> Tensor:
    """Each row rounded to int8 as `nybble.reference.linear_int8_activations` does it, but as the fp32 values."""
    values = x.float()
    if not values.shape[-1]:
        return values
    outliers = reference.outlier_columns(x, outlier_threshold)
    inner = values if outliers is None else values.index_fill(-1, outliers, 0.0)
    scale = inner.abs().amax(-1, keepdim=True) / 127.0
    rounded = scale * torch.where(scale == 0, 0.0, torch.round(inner / scale).clamp(-127.0, 127.0))
    if outliers is not None:
        rounded[..., outliers] = values[
            ..., outliers
        ]  # index_copy is newer on MPS, and was wrong there (torch #166237)
    return rounded


def _run(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    side: Tensor | None,
    side_weight: Tensor | None,
    transposed: bool,
) -> Tensor:
    if isinstance(weight, BoundWeight):  # which `ops.check_args` leaves to its backend
        weight.check()
    rows, cols = weight.out_features, weight.in_features
    columns, contraction = (cols, rows) if transposed else (rows, cols)
    out = new_output(x, columns)
    x = contiguous_rows(x)
    m, rank = x.shape[0], 0
    if out.numel() == 0:
        return out
    bias_code = side_code = side_weight_code = -1
    if bias is not None:
        bias, bias_code = contiguous_values(bias.detach()), DTYPE_CODES[bias.dtype]
    if side is not None and side_weight is not None and side.shape[-1]:
        rank = side.shape[-1]
        side, side_weight = contiguous_values(side.detach()), contiguous_values(side_weight.detach())
        side_code, side_weight_code = DTYPE_CODES[side.dtype], DTYPE_CODES[side_weight.dtype]
    int8 = weight.codebook is None
    choice = choose(m, transposed)
    small = choice.library == "linear_small_m"
    # Runs of x are loaded 4 elements at a time; of the weight, 32 elements of 4 bits (16 by tiles) or 16 of 8.
    stride = x.stride(0)
    whole_x = contraction % 4 == 0 and stride % 4 == 0 and x.storage_offset() % 4 == 0
    whole_w = cols % (32 if small else 16) == 0

    def there(tensor: Tensor | None) -> Tensor:
        """Something stands for a tensor that is not there or empty, and is never read."""
        return out if tensor is None or not tensor.numel() else tensor

    group = 32 * _SMALL_M_SIMDGROUPS if small else _TILE_THREADS
    groups = [-(-columns // (_SMALL_M_SIMDGROUPS * _SMALL_M_ROWS))]
    if not small:
        groups = [-(-columns // _TILE_COLUMNS), -(-m // choice.rows)]
    _kernel(choice.library, f"{choice.kernel}_{'int8' if int8 else '4bit'}_{_NAMES[x.dtype]}_{choice.rows}")(
        there(x),
        there(_aligned(weight.packed)),
        *map(there, _scales(weight, out)),
        there(side if rank else None),
        there(side_weight if rank else None),
        there(bias),
        out,
        [
            *(m, rows, cols, stride, rank),
            0 if int8 else _log2(weight.block_size),
            _nested_shift(weight),
            *(side_code, side_weight_code, bias_code, int(whole_x), int(whole_w)),
        ],
        threads=[groups[0] * group, *groups[1:]],
        group_size=[group, *[1] * (len(groups) - 1)],
    )
    return out


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
    """Which kernel `linear` (or `grad_input`) would run, and why: kernel, isa, compute, reason."""
    choice = choose(m, grad_input)
    rounded = compute == 1 and not grad_input
    if rounded:
        arithmetic = "int8 activations, fp32"
    elif choice.library == "linear_small_m" or dtype == torch.float32:
        arithmetic = "fp32"
    else:
        arithmetic = f"{str(dtype).removeprefix('torch.')} products, fp32 accumulation"
    reason = f"m = {m}: {choice.why}"
    if in_features % (32 if choice.library == "linear_small_m" else 16):
        reason += "; rows of the weight do not begin at whole runs, so elements are loaded one by one"
    return {"kernel": choice.kernel, "isa": "metal", "compute": arithmetic, "reason": reason}
