"""Linear operations of every shape, format, dtype, stride and magnitude, and how far a kernel may be from the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from nybble import QuantConfig, QuantTensor, ops, reference
from nybble.backends import PackedWeight, cpu
from nybble.formats import BLOCK_SIZES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUSTOM = tuple((i - 6.5) / 9 for i in range(16))  # no zero in it
FORMATS = ("nf4", "fp4", "int4", CUSTOM, "int8")
LAYOUTS = ("contiguous", "transposed", "row_stride", "column_stride", "unaligned", "expanded", "overlapping", "leading")

# Unit roundoffs (half the distance from 1 to the next number) and half the distance between the smallest denormals.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


@dataclass
class Problem:
    """One linear operation; `grad` tells the direction, as in `nybble.ops.check_args`."""

    x: Tensor
    weight: QuantTensor
    bias: Tensor | None = None
    side: Tensor | None = None
    side_weight: Tensor | None = None
    grad: bool = False

    @property
    def packed(self) -> PackedWeight:
        return self.weight.packed_weight()

    def run(self) -> Tensor:
        if self.grad:
            return ops.grad_input(self.x, self.packed, self.side, self.side_weight)
        return ops.linear(self.x, self.packed, self.bias, self.side, self.side_weight)

    def __repr__(self) -> str:
        def show(tensor: Tensor | None) -> str:
            return "-" if tensor is None else f"{list(tensor.shape)}/{tensor.stride()} {tensor.dtype}"

        parts = (self.x, self.bias, self.side, self.side_weight)
        return f"{'grad_input' if self.grad else 'linear'}({self.weight}; {', '.join(map(show, parts))})"


def decoded(weight: QuantTensor) -> Tensor:
    """The fp32 weight by the specification (4-bit); for int8 the exact quotient in float64."""
    if weight.codebook is None:
        return weight.packed.double() * weight.absmax.double().unsqueeze(1) / 127.0
    absmax = weight.absmax
    if weight.is_nested:
        absmax = reference.nested_dequantize(absmax, weight.nested_absmax, weight.nested_map, weight.nested_offset)
    return reference.dequantize_4bit(
        weight.packed, absmax, weight.codebook, weight.block_size, weight.shape, torch.float32
    )


def explained(problem: Problem) -> dict[str, str]:
    """What `explain` says of the problem: its promise is what is tested."""
    m = math.prod(problem.x.shape[:-1])
    weight = problem.weight
    rows, columns = weight.shape
    int8 = weight.codebook is None
    block = 64 if int8 else weight.block_size
    return cpu.explain_linear(rows, columns, m, problem.x.dtype, int8, problem.grad, block_size=block)


def uses_pairs(problem: Problem) -> bool:
    """Whether the kernel multiplies bf16 pairs."""
    found = explained(problem)
    assert found["compute"] in ("fp32", "bf16 pairs, fp32 accumulation")
    return found["compute"] != "fp32"


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """The float64 result and, for every output, how far a correct kernel may be from it.

    A sum of n products in any order, each operation rounded with |d| <= u, is off by at most
        gamma_n * sum |x_i| |w_i|,   gamma_n = n u / (1 - n u)
    because no term passes through more than n roundings (Higham, Accuracy and Stability, 3.1 and 4.2). u = 2^-24: both
    kinds of kernel accumulate in fp32. n counts the contraction, the rank, the bias and 6 more: int8 rounds
    q * (absmax / 127) twice, and a kernel adds a few partial sums. The float64 reference errs by gamma_n with 2^-53.

    Operands are exact, but for bf16 pairs, where the weight, side and side_weight are first rounded to bf16: the
    reference rounds them too, so nothing more has to be allowed.

    Underflow: an fp32 operation is off by at most 2^-150. The bf16 dot product instead takes denormal operands and
    results as zero: a product loses at most 2^-126 times the other factor, an addition 2^-126 for each of its three
    numbers, of which there are at most 3 n.

    linear_tiles_few rounds the codes, not the weights, to bf16, and scales sums of bare products: each weight is off by
    2^-8 of itself, and an underflow counts in units of the block's scale.

    The result is rounded to the output's dtype: u_out * |result|, or TINY where that is denormal.
    """
    pairs = uses_pairs(problem)
    bare_codes = explained(problem)["kernel"] == "linear_tiles_few"
    x, weight = problem.x.double(), decoded(problem.weight)
    side, side_weight = problem.side, problem.side_weight
    if pairs:
        if problem.weight.codebook is None and not bare_codes:
            by = problem.weight.absmax / 127.0
            weight = problem.weight.packed.float() * by.unsqueeze(1)
        if not bare_codes:
            weight = weight.bfloat16()
        side = None if side is None else side.bfloat16()
        side_weight = None if side_weight is None else side_weight.bfloat16()
    right = weight.double() if problem.grad else weight.double().t()
    if side is not None and side_weight is not None:
        extra = side_weight.double() if problem.grad else side_weight.double().t()
        x, right = torch.cat([x, side.double()], -1), torch.cat([right, extra])
    exact, size = x @ right, x.abs() @ right.abs()
    if problem.bias is not None:
        exact, size = exact + problem.bias.double(), size + problem.bias.double().abs()
    n = right.shape[0] + 7

    def gamma(unit: float) -> float:
        return n * unit / (1 - n * unit)

    bound = (gamma(2.0**-24) + gamma(2.0**-53)) * size + 3 * n * 2.0 ** (-126 if pairs else -150)
    if pairs:
        bound = bound + 2.0**-126 * (x.abs().sum(-1, keepdim=True) + right.abs().sum(0))
    if bare_codes:
        bound = bound + 2.0**-8 * (1 + 2.0**-8) * size + 3 * n * 2.0**-126 * block_unit(problem.weight)
    dtype = problem.x.dtype
    if dtype != torch.float32:
        bound = bound + UNIT[dtype] * (exact.abs() + bound) + TINY[dtype]
    return exact, bound


def block_unit(weight: QuantTensor) -> float:
    """The largest scale of a block (of a row / 127): what multiplies bare codes."""
    if weight.packed.numel() == 0:
        return 0.0
    if weight.codebook is None:
        return float(weight.absmax.abs().max()) / 127
    return float(decoded(weight).abs().max() / weight.codebook.double().abs()[weight.codebook != 0].min())


def assert_within(problem: Problem, actual: Tensor, exact: Tensor, bound: Tensor, by: str = "") -> None:
    """Fails unless shape and dtype are right and every element is within `bound` of `exact`, or infinite where it may.

    `by`: what the message begins with, such as the kernel.
    """
    assert actual.dtype == problem.x.dtype
    assert actual.shape == exact.shape
    close = (actual.double() - exact).abs() <= bound
    overflows = actual.isinf() & (actual.sign() * exact + bound >= torch.finfo(actual.dtype).max)
    wrong = ~(close | overflows)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{by}{problem}: {int(wrong.sum())} of {wrong.numel()} elements are off; at {at}: {actual[at].item()}, "
            f"expected {exact[at].item()} within {bound[at].item()}"
        )


def assert_within_bound(problem: Problem, actual: Tensor) -> None:
    """Fails unless shape, dtype and every element of `actual` are right; infinite only where that may be."""
    assert_within(problem, actual, *expected(problem))


# ---- making them -----------------------------------------------------------------------------------------------------


def values(kind: str, *shape: int, dtype: torch.dtype, seed: int, low: int = -12, high: int = 12) -> Tensor:
    """Random values: "normal", "large", "small" (denormal in fp16 and bf16 alike) or of many "magnitudes"."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "large":
        normal = normal * 10.0**high
    elif kind == "small":
        normal = normal * (1e-7 if dtype == torch.float16 else 1e-39)
    elif kind == "magnitudes":
        normal = normal * torch.pow(10.0, torch.randint(low, high + 1, shape, generator=generator).double())
    limit = torch.finfo(dtype).max
    return normal.clamp(-limit, limit).to(dtype)


def laid_out(rows: int, columns: int, layout: str, kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """An input of `rows` rows with the strides of `layout`; all layouts but "leading" are [rows, columns]."""
    flat = values(kind, 2 * rows * columns + rows + 2 * columns + 1, dtype=dtype, seed=seed)
    n = rows * columns
    if layout == "transposed":
        return flat[:n].reshape(columns, rows).t()
    if layout == "row_stride":
        return flat.as_strided((rows, columns), (columns + 1, 1))
    if layout == "column_stride":
        return flat[: 2 * n].reshape(rows, 2 * columns)[:, ::2]
    if layout == "unaligned":
        return flat[1 : n + 1].reshape(rows, columns)
    if layout == "expanded":
        return flat[:columns].expand(rows, columns)
    if layout == "overlapping":
        return flat.as_strided((rows, columns), (1, 1))
    if layout == "leading":
        return flat[: 2 * n].reshape(2, rows, columns).transpose(0, 1)[:, :1]
    return flat[:n].reshape(rows, columns)


def quantized(rows: int, columns: int, config: QuantConfig, kind: str = "normal", seed: int = 0) -> QuantTensor:
    """A random weight; int8's layout goes through fp16, which holds no more than 65504."""
    weight = values(kind, rows, columns, dtype=torch.float32, seed=seed)
    return QuantTensor.quantize(weight.clamp(-6e4, 6e4) if config.format == "int8" else weight, config)


def make(
    n: int,
    k: int,
    m: int,
    format: object = "nf4",
    block: int = 64,
    *,
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    rank: int = 0,
    side: torch.dtype = torch.float32,
    side_weight: torch.dtype = torch.float32,
    layout: str = "contiguous",
    x_kind: str = "normal",
    weight_kind: str = "normal",
    grad: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem with weight [n, k] and m rows of input; `rank` 0 is without side path."""
    config = QuantConfig(format=format, block_size=block, double_quant=nested and format != "int8")
    columns, contraction = (k, n) if grad else (n, k)
    problem = Problem(
        x=laid_out(m, contraction, layout, x_kind, dtype, seed + 1),
        weight=quantized(n, k, config, weight_kind, seed),
        bias=None if bias is None or grad else values("normal", columns, dtype=bias, seed=seed + 2),
        grad=grad,
    )
    if rank:
        shape = (rank, columns) if grad else (columns, rank)
        problem.side = values("normal", *problem.x.shape[:-1], rank, dtype=side, seed=seed + 3)
        problem.side_weight = values("normal", *shape, dtype=side_weight, seed=seed + 4)
    return problem


# Around the number of lanes, the small-M limit of 8, tiles of 16, 64 and 128, the chunk of 512.
_ROWS = st.one_of(st.sampled_from((0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49)), st.integers(1, 40))
_SIZES = (0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129, 130)
_LONG = (144, 255, 256, 400, 511, 512, 513, 514, 545, 1025, 1030)
_BLOCKS = st.one_of(st.sampled_from((32, 64)), st.sampled_from(BLOCK_SIZES))
_KINDS = st.one_of(st.just("normal"), st.sampled_from(("normal", "large", "small", "magnitudes")))
_dtypes = st.sampled_from(DTYPES)


@st.composite
def problems(
    draw: st.DrawFn,
    grad: bool | None = None,
    kinds: st.SearchStrategy[str] = _KINDS,
    dtypes: st.SearchStrategy[torch.dtype] = _dtypes,
) -> Problem:
    """Any problem whose contraction may be long and whose outputs are few enough to check."""
    grad = draw(st.booleans()) if grad is None else grad
    contraction = draw(st.one_of(st.sampled_from(_SIZES), st.sampled_from(_LONG), st.integers(1, 200)))
    columns = draw(st.one_of(st.sampled_from(_SIZES), st.integers(1, 70)))
    n, k = (contraction, columns) if grad else (columns, contraction)
    return make(
        n,
        k,
        draw(_ROWS),
        draw(st.sampled_from(FORMATS)),
        draw(_BLOCKS),
        nested=draw(st.booleans()),
        dtype=draw(dtypes),
        bias=draw(st.one_of(st.none(), _dtypes)),
        rank=draw(st.one_of(st.just(0), st.sampled_from((1, 2, 16, 31, 32, 33)), st.integers(1, 40))),
        side=draw(_dtypes),
        side_weight=draw(_dtypes),
        layout=draw(st.sampled_from(LAYOUTS)),
        x_kind=draw(kinds),
        weight_kind=draw(kinds),
        grad=grad,
        seed=draw(st.integers(0, 2**31 - 10)),
    )
