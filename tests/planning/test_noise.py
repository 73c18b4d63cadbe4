"""`nybble.planning.noise`: the spacing of a dtype's numbers, and that rounding stays below the edge that it tells."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.planning.noise import RoundingNoise, spacing

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@given(dtype=DTYPES, seed=st.integers(0, 10**6), exponent=st.integers(-140, 14))
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype, seed: int, exponent: int) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.0**exponent
    values = torch.cat([values, torch.tensor([0.0, 1.0, 2.0**exponent], dtype=torch.float64)]).to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    size = values.abs()
    following = (size.view(integers) + 1).view(dtype)
    assert torch.equal(spacing(values.double(), dtype), following.double() - size.double())


@settings(max_examples=40)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 80),
    dtype=DTYPES,
    spread=st.sampled_from([0.0, 0.7, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_rounding_has_no_singular_value_above_the_edge(
    rows: int, columns: int, dtype: torch.dtype, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = 0.02 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    exact *= torch.exp(spread * torch.randn(rows, 1, generator=generator, dtype=torch.float64))
    tuned = exact.to(dtype).double()
    noise = RoundingNoise(dtype, columns)
    for first in range(0, rows, 7):
        noise.add((0.5 * tuned)[first : first + 7], (0.5 * tuned)[first : first + 7])  # a base that the dtype has
    errors = tuned - exact
    assert float(torch.linalg.svdvals(errors)[0]) <= noise.edge
    if rows * columns >= 1000 and not spread:
        # Squares of uniform errors: relative standard deviation 0.9 an element, spacings differ by some powers of two.
        assert float(errors.square().sum()) == pytest.approx(noise.energy, rel=8 / (rows * columns) ** 0.5)


def test_a_base_between_two_numbers_counts_twice() -> None:
    base = torch.full((4, 4), 1.0 + 2**-9, dtype=torch.float64)
    noise, exact = RoundingNoise(torch.bfloat16, 4), RoundingNoise(torch.bfloat16, 4)
    noise.add(base, torch.full_like(base, 2**-7 - 2**-9))
    exact.add(torch.ones_like(base), torch.full_like(base, 2**-7))
    assert noise.energy == pytest.approx(2 * exact.energy) == pytest.approx(2 * 16 * 2**-14 / 12)


def test_rows_that_did_not_move_hold_no_rounding() -> None:
    base = torch.ones(10, 4, dtype=torch.float64)
    part = torch.zeros_like(base)
    part[3] = 2**-7
    noise, alone = RoundingNoise(torch.bfloat16, 4), RoundingNoise(torch.bfloat16, 4)
    noise.add(base, part)
    alone.add(base[3:4], part[3:4])
    assert (noise.energy, noise.edge) == (alone.energy, alone.edge) and noise.energy > 0
    nothing = RoundingNoise(torch.bfloat16, 4)
    nothing.add(base, torch.zeros_like(base))
    assert (nothing.energy, nothing.edge) == (0, 0)


def test_what_is_not_known_is_said() -> None:
    noise = RoundingNoise(None, 3)
    noise.add(torch.ones(2, 3), torch.ones(2, 3))
    assert not noise.known and RoundingNoise(torch.float16, 3).known and not RoundingNoise(torch.float64, 3).known
