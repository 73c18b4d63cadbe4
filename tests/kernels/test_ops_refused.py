"""What the operators refuse, eager and registered, and how they name it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.ops_inputs import SCALING, WEIGHTS, K, M, N, R
from kernels.problems import Problem, make, quantized
from torch import Tensor

from nybble import ops
from nybble.backends import PackedWeight
from nybble.errors import LayoutError, UnsupportedDtypeError

GOOD = make(N, K, M, rank=R, bias=torch.float32)


def refused(error: type[Exception], match: str, **changes: Any) -> None:
    """Forward, eager and registered, must refuse GOOD with these changes."""
    weight = GOOD.packed._replace(**{k: v for k, v in changes.items() if k in PackedWeight._fields})
    values = {"x": GOOD.x, "bias": GOOD.bias, "side": GOOD.side, "side_weight": GOOD.side_weight}
    values.update({k: v for k, v in changes.items() if k in values})
    rest = (values["bias"], values["side"], values["side_weight"])
    with pytest.raises(error, match=match):
        ops.linear(values["x"], weight, *rest)
    with pytest.raises(error, match=match):
        torch.ops.nybble.linear(values["x"], *weight, *rest)


def test_the_good_problem_is_good() -> None:
    assert GOOD.run().shape == (M, N)


def test_wrong_shapes_are_named() -> None:
    refused(LayoutError, r"x has shape \[4, 11\].*in_features = 10", x=torch.randn(M, K + 1))
    refused(LayoutError, r"x has shape \[\]", x=torch.tensor(1.0))
    refused(LayoutError, r"bias has shape \[7\].*\[6\]", bias=torch.randn(N + 1))
    refused(LayoutError, r"bias has shape \[6, 1\]", bias=torch.randn(N, 1))
    refused(LayoutError, r"side has shape \[5, 3\].*\[4, 3\]", side=torch.randn(M + 1, R))
    refused(LayoutError, r"side_weight has shape \[3, 6\].*\[6, 3\]", side_weight=torch.randn(R, N))
    refused(LayoutError, r"side_weight has shape \[6, 4\].*\[6, 3\]", side_weight=torch.randn(N, R + 1))
    refused(LayoutError, r"side has shape \[\]", side=torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool], ids=str)
def test_wrong_dtypes_are_named(dtype: torch.dtype) -> None:
    for name in ("x", "bias", "side", "side_weight"):
        good = getattr(GOOD, name)
        refused(
            UnsupportedDtypeError, rf"^{name} has dtype {dtype}.*float32, float16, bfloat16", **{name: good.to(dtype)}
        )


def test_half_a_side_path_is_refused() -> None:
    refused(LayoutError, "side and side_weight go together", side=None)
    refused(LayoutError, "side and side_weight go together", side_weight=None)


def test_wrong_tensors_of_the_weight_are_named() -> None:
    weight = GOOD.packed
    refused(LayoutError, "packed has 29 elements.* 30", packed=weight.packed[:-1])
    refused(LayoutError, "absmax has 2 elements.* 1", absmax=torch.zeros(2, dtype=torch.uint8))
    refused(LayoutError, "packed is not contiguous", packed=torch.zeros(60, 1, dtype=torch.uint8)[::2])
    refused(LayoutError, "codebook has 15 elements", codebook=torch.zeros(15))
    refused(LayoutError, "nested_map has 255 elements", nested_map=torch.zeros(255))
    refused(LayoutError, "nested_absmax has 2 elements", nested_absmax=torch.zeros(2))
    refused(LayoutError, "nested_offset is None", nested_offset=None)
    refused(UnsupportedDtypeError, "packed has dtype torch.int8", packed=weight.packed.to(torch.int8))
    refused(UnsupportedDtypeError, "absmax has dtype torch.float32", absmax=torch.zeros(1))
    refused(UnsupportedDtypeError, "codebook has dtype torch.float16", codebook=weight.codebook.half())
    refused(LayoutError, "packed has 30 elements.* 33", in_features=K + 1, x=torch.randn(M, K + 1))


def test_wrong_tensors_of_an_int8_weight_are_named() -> None:
    weight = quantized(N, K, WEIGHTS["int8"]).packed_weight()
    x = torch.randn(M, K)
    with pytest.raises(LayoutError, match="absmax has 5 elements"):
        ops.linear(x, weight._replace(absmax=weight.absmax[:-1]))
    with pytest.raises(UnsupportedDtypeError, match=r"packed has dtype torch\.uint8"):
        ops.linear(x, weight._replace(packed=weight.packed.view(torch.uint8)))


def test_tensors_of_different_devices_are_named() -> None:
    weight = GOOD.packed
    refused(LayoutError, "packed is on cpu, but the input is on meta", x=GOOD.x.to("meta"))
    refused(LayoutError, "absmax is on meta, but packed is on cpu", absmax=weight.absmax.to("meta"))
    refused(LayoutError, "codebook is on meta", codebook=weight.codebook.to("meta"))
    for name in ("bias", "side", "side_weight"):
        refused(LayoutError, f"{name} is on meta, but the input is on cpu", **{name: getattr(GOOD, name).to("meta")})


def test_grad_input_names_its_own_arguments() -> None:
    weight = GOOD.packed
    with pytest.raises(LayoutError, match=r"grad has shape \[4, 10\].*out_features = 6"):
        ops.grad_input(GOOD.x, weight)
    with pytest.raises(UnsupportedDtypeError, match=r"grad has dtype torch\.float64"):
        ops.grad_input(torch.randn(M, N).double(), weight)
    with pytest.raises(LayoutError, match=r"side_weight has shape \[6, 3\].*\[3, 10\]"):
        ops.grad_input(torch.randn(M, N), weight, GOOD.side, GOOD.side_weight)


def test_lora_factors_are_named() -> None:
    weight, x = GOOD.packed, GOOD.x
    a, b = torch.randn(R, K), torch.randn(N, R)
    for call in (ops.lora_linear, lambda x, w, *rest: torch.ops.nybble.lora_linear(x, *w, *rest)):
        with pytest.raises(LayoutError, match=r"lora_A has shape \[3, 11\].*\[3, 10\]"):
            call(x, weight, None, torch.randn(R, K + 1), b, SCALING)
        with pytest.raises(LayoutError, match=r"lora_B has shape \[6, 4\].*\[6, 3\]"):
            call(x, weight, None, a, torch.randn(N, R + 1), SCALING)
        with pytest.raises(LayoutError, match="lora_A"):
            call(x, weight, None, torch.randn(K), b, SCALING)
        with pytest.raises(UnsupportedDtypeError, match=r"lora_A has dtype torch\.float64"):
            call(x, weight, None, a.double(), b, SCALING)
        with pytest.raises(UnsupportedDtypeError, match=r"x has dtype torch\.int64"):
            call(x.long(), weight, None, a, b, SCALING)
        with pytest.raises(LayoutError, match=r"x has shape \[4, 11\]"):
            call(torch.randn(M, K + 1), weight, None, a, b, SCALING)
        with pytest.raises(LayoutError, match="lora_A is on meta"):
            call(x, weight, None, a.to("meta"), b, SCALING)
        with pytest.raises(LayoutError, match=r"mask has shape \[4, 4\]; it must be \[4, 3\]"):
            call(x, weight, None, a, b, SCALING, torch.ones(M, R + 1))
        with pytest.raises(LayoutError, match=r"mask has shape \[8, 3\]; it must be \[4, 3\]"):
            call(x.reshape(4, 1, K).expand(4, 2, K), weight, None, a, b, SCALING, torch.ones(8, R))
        with pytest.raises(UnsupportedDtypeError, match=r"mask has dtype torch\.bool"):
            call(x, weight, None, a, b, SCALING, torch.ones(M, R, dtype=torch.bool))
        with pytest.raises(LayoutError, match=r"x has shape \[10\]; with a mask it needs a first dimension of rows"):
            call(x[0], weight, None, a, b, SCALING, torch.ones(M, R))


def test_meta_tensors_give_meta_results_of_the_right_shape() -> None:
    weight = PackedWeight(*(t.to("meta") if isinstance(t, Tensor) else t for t in GOOD.packed))
    x = torch.empty(2, M, K, device="meta", dtype=torch.bfloat16)
    y = torch.ops.nybble.linear(x, *weight, None, None, None)
    assert y.is_meta
    assert (y.shape, y.dtype) == ((2, M, N), torch.bfloat16)


def test_a_problem_prints_its_shapes() -> None:
    assert repr(Problem(GOOD.x, GOOD.weight)).startswith("linear(QuantTensor(nf4")
