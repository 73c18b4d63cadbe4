"""A QLoRA step (forward, loss, backward, optimizer) of a Llama of 1B parameters: nybble beside the usual three.

Random weights in the sizes of Llama 3.2 1B, one sequence of 2048 tokens, NF4 double-quantized, LoRA r = 16 on every
linear layer of the blocks, bf16, with and without activation checkpointing. The other side is transformers with
bitsandbytes' Linear4bit and PEFT's LoRA, put together as their integration does, and torch's fused AdamW.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from cuda_timing import Gpu, table
from torch import nn

import nybble
from nybble.training.optim import AdamW

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TINY = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
LENGTH, RANK, STEPS = 2048, 16, 8
TARGET = 1.5

Step = Callable[[], object]


def llama(gpu: Gpu) -> Any:
    """Random bf16 weights, made on the device."""
    import transformers

    config = transformers.LlamaConfig(**(TINY if gpu.dry else SIZES), bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with gpu.device:
            return transformers.LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def ours(gpu: Gpu) -> tuple[Any, torch.optim.Optimizer]:
    model = llama(gpu)
    nybble.quantize_(model)
    nybble.add_lora(model, r=RANK, alpha=2 * RANK)
    return model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def theirs(gpu: Gpu) -> tuple[Any, torch.optim.Optimizer]:
    """As transformers' BitsAndBytesConfig(load_in_4bit=True, nf4, double quantization, bf16) leaves a model."""
    import bitsandbytes
    import peft

    model = llama(gpu)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            model.set_submodule(name, layer.to(gpu.device))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(parameters, lr=1e-4, fused=not gpu.dry)


def step_of(gpu: Gpu, model: Any, optimizer: torch.optim.Optimizer) -> Step:
    vocabulary, length = model.config.vocab_size, 32 if gpu.dry else LENGTH
    tokens = torch.randint(0, vocabulary, (1, length), device=gpu.device)

    def step() -> object:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def measure(gpu: Gpu, build: Callable[[Gpu], tuple[Any, torch.optim.Optimizer]], checkpointing: bool) -> dict[str, Any]:
    """Seconds a step, peak bytes, bytes of the model at rest, loss after the steps."""
    gc.collect()
    model, optimizer = build(gpu)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = step_of(gpu, model, optimizer)
    step()
    gc.collect()
    gpu.reset_peak()
    timing = gpu.step(step, STEPS)
    loss = step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**asdict(timing), "peak": gpu.peak(), "loss": float(loss.detach()), "trained": trained}


def run(gpu: Gpu, notes: list[str]) -> list[dict[str, Any]]:
    """Both sides, with and without activation checkpointing; prints a table."""
    rows, cases = [], []
    for checkpointing in (False, True):
        found: dict[str, dict[str, Any]] = {}
        for name, build in (("nybble", ours), ("transformers + PEFT + bitsandbytes", theirs)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found[name] = measure(gpu, build, checkpointing)
            except Exception as error:
                notes.append(f"step, {name}: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}")
                continue
            cases.append({"op": "step", "what": name, "checkpointing": checkpointing, **found[name]})
        peer = found.get("transformers + PEFT + bitsandbytes")
        for name, result in found.items():
            ratio = peer["median"] / result["median"] if peer else None
            rows.append(
                [
                    name,
                    "yes" if checkpointing else "no",
                    f"{result['median'] * 1e3:.1f}",
                    f"{LENGTH / result['median']:.0f}",
                    f"{result['peak'] / 2**30:.2f}",
                    f"{ratio:.2f}" if ratio else "-",
                    ("met" if ratio >= TARGET else "MISSED") if ratio and name == "nybble" else "-",
                    f"{result['loss']:.2f}",
                ]
            )
    print(f"\nQLoRA step, Llama 1B (random weights), 1 x {LENGTH} tokens, r = {RANK}; target {TARGET} x")
    print(table(["", "checkpointing", "ms", "tokens/s", "peak GiB", "speed-up", "target", "loss"], rows))
    return cases
