"""AdamW of the loop: torch's rule, state that survives every way of being kept, clipping in the same pass."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from typing import Any

import pytest
import torch
from codec.equality import assert_same_bits
from torch import Tensor, nn

from nybble import _core, reference, reference_optim
from nybble.errors import LayoutError, NonFiniteError, UnsupportedDtypeError
from nybble.formats import dynamic_map
from nybble.training.optim import AdamW, build_optimizer, clip_scale, state_bytes, step_scaled


class Run:
    """A small regression problem: a matrix large enough for 8 bits, and a bias that is not."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, 96, generator=generator)
        self.y = self.x @ torch.randn(96, 64, generator=generator) + torch.randn(64, generator=generator)
        self.weight = nn.Parameter(torch.zeros(96, 64, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(64, dtype=dtype))
        self.optimizer = AdamW([self.weight, self.bias], **{"lr": 0.02, "weight_decay": 0.0, **options})

    def loss(self) -> Tensor:
        return (self.x @ self.weight.float() + self.bias.float() - self.y).square().mean()

    def steps(self, count: int) -> float:
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
        return float(self.loss().detach())

    def tensors(self) -> list[Tensor]:
        state = [self.optimizer.state[p] for p in (self.weight, self.bias)]
        return [self.weight.detach(), self.bias.detach(), *(one[name] for one in state for name in sorted(one))]


def assert_same(a: Run, b: Run) -> None:
    for ours, theirs in zip(a.tensors(), b.tensors(), strict=True):
        assert_same_bits(ours, theirs)


OPTIONS = [
    {"bits": 32},
    {"bits": 8},
    {"bits": 8, "dtype": torch.bfloat16},
    {"bits": 32, "dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3},
    {"bits": 8, "block_size": 64, "dtype": torch.float16},
]


def through_torch_save(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load, save

    tensors = {f"{number}.{key}": value for number, one in state["state"].items() for key, value in one.items()}
    loaded: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load(save(tensors)).items():
        number, key = name.split(".")
        loaded.setdefault(int(number), {})[key] = tensor
    return {"state": loaded, "param_groups": state["param_groups"]}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", [lambda state: state, copy.deepcopy, through_torch_save, through_safetensors])
def test_a_run_goes_on_from_saved_state_bit_for_bit(options: dict[str, Any], way: Any) -> None:
    whole, first, second = Run(**options), Run(**options), Run(**options)
    whole.steps(9)
    first.steps(4)
    saved = way(first.optimizer.state_dict())
    second.weight.data.copy_(first.weight.data)
    second.bias.data.copy_(first.bias.data)
    second.optimizer.load_state_dict(saved)
    assert_same(second, first)
    second.steps(5)
    assert_same(second, whole)
    for one in saved["state"].values():  # what was loaded is a copy
        assert int(one["step"]) == 4


@pytest.mark.parametrize("options", OPTIONS)
def test_pickle_and_deepcopy_keep_everything(options: dict[str, Any]) -> None:
    whole, run = Run(**options), Run(**options)
    whole.steps(6)
    run.steps(3)
    for copied in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        copied.steps(3)
        assert_same(copied, whole)
    run.steps(3)
    assert_same(run, whole)


def test_state_is_what_its_docstring_says() -> None:
    run = Run(torch.bfloat16, bits=8, block_size=256)
    run.steps(1)
    big, small = run.optimizer.state[run.weight], run.optimizer.state[run.bias]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in big.items()} == {
        "step": (torch.int64, ()),
        "exp_avg": (torch.uint8, (96, 64)),
        "exp_avg_sq": (torch.uint8, (96, 64)),
        "exp_avg_absmax": (torch.float32, (24,)),
        "exp_avg_sq_absmax": (torch.float32, (24,)),
    }
    assert {name: t.dtype for name, t in small.items()} == {
        "step": torch.int64,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }
    assert state_bytes(run.optimizer) == 8 + 2 * 96 * 64 + 2 * 24 * 4 + 8 + 2 * 64 * 4


def test_steps_are_torchs() -> None:
    """The gradients of later steps depend on earlier roundings, so this is a smoke test; bounds: tests/kernels."""
    ours, theirs = Run(weight_decay=0.1, eps=1e-6), Run(weight_decay=0.1, eps=1e-6)
    options = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6}
    theirs.optimizer = torch.optim.AdamW([theirs.weight, theirs.bias], **options)  # type: ignore[assignment]
    ours.steps(20), theirs.steps(20)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(ours.optimizer.state[ours.weight][name], theirs.optimizer.state[theirs.weight][name])
    assert int(ours.optimizer.state[ours.weight]["step"]) == 20
    ours.steps(1)


def test_8_bits_converge_as_32_do() -> None:
    losses = {bits: Run(bits=bits).steps(400) for bits in (32, 8)}
    start = Run().steps(0)
    assert losses[32] < 1e-3 * start
    assert losses[8] < 2 * losses[32]  # measured: 1.5 times, where 32 bits are 20 steps earlier


def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses() -> None:
    """Updates of lr = 1e-3 are below half a unit in the last place of bf16 weights near 1 (2^-8)."""

    def distance(**options: Any) -> float:
        weight = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-3, weight_decay=0.0, **options)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return float((weight.detach().float() - 1.0).mean())

    assert distance() == 0.0
    for bits in (8, 32):
        assert distance(bits=bits, stochastic_rounding=True) == pytest.approx(-0.1, rel=0.02)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_scale_is_as_good_as_clipping_first(bits: int) -> None:
    """A power of two multiplies exactly: both ways have the same bits. Any other factor is rounded once in either."""
    scaled, clipped = Run(bits=bits), Run(bits=bits)
    for run in (scaled, clipped):
        run.loss().backward()
    norm, scale = clip_scale([scaled.weight, scaled.bias], 0.5)
    before = scaled.weight.grad.clone()  # type: ignore[union-attr]
    expected = nn.utils.clip_grad_norm_([clipped.weight, clipped.bias], 0.5)
    assert norm.dtype == torch.float32 and norm.shape == () and 0 < scale < 1
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    scaled.optimizer.step(grad_scale=scale)
    assert_same_bits(scaled.weight.grad, before)
    clipped.optimizer.step()
    torch.testing.assert_close(scaled.weight, clipped.weight, rtol=1e-5, atol=1e-7)
    exact, multiplied = Run(bits=bits), Run(bits=bits)
    for run in (exact, multiplied):
        run.loss().backward()
    exact.optimizer.step(grad_scale=0.25)
    for param in (multiplied.weight, multiplied.bias):
        param.grad.mul_(0.25)  # type: ignore[union-attr]
    multiplied.optimizer.step()
    assert_same(exact, multiplied)


def test_clip_scale_of_small_no_and_bad_gradients() -> None:
    param, without = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    assert clip_scale([without], 1.0) == (torch.tensor(0.0), 1.0)
    param.grad = torch.tensor([3.0, 4.0, 0.0])
    assert clip_scale([param, without], 10.0) == (torch.tensor(5.0), 1.0)
    assert clip_scale([param], None) == (torch.tensor(5.0), 1.0)
    assert clip_scale([param], 1.0)[1] == pytest.approx(0.2, rel=1e-6)
    param.grad[2] = math.inf
    norm, scale = clip_scale([param], 1.0)
    assert norm == math.inf and scale == 0.0
    param.grad[1] = math.nan
    norm, scale = clip_scale([param], 1.0)
    assert math.isnan(norm) and math.isnan(scale)
    with pytest.raises(ValueError, match="grad_scale must be finite, got nan"):
        AdamW([param]).step(grad_scale=scale)
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        clip_scale([param], 0.0)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_parameter_with_other_strides_takes_the_references_way(bits: int) -> None:
    straight = Run(bits=bits)
    turned = Run(bits=bits)
    turned.weight = nn.Parameter(torch.zeros(64, 96).t())
    turned.optimizer = AdamW([turned.weight, turned.bias], lr=0.02, weight_decay=0.0, bits=bits)
    for run in (straight, turned):
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            run.weight.grad = torch.randn(96, 64, generator=generator)
            run.optimizer.step()
    assert not turned.weight.is_contiguous()
    assert_same_bits(straight.weight.detach(), turned.weight.detach())


def test_sparse_complex_and_other_dtypes_are_refused() -> None:
    embedding = nn.Embedding(8, 4, sparse=True)
    dense = nn.Parameter(torch.ones(3))
    optimizer = AdamW([("plain", dense), ("embedding", embedding.weight)])
    (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match="parameter 'embedding' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    with pytest.raises(UnsupportedDtypeError, match=r"parameter 0 of its group has dtype torch\.complex64"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(UnsupportedDtypeError, match=r"torch\.float64"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(UnsupportedDtypeError, match="stochastic_rounding is for bfloat16"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.float16))], stochastic_rounding=True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, "betas must be a number of at least 0 and below 1, each, got 1.0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps must"),
        ({"weight_decay": "much"}, "weight_decay must be a number of at least 0, got 'much'"),
        ({"bits": 4}, "bits must be 8 or 32, got 4"),
        ({"block_size": 100}, "block_size is 100"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"stochastic_rounding": 1}, "stochastic_rounding must be True or False, got 1"),
    ],
)
def test_bad_options_are_named_in_groups_too(options: dict[str, Any], what: str) -> None:
    param, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=what):
        AdamW([param], **options)
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match=what):
        optimizer.add_param_group({"params": [other], **options})
    assert len(optimizer.param_groups) == 1


def test_state_that_does_not_fit_changes_nothing() -> None:
    run = Run(bits=8)
    run.steps(2)
    good = copy.deepcopy(run.optimizer.state_dict())
    before = [t.clone() for t in run.tensors()]

    def spoiled(**changes: Any) -> dict[str, Any]:
        state = copy.deepcopy(good)
        state["state"][0] = {k: v for k, v in {**state["state"][0], **changes}.items() if v is not None}
        return state

    for state, what in (
        (spoiled(exp_avg=torch.zeros(96, 64)), r"saved exp_avg is torch\.float32 \(96, 64\); uint8 \(96, 64\)"),
        (spoiled(exp_avg_sq_absmax=torch.zeros(23)), r"exp_avg_sq_absmax is torch\.float32 \(23,\).*\(24,\)"),
        (spoiled(exp_avg_sq=None), "its saved state holds"),
        (spoiled(max_exp_avg_sq=torch.zeros(96, 64)), "its saved state holds"),
    ):
        with pytest.raises(LayoutError, match=what):
            run.optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="parameter group"):
        run.optimizer.load_state_dict({**good, "param_groups": good["param_groups"] * 2})
    for a, b in zip(run.tensors(), before, strict=True):
        assert_same_bits(a, b)


def test_a_gradient_that_is_not_finite_is_an_error_with_8_bits() -> None:
    weight = nn.Parameter(torch.ones(4096))
    optimizer = AdamW([("layer.weight", weight)], bits=8)
    weight.grad = torch.full_like(weight, math.inf)
    with pytest.raises(NonFiniteError, match=r"the gradient of parameter 'layer\.weight': the moments of block 0"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(4096))


def test_the_compiled_step_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("adamw_8bit", "adamw_32bit"):
        kernel = getattr(_core, name)
        monkeypatch.setattr(_core, name, lambda *a, k=kernel, n=name: (called.append(n), k(*a)))
    Run(bits=8).steps(1)
    assert called == ["adamw_8bit", "adamw_32bit"]


def test_closures_schedulers_and_parameters_without_gradient() -> None:
    run = Run()
    idle = nn.Parameter(torch.ones(5))
    run.optimizer.add_param_group({"params": [idle], "lr": 0.1})
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss()
        loss.backward()
        return loss

    first = run.optimizer.step(closure)
    scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    assert run.optimizer.step(closure) < first
    assert torch.equal(idle, torch.ones(5)) and idle not in run.optimizer.state


def test_optimizers_by_name() -> None:
    for name, kind, bits in (("adamw", AdamW, 32), ("adamw8bit", AdamW, 8), ("sgd", torch.optim.SGD, None)):
        param = nn.Parameter(torch.ones(4))
        groups = [{"params": [param], "weight_decay": 0.5}]
        optimizer = build_optimizer(name, groups, lr=0.5, betas=(0.8, 0.9), eps=1e-6)
        assert type(optimizer) is kind and optimizer.param_groups[0].get("bits") == bits
        assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 0.5
    param.grad = torch.ones(4)
    step_scaled(optimizer, 0.5)  # SGD: 1 - 0.5 * (0.5 + 0.5)
    assert torch.equal(param, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw8bit, lion, sgd; got 'adam'"):
        build_optimizer("adam", [param], lr=0.1)
    with pytest.raises(ValueError, match="stochastic_rounding goes with adamw"):
        build_optimizer("sgd", [param], lr=0.1, stochastic_rounding=True)


def test_lion_is_the_packages_or_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(4))
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'nybble\[lion\]'"):
        build_optimizer("lion", [param], lr=0.1)
    monkeypatch.delitem(sys.modules, "lion_pytorch")
    lion = pytest.importorskip("lion_pytorch")
    optimizer = build_optimizer("lion", [param], lr=0.125, betas=(0.9, 0.99))
    assert isinstance(optimizer, lion.Lion)
    param.grad = torch.full((4,), 3.0)
    step_scaled(optimizer, 0.1)
    assert torch.equal(param, torch.full((4,), 0.875))  # Lion takes the sign


@pytest.mark.bitsandbytes
def test_one_step_from_the_same_8bit_state_is_bitsandbytes() -> None:
    """From codes and scales that both decode alike, both take the step in fp32, so parameters differ by rounding alone.

    The state after it is compared by value: each side stores, of moments that agree to rounding, a code within a gap of
    the map. (bitsandbytes' own encoder is off by more: it turns exact zeros into 2e-5 of the scale. So no later step
    is compared.)
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(4)
    n, lr, decay, beta1, beta2, eps = 8192, 1e-2, 0.1, 0.9, 0.999, 1e-8
    start, grad = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    m_map, v_map = dynamic_map(True), dynamic_map(False)
    m = reference.quantize_8bit(torch.randn(n, generator=generator) * 0.1, m_map, 256)
    v = reference.quantize_8bit(torch.rand(n, generator=generator) + 0.1, v_map, 256)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours.grad, theirs.grad = grad.clone(), grad.clone()
    optimizer = AdamW([ours], lr, (beta1, beta2), eps, decay, bits=8)
    state = {"exp_avg": m[0], "exp_avg_sq": v[0], "exp_avg_absmax": m[1], "exp_avg_sq_absmax": v[1]}
    saved = {"state": {0: {"step": torch.tensor(6), **state}}, "param_groups": optimizer.state_dict()["param_groups"]}
    optimizer.load_state_dict(saved)
    optimizer.step()
    peer = bitsandbytes.optim.AdamW8bit([theirs], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    peer.init_state(peer.param_groups[0], theirs, 0, 0)
    peer_state = peer.state[theirs]
    peer_state["step"] = 6
    for name, tensor in zip(("state1", "state2", "absmax1", "absmax2"), (m[0], v[0], m[1], v[1]), strict=True):
        peer_state[name].copy_(tensor)
    peer.step()
    # As in tests/kernels: 18 u of the longest step, 4 u of the parameter, for each side.
    u, old_m = 2.0**-24, reference.dequantize_8bit(*m, m_map, 256, torch.float32)
    old_v = reference.dequantize_8bit(*v, v_map, 256, torch.float32)
    size = beta1 * old_m.abs() + (1 - beta1) * grad.abs()
    root = ((beta2 * old_v + (1 - beta2) * grad.square()) / (1 - beta2**7)).sqrt()
    move = lr / (1 - beta1**7) * size / (root + eps)
    assert bool(((ours - theirs).abs() <= 2 * (18 * u * move + 4 * u * start.abs())).all())
    for code, scale, table, name in (
        ("state1", "absmax1", m_map, "exp_avg"),
        ("state2", "absmax2", v_map, "exp_avg_sq"),
    ):
        torch.testing.assert_close(peer_state[scale], optimizer.state[ours][f"{name}_absmax"], rtol=8 * u, atol=0)
        a = table[peer_state[code].long()]
        b = table[optimizer.state[ours][name].long()]
        assert bool(((a - b).abs() <= 2 * (table[1:] - table[:-1]).max()).all())


def test_zero_state_decodes_to_zero() -> None:
    for signed in (True, False):
        codes, scales = reference_optim.empty_moment(torch.zeros(300), 256, signed)
        values = reference.dequantize_8bit(codes, scales, dynamic_map(signed), 256, torch.float32)
        assert_same_bits(values, torch.zeros(300))
