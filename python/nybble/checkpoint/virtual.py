"""Prefix and prompt tuning in PEFT's files: one tensor, `prompt_embeddings` [virtual tokens, width].

Of a prefix that is computed by a network (`PrefixConfig.projection`), files hold what it computes, as PEFT's do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn.adapters import freeze_base
from ..nn.prefix import Prefix, PrefixConfig, attention_layers, prefix_for, put_prefix
from ..nn.prompt import Prompt, put_prompt
from ..nn.tokens import decoder_of, embedding
from ..nn.virtual import prepared, virtual_tokens
from .adapter import CONFIG_NAME, FLOATS, PREFIX, WEIGHTS_NAME, read_settings
from .copies import load_copies, plan_copies
from .files import TensorInfo, read_header, read_tensor

_NAME = "prompt_embeddings"
_PEFT_PREFIX = "base_model."  # before the names of modules that PEFT saves in full beside a prompt


def save_virtual(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json's own part, tensors) of the prefix or prompt of this name."""
    virtual = virtual_tokens(model)
    assert virtual is not None
    tokens: Any = virtual.adapters[name]
    text = _text_config(decoder_of(model))
    config: dict[str, Any] = {
        "num_virtual_tokens": tokens.tokens,
        "num_transformer_submodules": 1,
        "num_layers": text.num_hidden_layers,
    }
    if isinstance(tokens, Prefix):
        width = tokens.heads * tokens.head_dim
        config |= {
            "peft_type": "PREFIX_TUNING",
            "token_dim": width,
            "num_attention_heads": tokens.heads,
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }
        return config, {_NAME: tokens.flat()}
    config |= {
        "peft_type": "PROMPT_TUNING",
        "token_dim": tokens.embeddings.shape[1],
        "num_attention_heads": text.num_attention_heads,
        "prompt_tuning_init": "RANDOM",
    }
    return config, {_NAME: tokens.embeddings.detach()}


@torch.no_grad()
def load_virtual(model: nn.Module, directory: Path, name: str) -> None:
    """Put the prefix or prompt of a directory on a model as the adapter of this name; see `nybble.load_adapter`.

    Raises:
        CheckpointNotFoundError: a file is missing.
        CheckpointError: a damaged file, a tensor that does not fit the model, or another adapter of this name on it.
        TypeError, ValueError: the model can have no such adapter.
    """
    settings = read_settings(directory)
    info, others = _tensors(directory / WEIGHTS_NAME)
    count = _tokens(directory / CONFIG_NAME, settings)
    present = _present(model, directory, name, settings["peft_type"], count)
    full = plan_copies(model, directory, settings.get("modules_to_save"), others)
    decoder, virtual = prepared(model)
    if settings["peft_type"] == "PREFIX_TUNING":
        layers = attention_layers(model, decoder, [0] * count)
        prefix = prefix_for(decoder, layers, PrefixConfig(tokens=count, init="random"))
        prefix.assign(_values(info, count, prefix.layers * 2 * prefix.heads * prefix.head_dim))
        if present is None:
            put_prefix(decoder, virtual, layers, prefix, name)
        else:
            present.assign(prefix.flat())
    else:
        table: Any = embedding(decoder).weight
        values = _values(info, count, table.shape[1])
        if present is None:
            present = Prompt(count, table.shape[1], device=table.device)
            put_prompt(decoder, virtual, present, name)
        present.embeddings.copy_(values)
    freeze_base(model)
    load_copies(model, name, full)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _tokens(path: Path, settings: dict[str, Any]) -> int:
    if (settings.get("num_transformer_submodules") or 1) != 1:
        raise CheckpointError(f"{path}: num_transformer_submodules must be 1: no encoder-decoders")
    tokens = settings.get("num_virtual_tokens")
    if type(tokens) is not int or tokens < 1:
        raise CheckpointError(f"{path}: num_virtual_tokens = {tokens!r}, a positive integer is needed")
    return tokens


def _tensors(file: Path) -> tuple[TensorInfo, dict[str, TensorInfo]]:
    """(the virtual tokens, modules saved in full by their names in the model)."""
    infos = read_header(file)[0]
    others = {key: info for key, info in infos.items() if key != _NAME}
    odd = [key for key in others if not key.startswith(_PEFT_PREFIX)]
    if _NAME not in infos or odd:
        shown = ", ".join(sorted(odd or infos)[:3]) or "nothing"
        raise CheckpointError(f"{file}: holds {shown}, exactly {_NAME!r} is needed")
    return infos[_NAME], {
        key.removeprefix(PREFIX if key.startswith(PREFIX) else _PEFT_PREFIX): info for key, info in others.items()
    }


def _values(info: TensorInfo, tokens: int, width: int) -> Tensor:
    if info.shape != (tokens, width) or info.dtype not in FLOATS:
        raise CheckpointError(
            f"{info.path}: tensor {_NAME!r} is {info.dtype} {list(info.shape)}, the model wants floats "
            f"[{tokens}, {width}]"
        )
    return read_tensor(info)


def _present(model: nn.Module, directory: Path, name: str, kind: str, tokens: int) -> Any:
    """The adapter of this name on the model, None if there is none; CheckpointError if it is not the file's."""
    virtual = virtual_tokens(model)
    if virtual is None or name not in virtual.adapters:
        return None
    held: Any = virtual.adapters[name]
    computed = isinstance(held, Prefix) and held.projection_size is not None
    if isinstance(held, Prefix) != (kind == "PREFIX_TUNING") or held.tokens != tokens or computed:
        how = " computed by a network" if computed else ""
        raise CheckpointError(
            f"{directory}: the model's adapter {name!r} is a {held.kind} of {held.tokens} virtual tokens{how}, the "
            f"file's is {kind} of {tokens}; give another name, or delete_adapter first"
        )
    return held
