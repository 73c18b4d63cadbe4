"""Low-rank updates beside frozen layers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .adapters import DEFAULT, Adapted, by_rows
from .factors import LoRA
from .linear import QuantLinear


class LoRALinear(Adapted):
    """y = base(x) + scaling * dropout(x) A^T B^T for the adapter that acts; only the As and Bs are trained.

    Over a `QuantLinear` the update is computed in the base kernel's own pass over the output, forward and backward.
    With `dora` every output is scaled besides: y = (m / n) * (x W^T + scaling * x A^T B^T) + bias, where m is trained
    and n, the row norms of W + scaling * B A, is held constant in the backward pass. The weight is not decoded for n:
    ||w + s b A||^2 = ||w||^2 + 2 s b.(A w) + s^2 b A A^T b, and A w is the base kernel's product with the rows of A.

    Where `selection.rows` names an adapter for each row of the batch, the adapters' factors go side by side through the
    same kernel, each row masked to its own; or, where that would be more work, each adapter computes its rows alone.
    Rows without adapter get exactly the base's output for this input (alone: for these rows), bit for bit, unless a
    DoRA adapter has rows beside them and the layer a bias, which is then added after rounding. All factors must be
    finite: NaN in one adapter may reach the rows of others.

    Attributes:
        base: the frozen QuantLinear or nn.Linear.
        adapters: name -> `LoRA` with lora_A [r, in_features] and lora_B [out_features, r].
        lora_A, lora_B, lora_magnitude, r, alpha, dropout, rslora, dora, init, scaling: of `adapter()`.
    """

    def __init__(self, base: QuantLinear | nn.Linear) -> None:
        """Without an adapter yet; use `from_base`."""
        super().__init__()
        if not isinstance(base, (QuantLinear, nn.Linear)):
            raise TypeError(f"base is a {type(base).__name__}; a QuantLinear or an nn.Linear is needed")
        self.base = base.requires_grad_(False)
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
        name: str = DEFAULT,
    ) -> LoRALinear:
        """Puts an update of rank `r` beside `base`, which is frozen and kept, not copied.

        Args:
            r: rank, 1 or more. alpha: numerator of the scaling. dropout: on the update's input, while training.
            rslora: scale by alpha / sqrt(r) instead of alpha / r.
            init: of A: "kaiming" (uniform, a = sqrt 5, as nn.Linear), "gaussian" (standard deviation 1 / r) or
                "orthogonal" (orthonormal rows). B is zero, so that the new layer gives exactly its base's output.
            dtype: of A and B; they are used in the dtype of the input.
            dora: train a magnitude for every output too, at the start the row norm of the base.
            name: of the adapter, which acts.

        Raises:
            TypeError, ValueError: an argument that is not allowed, by name.
        """
        layer = cls(base)
        layer.add(name, r, alpha, dropout, rslora, init, dtype, dora)
        layer.selection.active = name
        return layer

    def add(
        self,
        name: str,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype = torch.float32,
        dora: bool = False,
    ) -> LoRA:
        """Puts one more update beside the base, which acts once it is chosen (`nybble.set_adapter`); see `from_base`.

        Raises:
            TypeError, ValueError: an argument that is not allowed, by name; the name is taken.
        """
        base = self.base
        device = base.weight.device
        adapter = LoRA(base.in_features, base.out_features, r, alpha, dropout, rslora, init, dtype, dora, device)
        self.put(name, adapter.train(self.training))
        self._reset_magnitude(adapter)
        return adapter

    def adapter(self, name: str | None = None) -> LoRA:
        """The adapter of that name; without one, the adapter that acts here, or the only one.

        Raises:
            ValueError: there is none, or several and none of them acts on all rows.
        """
        if name is None:
            acting = self.acting() if self.selection.rows is None else None
            if acting is not None:
                return acting
            name = next(iter(self.adapters)) if len(self.adapters) == 1 else None
        if name is None or name not in self.adapters:
            present = ", ".join(map(repr, self.adapters)) or "no adapter"
            raise ValueError(f"this layer has {present}; " + ("give one's name" if name is None else f"not {name!r}"))
        found: Any = self.adapters[name]
        return found

    @property
    def lora_A(self) -> nn.Parameter:
        """Parameter [r, in_features] of `adapter()`."""
        return self.adapter().lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """Parameter [out_features, r] of `adapter()`."""
        return self.adapter().lora_B

    @property
    def lora_magnitude(self) -> nn.Parameter | None:
        """Parameter [out_features] of `adapter()`, None without DoRA."""
        return self.adapter().lora_magnitude

    @property
    def r(self) -> int:
        """Rank of `adapter()`."""
        return self.adapter().r

    @property
    def alpha(self) -> float:
        """Numerator of the scaling of `adapter()`."""
        return self.adapter().alpha

    @property
    def dropout(self) -> float:
        """Dropout of `adapter()`."""
        return self.adapter().dropout

    @property
    def rslora(self) -> bool:
        """Whether `adapter()` is scaled by alpha / sqrt(r)."""
        return self.adapter().rslora

    @property
    def dora(self) -> bool:
        """Whether `adapter()` has magnitudes."""
        return self.adapter().dora

    @property
    def init(self) -> str:
        """How A of `adapter()` starts."""
        return self.adapter().init

    @property
    def scaling(self) -> float:
        """What the low-rank product of `adapter()` is multiplied with."""
        return self.adapter().scaling

    def delta_weight(self) -> Tensor:
        """scaling * B A of `adapter()`, [out_features, in_features] in fp32: what merging adds to the weight."""
        return self.adapter().delta_weight()

    def reset_parameters(self) -> None:
        """A of `adapter()` anew by its `init`, B to zero, magnitudes to the base's norms."""
        adapter = self.adapter()
        adapter.reset_parameters()
        self._reset_magnitude(adapter)

    @torch.no_grad()
    def _reset_magnitude(self, adapter: LoRA) -> None:
        if adapter.lora_magnitude is not None and not self.base.weight.is_meta:
            adapter.lora_magnitude.copy_(self._base_squares().sqrt())

    @property
    def in_features(self) -> int:
        """Size of the input's last dimension."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the output's last dimension."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The base's weight, packed in a QuantLinear, without any update."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def unwrapped(self) -> nn.Module:
        """The base."""
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]; with an adapter for each row, x [rows, ..., in_features]."""
        self.watch_recomputation()
        if self.selection.rows is not None:
            return self._by_rows(x)
        adapter = self.acting()
        return self.base(x) if adapter is None else self._adapted(x, adapter)

    # ---- one adapter -------------------------------------------------------------------------------------------------

    def _adapted(self, x: Tensor, adapter: LoRA) -> Tensor:
        if adapter.lora_magnitude is not None:
            return self._dora(x, adapter, adapter.lora_magnitude)
        a, b, scaling = adapter.lora_A, adapter.lora_B, adapter.scaling
        base = self.base
        if isinstance(base, QuantLinear):
            weight, bias = base.operands()
            if not (self.training and adapter.dropout > 0.0):
                return ops.lora_linear(x, weight, bias, a, b, scaling)
            # Dropout is on the update's input alone, so its gradient reaches x by a path of its own.
            return ops.linear(x, weight, bias, self._side(x, a, adapter.dropout, scaling), b)
        return self._sum(x, self._side(x, a, adapter.dropout, scaling), b)

    def _sum(self, x: Tensor, side: Tensor, b: Tensor) -> Tensor:
        """base(x) + side b^T. The base comes last: where checkpointing computes again only what the backward pass
        needs, and that is not this sum, it is left out (`recomputation.saving_first`)."""
        update = functional.linear(side, self._cast(b, x))
        return self.base(x) + update

    def _side(self, x: Tensor, a: Tensor, dropout: float, scaling: float, mask: Tensor | None = None) -> Tensor:
        dropped = functional.dropout(x, dropout, self.training)
        return ops.scaled(functional.linear(dropped, self._cast(a, x)), scaling, mask)

    @staticmethod
    def _cast(factor: Tensor, x: Tensor) -> Tensor:
        """In x's dtype; under autocast functional.linear casts by itself."""
        return factor if ops.autocast_enabled(x.device.type) else factor.to(x.dtype)

    def _dora(self, x: Tensor, adapter: LoRA, magnitude: Tensor) -> Tensor:
        gain = magnitude / self._norms(adapter).to(magnitude.dtype)
        bias = self.base.bias
        factors = adapter.lora_A, adapter.lora_B, adapter.scaling
        if not (self.training and adapter.dropout > 0.0):
            y = self._product(x, factors)
            y = y * gain.to(y.dtype)
            return y if bias is None else y + bias.to(y.dtype)
        # Dropout is on the input of everything that is trained: y = base(x) + (gain W' - W) dropout(x).
        dropped = functional.dropout(x, adapter.dropout, True)
        y = self._product(dropped, factors)
        return self.base(x) + y * gain.to(y.dtype) - self._product(dropped)

    def _product(
        self, x: Tensor, factors: tuple[Tensor, Tensor, float] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x W^T, with `factors` (A, B, scaling) also the low-rank update; without the bias."""
        base = self.base
        if isinstance(base, QuantLinear):
            weight = base.operands()[0]
            return ops.linear(x, weight, None) if factors is None else ops.lora_linear(x, weight, None, *factors, mask)
        y = functional.linear(x, base.weight)
        if factors is not None:
            a, b, scaling = factors
            side = ops.scaled(functional.linear(x, self._cast(a, x)), scaling, mask)
            y = y + functional.linear(side, self._cast(b, x))
        return y

    @torch.no_grad()
    def _norms(self, adapter: LoRA) -> Tensor:
        """||W + scaling B A|| of every row, fp32 [out_features]."""
        a, b, scaling = adapter.lora_A.float(), adapter.lora_B.float(), adapter.scaling
        base = self.base
        device = a.device.type
        with torch.autocast(device, enabled=False):
            if isinstance(base, QuantLinear):
                product = ops.linear(a, base.operands()[0], None).T
            else:
                product = base.weight.float() @ a.T
            squares = self._base_squares() + 2 * scaling * (b * product).sum(1)
            squares += scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()

    def _base_squares(self) -> Tensor:
        """||w||^2 of the base's rows, fp32; kept for as long as the weight is the very same one."""
        weight, kept = self.base.weight, self.__dict__.get("_kept_squares")
        held = kept if kept is not None and kept[0] is weight and kept[2].device == weight.device else None
        if held is not None and (torch.compiler.is_compiling() or held[1] == weight._version):
            return held[2]  # a compiler cannot read versions
        squares = _squares(self.base)
        if not torch.compiler.is_compiling():
            self.__dict__["_kept_squares"] = weight, weight._version, squares
        return squares

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: everything but what is derived."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept_squares"}

    # ---- an adapter for each row -------------------------------------------------------------------------------------

    def _by_rows(self, x: Tensor) -> Tensor:
        selection = self.selection
        selection.check_rows(x, "LoRALinear")
        groups = selection.groups(self.adapters)
        if len(groups) > 1 and self._side_by_side(x, groups):
            return self._masked(x, groups)
        return by_rows(x, groups, self._alone, selection)

    def _alone(self, name: str | None, x: Tensor) -> Tensor:
        adapter: Any = None if name is None else self.adapters[name]
        return self.base(x) if adapter is None else self._adapted(x, adapter)

    def _side_by_side(self, x: Tensor, groups: dict[str | None, list[int]]) -> bool:
        """Whether the factors of all adapters go through one call, each row masked to its own.

        That multiplies each row with the other adapters' factors too; but a call for every adapter decodes the weight
        as often, and takes launches. Measured, forward and backward in bf16 on 2 cores with AMX (1024 x 1024 to 4096 x
        4096, 2 to 32 adapters of rank 16 and 64, 1 to 4096 rows of x): the masked call is the faster one up to 256
        ranks in all, and with any number of adapters of rank 16 (16 of them, 4096 x 4096, 1024 rows: 85 ms against
        166); not with eight adapters of rank 64 (163 ms against 115). The two meet where a call's wasted
        multiplications cost as much as another decoding, 15 of them a weight, and 80 million for the rest.
        """
        acting: list[Any] = [self.adapters[name] for name in groups if name is not None]
        if self.training:
            rates = {adapter.dropout for adapter in acting}
            if len(rates) > 1 or (rates != {0.0} and any(adapter.dora for adapter in acting)):
                return False  # one random mask for all of x cannot have two rates; DoRA drops the base's input too
        size, ranks = self.in_features + self.out_features, [adapter.r for adapter in acting]
        rows = x.numel() // max(1, x.shape[-1]) / len(groups)
        wasted = rows * (sum(ranks) - sum(ranks) / len(ranks)) * size
        return wasted <= 8e7 + 15 * self.in_features * self.out_features

    def _masked(self, x: Tensor, groups: dict[str | None, list[int]]) -> Tensor:
        adapters: dict[str, Any] = {name: self.adapters[name] for name in groups if name is not None}
        a = torch.cat([adapter.lora_A for adapter in adapters.values()])
        b = torch.cat([adapter.lora_B for adapter in adapters.values()], 1)
        mask = self._mask(groups, adapters, x.device)
        base = self.base
        if any(adapter.dora for adapter in adapters.values()):
            y = self._product(x, (a, b, 1.0), mask)
            y = y * ops.spread(self._gains(groups, adapters, x.device).to(y.dtype), y)
            return y if base.bias is None else y + base.bias.to(y.dtype)
        dropout = next(iter(adapters.values())).dropout if self.training else 0.0
        if not isinstance(base, QuantLinear):
            return self._sum(x, self._side(x, a, dropout, 1.0, mask), b)
        weight, bias = base.operands()
        if dropout == 0.0:
            return ops.lora_linear(x, weight, bias, a, b, 1.0, mask)
        return ops.linear(x, weight, bias, self._side(x, a, dropout, 1.0, mask), b)

    def _mask(self, groups: dict[str | None, list[int]], adapters: dict[str, Any], device: torch.device) -> Tensor:
        """fp32 [rows, sum of ranks]: a row's scaling in the columns of its adapter, else 0."""
        blocks = tuple((name, adapter.r, adapter.scaling) for name, adapter in adapters.items())

        def make() -> Tensor:
            table = [[by if name == own else 0.0 for name, r, by in blocks for _ in range(r)] for own in groups]
            return torch.tensor(table, device=device)[self._numbers(groups, device)]

        return self.selection.constant(("mask", blocks, tuple(groups), device), make)

    def _numbers(self, groups: dict[str | None, list[int]], device: torch.device) -> Tensor:
        """int64 [rows]: the number of each row's group."""

        def make() -> Tensor:
            numbers = {row: number for number, rows in enumerate(groups.values()) for row in rows}
            return torch.tensor([numbers[row] for row in range(len(numbers))], device=device)

        return self.selection.constant(("numbers", tuple(groups), device), make)

    def _gains(self, groups: dict[str | None, list[int]], adapters: dict[str, Any], device: torch.device) -> Tensor:
        """fp32 [rows, out_features]: DoRA's m / n of each row's adapter, 1 for rows without."""
        gains = []
        for name in groups:
            magnitude = None if name is None else adapters[name].lora_magnitude
            if name is None or magnitude is None:
                gains.append(torch.ones(self.out_features, device=device))
            else:
                gains.append(magnitude.float() / self._norms(adapters[name]))
        return torch.stack(gains)[self._numbers(groups, device)]


@torch.no_grad()
def _squares(base: QuantLinear | nn.Linear) -> Tensor:
    """||w||^2 of the rows, fp32; a constant in a compiled graph, as the base is frozen."""
    whole = base.dequantize() if isinstance(base, QuantLinear) else base.weight.detach()
    return torch.linalg.vector_norm(whole, dim=1, dtype=torch.float32).square_()


# All that torch.compiler.assume_constant_result does, beside importing torch's compiler: 1.5 s of a program's start.
_squares._dynamo_marked_constant = True  # type: ignore[attr-defined]
