"""What the tests of layers share: formats as configurations, and layers made of random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble import QuantConfig, QuantLinear

CONFIGS = {
    "nf4": QuantConfig(),
    "nf4-plain": QuantConfig(double_quant=False),
    "fp4-32": QuantConfig(format="fp4", block_size=32),
    "int4-4096": QuantConfig(format="int4", block_size=4096),
    "custom": QuantConfig(format=tuple(i / 8 - 1 for i in range(16)), double_quant=False),
    "mse": QuantConfig(search="mse"),
    "int8": QuantConfig(format="int8", double_quant=False),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(n: int = 10, k: int = 70, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    """A random nn.Linear [n, k]."""
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def quant_linear(config: QuantConfig | None = None, **options: object) -> QuantLinear:
    """A QuantLinear made of `linear(**options)`."""
    return QuantLinear.from_linear(linear(**options), config)


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same keys in the same order, same dtypes, shapes and bytes."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape), key
        flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (actual[key], value))
        assert torch.equal(*flat), key
