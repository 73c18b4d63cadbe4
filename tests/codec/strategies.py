"""Hypothesis strategies for the codec tests: weights of every size, stride, dtype and magnitude; codebooks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from nybble.formats import BLOCK_SIZES, codebook

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

dtypes = st.sampled_from(DTYPES)
# Large blocks cost time in the reference and differ from small ones in nothing but their number of chunks.
block_sizes = st.one_of(st.sampled_from((32, 64)), st.sampled_from(BLOCK_SIZES))
named_codebooks = st.sampled_from(("nf4", "fp4", "int4")).map(codebook)


def _ascending(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values), dtype=torch.float32)


custom_codebooks = st.lists(
    st.floats(-2.0, 2.0, width=32, allow_subnormal=False), min_size=16, max_size=16, unique=True
).map(_ascending)
codebooks = st.one_of(named_codebooks, custom_codebooks)


def _values(kind: str, n: int, seed: int) -> Tensor:
    """n fp64 values of one kind."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    largest = torch.finfo(torch.float32).max
    spike = torch.zeros(n, dtype=torch.float64)
    if n:
        spike[seed % n] = -3.0 if seed % 2 else 3.0
    return {
        "normal": lambda: normal,
        "zeros": lambda: torch.zeros(n, dtype=torch.float64) * normal.sign(),  # of both signs
        "grid": lambda: (normal * 8).round() / 16,  # many exact ties
        "heavy": lambda: normal / uniform.clamp(min=1e-6),
        "sparse": lambda: normal * (uniform < 0.1),
        "spike": lambda: spike,
        "magnitudes": lambda: normal * torch.pow(10.0, (uniform * 70 - 35)),
        "denormal": lambda: normal * 1e-39,
        "tiny": lambda: normal * 1e-45,
        "huge": lambda: normal * 1e38,
        "largest": lambda: largest * normal.sign(),
    }[kind]()


KINDS = ("normal", "zeros", "grid", "heavy", "sparse", "spike", "magnitudes", "denormal", "tiny", "huge", "largest")

kinds = st.one_of(st.just("normal"), st.sampled_from(KINDS))


def weight(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """n values of one of `KINDS`, clamped to what `dtype` can hold."""
    limit = torch.finfo(dtype).max
    return _values(kind, n, seed).clamp(-limit, limit).to(dtype)


def _strided(flat: Tensor, rows: int, columns: int, layout: str) -> Tensor:
    """`flat` (3 * rows * columns values) as a tensor of about rows x columns with the strides of `layout`."""
    n = rows * columns
    if layout == "transposed":
        return flat[:n].reshape(columns, rows).t()
    if layout == "sliced":
        return flat[: 2 * n].reshape(rows, 2 * columns)[:, ::2]
    if layout == "expanded":
        return flat[:columns].expand(rows, columns)
    if layout == "unaligned":
        return flat[1 : n + 1].reshape(rows, columns)
    if layout == "3d":
        return flat[: 3 * n].reshape(3, rows, columns).transpose(0, 2)
    return flat[:n].reshape(rows, columns)


LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "unaligned", "3d")


@st.composite
def weights(draw: st.DrawFn, finite_in_half: bool = False) -> Tensor:
    """Weights: 0 elements, 1, odd, around block boundaries; contiguous or not; any of `KINDS` and dtypes."""
    dtype = draw(dtypes)
    kind = draw(kinds)
    seed = draw(st.integers(0, 2**31 - 1))
    if draw(st.booleans()):
        sizes = st.one_of(
            st.sampled_from((0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025)), st.integers(0, 700)
        )
        tensor = weight(kind, draw(sizes), seed, dtype)
    else:
        rows, columns = draw(st.integers(0, 20)), draw(st.integers(0, 70))
        flat = weight(kind, 3 * rows * columns + 1, seed, dtype)
        tensor = _strided(flat, rows, columns, draw(st.sampled_from(LAYOUTS)))
    return tensor.clamp(-60000.0, 60000.0) if finite_in_half else tensor
