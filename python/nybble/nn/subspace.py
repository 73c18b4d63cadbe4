"""Training in a random subspace: every parameter is theta_0 + P z, and only the few numbers z are trained.

The number of z at which that reaches what full fine-tuning does is the intrinsic dimension of a task (Li et al.,
arXiv 1804.08838; of fine-tuning: Aghajanyan et al., arXiv 2012.13255). P is Fastfood's, which takes memory for a few
numbers a parameter, where a dense one would take D x d.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapter_names
from .fastfood import Fastfood
from .linear import QuantLinear
from .names import weight_owners

#: What the module with z is called on a model.
NAME = "subspace"


class Subspace(nn.Module):
    """What `add_subspace` puts on a model.

    The parameters stay where they are, frozen, with their values theta_0. For the time of the model's forward the
    modules see theta_0 + P z in their place.

    Attributes:
        z: fp32 [dims], zeros at the start; without `structure` that is all that is trained.
        scales: fp32 [groups], ones at the start, with `structure`; else None. The first of `groups` goes with the
            parameters of the first group, and so on: they move by 1 + scale_step * (scale - 1) times P z.
        fastfood: P.
    """

    def __init__(
        self, model: nn.Module, names: list[str], dims: int, seed: int, structure: bool, scale_step: float
    ) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        owners = weight_owners(model)
        self.names = names
        self.groups = list(dict.fromkeys(map(_group, names))) if structure else []
        if structure and dims <= len(self.groups):
            raise ValueError(
                f"dims must be above {len(self.groups)}, one scale for each of the model's {len(self.groups)} parts "
                f"(structure=True); got {dims}"
            )
        # Plain lists: these modules and parameters are the model's, and not this module's.
        self._parameters_of = [parameters[name] for name in names]
        self._places = [[_place(model, owner) for owner in owners[id(parameters[name])]] for name in names]
        self._group_of = [self.groups.index(_group(name)) for name in names] if structure else []
        self._sizes = [parameters[name].numel() for name in names]
        device = self._parameters_of[0].device
        self.fastfood = Fastfood(dims - len(self.groups), sum(self._sizes), seed).to(device)
        self.z = nn.Parameter(torch.zeros(self.fastfood.dims, device=device))
        self.scales = nn.Parameter(torch.ones(len(self.groups), device=device)) if structure else None
        self.scale_step = scale_step
        self._kept: tuple[Any, list[Tensor]] | None = None

    @property
    def size(self) -> int:
        """Numbers that move with z."""
        return self.fastfood.size

    def values(self) -> list[Tensor]:
        """theta_0 + P z by parameter, in the order of `names`; with gradients they have a graph to z."""
        if torch.is_grad_enabled():
            self._kept = None
            return self._compute()
        # An evaluation runs many batches with the same z.
        key = (self.z._version, None if self.scales is None else self.scales._version)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._compute()
        return self._kept[1]

    def _compute(self) -> list[Tensor]:
        # One split, whose gradient is one concatenation.
        pieces = self.fastfood(self.z).split(self._sizes)
        factors = None if self.scales is None else 1 + self.scale_step * (self.scales - 1)
        result = []
        for index, (parameter, piece) in enumerate(zip(self._parameters_of, pieces, strict=True)):
            moved = piece if factors is None else piece * factors[self._group_of[index]]
            result.append(parameter.detach() + moved.view_as(parameter))
        return result

    def _enter(self, model: nn.Module, args: Any) -> None:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError("a subspace does not go with gradient checkpointing, which runs layers again outside it")
        for places, value in zip(self._places, self.values(), strict=True):
            for module, leaf in places:
                module.__dict__[leaf] = value  # is found before the registered parameter

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        for places in self._places:
            for module, leaf in places:
                module.__dict__.pop(leaf, None)

    def extra_repr(self) -> str:
        return f"{len(self.names)} parameters of {self.size} numbers, {len(self.groups)} scales"


def add_subspace(
    model: nn.Module,
    dims: int,
    *,
    seed: int = 0,
    structure: bool = False,
    scale_step: float = 1.0,
    exclude: Collection[str] = (),
) -> Subspace:
    """Freeze a model and let its parameters move in a random subspace of `dims` dimensions, in place.

    It acts in the forward of `model` itself, not in that of a part of it that is called directly.

    Args:
        model: a plain model in fp32.
        dims: numbers that are trained, at most those of the parameters.
        seed: of the projection.
        structure: beside z, one scale for each block of the model (SAID: theta = theta_0 + scale_block P z). These
            scales are counted in `dims`.
        scale_step: how far a block's scale goes when the trained number moves by one. z takes large steps, of the order
            of one, which would turn a scale about; an optimizer like Adam then moves scales scale_step times as fast.
        exclude: names of parameters that are left as they are, trainable or not.

    Returns:
        The module with what is trained, `model.subspace`.

    Raises:
        ValueError: dims or scale_step is not possible; the model is quantized, has adapters, a subspace already, or
            parameters that are not fp32; or a name in `exclude` is no parameter.
    """
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if quantized or adapter_names(model):
        what = f"{quantized[0]} is quantized" if quantized else f"it has the adapter {adapter_names(model)[0]!r}"
        raise ValueError(f"model: {what}; a subspace is for the parameters of a plain model")
    if hasattr(model, NAME):
        raise ValueError(f"model: it has a {NAME!r} already")
    parameters = dict(model.named_parameters())
    unknown = sorted(set(exclude) - parameters.keys())
    if unknown:
        raise ValueError(
            f"exclude: {unknown[0]!r} is no parameter of the model ({', '.join(list(parameters)[:4])} ...)"
        )
    names = [name for name in parameters if name not in exclude]
    odd = next((name for name in names if parameters[name].dtype != torch.float32), None)
    if odd is not None:
        raise ValueError(f"model: {odd} has dtype {parameters[odd].dtype}; load it in torch.float32")
    if not names:
        raise ValueError("exclude: no parameter is left")
    if isinstance(scale_step, bool) or not isinstance(scale_step, int | float) or not 0 < scale_step < math.inf:
        raise ValueError(f"scale_step must be a number above 0, got {scale_step!r}")
    subspace = Subspace(model, names, dims, seed, structure, scale_step)
    for name in names:
        parameters[name].requires_grad_(False)
    setattr(model, NAME, subspace)
    model.register_forward_pre_hook(subspace._enter)
    model.register_forward_hook(subspace._leave, always_call=True)
    return subspace


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _group(name: str) -> str:
    """The block that a parameter is in: its path up to the first number, or else the first two parts of it."""
    parts = name.split(".")[:-1]
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:2] if number is None else parts[: number + 1])
