"""Products of bf16 and fp16 matrices as a CPU without instructions for them computes them."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from problems import UNIT
from torch import Tensor

from nybble.backends import products

U = 2.0**-24
_sizes = st.one_of(st.integers(0, 9), st.integers(10, 90))


def drawn(rows: int, columns: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    if layout == "strided":
        return torch.randn(2 * rows + 1, columns + 3, generator=generator).to(dtype)[1::2, 2:-1]
    return torch.randn(rows, columns, generator=generator).to(dtype)


@given(
    st.tuples(_sizes, _sizes, _sizes),
    st.sampled_from((torch.bfloat16, torch.float16)),
    st.sampled_from((None, torch.float32)),
    st.tuples(*[st.sampled_from(("rows", "transposed", "strided"))] * 2),
    st.integers(1, 2000),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((2, 90, 3), torch.bfloat16, None, ("rows", "rows"), 7, True, 0)
def test_it_is_the_product_rounded_once(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    layouts: tuple[str, str],
    block: int,
    add: bool,
    seed: int,
) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    left, right = drawn(m, k, dtype, layouts[0], generator), drawn(k, n, dtype, layouts[1], generator)
    exact = left.double() @ right.double()
    bound = (k + 2) * U * (left.double().abs() @ right.double().abs())
    total = torch.randn(m, n, generator=generator)
    before = total.double()
    emulated = patch.object(products, "emulated", lambda d: d in (torch.bfloat16, torch.float16))
    with emulated, patch.object(products, "_BLOCK", block):
        actual = products.product(left, right, out_dtype)
        products.product_into(left, right, total, add)
    assert actual.dtype == (out_dtype or dtype) and actual.shape == exact.shape
    rounding = UNIT[dtype] * exact.abs() + 2.0**-24 if out_dtype is None else 0.0
    assert ((actual.double() - exact).abs() <= 1.01 * (bound + rounding)).all()
    expected = exact + before if add else exact
    assert ((total.double() - expected).abs() <= 1.01 * (bound + (k + 2) * U * before.abs())).all()


def test_a_gradient_goes_through() -> None:
    left = torch.randn(3, 4).bfloat16().requires_grad_()
    right = torch.randn(4, 5).bfloat16()
    with patch.object(products, "emulated", lambda d: True):
        products.product(left, right).sum().backward()
        assert products.product(left.detach(), right).grad_fn is None
    assert left.grad is not None and torch.equal(left.grad, right.sum(1).expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_torchs(dtype: torch.dtype) -> None:
    left, right = torch.randn(5, 6).to(dtype), torch.randn(6, 7).to(dtype)
    assert not products.emulated(dtype)
    assert torch.equal(products.product(left, right), left @ right)
