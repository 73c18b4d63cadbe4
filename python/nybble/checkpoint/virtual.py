"""Prefix and prompt tuning in PEFT's files: one tensor, `prompt_embeddings` [virtual tokens, width]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn.virtual import Prefix, Prompt, Virtual, attach, attached, attention_sizes
from .adapter import CONFIG_NAME, FLOATS, WEIGHTS_NAME, read_settings
from .files import read_header, read_tensor

__all__ = ["attached", "load_virtual", "save_virtual"]

_NAME = "prompt_embeddings"


def save_virtual(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json's own part, tensors) of a model's virtual tokens."""
    virtual = attached(model)
    assert virtual is not None
    layers, heads, head_dim = attention_sizes(model)
    config: dict[str, Any] = {
        "num_virtual_tokens": virtual.tokens,
        "num_transformer_submodules": 1,
        "num_layers": layers,
    }
    if isinstance(virtual, Prefix):
        width = heads * head_dim
        config |= {
            "peft_type": "PREFIX_TUNING",
            "token_dim": width,
            "num_attention_heads": heads,
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }
    else:
        hidden: Any = model.config
        config |= {
            "peft_type": "PROMPT_TUNING",
            "token_dim": virtual.embeddings.shape[1],
            "num_attention_heads": hidden.num_attention_heads,
            "prompt_tuning_init": "RANDOM",
        }
    return config, {_NAME: virtual.embeddings.detach()}


def load_virtual(model: nn.Module, directory: Path) -> None:
    """Attach the prefix or prompt of an adapter directory to a model.

    Raises:
        CheckpointNotFoundError: a file is missing.
        CheckpointError: a damaged file, or a tensor that does not fit the model.
    """
    settings = read_settings(directory)
    file, kind = directory / WEIGHTS_NAME, settings["peft_type"]
    if (settings.get("num_transformer_submodules") or 1) != 1:
        raise CheckpointError(f"{directory / CONFIG_NAME}: num_transformer_submodules must be 1: no encoder-decoders")
    infos = read_header(file)[0]
    if list(infos) != [_NAME]:
        raise CheckpointError(f"{file}: holds {', '.join(sorted(infos)[:3]) or 'nothing'}, exactly {_NAME!r} is needed")
    info = infos[_NAME]
    tokens = settings.get("num_virtual_tokens")
    if type(tokens) is not int or tokens < 1:
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: num_virtual_tokens = {tokens!r}, a positive integer is needed"
        )
    layers, heads, head_dim = attention_sizes(model)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    width = layers * 2 * heads * head_dim if kind == "PREFIX_TUNING" else table.weight.shape[1]
    if info.shape != (tokens, width) or info.dtype not in FLOATS:
        raise CheckpointError(
            f"{file}: tensor {_NAME!r} is {info.dtype} {list(info.shape)}, the model wants floats [{tokens}, {width}]"
        )
    device = table.weight.device
    virtual: Virtual
    if kind == "PREFIX_TUNING":
        virtual = Prefix(tokens, layers, heads, head_dim, device)
    else:
        virtual = Prompt(tokens, width, device)
    values = read_tensor(info)
    present = attached(model)
    if present is not None and (type(present) is not type(virtual) or present.tokens != tokens):
        raise CheckpointError(
            f"{directory}: the model has other virtual tokens ({type(present).__name__}, {present.tokens})"
        )
    with torch.no_grad():
        (virtual if present is None else present).embeddings.copy_(values)
    if present is None:
        attach(model, virtual)
