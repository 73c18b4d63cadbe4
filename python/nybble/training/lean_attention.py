"""transformers' "sdpa" attention with the gradient of `nybble.nn.sdpa`, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..nn.sdpa import attention


class _Redirected(TorchFunctionMode):
    """Where torch's attention is called, nybble's is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _redirect(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def sdpa(module: torch.nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Without a gradient, or on another device, nothing would differ: then nothing is in between either.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or query.device.type != "cpu":
            return original(module, query, *args, **kwargs)
        with _Redirected():
            return original(module, query, *args, **kwargs)

    return sdpa


@contextmanager
def lean_attention() -> Iterator[None]:
    """Within it, models of transformers with `attn_implementation="sdpa"` compute attention's gradient as
    `nybble.nn.sdpa.attention` does: the outputs are the same, the backward pass takes less time.

    transformers' function itself still runs and decides on masks, causality, heads and scaling; only the call of torch
    inside of it is another. Whatever took its place in `ALL_ATTENTION_FUNCTIONS["sdpa"]` before the context is treated
    alike, and is there again afterwards. A backward pass may come after the context has ended, but for one that
    computes layers again (gradient checkpointing): that must find what the forward pass found. Without transformers the
    context does nothing. May be nested.
    """
    if find_spec("transformers") is None:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    original = functions["sdpa"]
    replacement = _redirect(original)
    functions["sdpa"] = replacement
    try:
        yield
    finally:
        if functions["sdpa"] is replacement:  # and not what someone has put there since
            del functions["sdpa"]  # uncovers the library's own
            if functions.get("sdpa") is not original:
                functions["sdpa"] = original
