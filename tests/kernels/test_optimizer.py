"""The optimizer step: the reference's bits under every ISA, and what the reference promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from codec.equality import assert_same_bits
from codec.strategies import DTYPES, kinds, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble import reference, reference_optim
from nybble.backends import cpu_optim
from nybble.errors import FormatError, LayoutError, NonFiniteError, UnsupportedDtypeError
from nybble.formats import dynamic_map
from nybble.reference_optim import AdamWRule, adamw_rule

U = 2.0**-24  # unit roundoff of fp32

# Around vectors of 4, 8 and 16, blocks of 32 to 1024, a task's 65536.
sizes = st.one_of(
    st.sampled_from((0, 1, 3, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1024, 1025)),
    st.integers(0, 700),
    st.just(65536 + 300),
)
rules = st.builds(
    adamw_rule,
    st.one_of(st.integers(1, 20), st.just(100_000)),
    st.sampled_from((0.0, 1e-5, 1e-3, 1.0)),
    st.sampled_from(((0.9, 0.999), (0.0, 0.0), (0.95, 0.5))),
    st.sampled_from((0.0, 1e-8, 1e-3)),
    st.sampled_from((0.0, 0.1)),
    st.sampled_from((1.0, 0.37, 0.0)),
)


def _limited(x: Tensor, limit: float) -> Tensor:
    return x.float().clamp(-limit, limit).to(x.dtype)


class Problem:
    """A parameter, a gradient, and moments such as an earlier run has left."""

    def __init__(
        self, n: int, dtypes: tuple[torch.dtype, torch.dtype], like: tuple[str, str, str], block_size: int, seed: int
    ) -> None:
        self.param = weight(like[0], n, seed, dtypes[0])
        # Not so large that all squares overflow: `test_what_is_not_finite...` looks at those.
        self.grad = _limited(weight(like[1], n, seed + 1, dtypes[1]), 1e18)
        self.m = weight(like[2], n, seed + 2).clamp(-1e30, 1e30)
        self.v = weight(like[1], n, seed + 3).abs().clamp(max=1e30)
        self.block_size = block_size
        self.m_codes, self.m_absmax = reference.quantize_8bit(self.m, dynamic_map(True), block_size)
        self.v_codes, self.v_absmax = reference.quantize_8bit(self.v, dynamic_map(False), block_size)

    def step32(self, backend, rule: AdamWRule, key: int | None = None) -> list[Tensor]:
        param, m, v = self.param.clone(), self.m.clone(), self.v.clone()
        backend.adamw_32bit(param, self.grad, m, v, rule, key)
        return [param, m, v]

    def step8(self, backend, rule: AdamWRule, key: int | None = None) -> list[Tensor]:
        param = self.param.clone()
        state = [t.clone() for t in (self.m_codes, self.v_codes, self.m_absmax, self.v_absmax)]
        backend.adamw_8bit(param, self.grad, *state, self.block_size, rule, key)
        return [param, *state]


problems = st.builds(
    Problem,
    sizes,
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    st.tuples(kinds, kinds, kinds),
    st.sampled_from((32, 256, 1024)),
    st.integers(0, 2**31 - 1),
)
keys = st.one_of(st.none(), st.integers(0, 2**64 - 1))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, but that a NaN is a NaN: IEEE leaves open which of two operands' payloads it takes."""
    for name, a, b in zip(("param", "m", "v", "m_absmax", "v_absmax"), found, expected, strict=False):
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()), name
            a, b = a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5)
        assert_same_bits(a, b, name)


@given(problem=problems, rule=rules, key=keys)
def test_32bit_step_is_the_references_bit_for_bit(isa: str, problem: Problem, rule: AdamWRule, key: int | None) -> None:
    key = key if problem.param.dtype == torch.bfloat16 else None
    assert_same(problem.step32(cpu_optim, rule, key), problem.step32(reference_optim, rule, key))


@given(problem=problems, rule=rules, key=keys)
def test_8bit_step_is_the_references_bit_for_bit(isa: str, problem: Problem, rule: AdamWRule, key: int | None) -> None:
    key = key if problem.param.dtype == torch.bfloat16 else None
    assert_same(problem.step8(cpu_optim, rule, key), problem.step8(reference_optim, rule, key))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_next_to_every_midpoint(isa: str, signed: bool) -> None:
    code = dynamic_map(signed)
    midpoints = (code[1:] + code[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    values = torch.cat([midpoints, midpoints.nextafter(up), midpoints.nextafter(down), code, code.new_zeros(1)])
    values = torch.cat([values, torch.tensor([1e-45, 1e-38, 2.0**-22, 1.0]).nextafter(down), code.new_ones(1)])
    values = values.clamp(min=-1.0 if signed else 0.0)
    n = values.numel()
    # A first step with betas of 0 makes m the gradient and v its square.
    rule = AdamWRule(1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    grad = values if signed else values.sqrt()
    m, m_absmax = reference_optim.empty_moment(grad, 1024, True)
    v, v_absmax = reference_optim.empty_moment(grad, 1024, False)
    cpu_optim.adamw_8bit(torch.zeros(n), grad, m, v, m_absmax, v_absmax, 1024, rule)
    moment = grad if signed else grad * grad
    expected, _ = reference.quantize_8bit(moment, code, 1024)
    if not signed:
        expected = torch.where(moment > 0, expected.clamp(min=1), expected)
    assert_same_bits(m if signed else v, expected)


@given(problem=problems, step=st.integers(1, 50), lr=st.sampled_from((1e-4, 0.1)), decay=st.sampled_from((0.0, 0.1)))
def test_32bit_step_is_torchs_to_rounding(problem: Problem, step: int, lr: float, decay: float) -> None:
    """Against torch.optim.AdamW in float64, from the same state.

    In units of u, with |m|' = b1 |m| + (1 - b1) |g| (m itself may cancel): the scalars have one rounding each, m two
    products and a sum on top of that (4), v one product more (5), which its root halves; the root, its scale (2), eps
    (1) and the sum: 3 + 5 / 2 < 6. The step: m, its factor (2), the denominator and the quotient: 4 + 3 + 6 + 1. The
    parameter: its decay's two roundings and the difference. Constants are taken a little larger for second-order terms.
    A moment that underflows is off by 2^-149 a rounding; a denominator of at least eps makes less than 1e-36 of that.
    """
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m, v, grad = problem.m.clamp(-1e15, 1e15), problem.v.clamp(max=1e30), _limited(problem.grad, 1e15)
    param = problem.param.float().clamp(-1e30, 1e30)
    theirs = torch.nn.Parameter(param.double())
    theirs.grad = grad.double()
    torchs = torch.optim.AdamW([theirs], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, foreach=False)
    state = {"step": torch.tensor(step - 1.0), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    torchs.state[theirs] = state
    torchs.step()
    ours, our_m, our_v = param.clone(), m.clone(), v.clone()
    cpu_optim.adamw_32bit(ours, grad, our_m, our_v, adamw_rule(step, lr, (beta1, beta2), eps, decay))
    tiny = 2.0**-147
    size = beta1 * m.double().abs() + (1 - beta1) * grad.double().abs()
    assert bool(((our_m.double() - state["exp_avg"]).abs() <= 5 * U * size + tiny).all())
    assert bool(((our_v.double() - state["exp_avg_sq"]).abs() <= 6 * U * state["exp_avg_sq"] + tiny).all())
    denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step) + eps
    # A v that has lost all its bits to underflow is worth at most sqrt(2^-147) = 7e-23, nothing beside eps.
    move = lr / (1 - beta1**step) * (size + tiny) / denominator
    bound = 18 * U * move + 4 * U * param.double().abs() + 1e-36
    assert bool(((ours.double() - theirs).abs() <= bound).all())


@given(problem=problems, rule=rules)
def test_8bit_moments_lie_within_a_code_of_the_fp32_ones(codec, problem: Problem, rule: AdamWRule) -> None:
    """The step decodes, updates in fp32 and encodes: what is stored is within half a gap of what was used."""
    backend = reference_optim if codec is reference else cpu_optim
    m_map, v_map, size = dynamic_map(True), dynamic_map(False), problem.block_size
    param = problem.param.clone()
    m = reference.dequantize_8bit(problem.m_codes, problem.m_absmax, m_map, size, torch.float32)
    v = reference.dequantize_8bit(problem.v_codes, problem.v_absmax, v_map, size, torch.float32)
    backend.adamw_32bit(param, problem.grad, m, v, rule)
    param8, m_codes, v_codes, m_absmax, v_absmax = problem.step8(backend, rule)
    assert_same([param8], [param])
    for exact, codes, absmax, table in ((m, m_codes, m_absmax, m_map), (v, v_codes, v_absmax, v_map)):
        assert_same_bits(absmax, reference.block_absmax(reference.to_blocks(exact, size)))
        scale = absmax.repeat_interleave(size)[: exact.numel()].double()
        s = exact.double() / scale
        stored = table.double()[codes.long()]
        gap = torch.cat([table[1:] - table[:-1], table.new_zeros(1)]).double()
        half = torch.maximum(gap, gap.roll(1))[codes.long()] / 2
        # A v above 0 takes code 1 also where code 0 is nearer: all of the first gap. The rest is that of
        # test_8bit_code_is_the_nearest: reciprocal, product and midpoint are rounded.
        if table is v_map:
            half = torch.where(codes == 1, torch.maximum(half, gap[0]), half)
            assert bool((codes[s > 2.0**-140] > 0).all()) and bool((codes[exact == 0] == 0).all())
        assert bool(((stored - s).abs() <= half + 2.0**-21).all())


def test_steps_stay_short_where_a_neighbours_gradient_is_larger(codec) -> None:
    """One element's gradient is 1e5 times its neighbours', whose v then is far below the map's least code.

    Were that v 0, a neighbour's step would be lr m / eps: 1e-3 * 1e-4 / 1e-8 = 10 for lr = 1e-3.
    """
    backend = reference_optim if codec is reference else cpu_optim
    generator = torch.Generator().manual_seed(0)
    param = torch.zeros(256)
    state = [*reference_optim.empty_moment(param, 256, True), *reference_optim.empty_moment(param, 256, False)]
    m, m_absmax, v, v_absmax = state
    for step in range(1, 31):
        grad = torch.randn(256, generator=generator) * 1e-3 * (step % 3 != 0)
        grad[7] = 100.0
        before = param.clone()
        backend.adamw_8bit(param, grad, m, v, m_absmax, v_absmax, 256, adamw_rule(step, 1e-3, (0.9, 0.999), 1e-8, 0.0))
        assert (param - before).abs().max() <= 1.1e-3


def test_the_same_bits_for_any_number_of_threads(isa: str, threads) -> None:
    problem = Problem(300_001, (torch.bfloat16, torch.float32), ("normal", "heavy", "normal"), 256, 3)
    rule = adamw_rule(5, 1e-2, (0.9, 0.999), 1e-8, 0.1, 0.5)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append([*problem.step32(cpu_optim, rule, 11), *problem.step8(cpu_optim, rule, 11)])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_block_that_would_not_be_finite_is_left_as_it_was(codec, bad: float) -> None:
    backend = reference_optim if codec is reference else cpu_optim
    problem = Problem(1000, (torch.float32, torch.float32), ("normal", "normal", "normal"), 256, 5)
    rule = adamw_rule(2, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    expected = problem.step8(backend, rule)
    before = [problem.param, problem.m_codes, problem.v_codes, problem.m_absmax, problem.v_absmax]
    for place in (300, 999):  # blocks 1 and 3
        problem.grad[place] = bad
    found = [t.clone() for t in before]
    with pytest.raises(NonFiniteError, match=r"grad: the moments of block 1, elements 256 to 511") as error:
        backend.adamw_8bit(found[0], problem.grad, *found[1:], 256, rule)
    assert error.value.index == 256
    for index, (a, b, c) in enumerate(zip(found, before, expected, strict=True)):
        step = 1 if index > 2 else 256
        for block in range(4):
            at = slice(block * step, (block + 1) * step)
            assert_same_bits(a[at], (b if block in (1, 3) else c)[at])


def test_what_is_not_finite_spreads_in_its_element_alone_with_32_bits(isa: str) -> None:
    problem = Problem(100, (torch.float32, torch.float32), ("normal", "normal", "normal"), 32, 5)
    rule = adamw_rule(2, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    expected = problem.step32(cpu_optim, rule)
    problem.grad[50] = math.nan
    for a, b in zip(problem.step32(cpu_optim, rule), expected, strict=True):
        assert a[50].isnan()
        assert_same_bits(torch.cat([a[:50], a[51:]]), torch.cat([b[:50], b[51:]]))


def test_stochastic_rounding_is_right_on_average(isa: str) -> None:
    """A step of a tenth of the distance to the next bf16 number goes there once in ten."""
    n = 1 << 16
    param, grad = torch.ones(n, dtype=torch.bfloat16), torch.full((n,), -1.0)
    rule = adamw_rule(1, 2.0**-7 / 10, (0.9, 0.999), 0.0, 0.0)
    for key in (0, 1, 2**63 + 12345):
        moved = param.clone()
        cpu_optim.adamw_32bit(moved, grad, torch.zeros(n), torch.zeros(n), rule, key)
        assert set(moved.float().unique().tolist()) == {1.0, 1.0 + 2.0**-7}
        share = (moved > 1).float().mean().item()
        # Five standard deviations of n independent draws; the 16 random bits tell tenths to 2^-16.
        assert abs(share - 0.1) <= 5 * math.sqrt(0.09 / n) + 2.0**-16
    still = param.clone()
    cpu_optim.adamw_32bit(still, grad, torch.zeros(n), torch.zeros(n), rule)
    assert bool((still == 1).all())


def test_stochastic_rounding_draws_anew_for_every_step_parameter_and_element() -> None:
    values = torch.full((1 << 14,), 1.0 + 2.0**-8)  # half-way
    numbers = ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (1, 0, 0), (1 << 40, 1, 0))
    keys = [reference_optim.rounding_key(*each) for each in numbers]
    draws = [reference_optim.stochastic_bf16(values, key) > 1 for key in keys]
    for a, b in itertools.combinations(draws, 2):
        # Of independent draws half agree; five standard deviations.
        assert abs((a == b).float().mean().item() - 0.5) <= 5 * 0.5 / 2**7
    for lag in (1, 2, 16, 4096):
        agreeing = (draws[0] == draws[0].roll(lag)).float().mean().item()
        assert abs(agreeing - 0.5) <= 5 * 0.5 / 2**7


@given(n=sizes, kind=kinds, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31 - 1))
def test_sum_of_squares(isa: str, n: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    """256 squares are added in fp32, each rounded: at most 256 u, besides what underflows."""
    x = _limited(weight(kind, n, seed, dtype), 1e15)
    exact = reference_optim.sum_of_squares(x)
    assert abs(cpu_optim.sum_of_squares(x) - exact) <= 257 * U * exact + n * 2.0**-149
    assert cpu_optim.sum_of_squares(x[::3]) == cpu_optim.sum_of_squares(x[::3].contiguous())


def test_sum_of_squares_has_the_same_bits_everywhere(threads) -> None:
    from nybble import _core

    x = weight("heavy", 200_003, 1, torch.float32)
    before, found = _core.active_isa(), set()
    try:
        for isa in _core.isas():
            _core.set_active_isa(isa)
            for count in (1, 2):
                threads(count)
                found.add(cpu_optim.sum_of_squares(x))
    finally:
        _core.set_active_isa(before)
    assert len(found) == 1
    x[5] = math.nan
    assert math.isnan(cpu_optim.sum_of_squares(x))
    x[5] = math.inf
    assert cpu_optim.sum_of_squares(x) == math.inf


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31 - 1))
def test_strided_gradients_and_other_strides_in_the_reference(seed: int) -> None:
    problem = Problem(12 * 40, (torch.float32, torch.float32), ("normal", "normal", "normal"), 32, seed)
    rule = adamw_rule(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    param, m, v = problem.step32(cpu_optim, rule)
    for backend in (cpu_optim, reference_optim):
        again, m2, v2 = (
            problem.param.view(12, 40).clone(),
            problem.m.view(12, 40).clone(),
            problem.v.view(12, 40).clone(),
        )
        backend.adamw_32bit(again, problem.grad.view(12, 40).t().contiguous().t(), m2, v2, rule)
        assert_same([again.view(-1), m2.view(-1), v2.view(-1)], [param, m, v])
    transposed = problem.param.view(12, 40).t().contiguous().t()
    reference_optim.adamw_32bit(transposed, problem.grad.view(12, 40), problem.m, problem.v, rule)
    assert_same([transposed.reshape(-1), problem.m, problem.v], [param, m, v])


@pytest.mark.parametrize("backend", [reference_optim, cpu_optim])
def test_bad_arguments_are_named(backend) -> None:
    rule = adamw_rule(1, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    x = torch.zeros(64)
    codes, scales = torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    for arguments, kind, what in (
        ((x.double(), x, x, x), UnsupportedDtypeError, r"param has dtype torch\.float64"),
        ((x, x.to(torch.complex64), x, x), UnsupportedDtypeError, r"grad has dtype torch\.complex64"),
        ((x, x[1:], x, x), LayoutError, r"grad has shape \(63,\)"),
        ((x, x, x.half(), x), LayoutError, r"m is torch\.float16 \(64,\).*needs 64"),
        ((x, x, x, x[::2]), LayoutError, r"v is torch\.float32 \(32,\)"),
        ((x, x, x, torch.zeros(128)[::2]), LayoutError, "contiguous"),
    ):
        with pytest.raises(kind, match=what):
            backend.adamw_32bit(*arguments, rule)
    for arguments, kind, what in (
        ((codes, codes, scales, scales[1:], 32), LayoutError, r"v_absmax is torch\.float32 \(1,\).*needs 2"),
        ((x, codes, scales, scales, 32), LayoutError, r"m is torch\.float32 .*torch\.uint8"),
        ((codes, codes, scales, scales, 33), FormatError, "block_size is 33"),
    ):
        with pytest.raises(kind, match=what):
            backend.adamw_8bit(x, x, *arguments, rule)
    with pytest.raises(LayoutError, match="stochastic rounding is for bfloat16"):
        backend.adamw_32bit(x, x, x.clone(), x.clone(), rule, key=1)


def test_a_parameter_that_is_not_contiguous_is_refused() -> None:
    rule = adamw_rule(1, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    x = torch.zeros(8, 8).t()
    with pytest.raises(LayoutError, match="strides"):
        cpu_optim.adamw_32bit(torch.zeros(16, 8).t(), torch.zeros(8, 16), torch.zeros(128), torch.zeros(128), rule)
    assert not cpu_optim.supports(torch.zeros(16, 8).t()) and cpu_optim.supports(x.t())


def test_autograd_is_told_of_the_change() -> None:
    param = torch.zeros(64, requires_grad=True)
    product = (param * param).sum()
    with torch.no_grad():
        cpu_optim.adamw_32bit(
            param,
            torch.ones(64),
            torch.zeros(64),
            torch.zeros(64),
            adamw_rule(1, 1e-3, (0.9, 0.999), 1e-8, 0.0),
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
