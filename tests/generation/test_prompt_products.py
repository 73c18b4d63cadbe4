"""Prompts of 16-bit models on CPUs without 16-bit instructions: products in fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import llama
from torch import Tensor

from nybble.backends import products
from nybble.calibration.compare import compare
from nybble.generation.decoder import Batch, ModelTraits
from nybble.nn import lean_products as module

PROMPT = list(range(3, 40))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A CPU without such instructions, whatever this one has; the shapes of what is multiplied in fp32 then."""
    seen: list[tuple[int, ...]] = []
    original = module.product

    def counted(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        seen.append(tuple(left.shape))
        return original(left, right, dtype)

    for where in (products, module):
        monkeypatch.setattr(where, "emulated", lambda dtype: dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(module, "product", counted)
    return seen


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return Batch(ModelTraits(model), [None], 64).read([PROMPT], 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_prompt_is_read_with_products_in_fp32(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    model = llama().to(dtype).eval()
    before = F.linear
    found = logits(model)
    # q, k, v, o, gate, up, down of each layer; the head reads the last token alone.
    assert len([shape for shape in calls if shape[0] == len(PROMPT)]) == 7 * model.config.num_hidden_layers
    assert F.linear is before
    exact = logits(llama().double().eval())
    step = torch.finfo(dtype).eps
    assert (found - exact).abs().max() <= 20 * step * exact.abs().max()


def test_models_are_compared_with_products_in_fp32(calls: list[tuple[int, ...]]) -> None:
    model = llama().to(torch.bfloat16)
    compare(model, model, torch.arange(64) % 40, 32)
    assert calls
