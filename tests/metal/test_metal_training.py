"""A step of QLoRA on Metal's kernels, in the shim, beside the same step on the CPU's: a Llama of two layers.

`pytest -s` shows the losses, and how far the gradients are from each other and from the exact ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from shim.metal.library import Schedule
from tiny import llama
from torch import Tensor
from torch.nn import functional

from nybble import LoRAConfig, QuantConfig, QuantLinear, TrainConfig, add_lora, ops, quantize_
from nybble.recomputation import saving_first
from nybble.training import mode

IDS = torch.randint(1, 250, (2, 21), generator=torch.Generator().manual_seed(3))
LAYERS = 2 * 7  # q, k, v, o, gate, up, down
GRADIENTS = LAYERS - 3  # what is below the first q, k and v does not train
DTYPES = [torch.float32, torch.bfloat16]
# Both sides round the same numbers about as often. So Metal's errors are of the size of the CPU's, which float64 tells;
# of thousands of independent roundings the norms agree to percents, and twice the CPU's is allowed. Only the distance
# from the exact step counts: with NF4 in fp32 the shim's matrices and the CPU's kernels sum in the same order, fused,
# and agree to the bit, which a GPU need not.
ALLOWED = 2.0
# A loss is one number, whose error may be next to nothing by chance: it is a mean of a token's losses, each of which
# has at least the rounding of the dtype that the logits are in, relative to logits of a few units.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


class Step(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]  # of all that is trained


def with_lora(model: Any) -> Any:
    """Updates that are not zero, so that both factors have gradients."""
    add_lora(model, LoRAConfig(r=4, alpha=8, target=["*_proj"]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def quantized(dtype: torch.dtype, format: str) -> Any:
    model = llama(dtype)
    quantize_(model, QuantConfig(format), skip=("lm_head",))
    return with_lora(model)


def exact(model: Any) -> Any:
    """`model` with dense weights, in float64: no kernel of nybble's takes part, nor the fp32 of transformers' norms."""
    wide = llama(torch.float64)
    theirs = dict(model.named_modules())
    for name, module in wide.named_modules():
        own = theirs[name].base if isinstance(getattr(theirs[name], "base", None), QuantLinear) else theirs[name]
        if isinstance(own, QuantLinear):
            module.weight.data = own.dequantize(torch.float32).double()
        elif getattr(module, "weight", None) is not None:
            module.weight.data = own.weight.detach().double()
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(_norm, module)
    return with_lora(wide).double()


def _norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def step(model: Any, checkpointing: bool = False) -> Step:
    model.zero_grad()
    with contextlib.ExitStack() as stack:
        if checkpointing:
            switch = mode.checkpointing(model, TrainConfig(gradient_checkpointing=True))
            getattr(model, f"{switch}_enable")(**{f"{switch}_kwargs": {"use_reentrant": False}})
            stack.callback(getattr(model, f"{switch}_disable"))
            stack.enter_context(saving_first())
        logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits.double(), IDS[:, 1:].flatten())
        loss.backward()
    trained = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return Step(loss.item(), trained)


def distance(a: Step, b: Step, *names: str) -> float:
    """Of the gradients, all or those named, relative to b's."""
    flat = [torch.cat([side.gradients[name].flatten() for name in names or b.gradients]) for side in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_step_is_that_of_the_cpu(
    request: pytest.FixtureRequest, schedule: Schedule, format: str, dtype: torch.dtype
) -> None:
    model = quantized(dtype, format)
    cpu, true = step(model), step(exact(model))
    request.getfixturevalue("on_shim")
    schedule.launches.clear()
    metal = step(model)

    ran = Counter(name.split(f"_{'4bit' if format == 'nf4' else 'int8'}_")[0] for name in schedule.launches)
    assert ran == {"linear_tiles": LAYERS, "grad_input_tiles": GRADIENTS}
    assert set(metal.gradients) == set(cpu.gradients) == set(true.gradients) and len(cpu.gradients) == 2 * LAYERS
    farthest = max(distance(metal, cpu, name) for name in cpu.gradients)
    print(
        f"\n{format}, {dtype}: loss {metal.loss:.7f} on Metal's kernels, {cpu.loss:.7f} on the CPU's, {true.loss:.7f} "
        f"exact\n  gradients of {2 * LAYERS} factors: {distance(metal, cpu):.1e} apart, the worst factor "
        f"{farthest:.1e}; from the exact ones Metal {distance(metal, true):.1e}, CPU {distance(cpu, true):.1e}"
    )
    assert abs(metal.loss - true.loss) <= ALLOWED * max(abs(cpu.loss - true.loss), UNIT[dtype] * true.loss)
    assert distance(metal, true) <= ALLOWED * distance(cpu, true)
    assert distance(metal, cpu) <= (1 + ALLOWED) * distance(cpu, true)
    for name in cpu.gradients:
        assert distance(metal, true, name) <= ALLOWED * max(distance(cpu, true, name), distance(cpu, true)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpointing_changes_no_bit(on_shim: ModuleType, schedule: Schedule, dtype: torch.dtype) -> None:
    model = quantized(dtype, "nf4")
    plain = step(model)
    schedule.launches.clear()
    computed_again = step(model, checkpointing=True)
    assert len(schedule.launches) > LAYERS + GRADIENTS  # layers did run again
    assert computed_again.loss == plain.loss
    assert all(torch.equal(computed_again.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_grad_input_gives_the_same_bits_twice(on_shim: ModuleType, schedule: Schedule) -> None:
    model = quantized(torch.bfloat16, "nf4")
    layer = model.model.layers[0].mlp.down_proj.base
    g = torch.randn(70, layer.out_features, dtype=torch.bfloat16)
    results = []
    for schedule.order in ("random", "random", "in order", "reverse"):
        results.append(ops.grad_input(g, layer.operands()[0]))
    assert all(torch.equal(result, results[0]) for result in results)
