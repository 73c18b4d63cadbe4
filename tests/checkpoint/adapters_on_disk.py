"""Adapters and weights as files, for the tests of what merges them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import nybble
from nybble import LoRAConfig, add_lora

Make = Callable[..., Path]


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def write_adapter(base: Path, out: Path, **settings: Any) -> Path:
    model = nybble.load(base)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8, **settings}))
    randomize(model)
    nybble.save_adapter(model, out)
    return out


def logits(directory: Path, ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    model = nybble.load(directory)
    if adapter is not None:
        nybble.load_adapter(model, adapter)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def write_factors(out: Path, settings: dict[str, Any] | None = None, **layers: tuple[torch.Tensor, ...]) -> Path:
    """An adapter of (A, B) by path, `__` for a dot."""
    out.mkdir()
    tensors = {}
    for name, factors in layers.items():
        for part, values in zip(("A", "B"), factors, strict=True):
            tensors[f"base_model.model.{name.replace('__', '.')}.lora_{part}.weight"] = values.clone()
    save_file(tensors, out / "adapter_model.safetensors")
    r = next(iter(layers.values()))[0].shape[0]
    (out / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r, **(settings or {})})
    )
    return out


def write_weights(out: Path, **tensors: torch.Tensor) -> Path:
    out.mkdir()
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, out / "model.safetensors")
    return out


ONES = (torch.ones(1, 8), torch.ones(8, 1))
