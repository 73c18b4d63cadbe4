"""Linear operations whose every partial sum is an integer below 2^24: any correct kernel gives exactly one answer.

Inputs, codes times scales, side path and bias are small integers, which fp32, fp16 and bf16 hold exactly; fp32 adds
them without rounding in any order, also tensor cores, which truncate what they align. So the output is the exact sum
rounded once, at any size, and one wrong scale, one swapped pair of elements or one product too few changes its bits,
where an error bound for 8192 products would let it pass.
"""

from __future__ import annotations

import math

import torch
from kernels.problems import Problem
from torch import Tensor

from nybble import QuantTensor

# (i - 8) / 8 times a scale of 8, 16 or 32: integers of up to 32, 4 products of them with x at most 4 * 32.
CODEBOOK = tuple((i - 8) / 8 for i in range(16))
SCALES = (8, 16, 32)
LARGEST_X = 4
LARGEST_SUM = 2**24
NESTED_BLOCK = 256
# The stored scale is code * (nested / 256) + OFFSET, both kinds of nested blocks exact.
OFFSET = 8
NESTED = (256, 512)


def integers(low: int, high: int, *shape: int, device: torch.device, seed: int, dtype: torch.dtype) -> Tensor:
    """Uniform integers low..high, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16).to(device).to(dtype)


def weight(n: int, k: int, *, int8: bool, block: int, nested: bool, seed: int, device: torch.device) -> QuantTensor:
    """A random weight [n, k] of integers, made without quantizing."""
    generator = torch.Generator(device).manual_seed(seed)
    if int8:
        packed = torch.randint(-8, 9, (n, k), generator=generator, device=device, dtype=torch.int8)
        scales = torch.randint(1, 3, (n,), generator=generator, device=device) * 127.0
        return QuantTensor(packed, scales, None, 0, (n, k), torch.bfloat16, "int8")
    count = n * k
    blocks = -(-count // block)
    packed = torch.randint(0, 256, ((count + 1) // 2, 1), generator=generator, device=device, dtype=torch.uint8)
    pick = torch.randint(0, 3, (blocks,), generator=generator, device=device)
    codebook = torch.tensor(CODEBOOK, device=device)
    if not nested:
        scales = torch.tensor(SCALES, dtype=torch.float32, device=device)[pick]
        return QuantTensor(packed, scales, codebook, block, (n, k), torch.bfloat16, "custom")
    of_nested = torch.arange(-(-blocks // NESTED_BLOCK), device=device) % 2
    steps = (torch.tensor(SCALES, device=device)[pick] - OFFSET) // (
        1 + of_nested.repeat_interleave(NESTED_BLOCK)[:blocks]
    )
    return QuantTensor(
        packed,
        steps.to(torch.uint8),
        codebook,
        block,
        (n, k),
        torch.bfloat16,
        "custom",
        nested_absmax=torch.tensor(NESTED, dtype=torch.float32, device=device)[of_nested],
        nested_map=torch.arange(256, device=device) / 256.0,
        nested_offset=torch.tensor(float(OFFSET), device=device),
        nested_block_size=NESTED_BLOCK,
    )


def rows_of(tensor: QuantTensor, first: int, last: int) -> Tensor:
    """Rows first..last - 1 of `weight` in float64, by the definition of the layout alone."""
    n, k = tensor.shape
    last = min(last, n)
    if tensor.codebook is None:
        return tensor.packed[first:last].double() * (tensor.absmax[first:last, None].double() / 127)
    index = torch.arange(first * k, last * k, device=tensor.packed.device)
    bytes_ = tensor.packed.reshape(-1)[index // 2]
    codes = torch.where(index % 2 == 0, bytes_ >> 4, bytes_ & 15)
    block = index // tensor.block_size
    scales = tensor.absmax[block].double()
    if tensor.nested_absmax is not None:
        assert tensor.nested_map is not None and tensor.nested_offset is not None
        map_ = tensor.nested_map.double()[tensor.absmax[block].long()]
        scales = map_ * tensor.nested_absmax[block // tensor.nested_block_size].double() + tensor.nested_offset.double()
    return (tensor.codebook.double()[codes.long()] * scales).view(last - first, k)


def make(
    n: int,
    k: int,
    m: int,
    *,
    int8: bool = False,
    block: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    rank: int = 0,
    grad: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A problem of integers with weight [n, k] and m rows of input; refuses sizes whose sums might be rounded."""
    columns, contraction = (k, n) if grad else (n, k)
    assert contraction * LARGEST_X * max(SCALES) + rank * 16 + 100 < LARGEST_SUM, "sums could leave 2^24"
    device = torch.device(device)

    def of(low: int, high: int, *shape: int, offset: int) -> Tensor:
        return integers(low, high, *shape, device=device, seed=seed + offset, dtype=dtype)

    problem = Problem(
        x=of(-LARGEST_X, LARGEST_X, m, contraction, offset=1),
        weight=weight(n, k, int8=int8, block=block, nested=nested, seed=seed, device=device),
        bias=of(-100, 100, columns, offset=2) if bias and not grad else None,
        grad=grad,
    )
    if rank:
        problem.side = of(-4, 4, m, rank, offset=3)
        problem.side_weight = of(-4, 4, *((rank, columns) if grad else (columns, rank)), offset=4)
    return problem


def answer(problem: Problem, rows_at_once: int = 2048) -> Tensor:
    """The only right output, in x's dtype; the weight is decoded in slices of rows, so that a large one fits."""
    n, k = problem.weight.shape
    x = problem.x.double().reshape(math.prod(problem.x.shape[:-1]), problem.x.shape[-1])
    if problem.grad:
        result = torch.zeros(x.shape[0], k, dtype=torch.float64, device=x.device)
        for first in range(0, n, rows_at_once):
            result += x[:, first : first + rows_at_once] @ rows_of(problem.weight, first, first + rows_at_once)
    else:
        result = torch.empty(x.shape[0], n, dtype=torch.float64, device=x.device)
        for first in range(0, n, rows_at_once):
            last = min(n, first + rows_at_once)
            result[:, first:last] = x @ rows_of(problem.weight, first, last).t()
    if problem.side is not None and problem.side_weight is not None:
        right = problem.side_weight.double()
        result += problem.side.double().reshape(x.shape[0], -1) @ (right if problem.grad else right.t())
    if problem.bias is not None:
        result += problem.bias.double()
    assert bool((result.abs() < LARGEST_SUM).all())
    return result.to(problem.x.dtype).reshape(*problem.x.shape[:-1], result.shape[-1])
