"""A batch whose rows use different adapters: outputs and gradients are those of each adapter alone on its rows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.layers import CONFIGS, DTYPES, linear, quant_linear
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nybble import LoRALinear, QuantLinear, set_adapter, use_adapter

K, N = 70, 10
BASES = {
    "quantized": quant_linear,
    "int8": lambda **o: quant_linear(CONFIGS["int8"], **o),
    "plain": lambda **o: linear(**o),
}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "alpha": 8.0},
    "two": {"r": 2, "alpha": 5.0, "rslora": True},
    "three": {"r": 7, "alpha": 3.0, "dtype": torch.bfloat16},
}
ROWS = ("two", None, "one", "two", "three")


def layer_of(kind: str, adapters: dict[str, dict[str, Any]] = ADAPTERS, seed: int = 0, **base: Any) -> LoRALinear:
    """A layer with these adapters, all of them trained."""
    layer = LoRALinear(BASES[kind](seed=seed, **base))
    for name, options in adapters.items():
        adapter = layer.add(name, **options)
        with torch.no_grad():
            adapter.lora_B.normal_(std=0.3)
            if adapter.lora_magnitude is not None:
                adapter.lora_magnitude.mul_(torch.rand_like(adapter.lora_magnitude) + 0.5)
    return layer


@contextlib.contextmanager
def strategy(side_by_side: bool | None) -> Iterator[None]:
    """All factors in one masked call, each adapter alone, or as the layer chooses."""
    if side_by_side is None:
        yield
        return
    with mock.patch.object(LoRALinear, "_side_by_side", lambda *_: side_by_side):
        yield


def results(layer: LoRALinear, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and gradients; an adapter that took no part has none."""
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(g)
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def alone(layer: LoRALinear, x: Tensor, g: Tensor, rows: tuple[str | None, ...]) -> dict[str, Tensor]:
    """The same from a run of its own for every adapter."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(rows):
        own = [i for i, row in enumerate(rows) if row == name]
        with use_adapter(layer, name):
            part = results(layer, x[own], g[own])
        for key in ("y", "x"):
            values = part.pop(key)
            found.setdefault(key, values.new_empty(len(rows), *values.shape[1:]))[own] = values
        found |= part
    return found


def weight_of(base: QuantLinear | nn.Linear) -> Tensor:
    return base.dequantize(torch.float32) if isinstance(base, QuantLinear) else base.weight.detach()


def exact(layer: LoRALinear, x: Tensor, g: Tensor, rows: tuple[str | None, ...], magnitudes: bool) -> dict[str, Tensor]:
    """`results` in float64, row by row; of the magnitudes of everything for error bounds."""

    def given(values: Tensor) -> Tensor:
        values = values.detach().double()
        return (values.abs() if magnitudes else values).requires_grad_()

    x, w, bias, g = given(x), given(weight_of(layer.base)), given(layer.base.bias), given(g).detach()
    leaves = {f"adapters.{name}": given(p) for name, p in layer.adapters.named_parameters()}
    parts = []
    for row, name in zip(x, rows, strict=True):
        y = row @ w.t() + bias
        if name is not None:
            a, b = (leaves[f"adapters.{name}.lora_{part}"] for part in "AB")
            y = y + layer.adapters[name].scaling * (row @ a.t()) @ b.t()
        parts.append(y)
    y = torch.stack(parts)
    y.backward(g)
    return {"y": y.detach(), "x": x.grad, **{k: v.grad for k, v in leaves.items() if v.grad is not None}}


@given(
    kind=st.sampled_from(list(BASES)),
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(st.sampled_from((*ADAPTERS, None)), min_size=1, max_size=6).map(tuple),
    inner=st.sampled_from(((), (1,), (3,), (2, 2))),
    side_by_side=st.booleans(),
    seed=st.integers(0, 2**31 - 10),
)
def test_outputs_and_gradients_are_those_of_the_rows_own_adapter(
    kind: str, dtype: torch.dtype, rows: tuple[str | None, ...], inner: tuple[int, ...], side_by_side: bool, seed: int
) -> None:
    layer = layer_of(kind, seed=seed, dtype=dtype)
    torch.manual_seed(seed + 1)
    x, g = torch.randn(len(rows), *inner, K).to(dtype), torch.randn(len(rows), *inner, N).to(dtype)
    set_adapter(layer, rows)
    with strategy(side_by_side):
        actual = results(layer, x, g)
    wanted, sizes = (exact(layer, x, g, rows, magnitudes) for magnitudes in (False, True))
    assert actual.keys() == wanted.keys()  # adapters without a row have no gradient
    # As in kernels/test_ops_gradients.py: no term passes through more than `terms` fp32 additions, and it is rounded to
    # `dtype` (or to bf16, the coarser dtype of a factor or of its gradient) at most 8 times: input, factor, product,
    # scaling, result, sum with the base's result, sum over its uses, and the gradient's own dtype.
    terms = K + N + sum(options["r"] for options in ADAPTERS.values()) + g.numel() // N + 8
    for key, value in actual.items():
        unit = UNIT[torch.bfloat16 if ".three." in key or (key in ("x", "y") and "three" in rows) else dtype]
        bound = ((1 + max(unit, UNIT[dtype])) ** 8 * (1 + 2 * terms * 2.0**-24) - 1) * sizes[key] + 2.0**-24
        assert bool(((value.double() - wanted[key]).abs() <= bound).all()), key


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(BASES))
def test_rows_without_adapter_get_exactly_what_the_base_gives(
    isa: str, kind: str, dtype: torch.dtype, side_by_side: bool
) -> None:
    for bias in (True, False):
        layer = layer_of(kind, dtype=dtype, bias=bias)
        for inner in ((), (7,)):
            x = torch.randn(len(ROWS), *inner, K).to(dtype)
            set_adapter(layer, ROWS)
            with strategy(side_by_side):
                y = layer(x)
            # Alone, they are an input of their own, for which the kernel may be another.
            expected = layer.base(x)[1] if side_by_side else layer.base(x[1:2])[0]
            assert torch.equal(y[1], expected)


def test_alone_every_row_gets_exactly_its_own_run(kind: str = "quantized") -> None:
    layer = layer_of(kind)
    x, g = torch.randn(len(ROWS), 3, K), torch.randn(len(ROWS), 3, N)
    set_adapter(layer, ROWS)
    with strategy(False):
        actual = results(layer, x, g)
    wanted = alone(layer, x, g, ROWS)
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", list(BASES))
def test_the_same_adapter_for_every_row_is_that_adapter_acting(kind: str) -> None:
    layer = layer_of(kind)
    x, g = torch.randn(3, 4, K), torch.randn(3, 4, N)
    for name in (*ADAPTERS, None):
        set_adapter(layer, name)
        wanted = results(layer, x, g)
        set_adapter(layer, [name] * 3)
        actual = results(layer, x, g)
        assert actual.keys() == wanted.keys()
        assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


def test_a_row_whose_adapter_is_elsewhere_in_the_model_gets_the_base() -> None:
    layer = layer_of("quantized")
    model = nn.ModuleDict({"here": layer, "there": LoRALinear.from_base(linear(), r=2, alpha=2.0, name="other")})
    x = torch.randn(3, K)
    set_adapter(model, ["one", "other", None])
    y = layer(x)
    assert torch.equal(y[1:], layer.base(x)[1:])
    assert not torch.equal(y[0], layer.base(x)[0])


DORA = {"one": {"r": 4, "alpha": 8.0, "dora": True}, "two": {"r": 2, "alpha": 5.0}, "three": {"r": 7, "alpha": 3.0}}


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(BASES))
def test_dora_beside_plain_lora(kind: str, bias: bool, side_by_side: bool) -> None:
    layer = layer_of(kind, DORA, bias=bias)
    x, g = torch.randn(len(ROWS), 3, K), torch.randn(len(ROWS), 3, N)
    set_adapter(layer, ROWS)
    with strategy(side_by_side):
        actual = results(layer, x, g)
    wanted = alone(layer, x, g, ROWS)
    assert "adapters.one.lora_magnitude" in wanted
    assert actual.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-4)
    if not bias:
        assert torch.equal(actual["y"][1], layer.base(x)[1] if side_by_side else layer.base(x[1:2])[0])


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BASES))
def test_one_rate_of_dropout_is_that_of_plain_torch_with_the_same_seed(kind: str) -> None:
    layer = layer_of(kind, {name: {"r": 3, "alpha": 6.0, "dropout": 0.4} for name in ADAPTERS}).train()
    x, g = torch.randn(len(ROWS), 3, K), torch.randn(len(ROWS), 3, N)
    set_adapter(layer, ROWS)
    torch.manual_seed(5)
    actual = results(layer, x, g)
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    dropped = functional.dropout(leaf, 0.4)
    updates = []
    for row, name in zip(dropped, ROWS, strict=True):
        adapter = None if name is None else layer.adapters[name]
        updates.append(0 * row[:, :N] if adapter is None else row @ adapter.delta_weight().t())
    expected = functional.linear(leaf, weight_of(layer.base), layer.base.bias) + torch.stack(updates)
    torch.testing.assert_close(actual["y"], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(actual["x"], torch.autograd.grad(expected, leaf, g)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_every_adapter_has_its_own_rate_of_dropout(dora: bool) -> None:
    options = {"r": 4, "alpha": 8.0, "dora": dora}
    layer = layer_of("quantized", {"one": {**options, "dropout": 0.5}, "two": options, "three": options}).train()
    x = torch.randn(len(ROWS), K)
    set_adapter(layer, ROWS)
    draws = torch.stack([layer(x).detach() for _ in range(3)])
    moved = (draws != draws[0]).any(-1).any(0)
    assert moved.tolist() == [name == "one" for name in ROWS]
    mean = torch.stack([layer(x).detach()[2] for _ in range(4000)])
    layer.eval()
    # Five standard deviations of the mean, estimated from the draws.
    spread = 5 * mean.std(0) / 4000**0.5 + 1e-6
    assert bool(((mean.mean(0) - layer(x)[2]).abs() <= spread).all())


# ---- compile, autocast, checkpointing --------------------------------------------------------------------------------


class Model(nn.Module):
    """Mixed adapters over a quantized and a plain layer; `recompute` under activation checkpointing."""

    def __init__(self, adapters: dict[str, dict[str, Any]] = ADAPTERS, recompute: bool | None = None) -> None:
        super().__init__()
        self.first, self.second = layer_of("quantized", adapters), layer_of("plain", adapters, k=N, n=K)
        self.recompute = recompute
        set_adapter(self, ROWS)

    def block(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.recompute is None else checkpoint(self.block, x, use_reentrant=self.recompute)


def layer_results(model: Any, x: Tensor, parameters: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    for p in parameters.parameters():
        p.grad = None
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in parameters.parameters() if p.grad is not None)]


@pytest.mark.parametrize("adapters", [ADAPTERS, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_compiled_as_one_graph(side_by_side: bool, adapters: dict[str, dict[str, Any]]) -> None:
    model = Model(adapters)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(len(ROWS), 3, K)
    with strategy(side_by_side):
        for rows in (ROWS, ROWS[::-1], (None, "one", "one", "one", "two")):
            set_adapter(model, rows)
            expected = layer_results(model, x, model)
            actual = layer_results(compiled, x, model)
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other)
        for name in ("three", None):
            set_adapter(model, name)
            torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


@pytest.mark.parametrize("side_by_side", [True, False])
def test_autocast(side_by_side: bool) -> None:
    model, x = Model(), torch.randn(len(ROWS), 3, K)
    with strategy(side_by_side), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        wanted = torch.stack([part[0] for part in _row_by_row(model, x)])
    assert y.dtype == torch.bfloat16
    # Two layers of about 5 roundings each to 8 bits, on values of this size.
    torch.testing.assert_close(y, wanted, rtol=10 * 2.0**-8, atol=10 * 2.0**-8 * wanted.abs().max().item())
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def _row_by_row(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    for i, name in enumerate(ROWS):
        with use_adapter(model, name):
            yield model(x[i : i + 1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_activation_checkpointing(side_by_side: bool, reentrant: bool) -> None:
    model = Model()
    again = copy.deepcopy(model)
    again.recompute = reentrant
    x = torch.randn(len(ROWS), 3, K)
    with strategy(side_by_side):
        for one, other in zip(layer_results(model, x, model), layer_results(again, x, again), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_must_not_change_between_forward_and_recomputation(reentrant: bool) -> None:
    model = Model(recompute=reentrant)
    x = torch.randn(len(ROWS), K, requires_grad=True)
    set_adapter(model, "one")
    first = model(x).sum()
    set_adapter(model, "two")
    with pytest.raises(RuntimeError, match=r"changed between forward \('one'\) and backward \('two'\)"):
        first.backward()
    # Two forwards with different adapters, one backward.
    set_adapter(model, "one")
    first = model(x).sum()
    set_adapter(model, "two")
    second = model(x).sum()
    with pytest.raises(RuntimeError, match="run backward before set_adapter"):
        (first + second).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_other_forwards_before_and_between_are_no_change(reentrant: bool) -> None:
    model = Model()
    x = torch.randn(len(ROWS), K, requires_grad=True)
    for rows in (ROWS, ROWS[::-1], ["one"] * 5, "two", None):  # without checkpointing, with and without a backward
        set_adapter(model, rows)
        model(x).sum().backward()
        model(x)
    model.recompute = reentrant
    for name in ("one", "two", "one"):
        set_adapter(model, name)
        losses = [model(x).sum() for _ in range(2)]
        with torch.no_grad(), use_adapter(model.eval(), None):
            model(x)
        model.train()
        sum(losses).backward()


def test_constants_made_without_gradient_serve_training() -> None:
    layer, x = layer_of("quantized"), torch.randn(len(ROWS), K)
    set_adapter(layer, ROWS)
    with torch.inference_mode():
        layer(x)
    with strategy(True):
        layer(x).sum().backward()
    assert layer.adapters["one"].lora_A.grad is not None


# ---- the choice, and what is refused ---------------------------------------------------------------------------------


def test_few_ranks_go_side_by_side_and_many_alone() -> None:
    def chosen(adapters: int, r: int, tokens: int, size: int = 4096, **options: Any) -> bool:
        layer = LoRALinear(nn.Linear(size, size, device="meta"))
        for i in range(adapters):
            layer.add(f"a{i}", r, 1.0, **options)
        x = torch.empty(adapters, tokens, size, device="meta")
        return layer._side_by_side(x, {f"a{i}": [i] for i in range(adapters)})

    assert chosen(4, 16, 256) and chosen(16, 16, 64) and chosen(32, 16, 1) and chosen(8, 64, 1)
    assert not chosen(8, 64, 128) and not chosen(4, 128, 1024)
    assert chosen(4, 16, 256, size=1024) and not chosen(8, 64, 128, size=1024)
    assert chosen(4, 16, 256, dropout=0.1)
    assert not chosen(4, 16, 256, dropout=0.1, dora=True)


@pytest.mark.parametrize("shape", [(4, K), (6, 5, K), (K,)], ids=str)
def test_a_batch_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    layer = layer_of("quantized")
    set_adapter(layer, ROWS)
    with pytest.raises(ValueError, match=r"LoRALinear: its input has shape .* adapters were chosen for 5 rows"):
        layer(torch.randn(shape))
