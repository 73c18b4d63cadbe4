"""One low-rank update: its two factors, DoRA's magnitudes, and what they are multiplied with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

INITS = ("kaiming", "gaussian", "orthogonal")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


class LoRA(nn.Module):
    """The trained part of a low-rank update scaling * B A.

    Attributes:
        lora_A: Parameter [r, in_features], by `init`. lora_B: Parameter [out_features, r], zero at the start.
        lora_magnitude: Parameter [out_features] of DoRA, to be filled by the layer that knows its base; else None.
        r, alpha, dropout, rslora, init, dora: as given. scaling: alpha / r, or alpha / sqrt(r) with rslora.
    """

    kind = "lora"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype = torch.float32,
        dora: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_lora_arguments(r, alpha, dropout, init)
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}; allowed are float32, float16, bfloat16")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora
        self.init = init
        self.dora = dora
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=device))
        magnitude = torch.ones(out_features, dtype=dtype, device=device) if dora else None
        self.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A anew by `init`, B to zero."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        elif self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1.0 / self.r)
        else:
            self._orthogonal()
        nn.init.zeros_(self.lora_B)

    @torch.no_grad()
    def _orthogonal(self) -> None:
        if not self.lora_A.is_meta:
            values = torch.empty_like(self.lora_A, dtype=torch.float32)  # its decomposition has no 16-bit version
            self.lora_A.copy_(nn.init.orthogonal_(values))

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def delta_weight(self) -> Tensor:
        """scaling * B A [out_features, in_features] in fp32: what merging would add to the weight (before `dora`)."""
        return self.lora_B.detach().float() @ self.lora_A.detach().float() * self.scaling

    def extra_repr(self) -> str:
        kinds = "".join(f", {name}" for name in ("rslora", "dora") if getattr(self, name))
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}{kinds}"


class EmbeddingLoRA(LoRA):
    """The update of an embedding: in_features is the vocabulary; A is zero at the start and B normal, as a row of the
    table is then unchanged, and a row of A trains only when its token occurs."""

    def reset_parameters(self) -> None:
        """A to zero, B anew."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)
