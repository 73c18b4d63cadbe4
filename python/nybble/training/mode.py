"""The state a model is in while it trains: training mode, activation checkpointing, fused kernels; all undone after."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..recomputation import saving_first
from .allocator import LEAST, kept_heap, returned_heap
from .config import TrainConfig


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """To bfloat16, where config asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16")


def weights_dtype(config: TrainConfig) -> torch.dtype | None:
    """What trained weights are cast to when a run begins; None: they stay as they are."""
    return torch.float32 if config.fp32_weights else None


def checkpointing(model: nn.Module, config: TrainConfig) -> str | None:
    """What the model calls it, if config wants it: transformers renamed its methods in 5.23 (the old name warns)."""
    if not config.gradient_checkpointing:
        return None
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(_encoder(model), f"{name}_enable"):
            return name
    raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable()")


def _encoder(model: nn.Module) -> nn.Module:
    """The transformers model inside nybble's classifier, else the model."""
    inner = getattr(model, "encoder", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "gradient_checkpointing_enable") else model


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Within it, the garbage collector passes over what there was before.

    A step makes so many objects that the collector goes through all of the process's several times a minute, those of
    imported libraries for the most part: 2% of the time of a step of two seconds. Nothing is done where the caller has
    frozen objects, which `gc.unfreeze` could not tell from these.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def training_mode(model: nn.Module, config: TrainConfig, keep_heap: bool = True) -> Iterator[None]:
    """Training mode, and what config switches on, for the time of a run. keep_heap: see `allocator`."""
    was_training = {module: module.training for module in model.modules()}
    already_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    switch = None if already_on else checkpointing(model, config)
    with ExitStack() as stack:
        stack.enter_context(frozen_garbage())
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu and config.low_memory:
            stack.enter_context(returned_heap(LEAST))
        elif on_cpu and keep_heap:
            stack.enter_context(kept_heap())
        if config.fused and on_cpu:
            from ..nn.lean_products import lean_products
            from .lean import lean
            from .lean_attention import lean_attention

            stack.enter_context(lean_products())
            stack.enter_context(lean_attention())
            stack.enter_context(lean(model))
        if switch is not None or already_on:
            stack.enter_context(saving_first())
        if switch is not None:
            getattr(_encoder(model), f"{switch}_enable")(**{f"{switch}_kwargs": {"use_reentrant": False}})
            stack.callback(getattr(_encoder(model), f"{switch}_disable"))
        model.train()
        for parameter in model.parameters():
            parameter.grad = None  # of a backward pass before the run: it would be part of the first step
        try:
            yield
        finally:
            for module, training in was_training.items():
                module.training = training
            for parameter in model.parameters():
                parameter.grad = None
