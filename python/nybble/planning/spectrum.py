"""Singular values of a difference, and what they say of its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .difference import Difference, Update
from .noise import RoundingNoise

#: Shares of the energy (the sum of squared singular values) whose ranks a report tells.
ENERGIES = (0.90, 0.95, 0.99)
#: Up to here the whole matrix is decomposed; beyond, the Gram matrix of its shorter side is.
SVD_SIDE, SVD_ELEMENTS = 2048, 1 << 26


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, EUSIPCO 2007).

    From 1 for one direction to n for n of the same size; 0 where all are 0.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    values = values.double()
    total = float(values.sum())
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """||D||_F^2 / ||D||_2^2: from 1 to the rank; 0 where all are 0.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
    1.5
    """
    values = values.double()
    largest = float(values.max()) if values.numel() else 0.0
    return float((values / largest).square().sum()) if largest else 0.0


def energy_rank(values: Tensor, share: float) -> int:
    """How many of the singular values, the largest first, have at least `share` of the sum of their squares.

    values: [n], in descending order. 0 where all are 0.

    >>> energy_rank(torch.tensor([3.0, 1.0, 0.0]), 0.9), energy_rank(torch.tensor([3.0, 1.0, 0.0]), 1.0)
    (1, 2)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be a number above 0 and at most 1, got {share!r}")
    largest = float(values[0]) if values.numel() else 0.0
    if not largest:
        return 0
    energies = (values.double() / largest).square().cumsum(0)
    # The last sum is the whole, so that a share of 1 is reached in spite of rounding.
    return int((energies < share * energies[-1]).sum()) + 1


@dataclass
class Spectrum:
    """One weight's difference.

    Attributes:
        values: fp64 [min(shape)], descending, on the CPU.
        vectors: fp64 [side, n], singular vectors of the side that `by_rows` tells, by column; None if not asked for. Of
            an adapter no more than its rank.
        by_rows: the vectors are of the rows ([rows, n], left ones), else of the columns ([columns, n], right ones).
        norm, weight_norm: ||D||_F and ||base||_F.
        noise: the rounding in D; its `known` is False where nothing is known of it.
        method: "factors": of an adapter's A and B. "svd": LAPACK's, of D in fp64. "gram": square roots of the
            eigenvalues of D D^T or D^T D in fp64, whose rounding hides values below about sqrt(n) 1e-8 of the largest;
            larger ones and all energies are right to fp32 or better.
    """

    values: Tensor
    vectors: Tensor | None
    by_rows: bool
    norm: float
    weight_norm: float
    method: str
    noise: RoundingNoise


def spectrum(difference: Difference, *, vectors: bool = False, device: str = "cpu", method: str = "auto") -> Spectrum:
    """Singular values of a difference of two matrices, in fp64.

    Memory: the whole of D in fp64 for "svd" and for wide matrices; of tall ones with "gram" a slab at a time.

    Args:
        difference: of a weight of two dimensions, not empty.
        vectors: those of the shorter side too, from which `factors` makes the best approximations.
        device: where to compute. method: "auto", "svd" or "gram"; see `Spectrum`.

    Raises:
        NonFiniteError: see `Difference.slabs`.
    """
    rows, columns = difference.shape
    if isinstance(difference, Update):
        return _of_update(difference, vectors)
    if method == "auto":
        small = min(rows, columns) <= SVD_SIDE and rows * columns <= SVD_ELEMENTS
        method = "svd" if small else "gram"
    whole = method == "svd" or rows < columns
    matrix = torch.empty(rows, columns, dtype=torch.float64, device=device) if whole else None
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device) if matrix is None else None
    squares = weight_squares = 0.0
    noise = RoundingNoise(difference.rounded_to, columns)
    for first, base, part in difference.slabs():
        noise.add(base, part)
        weight_squares += float(base.square().sum())
        squares += float(part.square().sum())
        part = part.to(device)
        if matrix is not None:
            matrix[first : first + len(part)] = part
        elif gram is not None:
            gram.addmm_(part.T, part)
    by_rows = rows < columns
    found: Tensor | None = None
    if not squares:
        values = torch.zeros(min(rows, columns), dtype=torch.float64)
    elif method == "svd":
        assert matrix is not None
        if vectors:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            found = left if by_rows else right.T
        else:
            values = torch.linalg.svdvals(matrix)
    else:
        if matrix is not None:
            gram = matrix @ matrix.T
        assert gram is not None
        eigenvalues, eigenvectors = torch.linalg.eigh(gram) if vectors else (torch.linalg.eigvalsh(gram), None)
        values = eigenvalues.flip(0).clamp_min(0).sqrt()
        found = None if eigenvectors is None else eigenvectors.flip(1)
    return Spectrum(
        values.cpu(), None if found is None else found.cpu(), by_rows, squares**0.5, weight_squares**0.5, method, noise
    )


def _of_update(update: Update, vectors: bool) -> Spectrum:
    """By the QR decompositions of both factors: D = Q_1 (R_1 R_2^T) Q_2^T, of which the middle one is [r, r]."""
    rows, columns = update.shape
    weight_squares = sum(float(base.square().sum()) for _, base, _ in update.slabs())
    first, second = torch.linalg.qr(update.left), torch.linalg.qr(update.right.T)
    left, values, right = torch.linalg.svd(first.R @ second.R.T, full_matrices=False)
    by_rows = rows < columns
    found = first.Q @ left if by_rows else second.Q @ right.T
    every = torch.zeros(min(rows, columns), dtype=torch.float64)
    every[: len(values)] = values[: len(every)]
    return Spectrum(
        every, found if vectors else None, by_rows, float(values.norm()), weight_squares**0.5, "factors",
        RoundingNoise(None, columns),
    )  # fmt: skip


def factors(difference: Difference, found: Spectrum, rank: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(A, B), fp64 [rank, columns] and [rows, rank]: B A is the best approximation of D of this rank.

    D is projected onto its first singular vectors: the same as cutting its singular value decomposition (Eckart and
    Young, 1936), but as right where singular values are too small to divide by. A and B share the sizes: row i of A
    has the norm of column i of B, the square root of the singular value.
    """
    assert found.vectors is not None
    basis = found.vectors[:, :rank].to(device)
    rows, columns = difference.shape
    other = torch.zeros(columns if found.by_rows else rows, rank, dtype=torch.float64, device=device)
    for first, _, part in difference.slabs():
        part = part.to(device)
        if found.by_rows:
            other.addmm_(part.T, basis[first : first + len(part)])
        else:
            other[first : first + len(part)] = part @ basis
    root = torch.linalg.vector_norm(other, dim=0).sqrt()
    basis, other = basis * root, other / torch.where(root > 0, root, 1.0)
    a, b = (other.T, basis) if found.by_rows else (basis.T, other)
    return a.contiguous().cpu(), b.contiguous().cpu()
