"""Groups of parameters, clipping, the running mean of the weights: what lies between gradients and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import TrainConfig
from .optim import build_optimizer, step_scaled


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, options: Mapping[str, dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of config over parameters by name; `options`, by name, are what adamw8bit is told of each.

    Weight decay is for those of two or more dimensions; the B matrices of LoRA have config.lora_plus_ratio times the
    learning rate (LoRA+, arXiv 2402.12354), and a module called `head`, as a classifier's is, has config.head_lr_ratio
    times: a group's `lr_scale` says so.
    """
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        scale = config.lora_plus_ratio if name.endswith(".lora_B") else 1.0
        scale *= config.head_lr_ratio if name.startswith("head.") else 1.0
        told = (options or {}).get(name, {}) if config.optimizer == "adamw8bit" else {}
        groups.setdefault((decay, scale, *told.items()), []).append(parameter)
    listed = [
        {"params": members, "weight_decay": decay, "lr_scale": scale, **dict(told)}
        for (decay, scale, *told), members in groups.items()
    ]
    return build_optimizer(config.optimizer, listed, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group lr times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clipped_step(
    optimizer: torch.optim.Optimizer, members: Sequence[list[nn.Parameter]], factors: Sequence[float]
) -> None:
    """A step in which the gradients of every group of `members` count times the group's factor (`clip_scale`)."""
    if len(factors) == 1:
        step_scaled(optimizer, factors[0])
        return
    for parameters, factor in zip(members, factors, strict=True):
        for parameter in parameters:
            if parameter.grad is not None and factor != 1.0:
                parameter.grad.mul_(factor)
    optimizer.step()


class RunningMean:
    """The exponential moving average of parameters, in fp32 beside them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.values = {name: p.detach().float().clone() for name, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: mean = decay * mean + (1 - decay) * parameter."""
        for name, value in self.values.items():
            value.lerp_(self.parameters[name].float(), 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters have the mean's values for the time of a `with` block; nothing happens without a mean."""
        kept: dict[str, Any] = {name: self.parameters[name].detach().clone() for name in self.values}
        with torch.no_grad():
            for name, value in self.values.items():
                self.parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)
