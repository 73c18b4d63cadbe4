"""Apple's GPU itself: Metal's kernels beside the reference and beside the CPU's layers. Skipped where there is none.

tools/mac_check.sh sets NYBBLE_REQUIRE_MPS: there a missing GPU or missing kernels are an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble import QuantConfig, QuantTensor, backends, ops
from nybble.backends import mps as backend
from nybble.training.optim import AdamW, clip_scale

# The strategies and bounds of the CPU's kernels, and of Metal's under the shim, are theirs as well.
TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "kernels"), str(TESTS / "metal")]

from bounds import assert_within_bound, rounds_weight  # noqa: E402  (their folders are on the path only now)
from problems import DTYPES, FORMATS, Problem, make, values  # noqa: E402  (likewise)

if torch.backends.mps.is_available():
    MISSING = backend.missing(torch.device("mps"))
else:
    MISSING = "no GPU of Apple's (torch.backends.mps.is_available() is False)"
if MISSING:
    if os.environ.get("NYBBLE_REQUIRE_MPS"):
        raise RuntimeError(MISSING)
    pytest.skip(MISSING, allow_module_level=True)

# Versions of torch and transformers that a Mac happens to have may warn; that is no failure here.
pytestmark = pytest.mark.filterwarnings("default")
MPS = torch.device("mps")


def there(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(MPS)


def check(problem: Problem) -> None:
    """Runs it on the GPU and holds what comes back to the bound of the CPU's problem."""
    parts = (problem.bias, problem.side, problem.side_weight)
    moved = Problem(problem.x.to(MPS), problem.weight.to(MPS), *map(there, parts), problem.grad)
    assert_within_bound(problem, moved.run().cpu(), rounds_weight(backend, problem))


@pytest.mark.parametrize("library", ["dequantize", "quantize", "linear_small_m", "linear_tiles"])
def test_this_compiler_takes_the_text(library: str) -> None:
    backend._library(library)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "grad_input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5, 8, 9, 32, 33, 100])
def test_linear(m: int, dtype: torch.dtype, grad: bool) -> None:
    for n, k in ((13, 2080), (144, 144), (99, 101), (1024, 1024)):
        for format in ("nf4", "int8"):
            bias = None if grad else torch.float32
            check(make(n, k, m, format, 64, dtype=dtype, bias=bias, rank=17, grad=grad, seed=m))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format_and_block(format: Any, nested: bool) -> None:
    for block in (32, 256, 4096):
        check(make(40, 96, 1, format, block, nested=nested, dtype=torch.bfloat16))
        check(make(40, 96, 20, format, block, nested=nested, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["normal", "magnitudes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
def test_codecs_give_the_bits_of_the_cpu(format: str, nested: bool, dtype: torch.dtype, kind: str) -> None:
    if nested and format == "int8":
        return
    x = values(kind, 65, 257, dtype=dtype, seed=1)
    x = x.clamp(-6e4, 6e4) if format == "int8" else x  # whose layout is by way of fp16
    config = QuantConfig(format, double_quant=nested)
    expected, actual = QuantTensor.quantize(x, config), QuantTensor.quantize(x.to(MPS), config)
    for name, tensor in expected.state().items():
        assert torch.equal(actual.state()[name].cpu(), tensor), name
    found, wanted = actual.dequantize(torch.float32).cpu(), expected.dequantize(torch.float32)
    ordinary = wanted.abs() >= torch.finfo(torch.float32).tiny  # smaller ones the GPU may take for 0
    assert torch.equal(found[ordinary], wanted[ordinary])


def test_the_same_arguments_give_the_same_bits() -> None:
    problem = make(1000, 1024, 40, dtype=torch.bfloat16, grad=True)
    g, weight = problem.x.to(MPS), problem.weight.to(MPS).packed_weight()
    first = ops.grad_input(g, weight)
    for _ in range(10):
        assert torch.equal(first, ops.grad_input(g, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    problem = make(96, 128, 24, dtype=dtype, rank=8)
    assert problem.side is not None and problem.side_weight is not None
    results = []
    for device in (torch.device("cpu"), MPS):
        weight = problem.weight.to(device).packed_weight()
        leaves = [t.detach().to(device).requires_grad_() for t in (problem.x, problem.side, problem.side_weight)]
        y = ops.linear(leaves[0], weight, None, *leaves[1:])
        y.float().square().mean().backward()
        results.append([t.detach().float().cpu() for t in (y, *(leaf.grad for leaf in leaves))])
    # A few roundings of either side, to its own dtype, whose errors are independent: norms, with a factor of 8.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for wanted, found in zip(*results, strict=True):
        assert (found - wanted).norm() <= 8 * unit * wanted.norm()


def test_a_step_of_training_clips_and_updates_there() -> None:
    parameter = torch.nn.Parameter(torch.ones(5000, device=MPS))
    optimizer = AdamW([parameter], lr=0.1)
    parameter.grad = torch.full_like(parameter, 2.0)
    norm, scale = clip_scale([parameter], 1.0)
    optimizer.step(grad_scale=scale)
    assert abs(float(norm) - 2 * 5000**0.5) <= 1e-3
    assert torch.allclose(parameter.detach().cpu(), torch.full((5000,), 0.9), atol=2e-3)


def test_what_serves_this_device_is_metal() -> None:
    assert backends.of(MPS) is backend
