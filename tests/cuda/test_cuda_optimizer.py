"""The optimizer step on a GPU: what the CPU's is held to, the reference's bits above all, and what is read back."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from codec.strategies import DTYPES, kinds, weight
from hypothesis import given
from hypothesis import strategies as st
from kernels import test_optimizer
from kernels.test_optimizer import Problem, assert_same, keys, problems, rules, sizes
from shim.guarded import guarded
from training.test_optim import OPTIONS, Run
from training.test_optim import assert_same as assert_same_runs

from nybble import reference_optim
from nybble.backends import cpu_optim, cuda_optim
from nybble.errors import LayoutError, NonFiniteError
from nybble.reference_optim import adamw_rule
from nybble.training.optim import AdamW, clip_scale

# Every test there of one instruction set or one codec, but those of thread counts, which a GPU has none of.
for _name, _test in vars(test_optimizer).items():
    if _name.startswith("test_") and inspect.isfunction(_test):
        _taken = inspect.signature(_test).parameters
        if ("isa" in _taken or "codec" in _taken) and "threads" not in _taken:
            globals()[_name] = _test


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # as in tests/kernels


@pytest.fixture
def isa(cuda, monkeypatch):
    monkeypatch.setattr(test_optimizer, "cpu_optim", cuda_optim)


@pytest.fixture
def codec(isa, cuda):
    return cuda


@pytest.fixture
def on_gpu(cuda, monkeypatch):
    """The optimizer takes CPU tensors for a GPU's."""
    monkeypatch.setattr(cuda_optim, "serves", lambda tensor: tensor.device.type == "cpu")


class Guarded(Problem):
    """At unmapped pages: `place` says on which side."""

    def __init__(self, problem: Problem, place: dict) -> None:
        self.__dict__.update(problem.__dict__)
        for name, tensor in problem.__dict__.items():
            if isinstance(tensor, torch.Tensor):
                setattr(self, name, guarded(tensor, **place, read_only=name == "grad"))
        self._place = place

    def step32(self, backend, rule, key=None):
        param, m, v = (guarded(t, **self._place) for t in (self.param, self.m, self.v))
        backend.adamw_32bit(param, self.grad, m, v, rule, key)
        return [param, m, v]

    def step8(self, backend, rule, key=None):
        param, *state = (
            guarded(t, **self._place) for t in (self.param, self.m_codes, self.v_codes, self.m_absmax, self.v_absmax)
        )
        backend.adamw_8bit(param, self.grad, *state, self.block_size, rule, key)
        return [param, *state]


places = st.builds(
    lambda end, alignment: {"end": end, "alignment": alignment}, st.booleans(), st.sampled_from((16, None))
)


@given(problem=problems.filter(lambda p: 0 < p.param.numel() < 3000), rule=rules, key=keys, place=places)
def test_steps_stay_within_their_tensors(cuda, problem, rule, key, place):
    key = key if problem.param.dtype == torch.bfloat16 else None
    at_pages = Guarded(problem, place)
    assert_same(at_pages.step32(cuda_optim, rule, key), problem.step32(reference_optim, rule, key))
    assert_same(at_pages.step8(cuda_optim, rule, key), problem.step8(reference_optim, rule, key))


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 4096])
def test_every_block_size_over_more_than_a_grid(cuda, shim, block_size):
    shim.device(90, 1)
    problem = Problem(40_001, (torch.bfloat16, torch.bfloat16), ("normal", "heavy", "normal"), block_size, 3)
    rule = adamw_rule(5, 1e-2, (0.9, 0.999), 1e-8, 0.1, 0.5)
    assert_same(problem.step8(cuda_optim, rule, 11), problem.step8(cpu_optim, rule, 11))
    assert_same(problem.step32(cuda_optim, rule, 11), problem.step32(cpu_optim, rule, 11))


@given(n=st.one_of(sizes, st.just(3 * 65536)), kind=kinds, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999))
def test_sums_of_squares_are_the_cpus_bit_for_bit(cuda, n, kind, dtype, seed):
    tensors = [weight(kind, n, seed, dtype), weight("normal", 5, seed), weight(kind, n // 2, seed, dtype)[::3]]
    tensors[0] = guarded(tensors[0], end=seed % 2 == 0, alignment=None, read_only=True)
    found = cuda_optim.sums_of_squares(tensors)
    expected = [cpu_optim.sum_of_squares(x) for x in tensors]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_on_a_gpu_has_the_cpus_bits(on_gpu, monkeypatch, options):
    ours, theirs = Run(**options), Run(**options)
    ours.steps(4)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_optim, "serves", lambda tensor: False)
        theirs.steps(4)
    assert_same_runs(ours, theirs)


def parameters(count=3, n=5000):
    found = [torch.nn.Parameter(weight("normal", n, seed)) for seed in range(count)]
    for seed, param in enumerate(found):
        param.grad = weight("normal", n, 100 + seed)
    return found


def test_clipping_has_the_cpus_bits(on_gpu, monkeypatch):
    params = parameters()
    norm, scale = clip_scale(params, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_optim, "serves", lambda tensor: False)
        expected = clip_scale(params, 1.0)
    assert (float(norm), scale) == (float(expected[0]), expected[1])


def test_the_first_parameter_with_a_refused_block_is_named_once_all_have_been_updated(on_gpu):
    params = parameters(310, 4096)  # more than fit into one tensor of findings
    for number, place in ((300, 300), (280, 4000), (281, 0)):
        params[number].grad[place] = math.nan
    before = [param.detach().clone() for param in params]
    with pytest.raises(NonFiniteError, match=r"the gradient of parameter 280 .*the moments of block 15") as error:
        AdamW(params, bits=8).step()
    assert error.value.index == 15 * 256
    for number, (param, old) in enumerate(zip(params, before, strict=True)):
        blocks = (param.detach() == old).view(16, 256).all(1)
        assert blocks.nonzero().flatten().tolist() == {300: [1], 280: [15], 281: [0]}.get(number, [])


def test_what_a_step_reads_back(on_gpu, cuda, monkeypatch):
    """Once a step with 8-bit moments, never one with fp32 moments, and once for a norm, however many parameters."""
    read = []
    whole = torch.Tensor.tolist

    def tolist(tensor):
        read.append(tensor.numel())
        return whole(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    params = parameters()
    for bits, expected in ((8, 1), (32, 0)):
        optimizer = AdamW(params, bits=bits)
        read.clear()
        optimizer.step()
        assert len(read) == expected
    read.clear()
    clip_scale(params, 1.0)
    assert len(read) == 1


def test_a_parameter_that_is_not_contiguous_is_refused_and_one_of_no_elements_is_not(cuda):
    rule = adamw_rule(1, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    with pytest.raises(LayoutError, match="strides"):
        cuda_optim.adamw_32bit(torch.zeros(16, 8).t(), torch.zeros(8, 16), torch.zeros(128), torch.zeros(128), rule)
    empty, codes = torch.zeros(0), torch.zeros(0, dtype=torch.uint8)
    cuda_optim.adamw_32bit(empty, empty, empty, empty, rule)
    cuda_optim.adamw_8bit(empty, empty, codes, codes, empty, empty, 256, rule)
    assert cuda_optim.sums_of_squares([empty]) == [0.0]
    assert cuda_optim.sums_of_squares([]) == []


def test_autograd_is_told_of_the_change(cuda):
    param = torch.zeros(64, requires_grad=True)
    product = (param * param).sum()
    rule = adamw_rule(1, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    with torch.no_grad():
        cuda_optim.adamw_32bit(param, torch.ones(64), torch.zeros(64), torch.zeros(64), rule)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_same_bits_whatever_runs_first(cuda, shim):
    problem = Problem(70_001, (torch.bfloat16, torch.float32), ("normal", "heavy", "normal"), 256, 3)
    rule = adamw_rule(5, 1e-2, (0.9, 0.999), 1e-8, 0.1, 0.5)
    found = []
    for seed, schedule in enumerate(("in order", "reverse", "random", "random")):
        shim.schedule(schedule)
        shim.seed(seed)
        squares = torch.tensor([cuda_optim.sum_of_squares(problem.grad)])
        found.append([*problem.step32(cuda_optim, rule, 11), *problem.step8(cuda_optim, rule, 11), squares])
    for other in found[1:]:
        assert_same(other, found[0])
