"""The operators: one body behind three paths, gradients, torch.library, compile, autocast, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from kernels.problems import DTYPES, UNIT, Problem, decoded, make, quantized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble import LoRALinear, QuantConfig, QuantLinear, ops
from nybble.backends import PackedWeight
from nybble.errors import LayoutError, UnsupportedDtypeError

N, K, M, R = 6, 10, 4, 3
SCALING = 2.0
WEIGHTS = {
    "nested": QuantConfig(),
    "plain": QuantConfig(double_quant=False, block_size=32),
    "int8": QuantConfig(format="int8", double_quant=False),
}


@pytest.fixture(params=list(WEIGHTS))
def weight(request: pytest.FixtureRequest) -> PackedWeight:
    return quantized(N, K, WEIGHTS[request.param]).packed_weight()


def inputs(dtype: torch.dtype = torch.float32, rows: int = M) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {
        "x": (rows, K),
        "g": (rows, N),
        "bias": (N,),
        "side": (rows, R),
        "side_weight": (N, R),
        "a": (R, K),
        "b": (N, R),
    }
    return {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}


def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


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


def row_masks(*shape: int) -> Tensor:
    """Scalings by row and column, some of them 0; of the first row all."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2
    mask[mask < 0.7] = 0.0
    mask[0] = 0.0
    return mask


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


# ---- gradients -------------------------------------------------------------------------------------------------------


def assert_close(actual: Tensor, exact: Tensor, size: Tensor, terms: int, dtype: torch.dtype, roundings: int) -> None:
    """`actual` is within the error bound of chained products with `terms` terms in all, summed in fp32.

    On its way through, a term is rounded to `dtype` at most `roundings` times (factors that are cast, intermediate and
    final results): a factor (1 + u) each; the fp32 sums add gamma_terms, which 2 terms 2^-24 is above. `size` is the
    same expression of the magnitudes of all inputs.
    """
    bound = ((1 + UNIT[dtype]) ** roundings * (1 + 2 * terms * 2.0**-24) - 1) * size
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= bound).all()), (actual.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", list(WEIGHTS))
def test_gradients_of_linear_are_those_of_the_dequantized_weight(isa: str, config: str, dtype: torch.dtype) -> None:
    weight = quantized(N, K, WEIGHTS[config])
    w = decoded(weight).double()
    t = inputs(dtype, rows=12)
    names = ("x", "bias", "side", "side_weight")
    leaves = differentiable(*(t[name] for name in names))
    y = ops.linear(leaves[0], weight.packed_weight(), *leaves[1:])
    actual = torch.autograd.grad(y, leaves, t["g"])

    def reference(values: list[Tensor], by: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x, bias, side, side_weight = differentiable(*values)
        out = x @ by.t() + side @ side_weight.t() + bias
        return torch.autograd.grad(out, (x, bias, side, side_weight), g)

    double = [t[name].double() for name in names]
    exact = reference(double, w, t["g"].double())
    sizes = reference([v.abs() for v in double], w.abs(), t["g"].double().abs())
    for one, other, size in zip(actual, exact, sizes, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, size, terms=N + K + 12, dtype=dtype, roundings=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", list(WEIGHTS))
def test_gradients_of_lora_linear(isa: str, config: str, factors: torch.dtype, dtype: torch.dtype) -> None:
    weight = quantized(N, K, WEIGHTS[config])
    w = decoded(weight).double()
    t = inputs(dtype, rows=12)
    t["a"], t["b"] = t["a"].to(factors), t["b"].to(factors)
    names = ("x", "bias", "a", "b")
    leaves = differentiable(*(t[name] for name in names))
    y = ops.lora_linear(leaves[0], weight.packed_weight(), *leaves[1:], SCALING)
    actual = torch.autograd.grad(y, leaves, t["g"])

    def reference(values: list[Tensor], by: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x, bias, a, b = differentiable(*values)
        out = x @ by.t() + SCALING * (x @ a.t()) @ b.t() + bias
        return torch.autograd.grad(out, (x, bias, a, b), g)

    double = [t[name].double() for name in names]
    exact = reference(double, w, t["g"].double())
    sizes = reference([v.abs() for v in double], w.abs(), t["g"].double().abs())
    coarse = max((dtype, factors), key=UNIT.__getitem__)
    for leaf, one, other, size in zip(leaves, actual, exact, sizes, strict=True):
        assert one.dtype == leaf.dtype
        assert_close(one, other, size, terms=N + K + R + 12, dtype=coarse, roundings=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", list(WEIGHTS))
@pytest.mark.parametrize("shape", [(12,), (12, 2), (2, 3, 5)], ids=str)
def test_a_mask_multiplies_the_side_path(isa: str, config: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = quantized(N, K, WEIGHTS[config])
    w = decoded(weight).double()
    t = inputs(torch.float32)
    x, g, mask = torch.randn(*shape, K).to(dtype), torch.randn(*shape, N).to(dtype), row_masks(shape[0], R)
    leaves = differentiable(x, t["bias"].to(dtype), t["a"], t["b"])
    y = ops.lora_linear(leaves[0], weight.packed_weight(), *leaves[1:], SCALING, mask)
    actual = [y, *torch.autograd.grad(y, leaves, g)]

    def reference(values: list[Tensor], by: Tensor, g: Tensor) -> list[Tensor]:
        x, bias, a, b = differentiable(*values)
        scale = SCALING * mask.double().reshape(shape[0], *(1,) * (len(shape) - 1), R)
        out = x @ by.t() + (x @ a.t() * scale) @ b.t() + bias
        return [out, *torch.autograd.grad(out, (x, bias, a, b), g)]

    double = [leaf.detach().double() for leaf in leaves]
    exact = reference(double, w, g.double())
    sizes = reference([v.abs() for v in double], w.abs(), g.double().abs())
    for one, other, size in zip(actual, exact, sizes, strict=True):
        assert_close(one, other, size, terms=N + K + R + 12, dtype=dtype, roundings=6)
    base = ops.linear(x, weight.packed_weight(), leaves[1].detach())
    assert torch.equal(y[0], base[0])  # a row whose mask is 0, bit for bit
    assert not torch.equal(y[1], base[1])


@pytest.mark.parametrize("registered", [False, True], ids=["function", "operator"])
def test_only_what_is_needed_gets_a_gradient(weight: PackedWeight, registered: bool) -> None:
    t = inputs()
    for needed in itertools.product((False, True), repeat=4):
        for name, keys in (
            ("linear", ("x", "bias", "side", "side_weight")),
            ("lora_linear", ("x", "bias", "a", "b")),
        ):
            full = differentiable(*(t[key] for key in keys))
            some = [t[key].clone().requires_grad_(need) for key, need in zip(keys, needed, strict=True)]
            tail = (SCALING,) if name == "lora_linear" else ()
            if registered:
                result = getattr(torch.ops.nybble, name)(some[0], *weight, *some[1:], *tail)
                result = result[0] if name == "lora_linear" else result
            else:
                result = getattr(ops, name)(some[0], weight, *some[1:], *tail)
            assert result.requires_grad == any(needed)
            if not any(needed):
                continue
            result.backward(t["g"])
            reference = torch.autograd.grad(getattr(ops, name)(full[0], weight, *full[1:], *tail), full, t["g"])
            for leaf, need, want in zip(some, needed, reference, strict=True):
                assert (leaf.grad is not None) == need
                assert leaf.grad is None or torch.equal(leaf.grad, want)


def test_the_gradient_of_grad_input_is_the_forward(weight: PackedWeight) -> None:
    t = inputs()
    g, side, side_weight = differentiable(t["g"], t["side"], t["a"])
    dx = torch.ops.nybble.grad_input(g, *weight, side, side_weight)
    gg = torch.randn(M, K)
    to_g, to_side, to_side_weight = torch.autograd.grad(dx, (g, side, side_weight), gg)
    assert torch.equal(to_g, ops.linear(gg, weight))
    torch.testing.assert_close(to_side, gg @ t["a"].t())
    torch.testing.assert_close(to_side_weight, t["side"].t() @ gg)


def test_double_backward_through_the_registered_operator(weight: PackedWeight) -> None:
    t = inputs()
    (x,) = differentiable(t["x"])
    (g,) = differentiable(t["g"])
    y = torch.ops.nybble.linear(x, *weight, None, None, None)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (back,) = torch.autograd.grad(dx.square().sum(), g)
    torch.testing.assert_close(back, ops.linear(2 * dx.detach(), weight))


def test_a_broadcast_gradient_is_taken_as_it_is(weight: PackedWeight) -> None:
    # sum over the batch, then a product: the gradient that arrives has stride 0 over the rows.
    t = inputs()
    (x,) = differentiable(t["x"])
    (ops.linear(x, weight).sum(0) * t["bias"]).sum().backward()
    assert torch.equal(x.grad, ops.grad_input(t["bias"].repeat(M, 1), weight))


# ---- compile, export, autocast, checkpointing, functorch -------------------------------------------------------------


class Model(nn.Module):
    """LoRA over a quantized layer with a bias, a nonlinearity, LoRA over int8, a quantized layer alone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = QuantLinear.from_linear(nn.Linear(K, 2 * K), WEIGHTS["nested"])
        second = QuantLinear.from_linear(nn.Linear(2 * K, K, bias=False), WEIGHTS["int8"])
        self.up = LoRALinear.from_base(first, 4, 8.0, dropout)
        self.down = LoRALinear.from_base(second, 2, 4.0, rslora=True)
        self.out = QuantLinear.from_linear(nn.Linear(K, N), WEIGHTS["plain"])
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.lora_B.normal_(std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(torch.relu(self.up(x))))


def results(model: Any, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_forward_and_backward_equal_eager(dynamic: bool) -> None:
    # The "aot_eager" backend traces forward and backward in full, without a C++ compiler and its minute.
    model = Model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 12):
        x = torch.randn(2, rows, K)
        for a, b in zip(results(model, x, trained(model)), results(compiled, x, trained(model)), strict=True):
            assert torch.equal(a, b)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself when inductor is imported
def test_compiled_by_inductor_equals_eager() -> None:
    model = Model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(12, K)
    for a, b in zip(results(model, x, trained(model)), results(compiled, x, trained(model)), strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_exported_model_equals_eager() -> None:
    model = nn.Sequential(Model().out, nn.ReLU())
    x = torch.randn(M, K)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert any("nybble.linear" in str(node.target) for node in program.graph.nodes)
    for rows in (M, 11):
        x = torch.randn(rows, K)
        assert torch.equal(program.module()(x), model(x))


def test_autocast_computes_in_its_dtype() -> None:
    model, x = Model(), torch.randn(12, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert ops.linear(x.requires_grad_(), model.out.packed_weight()).dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained(model))
    weight = model.out.packed_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.linear(x, weight)
    assert torch.equal(cast, ops.linear(x.bfloat16(), weight))


def test_autocast_gives_the_same_as_casting_by_hand_under_compile() -> None:
    model, x = Model(), torch.randn(12, K)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), compiled(x))
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool, dropout: float) -> None:
    model, x = Model(dropout), torch.randn(12, K)
    torch.manual_seed(5)
    plain = results(model, x, trained(model))
    torch.manual_seed(5)
    again = x.clone().requires_grad_()
    y = checkpoint(model, again, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(y, plain[0])
    for gradient, leaf in zip(plain[1:], [again, *trained(model)], strict=True):
        assert torch.equal(gradient, leaf.grad)


def test_functional_call_takes_other_parameters() -> None:
    model, x = Model(), torch.randn(M, K)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(other):
            p.mul_(2.0)
    changed = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert torch.equal(torch.func.functional_call(model, changed, (x,)), other(x))
    assert not torch.equal(model(x), other(x))


def test_inference_mode_and_no_grad() -> None:
    model, x = Model(), torch.randn(M, K)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


# ---- what is refused -------------------------------------------------------------------------------------------------

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
