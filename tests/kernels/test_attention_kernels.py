"""Attention's forward pass and the softmax of its backward pass, as the reference, under every ISA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nybble import _core, reference_attention
from nybble.backends import attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = 2.0**-24
ROUNDOFF = {torch.float32: UNIT, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: What may become 0: numbers below 2^-124, and half of fp16's least number.
SMALLEST = {torch.float32: 2.0**-123, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-123}


class Problem:
    """A call's inputs, as a model's layers make them: heads side by side in memory, or one after another."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        rows: int,
        cols: int,
        depth: int,
        value_depth: int,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        mask: str,
        diagonal: int | None,
        side_by_side: bool,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        batches, kv_heads, group = heads

        def normal(count: int, length: int, width: int, size: float = 1.0) -> Tensor:
            shape = (batches, length, count, width) if side_by_side else (batches, count, length, width)
            x = (size * torch.randn(shape, generator=generator)).to(dtype)
            return x.transpose(1, 2) if side_by_side else x

        every = kv_heads * group
        self.query = normal(every, rows, depth, 3.0)
        self.key = normal(kv_heads, cols, depth)
        self.value = normal(kv_heads, cols, value_depth)
        self.output, self.grad_output = normal(every, rows, value_depth), normal(every, rows, value_depth)
        self.scale = depth**-0.5
        self.diagonal = diagonal
        self.out_dtype = out_dtype
        self.mask: Tensor | None = None
        if mask == "keys":
            self.mask = torch.rand(batches, 1, 1, cols, generator=generator) > 0.4
        elif mask == "bool":
            self.mask = torch.rand(1, every, rows, cols, generator=generator) > 0.4
        elif mask == "added":
            self.mask = torch.randn(rows, cols, generator=generator).to(dtype)[None, None]
        elif mask == "wide":  # rows of a larger mask
            wide = torch.randn(batches, 1, rows, cols + 5, generator=generator)
            self.mask = wide.masked_fill(torch.rand(wide.shape, generator=generator) > 0.5, -torch.inf)[..., 3:-2]
        if self.mask is not None:
            self.mask = self.mask.expand(batches, every, rows, cols)
        self.logsumexp = self.scores().logsumexp(-1).float().transpose(1, 2).contiguous().transpose(1, 2)

    def exact(self) -> tuple[Tensor, ...]:
        return tuple(x.double() for x in (self.query, self.key, self.value, self.output, self.grad_output))

    def scores(self) -> Tensor:
        query, key, *_ = self.exact()
        scores = self.scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
        if self.mask is not None:
            added = torch.where(self.mask, 0.0, -torch.inf) if self.mask.dtype == torch.bool else self.mask.double()
            scores = scores + added
        if self.diagonal is not None:
            seen = torch.ones(scores.shape[-2:]).tril(self.diagonal) != 0
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores

    def forward(self) -> tuple[Tensor, Tensor]:
        return attention.forward(self.query, self.key, self.value, self.mask, self.diagonal, self.scale)

    def expected_forward(self) -> tuple[Tensor, Tensor]:
        query, key, value, *_ = self.exact()
        return reference_attention.forward(query, key, value, self.mask, self.diagonal, self.scale)

    def forward_bounds(self, output: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
        """Of the errors of the output and logsumexp.

        A score is off by no more than the roundings of what it is made of, and so is its distance to the largest. Sums
        over keys round once a key, and where a larger score turns up they are multiplied by an exponential: once in 64
        keys. The weights are rounded to what is multiplied, to bf16 where the inputs are.
        """
        query, key, value, *_ = (x.abs() for x in self.exact())
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        cols, depth = key.shape[2], query.shape[-1]
        size = self.scale * query @ key.mT * (depth + 4)
        if self.mask is not None and self.mask.dtype != torch.bool:
            size = size + 4 * torch.where(self.mask.isfinite(), self.mask.double().abs(), 0.0)
        scores = self.scores()
        off = 2 * UNIT * size.masked_fill(scores == -torch.inf, 0).amax(-1)  # of exponents
        sums = (cols + 16 + 6 * -(-cols // 64)) * UNIT
        finite = torch.where(logsumexp.isfinite(), logsumexp.abs(), 0.0)
        bound = off + sums + 8 * UNIT * (finite + 1)
        weight = ROUNDOFF[torch.bfloat16] if self.query.dtype == torch.bfloat16 else UNIT
        relative = (2 * off).expm1() + 2 * sums + weight
        p = (scores - torch.where(logsumexp.isfinite(), logsumexp, 0.0)[..., None]).exp()
        least = SMALLEST[self.query.dtype] + SMALLEST[torch.float32] * value.sum(-2, keepdim=True)
        error = relative[..., None] * (p @ value) + least
        return error + ROUNDOFF[self.query.dtype] * (output.abs() + error), bound

    def run(self) -> tuple[Tensor, Tensor]:
        p = torch.full((*self.query.shape[:3], self.key.shape[2]), torch.nan, dtype=self.out_dtype)
        ds = p.clone()
        tensors = (self.query, self.key, self.value, self.output, self.grad_output, self.logsumexp, self.mask)
        attention.scores_grad(*tensors, self.diagonal, self.scale, p, ds)
        return p, ds

    def expected(self) -> tuple[Tensor, Tensor]:
        return reference_attention.scores_grad(
            *self.exact(), self.logsumexp.double(), self.mask, self.diagonal, self.scale
        )

    def bounds(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Of the errors of p and ds.

        The exponent is a product of `depth` terms, scaled, plus the mask less logsumexp: each of its roundings is of no
        more than the sum of what it is made of. An exponential is within 4 units of its argument's, an exponent that is
        off by e multiplies it by exp(e). ds is a product of four factors that round on their own.
        """
        query, key, value, output, grad_output = (x.abs() for x in self.exact())
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        size = self.scale * query @ key.mT * (query.shape[-1] + 4)
        size = size + 4 * torch.where(self.logsumexp.isfinite(), self.logsumexp.double().abs(), 0.0)[..., None]
        if self.mask is not None and self.mask.dtype != torch.bool:
            size = size + 4 * torch.where(self.mask.isfinite(), self.mask.double().abs(), 0.0)
        off = p * ((UNIT * size).expm1() + 4 * UNIT) + SMALLEST[torch.float32]
        products = grad_output @ value.mT + (output * grad_output).sum(-1, keepdim=True)
        bound = self.scale * products * (off + (value.shape[-1] + 6) * UNIT * p)
        unit, least = ROUNDOFF[self.out_dtype], SMALLEST[self.out_dtype]
        return off + unit * (p + off) + least, bound + unit * (p * self.scale * products + bound) + least


problems = st.builds(
    Problem,
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    st.one_of(st.integers(1, 40), st.sampled_from((127, 128, 129, 260))),
    st.one_of(st.integers(1, 70), st.sampled_from((127, 128, 129, 200))),
    st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128))),
    st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128))),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(("none", "keys", "bool", "added", "wide")),
    st.one_of(st.none(), st.integers(-3, 70), st.just(0)),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)


def check_forward(problem: Problem) -> None:
    output, logsumexp = problem.forward()
    expected, expected_sum = problem.expected_forward()
    assert output.dtype == problem.query.dtype and logsumexp.dtype == torch.float32
    blind = expected_sum == -torch.inf
    assert torch.equal(logsumexp == -torch.inf, blind) and not bool(output[blind].any())
    bound, bound_sum = problem.forward_bounds(expected, expected_sum)
    assert bool(((output.double() - expected).abs() <= bound).all())
    assert bool(((logsumexp.double() - expected_sum).abs() <= bound_sum)[~blind].all())


@given(problem=problems)
def test_output_and_logsumexp_are_the_reference(isa: str, problem: Problem) -> None:
    check_forward(problem)


@given(problem=problems)
def test_weights_and_gradient_are_the_reference(isa: str, problem: Problem) -> None:
    p, ds = problem.run()
    expected_p, expected_ds = problem.expected()
    bound_p, bound_ds = problem.bounds(expected_p)
    assert bool(((p.double() - expected_p).abs() <= bound_p).all())
    assert bool(((ds.double() - expected_ds).abs() <= bound_ds).all())
    hidden = problem.scores() == -torch.inf
    assert not bool(p[hidden].any()) and not bool(ds[hidden].any())


@given(problem=problems)
def test_any_number_of_threads_gives_the_same_bits(isa: str, threads: Callable[[int], None], problem: Problem) -> None:
    threads(1)
    first = (*problem.forward(), *problem.run())
    for count in (2, 3):
        threads(count)
        assert all(map(torch.equal, (*problem.forward(), *problem.run()), first))


def plain(**changes: object) -> Problem:
    arguments: dict[str, object] = {
        "heads": (1, 1, 1),
        "rows": 3,
        "cols": 5,
        "depth": 4,
        "value_depth": 4,
        "dtype": torch.float32,
        "out_dtype": torch.float32,
        "mask": "none",
        "diagonal": None,
        "side_by_side": False,
        "seed": 0,
    }
    scale = changes.pop("scale", None)
    problem = Problem(**{**arguments, **changes})
    problem.scale = problem.scale if scale is None else scale
    return problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", (1, 33, _core.MAX_HEAD_DEPTH))
def test_widest_heads(isa: str, dtype: torch.dtype, depth: int) -> None:
    problem = plain(rows=19, cols=70, depth=depth, value_depth=depth, dtype=dtype, out_dtype=dtype)
    check_forward(problem)
    for found, expected, bound in zip(
        problem.run(), problem.expected(), problem.bounds(problem.expected()[0]), strict=True
    ):
        assert bool(((found.double() - expected).abs() <= bound).all())


def test_exponentials_to_the_ends_of_their_range(isa: str) -> None:
    """Within 4 units in the last place; 0 at the lower end, infinity at the upper, and NaN of NaN."""
    exponents = torch.cat([torch.linspace(-110.0, 90.0, 20001), torch.tensor([-torch.inf, torch.inf, torch.nan])])
    problem = plain(rows=1, cols=exponents.numel())
    problem.query.zero_()
    problem.logsumexp.zero_()
    problem.mask = exponents.expand(1, 1, 1, -1)
    p = problem.run()[0].flatten().double()
    expected = exponents.double().exp()
    overflows = exponents > 88.73
    assert bool((p[:-1][overflows[:-1]] == torch.inf).all()) and p[-1].isnan()
    finite = exponents < 88.72
    assert bool(((p - expected).abs()[finite] <= 4 * UNIT * expected[finite] + SMALLEST[torch.float32]).all())
    assert bool((p[exponents < -105] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_and_larger_scores(isa: str, dtype: torch.dtype) -> None:
    """The largest score of each block of keys beside the one before: by little, by much, and by all that there is."""
    problem = plain(rows=30, cols=400, dtype=dtype, scale=30.0)
    problem.query.fill_(1.0)
    problem.key.copy_(torch.arange(400).float().view(1, 1, -1, 1) / 50)
    check_forward(problem)
    problem.key.neg_()
    check_forward(problem)


@pytest.mark.parametrize("scale", (-0.7, 0.0))
def test_any_scale(isa: str, scale: float) -> None:
    problem = plain(rows=5, cols=70, scale=scale)
    output, _ = problem.forward()
    torch.testing.assert_close(output.double(), problem.expected_forward()[0], atol=1e-5, rtol=1e-5)


def test_no_keys(isa: str) -> None:
    problem = plain(cols=1)
    problem.key, problem.value = problem.key[:, :, :0], problem.value[:, :, :0]
    output, logsumexp = problem.forward()
    assert not bool(output.any()) and bool((logsumexp == -torch.inf).all())


def test_a_query_that_saw_nothing_has_no_weights(isa: str) -> None:
    problem = plain(mask="bool")
    assert problem.mask is not None
    problem.mask[:, :, 1] = False
    problem.logsumexp = problem.scores().logsumexp(-1).float()
    assert problem.logsumexp[0, 0, 1] == -torch.inf
    for x in problem.run():
        assert not bool(x[:, :, 1].any()) and not bool(x.isnan().any())


def test_nan_is_not_hidden(isa: str) -> None:
    problem = plain(rows=2)
    problem.query[0, 0, 1] = torch.nan
    output, logsumexp = problem.forward()
    assert bool(output[0, 0, 1].isnan().all()) and bool(logsumexp[0, 0, 1].isnan())
    assert not bool(output[0, 0, 0].isnan().any())
    p, ds = problem.run()
    assert bool(p[0, 0, 1].isnan().all()) and bool(ds[0, 0, 1].isnan().all())
    assert not bool(p[0, 0, 0].isnan().any())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("depth", 0), ("depth", _core.MAX_HEAD_DEPTH + 1), ("group", 2), ("heads", -1), ("p", 0), ("threads", 0)],
)
def test_sizes_are_checked_before_memory_is_touched(argument: str, value: int) -> None:
    problem = plain()
    p = torch.empty(1, 1, 3, 5)
    good: dict[str, object] = {
        name: attention._strided(getattr(problem, name)) for name in ("query", "key", "value", "output", "grad_output")
    }
    good.update(dtype=0, logsumexp=attention._strided(problem.logsumexp), mask=(0, 0, 0, 0), mask_dtype=0, diagonal=5)
    good.update(scale=0.5, p=p.data_ptr(), ds=torch.empty_like(p).data_ptr(), out_dtype=0, threads=1)
    sizes = {"batches": 1, "heads": 1, "group": 1, "rows": 3, "cols": 5, "depth": 4, "value_depth": 4}
    changed = sizes if argument in sizes else good
    changed[argument] = value
    with pytest.raises(ValueError, match=argument):
        _core.attention_scores_grad(**good, sizes=tuple(sizes.values()))
