"""The operators: as torch.library sees them, and one body behind three paths."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from kernels.ops_inputs import SCALING, K, M, R, differentiable, inputs, row_masks
from kernels.problems import DTYPES
from torch import Tensor

from nybble import ops
from nybble.backends import PackedWeight

# ---- torch.library ---------------------------------------------------------------------------------------------------


def test_opcheck_linear(weight: PackedWeight) -> None:
    t = inputs()
    x, bias, side, side_weight = differentiable(t["x"], t["bias"], t["side"], t["side_weight"])
    torch.library.opcheck(torch.ops.nybble.linear, (x, *weight, bias, side, side_weight))
    torch.library.opcheck(torch.ops.nybble.linear, (x, *weight, None, None, None))
    torch.library.opcheck(torch.ops.nybble.linear, (t["x"].bfloat16(), *weight, t["bias"], None, None))


def test_opcheck_grad_input(weight: PackedWeight) -> None:
    t = inputs()
    g, side, side_weight = differentiable(t["g"], t["side"], t["a"])
    torch.library.opcheck(torch.ops.nybble.grad_input, (g, *weight, side, side_weight))
    torch.library.opcheck(torch.ops.nybble.grad_input, (g, *weight, None, None))


def test_opcheck_lora_linear(weight: PackedWeight) -> None:
    t = inputs()
    x, bias, a, b = differentiable(t["x"], t["bias"], t["a"], t["b"])
    torch.library.opcheck(torch.ops.nybble.lora_linear, (x, *weight, bias, a, b, SCALING))
    torch.library.opcheck(torch.ops.nybble.lora_linear, (x, *weight, None, a, b, SCALING))


@pytest.mark.parametrize("shape", [(M, K), (M, 5, K), (2, 3, 4, K)], ids=str)
def test_opcheck_lora_linear_with_a_mask(weight: PackedWeight, shape: tuple[int, ...]) -> None:
    t = inputs()
    x, a, b = differentiable(torch.randn(shape), t["a"], t["b"])
    mask = row_masks(shape[0], R)
    torch.library.opcheck(torch.ops.nybble.lora_linear, (x, *weight, t["bias"], a, b, SCALING, mask))
    torch.library.opcheck(torch.ops.nybble.lora_linear, (x.detach().bfloat16(), *weight, None, a, b, 1.0, mask))


# ---- three paths, one body -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 12])
def test_body_autograd_function_and_registered_operator_agree(
    isa: str, weight: PackedWeight, dtype: torch.dtype, rows: int
) -> None:
    t = inputs(dtype, rows)
    lora = (t["bias"], t["a"].float(), t["b"].float(), SCALING)
    masked = functools.partial(ops.lora_linear, mask=row_masks(rows, R))
    for name, rest, eager in (
        ("linear", (t["bias"], t["side"], t["side_weight"]), ops.linear),
        ("lora_linear", lora, ops.lora_linear),
        ("lora_linear", lora, masked),
    ):
        options = eager.keywords if eager is masked else {}
        body = eager(t["x"], weight, *rest)
        registered = getattr(torch.ops.nybble, name)(t["x"], *weight, *rest, **options)
        assert torch.equal(body, registered if name == "linear" else registered[0])

        def gradients(call: Any, rest: Any = rest) -> list[Tensor]:
            leaves = differentiable(t["x"], *(r for r in rest if isinstance(r, Tensor)))
            result = call(leaves[0], *leaves[1:], *(r for r in rest if not isinstance(r, Tensor)))
            assert torch.equal(result, body)  # noqa: B023  (called at once)
            return list(torch.autograd.grad(result, leaves, t["g"]))

        def operator(x: Tensor, *rest: Any, name: str = name, options: Any = options) -> Tensor:
            result = getattr(torch.ops.nybble, name)(x, *weight, *rest, **options)
            return result if name == "linear" else result[0]

        one = gradients(lambda x, *rest, eager=eager: eager(x, weight, *rest))
        other = gradients(operator)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
    body = ops.grad_input(t["g"], weight, t["side"], t["a"])
    assert torch.equal(body, torch.ops.nybble.grad_input(t["g"], *weight, t["side"], t["a"]))


class Wrapped(Tensor):
    """A tensor subclass, which the eager paths leave to torch's dispatcher."""


def test_a_tensor_subclass_goes_through_the_registered_operator(weight: PackedWeight) -> None:
    t = inputs()
    result = ops.linear(t["x"].as_subclass(Wrapped), weight)
    assert isinstance(result, Wrapped)
    assert torch.equal(result.as_subclass(Tensor), ops.linear(t["x"], weight))
