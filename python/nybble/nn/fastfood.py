"""A random linear map from few numbers to many, in memory and time near what the many take: Fastfood.

Le, Sarlos, Smola: Fastfood, ICML 2013 (arXiv 1408.3060). A dense matrix of d x D Gaussian numbers is out of reach for
the D of a model; the product H G Pi H B of Walsh-Hadamard matrices H, a Gaussian diagonal G, a permutation Pi and a
diagonal B of signs behaves much alike and takes O(D log d) operations.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

#: Blocks of the map are no smaller, so that a block's rows have enough Gaussian numbers to draw on.
LEAST_BLOCK = 1024
#: Elements that are transformed at once: 4 MB of fp32, which stay in a cache.
_CHUNK = 1 << 20
#: Largest factor of a transform: each is one small matrix product.
_FACTOR = 64


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _factors(size: int) -> list[int]:
    """Powers of two of nearly the same size, none above _FACTOR, with the product `size`."""
    bits = size.bit_length() - 1
    count = max(1, -(-bits // (_FACTOR.bit_length() - 1)))
    return [1 << (bits // count + (i < bits % count)) for i in range(count)]


def hadamard_transform(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform over the last dimension: H x with H = [[1, 1], [1, -1]] to its Kronecker powers.

    Not normalized: H H = n I. H of a product is the Kronecker product of its factors', so the transform is a matrix
    product with a small H for each of a few factors of n.

    Args:
        x: [..., n] of a floating dtype, n a power of two.

    Raises:
        ValueError: n is not a power of two.

    >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"x: the last dimension must be a power of two, the shape is {list(x.shape)}")
    result, inner = x.reshape(-1, n), 1
    for size in reversed(_factors(n)):
        # One axis of the factors at a time, where it stands: no copy into another order in between.
        matrix = _hadamard(size, x.dtype, x.device)  # symmetric
        if inner == 1:
            result = torch.matmul(result.reshape(-1, size), matrix)
        else:
            result = torch.matmul(matrix, result.view(-1, size, inner))
        inner *= size
    return result.reshape(x.shape)


class Fastfood(nn.Module):
    """x = P z, z of `dims` numbers, x of `size`, with E ||P z||^2 = ||z||^2.

    P is a column of blocks c H G Pi H B, each with random numbers of its own, the last one cut; z is filled up with
    zeros to a block's width m, the next power of two. Every element of P z has the variance ||z||^2 / size over the
    draw of G, exactly.

    Attributes:
        signs: int8 [blocks, m], B. gaussian: fp32 [blocks, m], G. order: int64 [blocks, m], Pi: element i of a block
            is taken from order[i]. All follow from the seed and are no part of the state dict.
    """

    signs: Tensor
    gaussian: Tensor
    order: Tensor

    def __init__(self, dims: int, size: int, seed: int = 0) -> None:
        """Raises ValueError, naming the argument."""
        super().__init__()
        for name, value in (("dims", dims), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if dims > size:
            raise ValueError(f"dims must be at most size, got {dims} of {size}")
        self.dims, self.size = dims, size
        self.block = max(min(LEAST_BLOCK, _power(size)), _power(dims))
        blocks = -(-size // self.block)
        generator = torch.Generator().manual_seed(seed)
        shape = (blocks, self.block)
        self.register_buffer(
            "signs", torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1, persistent=False
        )
        self.register_buffer("gaussian", torch.randn(shape, generator=generator), persistent=False)
        order = torch.empty(shape, dtype=torch.int64)
        for row in order:
            torch.randperm(self.block, generator=generator, out=row)
        self.register_buffer("order", order, persistent=False)
        self.scale = 1.0 / math.sqrt(size * self.block)

    def forward(self, z: Tensor) -> Tensor:
        """z: [dims] of a floating dtype; returns [size] of the same. Differentiable, also twice."""
        return _Project.apply(z, self)

    def adjoint(self, x: Tensor) -> Tensor:
        """P^T x: [size] to [dims]. Differentiable, also twice."""
        return _Adjoint.apply(x, self)

    def _chunks(self) -> list[slice]:
        step = max(1, _CHUNK // self.block)
        return [slice(first, first + step) for first in range(0, len(self.signs), step)]

    @torch.no_grad()
    def project(self, z: Tensor) -> Tensor:
        """As `forward`, without a graph."""
        if z.shape != (self.dims,):
            raise ValueError(f"z must have the shape [{self.dims}], got {list(z.shape)}")
        padded = nn.functional.pad(z, (0, self.block - self.dims))
        out = torch.empty(self.signs.shape, dtype=z.dtype, device=z.device)
        for part in self._chunks():
            rows = hadamard_transform(self.signs[part] * padded)
            rows = rows.gather(1, self.order[part]).mul_(self.gaussian[part]).mul_(self.scale)
            out[part] = hadamard_transform(rows)
        return out.view(-1)[: self.size]

    @torch.no_grad()
    def project_back(self, x: Tensor) -> Tensor:
        """As `adjoint`, without a graph."""
        if x.shape != (self.size,):
            raise ValueError(f"x must have the shape [{self.size}], got {list(x.shape)}")
        total = torch.zeros(self.block, dtype=x.dtype, device=x.device)
        for part in self._chunks():
            rows = x[part.start * self.block : part.stop * self.block]
            short = -rows.numel() % self.block
            rows = (nn.functional.pad(rows, (0, short)) if short else rows).view(-1, self.block)
            rows = hadamard_transform(rows).mul_(self.gaussian[part]).mul_(self.scale)
            rows = torch.empty_like(rows).scatter_(1, self.order[part], rows)
            total += (hadamard_transform(rows) * self.signs[part]).sum(0)
        return total[: self.dims]

    def extra_repr(self) -> str:
        return f"dims={self.dims}, size={self.size}, block={self.block}"


def _power(value: int) -> int:
    """The least power of two that is not below."""
    return 1 << (value - 1).bit_length()


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, fastfood: Fastfood) -> Tensor:
        ctx.fastfood = fastfood
        return fastfood.project(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Adjoint.apply(grad, ctx.fastfood), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fastfood: Fastfood) -> Tensor:
        ctx.fastfood = fastfood
        return fastfood.project_back(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Project.apply(grad, ctx.fastfood), None
