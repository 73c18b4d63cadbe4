"""Effective, stable and energy rank; singular values by either method; the best factors of a rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.planning import difference as difference_module
from nybble.planning.difference import Difference
from nybble.planning.spectrum import effective_rank, energy_rank, factors, spectrum, stable_rank

EPS = torch.finfo(torch.float64).eps
SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


class Held:
    """A reader of a tensor in memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self.name, self.shape, self.dtype = "held", tuple(values.shape), values.dtype
        self.bytes_per_element, self.fixed = 8.0, 0
        self._values = values.reshape(-1)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._values[start:stop]


def of(change: torch.Tensor) -> Difference:
    """The difference of a matrix of small integers, so that adding the change to it is exact to its rounding."""
    base = torch.zeros_like(change)
    return Difference("w", Held(base), Held(base + change))


@given(values=SPECTRA)
def test_ranks_lie_between_one_and_the_number_of_directions(values: torch.Tensor) -> None:
    n, slack = values.numel(), 1e-9
    assert 1 - slack <= effective_rank(values) <= n * (1 + slack)
    assert 1 - slack <= stable_rank(values) <= n * (1 + slack)


@given(values=SPECTRA, shares=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6))
def test_energy_ranks_are_the_least_and_rise_with_the_share(values: torch.Tensor, shares: list[float]) -> None:
    ranks = [energy_rank(values, share) for share in sorted(shares)]
    assert ranks == sorted(ranks)
    energies = (values / values[0]).square()
    total = float(energies.sum())
    for share, rank in zip(sorted(shares), ranks, strict=True):
        slack = 4 * values.numel() * EPS * total
        assert float(energies[:rank].sum()) >= share * total - slack
        assert float(energies[: rank - 1].sum()) < share * total + slack


@given(values=SPECTRA, factor=st.floats(1e-3, 1e3))
def test_ranks_do_not_depend_on_the_scale(values: torch.Tensor, factor: float) -> None:
    assert math.isclose(effective_rank(values), effective_rank(values * factor), rel_tol=1e-9)
    assert math.isclose(stable_rank(values), stable_rank(values * factor), rel_tol=1e-9)


@given(n=st.integers(1, 50), zeros=st.integers(0, 10), size=st.floats(1e-3, 1e3))
def test_equal_directions_are_counted(n: int, zeros: int, size: float) -> None:
    values = torch.cat([torch.full((n,), size, dtype=torch.float64), torch.zeros(zeros, dtype=torch.float64)])
    assert math.isclose(effective_rank(values), n, rel_tol=1e-9) and math.isclose(stable_rank(values), n, rel_tol=1e-9)
    assert energy_rank(values, 1.0) == n


def test_nothing_has_rank_zero() -> None:
    nothing = torch.zeros(3)
    assert (effective_rank(nothing), stable_rank(nothing), energy_rank(nothing, 0.9)) == (0.0, 0.0, 0)
    with pytest.raises(ValueError, match=r"share must be a number above 0 and at most 1, got 1\.5"):
        energy_rank(nothing, 1.5)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    elements=st.sampled_from([7, 64, 10**6]),
)
def test_both_methods_find_the_singular_values(rows: int, columns: int, seed: int, elements: int) -> None:
    change = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.linalg.svdvals(change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(difference_module, "ELEMENTS", elements)  # rows come in slabs
        for method in ("svd", "gram"):
            found = spectrum(of(change), method=method)
            # A backward stable decomposition is off by a small multiple of n eps ||D||_2; squares halve the digits.
            bound = 20 * max(rows, columns) * EPS * float(expected[0])
            if method == "gram":
                bound = math.sqrt(20 * max(rows, columns) * EPS) * float(expected[0])
            assert found.method == method and found.values.shape == expected.shape
            assert (found.values - expected).abs().max() <= bound
            assert math.isclose(found.norm, float(change.norm()), rel_tol=1e-12)


@settings(max_examples=30)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 99), data=st.data())
def test_factors_are_the_best_of_their_rank(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    change = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank = data.draw(st.integers(1, min(rows, columns)))
    values = torch.linalg.svdvals(change)
    for method in ("svd", "gram"):
        found = spectrum(of(change), vectors=True, method=method)
        a, b = factors(of(change), found, rank)
        assert a.shape == (rank, columns) and b.shape == (rows, rank)
        # Eckart and Young: no matrix of this rank is nearer than the root of the tail's energy.
        tail = float(values[rank:].square().sum().sqrt())
        bound = 50 * max(rows, columns) * EPS * float(values[0])
        if method == "gram" and rank < len(values):  # its subspace is off where singular values are near each other
            bound += math.sqrt(EPS) * float(values[0])
        assert abs(float((change - b @ a).norm()) - tail) <= bound
        # The sizes are shared: row i of A is as long as column i of B.
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-6, atol=1e-7)


def test_factors_of_a_change_of_low_rank_are_finite_beyond_it() -> None:
    change = torch.outer(torch.arange(6.0), torch.arange(4.0)).double()
    for method in ("svd", "gram"):
        a, b = factors(of(change), spectrum(of(change), vectors=True, method=method), 4)
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        torch.testing.assert_close(b @ a, change, rtol=0, atol=1e-12)


def test_large_matrices_go_by_their_gram_matrix() -> None:
    change = torch.zeros(2049, 2050)
    change[0, 0] = 3.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.planning.spectrum.SVD_SIDE", 8)
        assert spectrum(of(change[:9, :20])).method == "gram"
        assert spectrum(of(change[:8, :20])).method == "svd"
    assert spectrum(of(change[:9, :20])).method == "svd"
