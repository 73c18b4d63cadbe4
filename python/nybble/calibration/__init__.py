"""Data-aware quantization: second moments of every linear layer's inputs, and codes picked by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import Comparison, compare
    from .config import Calibration
    from .settings import Rounding

__all__ = ["Calibration", "Comparison", "Rounding", "compare"]


def __getattr__(name: str) -> Any:
    # On first use: the command line's help asks for the settings' defaults and must not wait for torch.
    if name == "Rounding":
        from .settings import Rounding as found
    elif name == "Calibration":
        from .config import Calibration as found  # type: ignore[assignment]
    elif name in ("Comparison", "compare"):
        from . import compare as module

        return getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
