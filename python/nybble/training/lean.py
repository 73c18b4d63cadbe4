"""Fused kernels in place of a model's own elementwise code, for the time of a `with` block.

    with lean(model) as report:
        ...                     # train

A model of transformers computes its norms, gated MLPs and rotary embeddings in many small operations, and saves fp32
copies of what goes through them for the backward pass. `lean` replaces, on the CPU, the forward of every module that it
recognizes by a function of `nybble.nn.fused`. A class is recognized by what it computes: its own forward and the fused
one are compared on small random inputs, results, gradients and dtypes; what differs is left alone.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import fused

ROTARY = "apply_rotary_pos_emb"

#: In fp32, of the largest magnitude: far above what roundings do, far below any other formula.
_CLOSE = 1e-4
_CLOSE_BF16 = 0.05
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class LeanReport:
    """What `lean` replaced.

    Attributes:
        norms, mlps: how many modules of which class. rotary: modules whose `apply_rotary_pos_emb` was replaced.
        left: how many modules of which class look like a norm or an MLP, but compute something else.
    """

    norms: Counter[str] = field(default_factory=Counter)
    mlps: Counter[str] = field(default_factory=Counter)
    rotary: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = [f"{count} {name}" for name, count in (*self.norms.items(), *self.mlps.items())]
        parts = [*counts, *(f"{ROTARY} of {name}" for name in self.rotary)]
        left = ", ".join(f"{count} {name}" for name, count in self.left.items())
        return f"fused: {', '.join(parts) or 'nothing'}" + (f"; left as they are: {left}" if left else "")


@contextmanager
def lean(model: nn.Module) -> Iterator[LeanReport]:
    """Runs a `with` block with fused kernels in `model`, and restores the model afterwards, also after an exception.

    RMSNorm (also with 1 + weight), MLPs of gate_proj, up_proj, down_proj and act_fn (or gate_up_proj, down_proj and
    activation_fn), and `apply_rotary_pos_emb` of the models' own files are replaced, the latter for every model of the
    same file. Modules whose forward somebody else has replaced, and those not on the CPU, are left alone; so a block
    inside another does nothing. Neither parameters nor torch's random numbers change.

    Results differ from the model's own by roundings: each result is rounded once, where the model rounds in between.
    Second derivatives through what was replaced raise torch's error.
    """
    report = LeanReport()
    with ExitStack() as stack:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), _no_autocast():
            found = [*_modules(model, report)]
            functions = [*_rotary_functions(model)]
        for module, forward in found:
            module.__dict__["forward"] = MethodType(forward, module)  # a copy of the model gets one of its own
            stack.callback(_restore_module, module, forward)
        for file in functions:
            if _replace_rotary(file):
                report.rotary.append(file.__name__)
                stack.callback(_restore_rotary, file)
        yield report


def _no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def _restore_module(module: nn.Module, forward: Any) -> None:
    ours = module.__dict__.get("forward")
    if getattr(ours, "__func__", None) is forward:
        del module.__dict__["forward"]


# ---- modules ---------------------------------------------------------------------------------------------------------

Forward = Callable[..., Tensor]


def _modules(model: nn.Module, report: LeanReport) -> Iterator[tuple[nn.Module, Forward]]:
    """Every module to be replaced, and by what."""
    known: dict[Any, Forward | None] = {}
    for module in model.modules():
        if _looks_like_norm(module):
            key: tuple[Any, ...] = (type(module), _traits(module))
            find: Callable[[nn.Module], Forward | None] = _norm_forward
            counted = report.norms
        elif (names := _mlp_names(module)) is not None:
            acted = getattr(module, names[-1])
            key = (type(module), _traits(module), type(acted), _traits(acted))
            find, counted = partial(_mlp_forward, names=names), report.mlps
        else:
            continue
        if "forward" in module.__dict__ or not all(p.is_cpu for p in module.parameters()):
            continue
        if key not in known:
            known[key] = find(module)
        forward = known[key]
        if forward is None:
            report.left[type(module).__name__] += 1
        else:
            counted[type(module).__name__] += 1
            yield module, forward


def _traits(module: Any) -> tuple[Any, ...]:
    """What may tell one module of a class from another."""
    values = getattr(module, "__dict__", {})
    simple = sorted((k, v) for k, v in values.items() if isinstance(v, bool | int | float | str) and k != "training")
    return (*simple, id(module) if isinstance(module, FunctionType) else None)


def _takes_one(module: nn.Module) -> bool:
    """Whether its forward takes one argument and no other."""
    parameters = [*inspect.signature(type(module).forward).parameters.values()][1:]
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _clone(module: nn.Module, parameters: dict[str, Any], children: dict[str, Any]) -> nn.Module:
    """A module of the same class and attributes with other parameters and children; no hook of it runs."""
    clone = module.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.update(_parameters=parameters, _modules=children)
    return clone


def _agrees(own: Callable[..., Tensor], ours: Callable[..., Tensor], x: Tensor, *others: Tensor) -> bool:
    """Whether both give the same at x, and in fp32 the same gradients."""
    inputs = (x, *others)
    expected, actual = own(x), ours(x)
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if any(t.dtype != torch.float32 for t in inputs):
        return _close(actual, expected, _CLOSE_BF16)
    towards = torch.cos(torch.arange(expected.numel(), dtype=torch.float32)).view_as(expected)
    pairs = zip(
        torch.autograd.grad(actual, inputs, towards), torch.autograd.grad(expected, inputs, towards), strict=True
    )
    return _close(actual, expected, _CLOSE) and all(_close(a, b, _CLOSE) for a, b in pairs)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    actual, expected = actual.detach().double(), expected.detach().double()
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator, device="cpu").to(dtype)


def _one_argument(own: Callable[..., Any], run: Callable[[Any, Tensor], Tensor]) -> Forward:
    """`run` as a forward that leaves any other call to the module's own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        values = (*args, *kwargs.values())
        return run(self, values[0]) if len(values) == 1 else own(self, *args, **kwargs)

    return forward


# ---- norms -----------------------------------------------------------------------------------------------------------


def _eps_name(module: nn.Module) -> str | None:
    return next((n for n in ("variance_epsilon", "eps") if isinstance(module.__dict__.get(n), float)), None)


def _looks_like_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and weight.is_floating_point()
        and sum(p is not None for p in module._parameters.values()) == 1
        and not module._modules
        and _eps_name(module) is not None
        and _takes_one(module)
    )


def _norm_forward(module: nn.Module) -> Forward | None:
    """The forward of an RMSNorm: with weight or 1 + weight, its result in the promoted dtype or in its input's."""
    eps = _eps_name(module)
    assert eps is not None
    for offset, keeps in itertools.product((0.0, 1.0), (False, True)):
        if _is_norm(module, eps, offset, keeps):
            return _one_argument(type(module).forward, partial(_norm, eps=eps, offset=offset, keeps=keeps))
    return None


def _norm(self: Any, x: Tensor, eps: str, offset: float, keeps: bool) -> Tensor:
    return fused.rms_norm(x, self.weight, getattr(self, eps), offset, x.dtype if keeps else None)


def _is_norm(module: nn.Module, eps: str, offset: float, keeps: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    columns = module.get_parameter("weight").shape[0]
    # Inputs far above eps, and of its size; with a mean, which a LayerNorm would take away.
    sizes = (1.0, max(module.__dict__[eps], 1e-30) ** 0.5)
    for dtype, weight_dtype, size in itertools.product(_DTYPES, _DTYPES, sizes):
        weight = nn.Parameter(_normal(generator, columns, dtype=weight_dtype))
        x = ((_normal(generator, 3, columns) + 0.5) * size).to(dtype).requires_grad_()
        clone = _clone(module, {**module._parameters, "weight": weight}, {})
        own, ours = partial(type(module).forward, clone), partial(_norm, clone, eps=eps, offset=offset, keeps=keeps)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if not _runs_alike(own, ours, x, weight):
                    return False
    return True


def _runs_alike(own: Callable[..., Tensor], ours: Callable[..., Tensor], *inputs: Tensor) -> bool:
    try:
        return _agrees(own, ours, *inputs)
    except Exception:  # its own forward wants something else; that is no reason to fail
        return False


# ---- MLPs ------------------------------------------------------------------------------------------------------------

#: The projections, and last what acts on the gate.
_SEPARATE = ("gate_proj", "up_proj", "down_proj", "act_fn")
_JOINED = ("gate_up_proj", "down_proj", "activation_fn")


def _mlp_names(module: nn.Module) -> tuple[str, ...] | None:
    """The names of its parts, if it has those of a gated MLP and no other, and nobody listens to its activation."""
    for names in (_SEPARATE, _JOINED):
        if not all(isinstance(module._modules.get(name), nn.Module) for name in names[:-1]):
            continue
        acted = getattr(module, names[-1], None)
        alone = set(module._modules) <= set(names) and not module._parameters and _takes_one(module)
        hooked = isinstance(acted, nn.Module) and (acted._forward_hooks or acted._forward_pre_hooks)
        if callable(acted) and alone and not hooked and not (isinstance(acted, nn.Module) and acted._backward_hooks):
            return names
    return None


def _separate(self: Any, x: Tensor, activation: str) -> Tensor:
    return self.down_proj(fused.gated(self.gate_proj(x), self.up_proj(x), activation))


def _joined(self: Any, x: Tensor, activation: str) -> Tensor:
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(fused.gated(gate, up, activation))


def _mlp_forward(module: nn.Module, names: tuple[str, ...]) -> Forward | None:
    run = _separate if names is _SEPARATE else _joined
    for activation in fused.ACTIVATIONS:
        if _is_mlp(module, names, partial(run, activation=activation)):
            return _one_argument(type(module).forward, partial(run, activation=activation))
    return None


def _is_mlp(module: nn.Module, names: tuple[str, ...], run: Callable[..., Tensor]) -> bool:
    """The projections are replaced by small ones of the test's own."""
    generator = torch.Generator().manual_seed(0)
    width, inner = 6, 10
    for dtype in _DTYPES:
        children: dict[str, Any] = dict(module._modules)
        for name in names[:-1]:
            n, k = (width, inner) if name == "down_proj" else (2 * inner if name == "gate_up_proj" else inner, width)
            layer = nn.Linear(k, n, bias=False, device="meta")
            layer.weight = nn.Parameter(_normal(generator, n, k, dtype=dtype))
            children[name] = layer
        clone = _clone(module, dict(module._parameters), children)
        x = (2 * _normal(generator, 2, 3, width)).to(dtype).requires_grad_()
        weights = [children[name].weight for name in names[:-1]]
        if not _runs_alike(partial(type(module).forward, clone), partial(run, clone), x, *weights):
            return False
    return True


# ---- the rotary embedding --------------------------------------------------------------------------------------------

_own_rotary: dict[ModuleType, Any] = {}
_lock = threading.Lock()


def _rotary_functions(model: nn.Module) -> Iterator[ModuleType]:
    """The files that the model's classes are from, where their `apply_rotary_pos_emb` is the standard one."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    for file in (sys.modules.get(name) for name in names):
        function = getattr(file, ROTARY, None)
        if file is None or not inspect.isfunction(function) or file in _own_rotary:
            continue
        if next(model.parameters(), torch.empty(0)).is_cpu and _is_rotary(function):
            yield file


def _is_rotary(function: Callable[..., Any]) -> bool:
    if [*inspect.signature(function).parameters][:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    for dtype, table in itertools.product(_DTYPES, repeat=2):
        q, k = (_normal(generator, 2, heads, 5, 8, dtype=dtype).requires_grad_() for heads in (4, 2))
        cos, sin = (_normal(generator, 2, 5, 8, dtype=table) for _ in range(2))
        for which in range(2):
            own, ours = (partial(_rotated, run, which, (q, k), cos, sin) for run in (function, fused.rotary))
            if not _runs_alike(own, ours, (q, k)[which]):
                return False
    return True


def _rotated(
    function: Callable[..., Any], which: int, both: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, x: Tensor
) -> Tensor:
    """What becomes of x in the place of q (`which` is 0) or k (1) of `both`."""
    q, k = (x if i == which else other for i, other in enumerate(both))
    return function(q, k, cos, sin)[which]


def _replace_rotary(file: ModuleType) -> bool:
    with _lock:
        if file in _own_rotary:
            return False
        own = _own_rotary[file] = getattr(file, ROTARY)

        def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or not (fused.rotates(q, cos, sin) and fused.rotates(k, cos, sin)):
                return own(q, k, cos, sin, *args, **kwargs)
            return fused.rotary(q, k, cos, sin)

        setattr(file, ROTARY, rotary)
        return True


def _restore_rotary(file: ModuleType) -> None:
    with _lock:
        setattr(file, ROTARY, _own_rotary.pop(file))
