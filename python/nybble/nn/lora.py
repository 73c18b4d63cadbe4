"""`LoRALinear`: a low-rank update beside a frozen linear layer (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .linear import QuantLinear

INITS = ("kaiming", "gaussian")


def check_lora_arguments(r: int, alpha: float, dropout: float, init: str) -> None:
    """Raises ValueError or TypeError, naming the argument, unless LoRA can be built with these."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r is {r!r}; it must be an integer, 1 or more")
    if r <= 0:
        raise ValueError(f"r is {r}; the rank must be 1 or more")
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha is {alpha!r}; it must be a finite number above 0")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout!r}; it must be in [0, 1)")
    if init not in INITS:
        raise ValueError(f"init is {init!r}; allowed are {', '.join(INITS)}")


class LoRALinear(nn.Module):
    """y = base(x) + scaling * dropout(x) A^T B^T; only A and B are trained.

    Over a `QuantLinear` the update is computed in the base kernel's own pass over the output, forward and backward.

    Attributes:
        base: the frozen QuantLinear or nn.Linear.
        lora_A: Parameter [r, in_features]. lora_B: Parameter [out_features, r], zero at the start, so that a new
            LoRALinear gives exactly its base's output.
        r, alpha, dropout, rslora: as given. scaling: alpha / r, or alpha / sqrt(r) with rslora.
    """

    def __init__(
        self,
        base: QuantLinear | nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(base, (QuantLinear, nn.Linear)):
            raise TypeError(f"base is a {type(base).__name__}; a QuantLinear or an nn.Linear is needed")
        check_lora_arguments(r, alpha, dropout, init)
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"dtype is {dtype}; allowed are float32, float16, bfloat16")
        self.base = base.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora
        self.init = init
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, dtype=dtype, device=device))
        self.reset_parameters()
        self.train(base.training)

    @classmethod
    def from_base(
        cls,
        base: QuantLinear | nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """Puts an update of rank `r` beside `base`, which is frozen and kept, not copied.

        Args:
            r: rank, 1 or more. alpha: numerator of the scaling. dropout: on the update's input, while training.
            rslora: scale by alpha / sqrt(r) instead of alpha / r.
            init: of A: "kaiming" (uniform, a = sqrt 5, as nn.Linear) or "gaussian" (standard deviation 1 / r).
            dtype: of A and B; they are used in the dtype of the input.

        Raises:
            TypeError, ValueError: an argument that is not allowed, by name.
        """
        return cls(base, r, alpha, dropout, rslora, init, dtype)

    def reset_parameters(self) -> None:
        """A anew by `init`, B to zero."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1.0 / self.r)
        nn.init.zeros_(self.lora_B)

    @property
    def in_features(self) -> int:
        """Size of the input's last dimension."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the output's last dimension."""
        return self.base.out_features

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def delta_weight(self) -> Tensor:
        """scaling * B A [out_features, in_features] in fp32: what merging would add to the weight."""
        return self.lora_B.detach().float() @ self.lora_A.detach().float() * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        drops = self.training and self.dropout > 0.0
        base = self.base
        if isinstance(base, QuantLinear):
            weight, bias = base.operands()
            if not drops:
                return ops.lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling)
            # Dropout is on the update's input alone, so its gradient reaches x by a path of its own.
            return ops.linear(x, weight, bias, self._side(x), self.lora_B)
        return base(x) + functional.linear(self._side(x), self._cast(self.lora_B, x))

    def _side(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout, self.training)
        return functional.linear(dropped, self._cast(self.lora_A, x)) * self.scaling

    @staticmethod
    def _cast(factor: Tensor, x: Tensor) -> Tensor:
        """In x's dtype; under autocast functional.linear casts by itself."""
        return factor if ops.autocast_enabled(x.device.type) else factor.to(x.dtype)

    def extra_repr(self) -> str:
        rslora = ", rslora" if self.rslora else ""
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}{rslora}"
