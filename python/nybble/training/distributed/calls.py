"""A module whose forward is any function of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


class Calls(nn.Module):
    """forward(function, *args) is function(*args), which uses `model`.

    DDP and FSDP2 act in the forward of the module that they are given. A loss that runs decoder and head apart never
    calls the model's own, so this one takes its place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)
