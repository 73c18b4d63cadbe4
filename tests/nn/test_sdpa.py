"""Attention for training: outputs and gradients as exact as torch's, in every case that it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble.nn import sdpa as module
from nybble.nn.sdpa import accelerated, attention

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Case:
    """Inputs of a call and the gradient of its output."""

    def __init__(
        self,
        batches: int,
        heads: tuple[int, int],
        rows: int,
        cols: int,
        depth: int,
        dtype: torch.dtype,
        mask: str = "none",
        side_by_side: bool = False,
        scale: float | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        kv_heads, group = heads

        def normal(count: int, length: int) -> Tensor:
            if side_by_side:
                return torch.randn(batches, length, count, depth, generator=generator).to(dtype).transpose(1, 2)
            return torch.randn(batches, count, length, depth, generator=generator).to(dtype)

        every = kv_heads * group
        self.inputs = normal(every, rows), normal(kv_heads, cols), normal(kv_heads, cols)
        self.grad = normal(every, rows)
        self.mask: Tensor | None = None
        if mask == "bool":
            self.mask = torch.rand(batches, 1, rows, cols, generator=generator) > 0.4
            self.mask[:, :, 0] = False  # a query that sees nothing
        elif mask == "keys":
            self.mask = torch.rand(batches, 1, 1, cols, generator=generator) > 0.2
            self.mask[..., 0] = True
        elif mask == "added":
            self.mask = torch.randn(1, every, rows, cols, generator=generator).to(dtype)
        elif mask == "flat":
            self.mask = torch.randn(rows, cols, generator=generator)
        elif mask == "queries":
            self.mask = torch.randn(1, 1, rows, 1, generator=generator).to(dtype)
        self.settings = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": group > 1}

    def run(self, function: Callable[..., Tensor], *, double: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The output and the gradients of query, key and value."""
        mask, grad = self.mask, self.grad
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        if double:
            inputs = [x.detach().double().requires_grad_() for x in self.inputs]
            grad = grad.double()
            mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
        output = function(*inputs, attn_mask=mask, **self.settings)
        return output, list(torch.autograd.grad(output, inputs, grad))

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        with sdpa_kernel(SDPBackend.MATH):
            return self.run(F.scaled_dot_product_attention, double=True)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The exact weights [B, H, T, S], and how far off, relatively, exponents in fp32 make them."""
        query, key = (x.double() for x in self.inputs[:2])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        cols, depth = key.shape[2:]
        scale = depth**-0.5 if self.settings["scale"] is None else self.settings["scale"]
        scores = scale * query @ key.mT
        size = abs(scale) * query.abs() @ key.abs().mT
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores, size = scores + self.mask, size + self.mask.abs()
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -torch.inf)
        if self.settings["is_causal"]:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
        off = 2.0**-19 + 2.0**-24 * (3 * (depth + 4) * size.amax(-1, keepdim=True) + cols + depth)
        return scores.softmax(-1).nan_to_num(0.0), off

    def output_bound(self) -> Tensor:
        """Weights are rounded, the sum, and then the output."""
        p, off = self.weights()
        value = self.inputs[2].double()
        size = p @ value.repeat_interleave(p.shape[1] // value.shape[1], 1).abs()
        return (3 * ROUNDOFF[self.grad.dtype] + 2 * off) * size + 2.0**-24

    def bounds(self) -> list[Tensor]:
        """Of the errors of the three gradients.

        Weights and the gradients of scores are rounded once, products once a block and sums once: 4 roundings of the
        sums of magnitudes. The forward pass's own errors come in through the output (rounded weights, a rounding) and
        the logsumexp, whose exponentials torch computes to 2^-20. Exponents are products of `depth` terms in fp32.
        """
        query, key, value = (x.double() for x in self.inputs)
        group = query.shape[1] // key.shape[1]
        kv_heads, depth = key.shape[1], key.shape[3]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        grad = self.grad.double()
        scale = depth**-0.5 if self.settings["scale"] is None else self.settings["scale"]
        p, off = self.weights()
        unit = ROUNDOFF[self.grad.dtype]
        products = grad.abs() @ value.abs().mT
        delta = ((p @ value.abs()) * grad.abs()).sum(-1, keepdim=True)
        ds = abs(scale) * p * ((4 * unit + off) * (products + delta) + 3 * unit * delta)
        shared = lambda x: x.unflatten(1, (kv_heads, group)).sum(2)  # noqa: E731
        return [
            ds @ key.abs(),
            shared(ds.mT @ query.abs()),
            shared(((4 * unit + off) * p).mT @ grad.abs()),
        ]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


cases = st.builds(
    Case,
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.one_of(st.integers(1, 40), st.sampled_from((65, 130))),
    st.one_of(st.integers(1, 40), st.sampled_from((65, 130))),
    st.sampled_from((1, 8, 24, 33, 64)),
    st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    st.sampled_from(("none", "causal", "bool", "keys", "added", "flat", "queries")),
    st.booleans(),
    st.sampled_from((None, 0.3)),
    st.integers(0, 2**31 - 1),
)


@given(case=cases, block=st.sampled_from((1 << 9, 1 << 12, 1 << 15, 2 << 20)), queries=st.sampled_from((7, 16, 64)))
def test_gradients_are_those_of_float64(case: Case, block: int, queries: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", block)
        patch.setattr(module, "_LEAST_QUERIES", queries)
        output, grads = case.run(attention)
    exact_output, exact_grads = case.exact()
    assert bool(((output.double() - exact_output.nan_to_num(0.0)).abs() <= case.output_bound()).all())
    for found, exact, bound, x in zip(grads, exact_grads, case.bounds(), case.inputs, strict=True):
        assert found.dtype == x.dtype and found.stride() == torch.empty_like(x).stride()
        # fp16's least number, once a product of the sum.
        least = 2.0**-24 if x.dtype == torch.float16 else 2.0**-120
        assert bool(((found.double() - exact.nan_to_num(0.0)).abs() <= bound + least).all())


@pytest.mark.parametrize("in_hardware", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    "case",
    (
        (2, (4, 1), 128, 128, 64, "causal"),
        (1, (3, 3), 300, 300, 64, "causal"),
        (1, (2, 2), 90, 150, 80, "bool"),
        (1, (1, 2), 700, 700, 32, "causal"),
    ),
)
def test_errors_are_not_larger_than_torchs(
    isa: str, monkeypatch: pytest.MonkeyPatch, case: tuple, dtype: torch.dtype, in_hardware: bool
) -> None:
    """In the norm, within a fifth for bf16 and fp16: both round weights once and gradients of scores once.

    fp32's errors are those of sums, whose order is another one: twice.
    """
    if not in_hardware:
        monkeypatch.setattr(module, "_product_dtype", lambda dtype: torch.float32)
    problem = Case(*case[:5], dtype, case[5])
    if case[5] == "bool":
        assert problem.mask is not None
        problem.mask[:, :, 0] = True
    exact = problem.exact()[1]
    ours, torchs = (
        errors(problem.run(attention)[1], exact),
        errors(problem.run(F.scaled_dot_product_attention)[1], exact),
    )
    factor = 2.0 if dtype == torch.float32 else 1.2
    assert all(a <= factor * b for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = Case(2, (2, 2), 200, 200, 64, dtype, "causal")
    first = case.run(attention)[1]
    for _ in range(3):
        assert all(map(torch.equal, case.run(attention)[1], first))


def test_memory_is_that_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are never all there: of a head of 1024 queries and keys in fp32 they are 4 MiB."""
    made: list[int] = []
    scratch = module.scratch

    def counted(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer = scratch(name, shape, dtype)
        made.append(buffer.numel() * buffer.element_size())
        return buffer

    monkeypatch.setattr(module, "scratch", counted)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 20)
    case = Case(2, (2, 1), 1024, 1024, 16, torch.float32, "causal")
    case.run(attention)
    assert max(made) <= 1 << 20 and len(made) > 16
    # Under the diagonal no more than the keys that a block's queries see.
    assert sum(size for size in made if size > 1024 * 16 * 4) < 0.7 * 2 * 2 * 2 * 1024 * 1024 * 4


REFUSED = {
    "dropout": {"dropout_p": 0.5},
    "mask with a gradient": {"attn_mask": torch.zeros(6, 6, requires_grad=True)},
}


@pytest.mark.parametrize("why", (*REFUSED, "no gradient", "no_grad", "three dimensions", "autocast", "float64", "math"))
def test_what_it_does_not_take_is_torchs(why: str) -> None:
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    if why == "three dimensions":
        q, k, v = q[0], k[0], v[0]
    if why == "float64":
        q, k, v = q.double(), k.double(), v.double()
    q.requires_grad_(why != "no gradient")
    arguments = REFUSED.get(why, {})
    with torch.set_grad_enabled(why != "no_grad"), torch.autocast("cpu", torch.bfloat16, why == "autocast"):
        if why == "math":
            with sdpa_kernel(SDPBackend.MATH):
                assert not accelerated(q, k, v)
            return
        assert not accelerated(q, k, v, **arguments)
        if why == "autocast":
            return  # `attention` casts first and asks again: test_under_autocast_it_is_that_of_the_cast_inputs
        torch.manual_seed(0)
        found = attention(q, k, v, **arguments)
        torch.manual_seed(0)
        assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, **arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_it_is_that_of_the_cast_inputs(
    dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[torch.dtype] = []
    run = module.attention_backward
    monkeypatch.setattr(module, "attention_backward", lambda g, *rest: (ran.append(g.dtype), run(g, *rest))[1])
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 9, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = torch.randn(9, 9, dtype=dtype) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*inputs, attn_mask=mask, is_causal=not masked)
        expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked)
    cast = [x if dtype == torch.float64 else x.bfloat16() for x in (*inputs, *([mask] if masked else []))]
    assert torch.equal(found, attention(*cast[:3], attn_mask=cast[3] if masked else None, is_causal=not masked))
    assert found.dtype == expected.dtype
    # Which of its kernels torch runs depends on the CPU: a few roundings to bf16 apart.
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=float(expected.detach().abs().max()) * 2**-7)
    grads = torch.autograd.grad(found.float().square().sum(), inputs)
    assert ran == ([] if dtype == torch.float64 else [torch.bfloat16])
    for grad, x, torchs in zip(
        grads, inputs, torch.autograd.grad(expected.float().square().sum(), inputs), strict=True
    ):
        assert grad.dtype == x.dtype
        # Both round probabilities and products to bf16: a few units of 2^-8 of the largest gradient.
        torch.testing.assert_close(grad, torchs, rtol=0, atol=float(torchs.abs().max()) * 2**-6)


def test_what_torch_refuses_is_refused() -> None:
    q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 3, 6, 8)
    with pytest.raises(RuntimeError):
        attention(q, k, k)
    both = (torch.ones(6, 6, dtype=torch.bool), 0.0, True)
    assert not accelerated(q, q, q, *both)
    assert torch.equal(attention(q, q, q, *both), F.scaled_dot_product_attention(q, q, q, *both))


def test_there_is_no_second_derivative() -> None:
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        (grad + q).sum().backward()


def test_only_some_inputs_need_a_gradient() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    v.requires_grad_()
    attention(q, k, v).sum().backward()
    assert q.grad is None and v.grad is not None


def test_a_gradient_that_is_one_number_many_times() -> None:
    case = Case(1, (2, 1), 9, 9, 16, torch.float32)
    case.grad = torch.ones(()).expand(1, 2, 9, 16)
    found, exact = case.run(attention)[1], case.exact()[1]
    assert max(errors(found[1:], exact[1:])) < 1e-5


def test_compiled_it_is_torchs() -> None:
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, q, q), F.scaled_dot_product_attention(q, q, q))
