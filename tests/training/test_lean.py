"""`lean`: the same losses and gradients to roundings, less saved, and a model that is afterwards as it was before."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from tiny import SETTINGS, llama, transformers
from torch import Tensor, nn

import nybble
from nybble.training.lean import ROTARY, lean

# Family, then how many norms and MLPs two of its layers have.
FAMILIES = {"Llama": (5, 2), "Mistral": (5, 2), "Qwen2": (5, 2), "Qwen3": (9, 2), "Gemma": (5, 2), "Phi3": (5, 2)}
IDS = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(3))


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of two layers, its norms' weights random too."""
    torch.manual_seed(1)
    settings = {**SETTINGS, "head_dim": 16, **changes}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5 if family == "Gemma" else 1.0, 0.2)
    return model.to(dtype).eval()


def step(model: nn.Module) -> tuple[float, Tensor]:
    """The loss, and the gradients of all trainable parameters as one vector."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def patched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in module.__dict__]


def rotary_function(model: nn.Module) -> Any:
    return getattr(sys.modules[type(model).__module__], ROTARY)


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_recognized_and_computes_the_same(family: str) -> None:
    """In fp32 all that differs are roundings of 2^-24, which two layers multiply by no more than some hundreds."""
    model = make(family)
    own = rotary_function(model)
    loss, gradient = step(model)
    with lean(model) as report:
        lean_loss, lean_gradient = step(model)
    norms, mlps = FAMILIES[family]
    assert report.norms == {f"{family}RMSNorm": norms} and report.mlps == {f"{family}MLP": mlps}
    assert report.rotary == [type(model).__module__] and not report.left
    assert abs(lean_loss - loss) < 1e-5 * loss and distance(lean_gradient, gradient) < 1e-5
    assert not patched(model) and rotary_function(model) is own
    again, gradient_again = step(model)
    assert again == loss and torch.equal(gradient_again, gradient)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "Mistral"])
def test_in_bf16_it_is_as_near_to_the_exact_gradient_as_the_model_itself(family: str) -> None:
    """The fused functions round once where the model rounds several times."""
    model = make(family, torch.bfloat16)
    exact_loss, exact = step(copy.deepcopy(model).float())
    loss, gradient = step(model)
    with lean(model):
        lean_loss, lean_gradient = step(model)
    assert distance(lean_gradient, exact) < 1.2 * distance(gradient, exact)
    assert abs(lean_loss - exact_loss) < max(2 * abs(loss - exact_loss), 2.0**-8 * exact_loss)


def test_norms_in_fp32_and_autocast_keep_their_dtypes() -> None:
    """Of every module's output: in a bf16 model, and under autocast in one with fp32 norms and in an fp32 one."""

    def dtypes(model: nn.Module, autocast: bool) -> list[tuple[str, torch.dtype]]:
        seen: list[tuple[str, torch.dtype]] = []
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: seen.append((name, output.dtype)))
            for name, module in model.named_modules()
            if name.endswith(("norm", "mlp", "o_proj"))
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        for handle in handles:
            handle.remove()
        return seen

    for family in ("Llama", "Qwen3", "Gemma"):
        mixed = make(family, torch.bfloat16)
        for module in mixed.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.float()
        for model, autocast in ((make(family, torch.bfloat16), False), (mixed, True), (make(family), True)):
            expected = dtypes(model, autocast)
            with lean(model):
                assert dtypes(model, autocast) == expected


def test_frozen_norms_and_quantized_adapted_projections() -> None:
    model = make("Llama")
    nybble.quantize_(model, nybble.QuantConfig())
    nybble.add_lora(model, nybble.LoRAConfig(r=4, alpha=8))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    loss, gradient = step(model)
    with lean(model) as report:
        lean_loss, lean_gradient = step(model)
    assert report.mlps == {"LlamaMLP": 2} and report.norms == {"LlamaRMSNorm": 5}
    assert abs(lean_loss - loss) < 1e-5 * loss and distance(lean_gradient, gradient) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_the_bits_stay(reentrant: bool) -> None:
    model = make("Llama", torch.bfloat16)
    model.enable_input_require_grads()
    with lean(model):
        loss, gradient = step(model)
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}})
        model.train()
        again, gradient_again = step(model)
    assert again == loss and torch.equal(gradient_again, gradient)


# ---- what is saved ---------------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> list[Tensor]:
    """What the decoder keeps for its backward pass, each memory once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=IDS)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return [tensor for address, tensor in kept.items() if address not in parameters]


def test_no_fp32_activation_is_saved_in_a_bf16_model() -> None:
    """But for one number a row, which norms and attention keep."""

    def fp32_activations(tensors: list[Tensor]) -> int:
        return sum(t.dtype == torch.float32 and t.numel() >= IDS.numel() * 16 for t in tensors)

    model = make("Qwen3", torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    plain = saved(model)
    with lean(model):
        fused = saved(model)
    assert fp32_activations(plain) >= 9 and fp32_activations(fused) == 0  # there are nine norms
    assert sum(t.untyped_storage().nbytes() for t in fused) < 0.75 * sum(t.untyped_storage().nbytes() for t in plain)


# ---- what is left as it was ------------------------------------------------------------------------------------------


def test_everything_is_restored_after_an_error() -> None:
    model = make("Llama")
    own = rotary_function(model)
    with pytest.raises(KeyError), lean(model):
        assert patched(model) and rotary_function(model) is not own
        raise KeyError
    assert not patched(model) and rotary_function(model) is own


def test_a_block_inside_another_does_nothing() -> None:
    model = make("Llama")
    own = rotary_function(model)
    with lean(model):
        outer, fused = patched(model), rotary_function(model)
        with lean(model) as inner:
            assert not (inner.norms or inner.mlps or inner.rotary)
        assert patched(model) == outer and len(outer) == 7 and rotary_function(model) is fused
    assert not patched(model) and rotary_function(model) is own


def test_random_numbers_gradients_and_modes_do_not_change() -> None:
    model = make("Llama").train()
    state = torch.get_rng_state()
    with torch.no_grad(), lean(model):
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), lean(model) as report:
        assert report.mlps and torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_copy_made_inside_has_its_own_weights() -> None:
    model = make("Llama")
    with lean(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        expected = step(copy.deepcopy(other))[0]
    assert step(other)[0] == pytest.approx(expected, rel=1e-6)
    assert step(model)[0] != pytest.approx(expected, rel=1e-3)


def test_hooks_run_and_arguments_may_be_named() -> None:
    model = make("Llama")
    norm, ran = model.model.norm, []
    norm.register_forward_hook(lambda *_: ran.append(True))
    x = torch.randn(2, 64)
    expected = norm(hidden_states=x)
    with lean(model):
        torch.testing.assert_close(norm(hidden_states=x), expected)
        torch.testing.assert_close(norm(x), expected)
        with pytest.raises(TypeError):
            norm(x, x)
    assert len(ran) == 3


class DoubledNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


class MaybeGatedNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class CappedMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    cap: float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.clamp(-self.cap, self.cap) if self.cap else y


def test_what_computes_something_else_is_left_alone() -> None:
    model = make("Llama")
    layers = model.model.layers
    model.model.norm = DoubledNorm(64)
    layers[0].input_layernorm = MaybeGatedNorm(64)
    for i, layer in enumerate(layers):
        capped = CappedMLP(model.config)
        capped.load_state_dict(layer.mlp.state_dict())
        capped.cap = 0.01 * i  # the first one computes what its class's base does
        layer.mlp = capped
    loss, gradient = step(model)
    with lean(model) as report:
        assert "forward" in layers[0].mlp.__dict__ and "forward" not in layers[1].mlp.__dict__
        lean_loss, lean_gradient = step(model)
    assert report.left == {"DoubledNorm": 1, "CappedMLP": 1}
    assert report.norms == {"LlamaRMSNorm": 3} and report.mlps == {"CappedMLP": 1}
    assert abs(lean_loss - loss) < 1e-5 * loss and distance(lean_gradient, gradient) < 1e-5
    assert "left as they are: 1 CappedMLP, 1 DoubledNorm" in str(report) or "1 DoubledNorm, 1 CappedMLP" in str(report)


def test_replaced_forwards_and_watched_activations_are_left_alone() -> None:
    model = make("Llama")
    own = model.model.norm.forward
    model.model.norm.forward = own
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    with lean(model) as report:
        assert model.model.norm.forward is own
        assert report.norms == {"LlamaRMSNorm": 4} and report.mlps == {"LlamaMLP": 1}
    assert model.model.norm.__dict__["forward"] is own


def test_an_interleaved_rotary_embedding_is_left_alone() -> None:
    model = make("Cohere", num_key_value_heads=4, head_dim=16)
    own = rotary_function(model)
    with lean(model) as report:
        assert rotary_function(model) is own and not report.rotary
        assert report.mlps == {"CohereMLP": 2}


def test_unknown_models_are_not_touched() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=256)
    for model in (transformers.GPT2LMHeadModel(config), nn.Linear(3, 3), nn.Sequential()):
        with lean(model) as report:
            assert not patched(model)
            assert str(report) == "fused: nothing"


def test_torch_s_own_rms_norm_is_recognized() -> None:
    model = nn.Sequential(nn.RMSNorm(40, eps=1e-5), nn.RMSNorm(40), nn.LayerNorm(40, bias=False))
    x = torch.randn(3, 40)
    expected = model(x)
    with lean(model) as report:
        assert report.norms == {"RMSNorm": 1}  # the second one's eps depends on the dtype
        torch.testing.assert_close(model(x), expected)


def test_the_report_is_readable() -> None:
    model = llama()
    with lean(model) as report:
        text = str(report)
    assert text == (
        "fused: 5 LlamaRMSNorm, 2 LlamaMLP, apply_rotary_pos_emb of transformers.models.llama.modeling_llama"
    )


def test_other_arguments_of_the_rotary_function_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    cos, sin = torch.randn(2, 2, 5, 8)
    own = rotary_function(model)
    expected = own(q, k, cos, sin, unsqueeze_dim=2)
    with lean(model):
        for actual, exact in zip(rotary_function(model)(q, k, cos, sin, unsqueeze_dim=2), expected, strict=True):
            assert torch.equal(actual, exact)
