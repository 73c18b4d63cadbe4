"""Experts computed one at a time on their packed bytes, beside transformers' products with decoded ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nybble
from nybble.nn import mixture
from nybble.nn.experts import computed_parameters

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "num_experts_per_tok": 2, "initializer_range": 0.1, "pad_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(num_local_experts=4, **SIZES)),
    "qwen3": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(num_experts=6, moe_intermediate_size=64, head_dim=32, **SIZES),
    ),
    # Transposed, with biases, gate and up interleaved.
    "gpt-oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig(num_local_experts=4, head_dim=32, **SIZES)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("mixtures")
    for name, (cls, config) in MODELS.items():
        torch.manual_seed(0)
        model = cls(copy.deepcopy(config))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("_bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(directory / name)
        nybble.quantize(directory / name, directory / f"{name}-nf4")
    return {path.name: path for path in directory.iterdir()}


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "_apply_gate"))


def run(model: Any, implementation: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the embedded text."""
    model.config._experts_implementation_internal = implementation
    embedded = torch.nn.Embedding.from_pretrained(torch.randn(96, 128, generator=torch.Generator().manual_seed(1)))(
        torch.arange(60).reshape(3, 20)
    ).requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(inputs_embeds=embedded).logits.float()
    (grad,) = torch.autograd.grad(logits.square().mean(), embedded)
    return logits.detach(), grad


@pytest.mark.parametrize("kind", ["", "-nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_transformers_does(models: dict[str, Path], name: str, kind: str) -> None:
    model: Any = nybble.load(models[name + kind], dtype=torch.float32).requires_grad_(False)
    assert model.config._experts_implementation == mixture.NAME
    assert bool(computed_parameters(experts_of(model))) == (kind == "-nf4")
    for ours, theirs in zip(run(model, mixture.NAME), run(model, "grouped_mm"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["", "-nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_that_of_linear_layers(models: dict[str, Path], name: str, kind: str) -> None:
    """bf16 as in nn.Linear; of one module, so that no token goes to another expert because of a rounding."""
    model: Any = nybble.load(models[name + kind], dtype=torch.float32).requires_grad_(False)
    experts, generator = experts_of(model), torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 128, generator=generator).requires_grad_()
    shares = torch.rand(50, 2, generator=generator).requires_grad_()
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(50)])

    def values(implementation: str, autocast: bool) -> list[Tensor]:
        experts.config._experts_implementation_internal = implementation
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = experts(hidden, index, shares)
        assert found.dtype == torch.float32
        return [found.detach(), *torch.autograd.grad(found.square().sum(), (hidden, shares))]

    for right, ours in zip(values("grouped_mm", False), values(mixture.NAME, True), strict=True):
        # Both operands of two products, and what lies between, rounded to 8 bits; not fp32, as transformers has it.
        assert 2**-10 < float((ours - right).norm()) / float(right.norm()) < 2**-6


def test_no_decoded_expert_is_kept(models: dict[str, Path]) -> None:
    model: Any = nybble.load(models["mixtral-nf4"], dtype=torch.float32).requires_grad_(False)
    model.requires_grad_(False)
    kept: dict[str, int] = {}
    for implementation in (mixture.NAME, "grouped_mm"):
        storages: dict[int, int] = {}

        def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(model, implementation)
        kept[implementation] = sum(storages.values())
    decoded = 2 * 4 * (2 * 128 * 128 + 128 * 128) * 4
    assert kept["grouped_mm"] - kept[mixture.NAME] > 0.9 * decoded, kept


def test_trained_experts_are_transformers(models: dict[str, Path]) -> None:
    model: Any = nybble.load(models["mixtral"], dtype=torch.float32)
    model.requires_grad_(False)
    experts = experts_of(model)
    experts.down_proj.requires_grad_()
    model(input_ids=torch.arange(20)[None]).logits.square().mean().backward()
    assert float(experts.down_proj.grad.abs().max()) > 0


def test_casting_and_moving_leave_no_old_weights_behind(models: dict[str, Path]) -> None:
    model: Any = nybble.load(models["mixtral-nf4"], dtype=torch.float32).requires_grad_(False)
    first = run(model, mixture.NAME)[0]
    other: Any = nybble.load(models["mixtral-nf4"], dtype=torch.float32).requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key in [key for key in state if key.endswith("w2.weight")]:
        state[key] = state[key].flip(0)
    other.load_state_dict(state)
    model.load_state_dict(state)
    changed = run(model, mixture.NAME)[0]
    assert not torch.equal(first, changed)
    assert torch.equal(changed, run(other, mixture.NAME)[0])
    assert torch.equal(changed, run(copy.deepcopy(model), mixture.NAME)[0])


def test_blocks_that_belong_to_two_experts_are_decoded(models: dict[str, Path]) -> None:
    """16 x 24 elements are 6 blocks of 64, and 256 of these share a nested scale."""
    weight = nybble.QuantTensor.quantize(torch.randn(4, 16, 24))
    owner = torch.nn.Module()
    owner.register_parameter("down_proj", torch.nn.Parameter(torch.empty(0)))
    from nybble.nn.experts import keep_packed

    keep_packed(owner, "down_proj", weight, torch.float32)
    (decoder,) = computed_parameters(owner).values()
    assert decoder.expert(weight.packed, 0) is None
    plain = nybble.QuantTensor.quantize(torch.randn(4, 16, 24), nybble.QuantConfig(double_quant=False))
    keep_packed(owner, "down_proj", plain, torch.float32)
    (part,) = decoder.expert(plain.packed, 3) or ()
    assert torch.equal(part.dequantize(), plain.dequantize()[3])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_any_spread_over_experts(models: dict[str, Path], tokens: int, k: int, seed: int, dtype: torch.dtype) -> None:
    """Against the sum as it is defined, in float64; experts that no token goes to among them."""
    generator = torch.Generator().manual_seed(seed)
    experts: Any = _experts(models)
    weights = {name: getattr(experts, name).detach().double() for name in ("gate_up_proj", "down_proj")}
    hidden = torch.randn(tokens, 128, generator=generator).to(dtype).requires_grad_()
    index = torch.stack(
        [torch.randperm(4, generator=generator)[:k] for _ in range(tokens)] or [torch.empty(0, k).long()]
    )
    index = index.reshape(tokens, k)
    shares = torch.rand(tokens, k, generator=generator).requires_grad_()
    exact_hidden, exact_shares = (x.detach().double().requires_grad_() for x in (hidden, shares))
    pull = torch.randn(tokens, 128, generator=generator).to(dtype)
    rows, sizes = [], torch.zeros(tokens, k, dtype=torch.float64)
    for t in range(tokens):
        row = torch.zeros(128, dtype=torch.float64)
        for j in range(k):
            down = weights["down_proj"][index[t, j]]
            gate, up = (exact_hidden[t] @ weights["gate_up_proj"][index[t, j]].t()).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            row = row + exact_shares[t, j] * (inner @ down.t())
            # A share's gradient is the product of these two, and may cancel out.
            sizes[t, j] = inner.detach().norm() * (pull[t].double() @ down).norm()
        rows.append(row)
    expected = torch.stack(rows) if rows else exact_hidden * 0
    found = mixture.forward(experts, hidden, index, shares)
    assert found.dtype == dtype and found.shape == (tokens, 128)
    # In bf16 eight roundings of 2^-9 lie on a path: weights, what is before and after the gate, the products.
    bound = 1e-5 if dtype == torch.float32 else 2**-5
    assert float((found - expected).detach().norm()) <= bound * float(expected.detach().norm())
    ours = torch.autograd.grad(found, (hidden, shares), pull)
    theirs = torch.autograd.grad(expected, (exact_hidden, exact_shares), pull.double(), allow_unused=True)
    if tokens:
        assert float((ours[0] - theirs[0]).norm()) <= bound * float(theirs[0].norm())
        assert bool(((ours[1] - theirs[1]).abs() <= bound * sizes).all())


_loaded: dict[str, Any] = {}


def _experts(models: dict[str, Path]) -> Any:
    if "experts" not in _loaded:
        _loaded["experts"] = experts_of(nybble.load(models["mixtral-nf4"], dtype=torch.float32).requires_grad_(False))
    return _loaded["experts"]
