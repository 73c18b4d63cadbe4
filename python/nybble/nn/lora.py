"""Low-rank updates beside frozen layers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353)."""

from __future__ import annotations

import math
from typing import Any

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
    With `dora` every output is scaled besides: y = (m / n) * (x W^T + scaling * x A^T B^T) + bias, where m is trained
    and n, the row norms of W + scaling * B A, is held constant in the backward pass. The weight is not decoded for n:
    ||w + s b A||^2 = ||w||^2 + 2 s b.(A w) + s^2 b A A^T b, and A w is the base kernel's product with the rows of A.

    Attributes:
        base: the frozen QuantLinear or nn.Linear.
        lora_A: Parameter [r, in_features]. lora_B: Parameter [out_features, r], zero at the start, so that a new
            LoRALinear gives exactly its base's output.
        lora_magnitude: Parameter [out_features], m, at the start the row norms of the base; None without `dora`.
        r, alpha, dropout, rslora, dora: as given. scaling: alpha / r, or alpha / sqrt(r) with rslora.
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
        dora: bool = False,
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
        self.dora = dora
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, dtype=dtype, device=device))
        magnitude = torch.empty(base.out_features, dtype=dtype, device=device) if dora else None
        self.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude)
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
        dora: bool = False,
    ) -> LoRALinear:
        """Puts an update of rank `r` beside `base`, which is frozen and kept, not copied.

        Args:
            r: rank, 1 or more. alpha: numerator of the scaling. dropout: on the update's input, while training.
            rslora: scale by alpha / sqrt(r) instead of alpha / r.
            init: of A: "kaiming" (uniform, a = sqrt 5, as nn.Linear) or "gaussian" (standard deviation 1 / r).
            dtype: of A and B; they are used in the dtype of the input.
            dora: train a magnitude for every output too.

        Raises:
            TypeError, ValueError: an argument that is not allowed, by name.
        """
        return cls(base, r, alpha, dropout, rslora, init, dtype, dora)

    def reset_parameters(self) -> None:
        """A anew by `init`, B to zero."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1.0 / self.r)
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None and not self.base.weight.is_meta:
            with torch.no_grad():
                self.lora_magnitude.copy_(self._base_squares().sqrt())

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
        """scaling * B A [out_features, in_features] in fp32: what merging would add to the weight (before `dora`)."""
        return self.lora_B.detach().float() @ self.lora_A.detach().float() * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.lora_magnitude is not None:
            return self._dora_forward(x, self.lora_magnitude)
        drops = self.training and self.dropout > 0.0
        base = self.base
        if isinstance(base, QuantLinear):
            weight, bias = base.operands()
            if not drops:
                return ops.lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling)
            # Dropout is on the update's input alone, so its gradient reaches x by a path of its own.
            return ops.linear(x, weight, bias, self._side(x), self.lora_B)
        return base(x) + functional.linear(self._side(x), self._cast(self.lora_B, x))

    def _dora_forward(self, x: Tensor, magnitude: Tensor) -> Tensor:
        gain = magnitude / self._norms().to(magnitude.dtype)
        bias = self.base.bias
        if not (self.training and self.dropout > 0.0):
            y = self._product(x, low=True)
            y = y * gain.to(y.dtype)
            return y if bias is None else y + bias.to(y.dtype)
        # Dropout is on the input of everything that is trained: y = base(x) + (gain W' - W) dropout(x).
        dropped = functional.dropout(x, self.dropout, True)
        y = self._product(dropped, low=True)
        return self.base(x) + y * gain.to(y.dtype) - self._product(dropped, low=False)

    def _product(self, x: Tensor, low: bool) -> Tensor:
        """x W^T, with `low` also the low-rank update; without the bias."""
        base = self.base
        if isinstance(base, QuantLinear):
            weight = base.operands()[0]
            if low:
                return ops.lora_linear(x, weight, None, self.lora_A, self.lora_B, self.scaling)
            return ops.linear(x, weight, None)
        y = functional.linear(x, base.weight)
        if low:
            side = functional.linear(x, self._cast(self.lora_A, x)) * self.scaling
            y = y + functional.linear(side, self._cast(self.lora_B, x))
        return y

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """||W + scaling B A|| of every row, fp32 [out_features]."""
        a, b = self.lora_A.float(), self.lora_B.float()
        base = self.base
        device = a.device.type
        with torch.autocast(device, enabled=False):
            if isinstance(base, QuantLinear):
                product = ops.linear(a, base.operands()[0], None).T
            else:
                product = base.weight.float() @ a.T
            squares = self._base_squares() + 2 * self.scaling * (b * product).sum(1)
            squares += self.scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()

    def _base_squares(self) -> Tensor:
        """||w||^2 of the base's rows, fp32; kept for as long as the weight is the very same one."""
        weight = self.base.weight
        kept = self.__dict__.get("_kept_squares")
        if kept is not None and kept[0] is weight and kept[1] == weight._version:
            return kept[2]
        with torch.no_grad():
            whole = self.base.dequantize() if isinstance(self.base, QuantLinear) else weight.detach()
            squares = torch.linalg.vector_norm(whole, dim=1, dtype=torch.float32).square_()
        if not torch.compiler.is_compiling():
            self.__dict__["_kept_squares"] = weight, weight._version, squares
        return squares

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: everything but what is derived."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept_squares"}

    def _side(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout, self.training)
        return functional.linear(dropped, self._cast(self.lora_A, x)) * self.scaling

    @staticmethod
    def _cast(factor: Tensor, x: Tensor) -> Tensor:
        """In x's dtype; under autocast functional.linear casts by itself."""
        return factor if ops.autocast_enabled(x.device.type) else factor.to(x.dtype)

    def extra_repr(self) -> str:
        kinds = "".join(f", {name}" for name in ("rslora", "dora") if getattr(self, name))
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}{kinds}"


class LoRAEmbedding(nn.Module):
    """y = base(ids) + scaling * (B A)^T [ids]; only A and B are trained.

    Attributes:
        base: the frozen nn.Embedding. lora_A: Parameter [r, num_embeddings], zero at the start.
        lora_B: Parameter [embedding_dim, r], normal. r, alpha, rslora, scaling: as in `LoRALinear`.
    """

    def __init__(
        self, base: nn.Embedding, r: int, alpha: float, rslora: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base is a {type(base).__name__}; an nn.Embedding is needed")
        check_lora_arguments(r, alpha, 0.0, "kaiming")
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora, self.dropout, self.dora = r, alpha, rslora, 0.0, False
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(r, base.num_embeddings, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, r, dtype=dtype, device=device))
        self.train(base.training)

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def weight(self) -> Tensor:
        """The base's table, [num_embeddings, embedding_dim], without the update."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim] in the base's dtype."""
        y = self.base(ids)
        low = functional.embedding(ids, self.lora_A.T, padding_idx=self.base.padding_idx)
        return y + (functional.linear(low, self.lora_B) * self.scaling).to(y.dtype)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}{', rslora' if self.rslora else ''}"
