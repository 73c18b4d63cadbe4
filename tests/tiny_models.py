"""Tiny random models that tests of adapters share: a Llama (decoder, grouped queries) and a BERT (encoder)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import llama

import nybble

transformers = pytest.importorskip("transformers")

KINDS = ("llama", "bert")
BASES = ("fp32", "nf4")


def bert(dtype: torch.dtype = torch.float32, seed: int = 0, pooler: bool = False, **changes: Any) -> Any:
    """A random BertModel with the sizes of `tiny.llama`."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = transformers.BertConfig(**{**settings, **changes})
    return transformers.BertModel(config, add_pooling_layer=pooler).to(dtype).eval()


def build(kind: str, base: str = "fp32", **changes: Any) -> Any:
    """A model of KINDS, its linear layers as in BASES."""
    model = llama(**changes) if kind == "llama" else bert(**changes)
    if base == "nf4":
        nybble.quantize_(model)
    return model


def dequantized(model: Any) -> Any:
    """The model with plain linear layers of the same values, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nybble.QuantLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.dequantize(torch.float32)
            if module.bias is not None:
                plain.bias.data = module.bias.detach().clone()
            model.set_submodule(name, plain)
    return model


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """int64 [batch, length], none of them 0."""
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def output(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of a causal model, last hidden states of a bare one."""
    result = model(input_ids=tokens, **inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def randomize(model: Any, name: str, scale: float = 0.1, seed: int = 3) -> None:
    """Moves an adapter's parameters at random, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in nybble.nn.adapters.adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    """An adapter's gradients by path, which are taken away."""
    result = {}
    for path, parameter in nybble.nn.adapters.adapter_parameters(model, name).items():
        assert parameter.grad is not None, path
        result[path], parameter.grad = parameter.grad, None
    return result


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rounding: float = 2e-5) -> None:
    """fp32: the same up to the order of summation, relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * max(1e-3, expected.abs().max().item()))


def checkpointing(model: Any) -> None:
    """Turns activation checkpointing on, without reentrance."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
