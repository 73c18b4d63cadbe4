"""Adapters between a model and PEFT's files: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn import LoRAEmbedding, LoRALinear, QuantLinear
from ..nn.adapters import DEFAULT, adapter_names, adapters, check_name, require_names, set_adapter, share_selection
from ..nn.names import adapted_layers as layers_around
from ..nn.names import base_modules
from .adapter import BOTTLENECK_TYPE, PROMPT_TYPES, read_adapter, read_settings, write_adapter
from .copies import copies_to_save
from .lora import load_lora, save_lora

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


# What PEFT makes of an adapter that is on no layer and only has copies of modules: this string stands for no layer.
_COPIES_ALONE = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": "dummy-target-modules",
    "bias": "none",
}


def task_type(class_name: str) -> str | None:
    """What PEFT calls the task of a model class of transformers; None if it has no name for it."""
    return next((task for ending, task in _TASKS.items() if class_name.endswith(ending)), None)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's `LoRALinear` modules by the names of their layers."""
    return layers_around(model, (LoRALinear,))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    """The model's layers with a low-rank update, linear ones and embeddings, by name."""
    return layers_around(model, (LoRALinear, LoRAEmbedding))


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> None:
    """Write one adapter of a model as PEFT does, replacing an adapter that is there.

    That is what has this name (low-rank updates, a prefix or prompt, bottlenecks), with its copies of modules as
    `modules_to_save`, and so every other module with trainable parameters that is no adapter. Of a model without
    adapters these modules alone (a linear probe's head), if the rest of it is frozen.

    Args:
        model: with an adapter, as `add_lora` and its siblings make it, or with a part that is trained in full.
        directory: made if it does not exist. The name is not written: any can be given on loading.
        base: what `base_model_name_or_path` says; by default where the model was loaded from, if it knows.
        name: of the adapter; by default the one that acts, or the only one.

    Raises:
        ValueError: the model has no such adapter, or several and none was chosen; or the adapter cannot be said in one
            file: it mixes kinds, or rsLoRA or DoRA with plain layers.
        StorageFullError: the disk is full; the adapter that was there is untouched.
    """
    name = _chosen(model, name)
    if base is None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    common = {
        "task_type": task_type(type(model).__name__),
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
    }
    config, tensors = _parts(model, name)
    copies = copies_to_save(model, name)
    config["modules_to_save"] = list(copies) or None
    for values in copies.values():
        tensors.update(values)
    write_adapter(Path(directory), {**config, **common}, tensors)


def _chosen(model: nn.Module, name: str | None) -> str:
    if name is not None:
        require_names(model, (name,))
        return name
    present = adapter_names(model)
    if not present:
        if _partly_trained(model):
            return DEFAULT
        raise ValueError(
            f"model: {type(model).__name__} has no adapter to save (see nybble.add_lora), nor is a part of it trained "
            "and the rest frozen; a whole model is saved by its own means, in finetune by the argument save"
        )
    active = share_selection(model).active
    if active is None and len(present) > 1:
        raise ValueError(
            f"name: the model has the adapters {', '.join(map(repr, present))}, and none acts on all rows; give one"
        )
    return present[0] if active is None else active


def _partly_trained(model: nn.Module) -> bool:
    owners = [module for _, _, module in base_modules(model) if not isinstance(module, QuantLinear)]
    own = [p for module in owners for p in module.parameters(recurse=False) if p.is_floating_point()]
    return len({p.requires_grad for p in own}) == 2


def _kinds(model: nn.Module, name: str) -> list[str]:
    """What the model has under a name, as files tell kinds apart: "bottleneck", "lora", "virtual"."""
    kinds = [kind for info in adapters(model) if info.name == name for kind in info.kinds]
    return sorted({"virtual" if kind in ("prefix", "prompt") else kind for kind in kinds} - {"copy"})


def _parts(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json's own part, tensors) of an adapter, without its copies of modules."""
    own = _kinds(model, name)
    if len(own) > 1:
        raise ValueError(
            f"name: adapter {name!r} is {' and '.join(own)} in one, and a file holds one kind; give each its own name"
        )
    if own == ["virtual"]:
        from .virtual import save_virtual

        return save_virtual(model, name)
    if own == ["bottleneck"]:
        from .bottleneck import save_bottleneck

        return save_bottleneck(model, name)
    if not own:
        return dict(_COPIES_ALONE), {}
    return save_lora(model, name)


def check_saveable(model: nn.Module, name: str | None = None) -> None:
    """Raises ValueError where `save_adapter` of this adapter would."""
    name = _chosen(model, name)
    _parts(model, name)
    copies_to_save(model, name)


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = DEFAULT) -> None:
    """Put an adapter in PEFT's layout on a model, beside those that it has; it acts from then on.

    LoRA with rsLoRA, DoRA, patterns, embeddings and modules_to_save; prefix and prompt tuning; bottlenecks. If the
    model has an adapter of this name already, it takes the values, provided that it is the file's in all else.

    Args:
        model: its layers have the names that the adapter has; changed in place, and unchanged after an error.
        directory: with adapter_config.json and adapter_model.safetensors.
        name: what the adapter is called on this model.

    Raises:
        ValueError: the name cannot be used.
        CheckpointNotFoundError: one of the two files is missing.
        CheckpointError: a damaged file, a tensor that does not fit its layer, or a kind of adapter that is not known.
        PatternError: the adapter names a layer that the model does not have.
    """
    check_name(name)
    directory = Path(directory)
    peft_type = read_settings(directory)["peft_type"]
    kind = {BOTTLENECK_TYPE: "bottleneck", **dict.fromkeys(PROMPT_TYPES, "virtual")}.get(peft_type, "lora")
    present = _kinds(model, name)
    if present not in ([], [kind]):
        raise CheckpointError(
            f"{directory}: the model's adapter {name!r} is {' and '.join(present)}, the file's {kind}; give another "
            "name"
        )
    if kind == "virtual":
        from .virtual import load_virtual

        load_virtual(model, directory, name)
    elif kind == "bottleneck":
        from .bottleneck import load_bottleneck

        load_bottleneck(model, directory, name)
    else:
        load_lora(model, read_adapter(directory), name)
    set_adapter(model, name)
