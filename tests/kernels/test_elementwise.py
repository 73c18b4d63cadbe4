"""RMSNorm, gated activations, the rotary embedding: within derived bounds of float64, under every ISA.

u = 2^-24 and gamma_n = n u / (1 - n u) as in `problems.expected`; a result is then rounded to its dtype. An operation
whose result is denormal is off by 2^-150 besides.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, TINY, UNIT, laid_out, values
from torch import Tensor

from nybble import _core
from nybble.errors import LayoutError
from nybble.nn import fused

U = 2.0**-24
_dtypes = st.sampled_from(DTYPES)
_layouts = st.sampled_from(("contiguous", "transposed", "row_stride", "column_stride", "unaligned", "expanded"))
_columns = st.one_of(st.sampled_from((1, 2, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 128, 576, 1000)), st.integers(1, 200))
_seeds = st.integers(0, 2**31 - 10)


def gamma(n: float) -> float:
    return n * U / (1 - n * U)


def assert_close(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Within `bound` and the rounding to actual's dtype; infinite only where that may be."""
    dtype = actual.dtype
    if dtype != torch.float32:
        bound = bound + UNIT[dtype] * (exact.abs() + bound) + TINY[dtype]
    assert actual.shape == exact.shape
    off = (actual.double() - exact).abs()
    overflows = actual.isinf() & (actual.sign() * exact + bound >= torch.finfo(dtype).max)
    wrong = ~((off <= bound) | overflows)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"at {at}: {actual[at].item()}, expected {exact[at].item()} within {bound[at].item()}")


def leaf(x: Tensor) -> Tensor:
    """The same numbers and strides as a leaf that gradients go to."""
    return x.detach().requires_grad_()


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    columns=_columns,
    dtype=_dtypes,
    weight_dtype=_dtypes,
    layout=_layouts,
    kind=st.sampled_from(("normal", "small", "magnitudes")),
    eps=st.sampled_from((1e-5, 1e-6, 1.0)),
    offset=st.sampled_from((0.0, 1.0)),
    seed=_seeds,
)
def test_rms_norm_and_its_gradients(isa, rows, columns, dtype, weight_dtype, layout, kind, eps, offset, seed) -> None:
    """The mean of squares has relative error gamma_(n + 2), so rstd has half of that and 3 u; products follow."""
    x = leaf(
        laid_out(rows, columns, layout, kind, dtype, seed)
        if kind != "magnitudes"
        else _wide(rows, columns, dtype, seed)
    )
    weight = leaf(values("normal", columns, dtype=weight_dtype, seed=seed + 1))
    y = fused.rms_norm(x, weight, eps, offset)
    assert y.dtype == torch.promote_types(dtype, weight_dtype) and y.is_contiguous()
    g = values("normal", rows, columns, dtype=y.dtype, seed=seed + 2)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), g)
    assert grad_x.dtype == dtype and grad_weight.dtype == weight_dtype

    xd, wd = leaf(x.double()), leaf(weight.double())
    exact = fused.plain_rms_norm(xd, wd, eps, offset)
    exact_x, exact_weight = torch.autograd.grad(exact, (xd, wd), g.double())
    with torch.no_grad():
        rstd = torch.rsqrt(xd.pow(2).mean(-1, keepdim=True) + eps)
        h, v = xd * rstd, g.double() * (wd + offset)
        tiny = 2.0**-149 * (1 + rstd) * (1 + wd.abs() + v.abs()) * (1 + h.abs()) * 8
        assert_close(y, exact.detach(), gamma(columns / 2 + 8) * exact.abs() + tiny)
        size = rstd * (v.abs() + h.abs() * (v * h).abs().mean(-1, keepdim=True))
        assert_close(grad_x, exact_x, gamma(3 * columns + 24) * size + tiny)
        size = (g.double() * h).abs().sum(0)
        assert_close(grad_weight, exact_weight, gamma(rows + columns / 2 + 8) * size + rows * 2.0**-149)


def _wide(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return values("magnitudes", rows, columns, dtype=dtype, seed=seed, low=-4, high=4)


def test_a_row_of_zeros_has_no_gradient_but_its_scaled_one(isa) -> None:
    x = torch.zeros(2, 33, requires_grad=True)
    y = fused.rms_norm(x, torch.ones(33), 1e-4)
    y.backward(torch.full((2, 33), 3.0))
    assert torch.equal(y, torch.zeros(2, 33))
    torch.testing.assert_close(x.grad, torch.full((2, 33), 300.0))


def test_what_is_not_finite_stays_in_its_row(isa) -> None:
    """As in torch: a NaN makes its row NaN, an infinity makes it 0 but for its own element, which is NaN."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    x[0, 7], x[1, 39] = math.nan, math.inf
    y = fused.rms_norm(x, torch.ones(40), 1e-6)
    assert torch.equal(y.isnan(), fused.plain_rms_norm(x, torch.ones(40), 1e-6).isnan())
    assert y[0].isnan().all() and y[1, 39].isnan() and torch.equal(y[1, :39], 0.0 * x[1, :39])
    assert y[2].isfinite().all()


# ---- gated activations -----------------------------------------------------------------------------------------------


def activation_terms(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """argument(z) and z argument'(z) of z sigmoid(argument(z)), in float64."""
    if activation == "silu":
        return z, z
    scale = 2 * math.sqrt(2 / math.pi)
    return scale * (z + 0.044715 * z**3), scale * (z + 3 * 0.044715 * z**3)


@given(
    rows=st.integers(1, 20),
    columns=_columns,
    dtype=_dtypes,
    layouts=st.tuples(_layouts, _layouts),
    kind=st.sampled_from(("normal", "small", "magnitudes")),
    activation=st.sampled_from(fused.ACTIVATIONS),
    seed=_seeds,
)
def test_gated_and_its_gradients(isa, rows, columns, dtype, layouts, kind, activation, seed) -> None:
    """E = e^-argument has relative error 4 u; an argument that is computed has 6 u, which moves E by 6 |argument| u.

    So s = 1 / (1 + E) has relative error e_s = (4 + (1 - s) (4 + 6 |argument|)) u. Of the slope s (1 + m (1 - s)),
    m = z argument'(z), 1 - s is off by s e_s + u; and where E < u, s is 1 and 1 - s is 0. E that overflows makes 0 of
    what is at most 2^-118.
    """
    gate = leaf(laid_out(rows, columns, layouts[0], "normal", dtype, seed))
    if kind == "magnitudes":
        gate = leaf(values("magnitudes", rows, columns, dtype=dtype, seed=seed, low=-6, high=3))
    up = leaf(laid_out(rows, columns, layouts[1], "normal", dtype, seed + 1))
    if kind == "small":
        gate = leaf(gate.detach() * 1e-3)
    y = fused.gated(gate, up, activation)
    assert y.dtype == dtype and y.is_contiguous()
    g = values("normal", rows, columns, dtype=dtype, seed=seed + 2)
    grad_gate, grad_up = torch.autograd.grad(y, (gate, up), g)
    assert grad_gate.dtype == grad_up.dtype == dtype

    z, b, gd = gate.detach().double(), up.detach().double(), g.double()
    argument, m = activation_terms(z, activation)
    s, rest = torch.sigmoid(argument), torch.sigmoid(-argument)
    act, slope = z * s, s * (1 + m * rest)
    error = (4 + rest * (4 + (6 * argument.abs() if activation != "silu" else 0))) * U
    assert_close(y, act * b, (error + 4 * U) * (act * b).abs() + 2.0**-118 * b.abs() + 2.0**-149)
    off = torch.where(argument > 17, rest, s * (s * error + U)) * m.abs()
    bound = s * (1 + m.abs() * rest) * (error + 6 * U) + off + 2.0**-118
    size = (gd * b).abs()
    assert_close(grad_gate, gd * b * slope, bound * size * (1 + 4 * U) + 4 * U * size * slope.abs() + 2.0**-147)
    assert_close(grad_up, gd * act, (error + 6 * U) * (gd * act).abs() + 2.0**-118 * gd.abs() + 2.0**-149)


def test_the_specification_of_gated_is_torch_s(isa) -> None:
    z, up = torch.randn(2, 5, 20, dtype=torch.float64)
    for activation, act in (("silu", torch.nn.SiLU()), ("gelu_tanh", torch.nn.GELU(approximate="tanh"))):
        torch.testing.assert_close(fused.plain_gated(z, up, activation), act(z) * up)


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_extreme_gates(isa, activation) -> None:
    """As in torch, -infinity times 0 is NaN; derivatives are those of the limits."""
    gate = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0, -0.0, 100.0, -100.0, 1e-40] * 4)
    gate.requires_grad_()
    up = torch.ones(40, requires_grad=True)
    y = fused.gated(gate, up, activation)
    y.sum().backward()
    expected = torch.tensor([math.inf, math.nan, math.nan, 3e38, 0.0, 0.0, 0.0, 100.0, 0.0, 5e-41] * 4)
    torch.testing.assert_close(y.detach(), expected, equal_nan=True, rtol=1e-6, atol=2.0**-118)
    torch.testing.assert_close(up.grad, expected, equal_nan=True, rtol=1e-6, atol=2.0**-118)
    slopes = torch.tensor([1.0, 0.0, math.nan, 1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 0.5] * 4)
    torch.testing.assert_close(gate.grad, slopes, equal_nan=True, rtol=1e-6, atol=2.0**-118)


# ---- the rotary embedding --------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    length=st.integers(1, 9),
    half=st.one_of(st.sampled_from((1, 4, 8, 16, 32, 33, 64)), st.integers(1, 40)),
    shared=st.booleans(),
    dtypes=st.sampled_from(
        [(a, b) for a in DTYPES for b in DTYPES if a == b or torch.float32 in (a, b)]
        + [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]
    ),
    transposed=st.booleans(),
    seed=_seeds,
)
def test_rotary_and_its_gradient(isa, batch, heads, length, half, shared, dtypes, transposed, seed) -> None:
    """Two products and a sum; the two halves of cos and of sin are different here."""
    dtype, table = dtypes
    inputs = []
    for i, n in enumerate(heads):
        x = values("normal", batch, length, n, 2 * half, dtype=dtype, seed=seed + i)
        inputs.append(leaf(x.transpose(1, 2) if transposed else x.transpose(1, 2).contiguous()))
    shape = (1 if shared else batch, length, 2 * half)
    cos, sin = (values("normal", *shape, dtype=table, seed=seed + 2 + i) for i in range(2))
    rotated = fused.rotary(*inputs, cos, sin)
    doubles = [leaf(x.double()) for x in inputs]
    exact = fused.plain_rotary(*doubles, cos.double(), sin.double())
    c, s = cos.double().unsqueeze(1).abs(), sin.double().unsqueeze(1).abs()
    for x, y, xd, yd in zip(inputs, rotated, doubles, exact, strict=True):
        assert y.dtype == torch.promote_types(dtype, table) and y.stride() == x.stride()
        a = x.detach().double().abs()
        assert_close(y, yd.detach(), gamma(3) * (a * c + a.roll(half, -1) * s) + 2.0**-148)
        g = values("normal", *y.shape, dtype=y.dtype, seed=seed + 4)
        (grad,) = torch.autograd.grad(y, x, g)
        (exact_grad,) = torch.autograd.grad(yd, xd, g.double())
        a = g.double().abs()
        assert grad.dtype == dtype
        assert_close(grad, exact_grad, gamma(3) * (a * c + (a * s).roll(half, -1)) + 2.0**-148)


def test_the_specification_of_rotary_is_rotate_half() -> None:
    """Two numbers of position t at angle t are turned by that angle."""
    angle = torch.arange(4.0)
    cos, sin = (f(torch.stack([angle, angle], -1)).unsqueeze(0) for f in (torch.cos, torch.sin))
    x = torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2)
    y, _ = fused.plain_rotary(x, x, cos, sin)
    torch.testing.assert_close(y[0, 0], torch.stack([angle.cos(), angle.sin()], -1))


# ---- what all of them promise ----------------------------------------------------------------------------------------


def _everything(dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients on sizes of several tasks, of rows and of columns."""
    found: list[Tensor] = []
    for rows, columns in ((3000, 40), (5, 20011)):
        x, up = (leaf(values("normal", rows, columns, dtype=dtype, seed=i)) for i in range(2))
        weight = leaf(values("normal", columns, dtype=torch.float32, seed=2))
        for y in (fused.rms_norm(x, weight, 1e-6), fused.gated(x, up), fused.gated(x.t(), up.t(), "gelu_tanh")):
            found += [y.detach(), *torch.autograd.grad(y, (x, weight, up), torch.cos(y.detach()), allow_unused=True)]
    x = leaf(values("normal", 2, 300, 6, 64, dtype=dtype, seed=3))
    y, _ = fused.rotary(x.transpose(1, 2), x.transpose(1, 2), *torch.randn(2, 1, 300, 64).to(dtype))
    return [t for t in (*found, y.detach(), *torch.autograd.grad(y.pow(2).sum(), x)) if t is not None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(isa, threads, dtype) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        results.append(_everything(dtype))
    for other in results[1:]:
        assert len(other) == len(results[0]) and all(map(torch.equal, results[0], other))


def _saved(run) -> list[Tensor]:
    """What autograd keeps for the backward pass of run()."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def test_only_the_inputs_are_saved() -> None:
    x, up = (torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
    kept = _saved(lambda: fused.rms_norm(x, weight, 1e-6))
    assert [(t.dtype, t.numel()) for t in kept] == [(x.dtype, 256), (x.dtype, 32), (torch.float32, 8)]
    assert {t.data_ptr() for t in kept[:2]} == {x.data_ptr(), weight.data_ptr()}
    assert [t.data_ptr() for t in _saved(lambda: fused.gated(x, up))] == [x.data_ptr(), up.data_ptr()]
    q, (cos, sin) = x.view(1, 2, 4, 32), torch.randn(2, 1, 4, 32)
    kept = _saved(lambda: fused.rotary(q, q, cos, sin))
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_the_gradient_of_a_frozen_weight_is_not_computed(monkeypatch) -> None:
    asked = []
    kernel = _core.rms_norm_backward
    monkeypatch.setattr(_core, "rms_norm_backward", lambda *args: (asked.append(args[-2]), kernel(*args))[1])
    x = torch.randn(4, 8, requires_grad=True)
    fused.rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert asked == [0]


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    q = x.view(1, 1, 4, 8)
    for y in (
        fused.rms_norm(x, torch.ones(8), 1e-6),
        fused.gated(x, x),
        fused.rotary(q, q, *torch.ones(2, 1, 4, 8))[0],
    ):
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
def test_who_watches_operators_sees_plain_torch() -> None:
    x, up, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)

    def loss(x: Tensor) -> Tensor:
        return (fused.rms_norm(x, weight, 1e-6) * fused.gated(x, up)).sum()

    eager = x.clone().requires_grad_()
    loss(eager).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), eager.grad)
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, eager.grad.sum())
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(x), loss(x))
    assert fused.rms_norm(x.to("meta"), weight.to("meta"), 1e-6).is_meta


def test_other_dtypes_and_empty_tensors_take_the_plain_formula() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    assert fused.rms_norm(x, x[0], 1e-6).dtype == torch.float64
    assert fused.gated(x, x.bfloat16()).dtype == torch.float64
    for shape in ((0, 8), (3, 0)):
        empty = torch.randn(*shape, requires_grad=True)
        fused.rms_norm(empty, torch.ones(shape[1]), 1e-6).sum().backward()
        assert fused.gated(empty, empty).shape == empty.grad.shape == shape


def test_errors_name_the_argument() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(LayoutError, match=r"weight has shape \[7\].*\[3, 8\]"):
        fused.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(LayoutError, match=r"up has shape \[8\].*\[3, 8\]"):
        fused.gated(x, x[0])
    with pytest.raises(ValueError, match="activation is 'relu'; allowed are 'silu', 'gelu_tanh'"):
        fused.gated(x, x, "relu")
    q, table = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8)
    with pytest.raises(LayoutError, match=r"k has shape \[2, 3, 4, 8\]"):
        fused.rotary(q, q[:, :, :4], table, table)
    with pytest.raises(LayoutError, match=r"q has shape \[2, 3, 5, 7\]"):
        fused.rotary(q[..., :7], q, table[..., :7], table[..., :7])
