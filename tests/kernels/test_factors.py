"""Products with LoRA's factors: as exact as sums in fp32 are, under every ISA that has the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, UNIT
from torch import Tensor

from nybble import LoRALinear, QuantConfig, QuantLinear, _core
from nybble.backends import factors

U = 2.0**-24
#: Numbers and products below it may become 0 where bf16 pairs are multiplied.
SMALLEST = 2.0**-124


@pytest.fixture(autouse=True)
def has_kernels(isa: str) -> None:
    if not _core.has_factor_kernels():
        pytest.skip(f"{isa} multiplies no bf16 pairs")


_sizes = st.one_of(st.integers(1, 40), st.sampled_from((64, 96, 97, 130, 255, 300)))
_inner = st.one_of(st.integers(0, 70), st.sampled_from((128, 513, 1023, 1024, 1026, 2100)))


def drawn(rows: int, columns: int, layout: str, generator: torch.Generator) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).bfloat16().t()
    if layout == "strided":
        return torch.randn(2 * rows + 1, columns + 3, generator=generator).bfloat16()[1::2, 2:-1]
    if layout == "expanded":
        return torch.randn(1, columns, generator=generator).bfloat16().expand(rows, columns)
    return torch.randn(rows, columns, generator=generator).bfloat16()


layouts = st.sampled_from(("rows", "transposed", "strided", "expanded"))
ranks = st.one_of(st.integers(1, _core.MOST_RANK), st.sampled_from((8, 16, 32)))


@given(_sizes, _inner, ranks, st.sampled_from(DTYPES), layouts, st.booleans(), st.floats(-3, 3), st.integers(0, 2**31))
def test_apply(
    isa: str,
    m: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    layout: str,
    by_rank: bool,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = drawn(m, k, layout, generator)
    factor = torch.randn((rank, k) if by_rank else (k, rank), generator=generator).to(dtype)
    found = factors.apply(x, factor, scale, by_rank)
    rounded = factor.bfloat16().double()
    matrix = rounded.t() if by_rank else rounded
    exact = scale * (x.double() @ matrix)
    bound = abs(scale) * (k + 3) * U * (x.double().abs() @ matrix.abs())
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 1.01 * (bound + UNIT[torch.bfloat16] * exact.abs()) + SMALLEST).all()


@given(_inner, _sizes, ranks, layouts, layouts, st.booleans(), st.integers(0, 2**31))
def test_gradient(isa: str, m: int, k: int, rank: int, layout: str, left_layout: str, by_rank: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, left = drawn(m, k, layout, generator), drawn(m, rank, left_layout, generator)
    found = factors.gradient(left, x, by_rank)
    exact = left.double().t() @ x.double()
    bound = (m + 3) * U * (left.double().abs().t() @ x.double().abs())
    assert found.dtype == torch.float32 and found.is_contiguous()
    found = found if by_rank else found.t()
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= 1.01 * bound + SMALLEST).all()


def test_any_number_of_threads_gives_the_same_bits(isa: str, threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(301, 530, generator=generator).bfloat16(), torch.randn(20, 530, generator=generator)
    left = torch.randn(301, 20, generator=generator).bfloat16()
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((factors.apply(x, factor, 0.5, True), factors.gradient(left, x, False)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_nan_and_infinity_are_not_lost(isa: str) -> None:
    x, factor = torch.ones(70, 40).bfloat16(), torch.ones(5, 40)
    x[3, 7], x[8, 1] = torch.nan, torch.inf
    found = factors.apply(x, factor, 1.0, True)
    assert found[3].isnan().all() and (found[8] == torch.inf).all() and (found[4] == 40).all()
    found = factors.gradient(torch.ones(70, 5).bfloat16(), x, True)
    assert found[:, 7].isnan().all() and (found[:, 1] == torch.inf).all() and (found[:, 0] == 70).all()


@pytest.mark.parametrize("rank", (8, 16, 64, 65))
def test_a_layer_has_the_same_gradients(isa: str, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Within the rounding of what they are made of: with and without the kernels, in bf16."""
    torch.manual_seed(0)
    base = QuantLinear.from_linear(torch.nn.Linear(128, 96, dtype=torch.bfloat16), QuantConfig())
    layer = LoRALinear.from_base(base, r=rank, alpha=rank)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 50, 128).bfloat16().requires_grad_()
    results = []
    for faster in ((), tuple(_core.isas())):
        monkeypatch.setattr(factors, "_FASTER", faster)
        assert factors.fits(x.detach().flatten(0, 1), rank) == (bool(faster) and rank <= 64)
        y = layer(x)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, layer.lora_A, layer.lora_B])])
    for before, after in zip(*results, strict=True):
        assert before.dtype == after.dtype
        assert (before.double() - after.double()).norm() <= 4 * UNIT[torch.bfloat16] * before.double().norm()


@pytest.mark.parametrize("argument", ("rank", "m", "threads", "x", "out"))
def test_arguments_are_checked(isa: str, argument: str) -> None:
    x, factor, out = torch.ones(4, 6).bfloat16(), torch.ones(3, 6), torch.empty(4, 3).bfloat16()
    good = {"x": x.data_ptr(), "x_stride": 6, "m": 4, "k": 6, "rank": 3, "factor": factor.data_ptr(), "factor_dtype": 0}
    good.update(by_rank=True, scale=1.0, out=out.data_ptr(), threads=1)
    bad = {"rank": _core.MOST_RANK + 1, "m": -1, "threads": 0, "x": 0, "out": 0}
    with pytest.raises(ValueError, match=argument):
        _core.factor_apply(**{**good, argument: bad[argument]})
