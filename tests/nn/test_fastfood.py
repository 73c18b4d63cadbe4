"""Fastfood: the Walsh-Hadamard transform, the random map of blocks H G Pi H B, and its exact adjoint."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.nn.fastfood import Fastfood, hadamard_transform

BITS = st.integers(0, 13)


def dense_hadamard(n: int) -> torch.Tensor:
    """By the definition H[i, j] = (-1)^popcount(i & j)."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64)


def dense(fastfood: Fastfood) -> torch.Tensor:
    """P as a matrix [size, dims], from the definition."""
    hadamard = dense_hadamard(fastfood.block)
    blocks = []
    for signs, gaussian, order in zip(fastfood.signs, fastfood.gaussian, fastfood.order, strict=True):
        permutation = torch.eye(fastfood.block, dtype=torch.float64)[order]
        inner = permutation @ hadamard @ torch.diag(signs.double())
        blocks.append(fastfood.scale * hadamard @ torch.diag(gaussian.double()) @ inner)
    return torch.cat(blocks)[: fastfood.size, : fastfood.dims]


@given(bits=st.integers(0, 9), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_transform_is_the_dense_one(bits: int, rows: int, seed: int) -> None:
    n = 1 << bits
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Sums of n numbers in any order: n eps of the sum of their sizes.
    bound = n * torch.finfo(torch.float64).eps * x.abs().sum(1, keepdim=True)
    assert ((hadamard_transform(x) - x @ dense_hadamard(n)).abs() <= bound).all()


@given(bits=BITS, seed=st.integers(0, 99))
def test_twice_the_transform_is_n_times_the_vector(bits: int, seed: int) -> None:
    n = 1 << bits
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Two transforms, each with the bound of the test above; the first one's error goes through the second.
    bound = 2 * n * torch.finfo(torch.float64).eps * n * x.norm(dim=1, keepdim=True) * math.sqrt(n)
    assert ((hadamard_transform(hadamard_transform(x)) - n * x).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(3,), (4, 0), (2, 6)])
def test_other_lengths_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the last dimension must be a power of two, the shape is \["):
        hadamard_transform(torch.zeros(shape))


@settings(max_examples=15)
@given(dims=st.integers(1, 70), extra=st.integers(0, 300), seed=st.integers(0, 99))
def test_the_map_is_the_product_of_its_matrices(dims: int, extra: int, seed: int) -> None:
    fastfood = Fastfood(dims, dims + extra, seed)
    matrix = dense(fastfood)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(dims, generator=generator, dtype=torch.float64)
    x = torch.randn(dims + extra, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(fastfood(z), matrix @ z, rtol=0, atol=1e-12 * float(z.norm()))
    torch.testing.assert_close(fastfood.adjoint(x), matrix.T @ x, rtol=0, atol=1e-12 * float(x.norm()))


@settings(max_examples=30)
@given(dims=st.integers(1, 3000), extra=st.integers(0, 5000), seed=st.integers(0, 99))
def test_the_adjoint_is_exact(dims: int, extra: int, seed: int) -> None:
    fastfood = Fastfood(dims, dims + extra, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    z = torch.randn(dims, generator=generator, dtype=torch.float64)
    x = torch.randn(dims + extra, generator=generator, dtype=torch.float64)
    left, right = fastfood(z) @ x, z @ fastfood.adjoint(x)
    # ||P|| is at most c m max|g|; both sides are off by the rounding of two transforms.
    largest = fastfood.scale * fastfood.block * float(fastfood.gaussian.abs().max())
    bound = 64 * fastfood.block * torch.finfo(torch.float64).eps * largest * float(z.norm() * x.norm())
    assert abs(float(left - right)) <= bound


def test_gradients_are_the_adjoint_and_twice_differentiable() -> None:
    fastfood = Fastfood(5, 40)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastfood, (z,)) and torch.autograd.gradgradcheck(fastfood, (z,))
    assert torch.autograd.gradcheck(fastfood.adjoint, (x,))
    (grad,) = torch.autograd.grad(fastfood(z) @ x.detach(), z)
    assert torch.equal(grad, fastfood.adjoint(x.detach()))


@pytest.mark.parametrize(("dims", "size"), [(1, 3000), (10, 5000), (1500, 5000)])
def test_norms_are_kept_in_expectation(dims: int, size: int) -> None:
    z = torch.ones(dims, dtype=torch.float64)
    draws = torch.stack([Fastfood(dims, size, seed)(z).square() for seed in range(200)]) / dims
    # ||P z||^2 / ||z||^2 has the mean 1; the error of the mean of draws is told from their own spread, at 5 sigma.
    norms = draws.sum(1)
    assert abs(float(norms.mean()) - 1) < 5 * float(norms.std()) / math.sqrt(len(norms))
    # And no place is favoured: halves of x have half of it each.
    halves = draws[:, : size // 2].sum(1)
    assert abs(float(halves.mean()) - (size // 2) / size) < 5 * float(halves.std()) / math.sqrt(len(halves))


def test_directions_are_nearly_orthogonal_and_follow_the_seed() -> None:
    columns = torch.stack([Fastfood(20, 20_000, 3)(e) for e in torch.eye(20, dtype=torch.float64)])
    gram = columns @ columns.T
    assert (gram.diagonal() - 1).abs().max() < 0.05
    # Of random directions in 20,000 dimensions: 1 / sqrt(20,000) = 0.007 each.
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 6 / math.sqrt(20_000)
    z = torch.randn(20)
    assert torch.equal(Fastfood(20, 20_000, 3)(z), Fastfood(20, 20_000, 3)(z))
    assert not torch.equal(Fastfood(20, 20_000, 3)(z), Fastfood(20, 20_000, 4)(z))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fastfood = Fastfood(100, 10_000)
    z, x = torch.randn(100, dtype=torch.float64), torch.randn(10_000, dtype=torch.float64)
    whole = fastfood(z), fastfood.adjoint(x)
    monkeypatch.setattr("nybble.nn.fastfood._CHUNK", 3000)  # two blocks at a time, of ten
    assert len(fastfood._chunks()) == 5
    torch.testing.assert_close(fastfood(z), whole[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(fastfood.adjoint(x), whole[1], rtol=0, atol=1e-13)


def test_it_holds_a_few_numbers_an_element_and_no_state() -> None:
    fastfood = Fastfood(1000, 1 << 17)
    assert sum(b.nbytes for b in fastfood.buffers()) == 13 * (1 << 17)
    assert not fastfood.state_dict()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 5), "dims must be an integer of at least 1, got 0"),
        ((2, 2.0), "size must be an integer of at least 1, got 2.0"),
        ((True, 5), "dims must be an integer of at least 1, got True"),
        ((6, 5), "dims must be at most size, got 6 of 5"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Fastfood(*arguments)


def test_vectors_of_another_length_are_refused() -> None:
    fastfood = Fastfood(5, 40)
    with pytest.raises(ValueError, match=r"z must have the shape \[5\], got \[6\]"):
        fastfood(torch.zeros(6))
    with pytest.raises(ValueError, match=r"x must have the shape \[40\], got \[5\]"):
        fastfood.adjoint(torch.zeros(5))
