"""Layers and training on a GPU beside the CPU: gradients, autocast, torch.compile, the optimizer, a QLoRA step."""

from __future__ import annotations

import copy
from typing import Any

import gpu.needed  # noqa: F401  (skips this file without a GPU)
import pytest
import torch
from codec.equality import assert_same_bits
from torch import Tensor, nn

import nybble
from nybble import LoRALinear, QuantConfig, QuantLinear, ops
from nybble.backends import cuda
from nybble.training.optim import AdamW, clip_scale

CONFIGS = {
    "nf4": QuantConfig(),
    "int8": QuantConfig(format="int8", double_quant=False),
    "int4-128": QuantConfig(format="int4", block_size=128, double_quant=False),
}


def lora_layer(config: QuantConfig, n: int, k: int, dtype: torch.dtype) -> LoRALinear:
    """On the CPU, B as after training."""
    torch.manual_seed(0)
    base = QuantLinear.from_linear(nn.Linear(k, n, dtype=dtype), config)
    layer = LoRALinear.from_base(base, r=16, alpha=32)
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer


def step(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward, on the CPU."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    named = {n.removeprefix("_orig_mod."): p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {name: t.detach().float().cpu() for name, t in {"y": y, "x": x.grad, **named}.items() if t is not None}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative error of each tensor as a whole: independent rounding errors do not add up to more than a few units."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance}"


# Inputs, weights and each of up to three products in a row are rounded once to the dtype; fp32 only sums in another
# order. fp16's and bf16's units are 2^-11 and 2^-8.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("config", list(CONFIGS))
def test_gradients_through_lora_are_those_of_the_cpu(gpu: torch.device, config: str, dtype: torch.dtype) -> None:
    layer = lora_layer(CONFIGS[config], 320, 512, dtype)
    there = copy.deepcopy(layer).to(gpu)
    for rows in ((3,), (2, 40), (300,)):
        torch.manual_seed(sum(rows))
        x, g = torch.randn(*rows, 512).to(dtype), torch.randn(*rows, 320).to(dtype)
        assert_near(step(there, x.to(gpu), g.to(gpu)), step(layer, x, g), TOLERANCE[dtype])


def test_a_new_lora_layer_gives_exactly_the_output_of_its_base(gpu: torch.device) -> None:
    base = QuantLinear.from_linear(nn.Linear(512, 256, device=gpu, dtype=torch.bfloat16))
    layer = LoRALinear.from_base(base, r=16, alpha=32).to(gpu)
    for m in (1, 16, 17, 300):
        x = torch.randn(m, 512, device=gpu, dtype=torch.bfloat16)
        assert torch.equal(layer(x), base(x)), m


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_keeps_values_and_gradients(gpu: torch.device, mode: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(
        lora_layer(CONFIGS["nf4"], 512, 256, torch.bfloat16),
        nn.GELU(),
        QuantLinear.from_linear(nn.Linear(512, 128, dtype=torch.bfloat16)),
    ).to(gpu)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    torch.manual_seed(1)
    x, g = (torch.randn(24, size, device=gpu, dtype=torch.bfloat16) for size in (256, 128))
    expected = step(model, x, g)
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(step(compiled, x, g), expected, 4 * 2.0**-8)
    with torch.no_grad():
        for turn in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            inputs = torch.randn(1, 256, device=gpu, dtype=torch.bfloat16)
            assert_near({"y": compiled(inputs).float().cpu()}, {"y": model(inputs).float().cpu()}, 2.0**-7), turn


def test_torch_compiles_graphs_may_be_the_first_to_use_a_stream(gpu: torch.device) -> None:
    # Its warm-up allocates from a private pool in which nothing may stay alive: the workspace must come from elsewhere.
    torch._dynamo.reset()
    cuda._workspaces.clear()
    layer = QuantLinear.from_linear(nn.Linear(4096, 64, device=gpu, dtype=torch.bfloat16))
    compiled = torch.compile(layer, mode="reduce-overhead")
    x = torch.randn(1, 4096, device=gpu, dtype=torch.bfloat16)
    with torch.no_grad():
        results = [compiled(x).clone() for _ in range(4)]
        assert all(torch.equal(result, layer(x)) for result in results)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(gpu: torch.device, cast: torch.dtype) -> None:
    layer = lora_layer(CONFIGS["nf4"], 96, 128, torch.float32).to(gpu)
    x = torch.randn(20, 128, device=gpu, requires_grad=True)
    with torch.autocast("cuda", dtype=cast):
        y = layer(x)
    assert y.dtype == cast
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    with torch.no_grad():
        assert_near(
            {"y": y.float().cpu()}, {"y": layer(x).cpu()}, 4 * (2.0**-8 if cast == torch.bfloat16 else 2.0**-11)
        )


def test_opcheck(gpu: torch.device) -> None:
    weight = QuantLinear.from_linear(nn.Linear(64, 32, device=gpu)).packed_weight()
    x = torch.randn(5, 64, device=gpu, requires_grad=True)
    a, b = (torch.randn(*shape, device=gpu, requires_grad=True) for shape in ((4, 64), (32, 4)))
    torch.library.opcheck(torch.ops.nybble.linear, (x, *weight, None, None, None))
    torch.library.opcheck(torch.ops.nybble.lora_linear, (x, *weight, None, a, b, 2.0))
    torch.library.opcheck(torch.ops.nybble.grad_input, (b.detach().t().contiguous(), *weight, None, None))


def test_eager_traced_and_differentiated_agree(gpu: torch.device) -> None:
    weight = QuantLinear.from_linear(nn.Linear(256, 128, device=gpu, dtype=torch.bfloat16)).packed_weight()
    for m in (1, 40):
        x = torch.randn(m, 256, device=gpu, dtype=torch.bfloat16)
        eager = ops.linear(x, weight)
        assert torch.equal(eager, torch.ops.nybble.linear(x, *weight, None, None, None))
        assert torch.equal(eager, ops.linear(x.clone().requires_grad_(), weight))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_has_the_bits_of_the_cpu(gpu: torch.device, dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, 96), (7,), (5000,), (1, 4097))
    start = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    options = {"lr": 0.01, "bits": bits, "weight_decay": 0.1, "stochastic_rounding": dtype == torch.bfloat16}
    runs = []
    for device in ("cpu", gpu):
        parameters = [nn.Parameter(value.clone().to(device)) for value in start]
        optimizer = AdamW(parameters, **options)
        for turn in range(4):
            gradients = torch.Generator().manual_seed(turn)
            for parameter in parameters:
                parameter.grad = torch.randn(*parameter.shape, generator=gradients).to(dtype).to(device)
            optimizer.step(grad_scale=0.7)
        runs.append([(p.detach().cpu(), {k: v.cpu() for k, v in optimizer.state[p].items()}) for p in parameters])
    for (ours, our_state), (theirs, their_state) in zip(runs[1], runs[0], strict=True):
        assert_same_bits(ours, theirs)
        for name, value in their_state.items():
            assert_same_bits(our_state[name], value, name)


def test_clipping_measures_the_norm_of_the_cpu(gpu: torch.device) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 1000, 70_000)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    there = [nn.Parameter(p.detach().to(gpu)) for p in parameters]
    for parameter, other in zip(there, parameters, strict=True):
        parameter.grad = other.grad.to(gpu)
    ours, theirs = clip_scale(there, 0.5), clip_scale(parameters, 0.5)
    assert [float(value) for value in ours] == pytest.approx([float(value) for value in theirs], rel=1e-6)


def qlora(dtype: torch.dtype) -> Any:
    """A Llama of two layers, quantized, with LoRA that does something; on the CPU."""
    from tiny import llama

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama(dtype, **sizes)
    nybble.quantize_(model)
    nybble.add_lora(model, r=8, alpha=16)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_qlora_step_of_a_llama_is_that_of_the_cpu(gpu: torch.device, dtype: torch.dtype) -> None:
    model = qlora(dtype)
    results = []
    tokens = torch.randint(1, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    for device in ("cpu", gpu):
        twin = copy.deepcopy(model).to(device)
        loss = twin(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        loss.backward()
        gradients = {n: p.grad.float().cpu() for n, p in twin.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach().float().cpu().reshape(1), **gradients})
    # Attention, norms and the loss are other code on either side; in bf16 each has roundings of 2^-8 of its own.
    assert_near(results[1], results[0], 1e-3 if dtype == torch.float32 else 0.08)


def test_fine_tuning_learns_what_the_cpu_learns(gpu: torch.device) -> None:
    from tiny import TEXT

    tokens = torch.tensor(list(TEXT.encode()))
    config = nybble.TrainConfig(steps=5, batch_size=2, seq_len=64, lr=1e-3, warmup_steps=0, dtype="fp32")
    model = qlora(torch.float32)
    losses = []
    for device in ("cpu", gpu):
        report = nybble.finetune(copy.deepcopy(model).to(device), tokens, config, show=False)
        losses.append(report.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_layer_moves_there_and_back_without_losing_a_bit(gpu: torch.device) -> None:
    layer = QuantLinear.from_linear(nn.Linear(130, 70, dtype=torch.bfloat16))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.to(gpu)
    layer(torch.randn(3, 130, device=gpu, dtype=torch.bfloat16))
    layer.to("cpu")
    for key, value in before.items():
        assert_same_bits(layer.state_dict()[key], value, key)


def test_explain_names_what_runs(gpu: torch.device) -> None:
    layer = QuantLinear.from_linear(nn.Linear(4096, 512, device=gpu, dtype=torch.bfloat16))
    few, many = nybble.explain(layer, m=1), nybble.explain(layer, m=4096)
    assert few.kernel == "linear_small_m" and "cuda" in few.device
    assert many.kernel != few.kernel and few.isa == many.isa and few.isa.startswith("sm_")
