"""Data-aware quantization: second moments of every linear layer's inputs, and codes picked by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import Rounding

if TYPE_CHECKING:
    from .config import Calibration

__all__ = ["Calibration", "Rounding"]


def __getattr__(name: str) -> Any:
    # On first use: the command line's help asks for the settings' defaults and must not wait for torch.
    if name != "Calibration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .config import Calibration

    return Calibration
