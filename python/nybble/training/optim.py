"""Optimizers of the loop: AdamW with its moments in fp32 or 8 bits, one pass over the memory; others by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import reference, reference_optim
from ..backends import cpu_optim, cuda_optim
from ..errors import LayoutError, UnsupportedDtypeError
from ..formats import check_block_size
from ..reference_optim import AdamWRule, adamw_rule, rounding_key

#: Smaller parameters keep fp32 moments also with bits=8 (bitsandbytes' limit). They are the norms' weights and the
#: biases, whose elements act on every token: 8 bits would save next to nothing and cost precision where it tells most.
MIN_8BIT_SIZE = 4096

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALES = ("exp_avg_absmax", "exp_avg_sq_absmax")


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with torch.optim.AdamW's rule, its moments in fp32 or in blocks of 8-bit codes.

    On the CPU and on NVIDIA GPUs a step is one pass over parameter, gradient and moments, and gives the same bits on
    both and for any number of threads. Elsewhere, and for a parameter that is not contiguous, the same rule runs as
    plain torch operations. All arithmetic is fp32 whatever the dtypes (`nybble.reference_optim`).

    Args:
        params: parameters, fp32, fp16 or bf16; or groups, each of which may set any of the options below.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; weight decay is decoupled.
        bits: 32, or 8: both moments as 8-bit codes of bitsandbytes' dynamic maps with an fp32 scale a block, 2.03 bytes
            an element instead of 8 (arXiv 2110.02861). Parameters of fewer than 4096 elements stay at 32. Embeddings
            may deserve a group with bits=32.
        block_size: of the 8-bit blocks, one of `formats.BLOCK_SIZES`.
        stochastic_rounding: bf16 parameters are rounded up or down by chance instead of to the nearest, so that
            updates below half a unit in the last place add up instead of getting lost. The chance is a hash of seed,
            step, parameter and element: runs repeat, and a resumed one goes on alike.
        seed: of that hash.

    State of a parameter: "step" (int64), "exp_avg" and "exp_avg_sq" (fp32, or uint8 codes with "exp_avg_absmax" and
    "exp_avg_sq_absmax"). `state_dict` holds it as it is and `load_state_dict` keeps every bit of it; it also takes
    the state of a torch.optim.AdamW.

    Raises:
        ValueError: an option is not one of those allowed.
        UnsupportedDtypeError: a parameter has another dtype.

    >>> weight = torch.nn.Parameter(torch.ones(64, 64))
    >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, bits=8)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> round(weight[0, 0].item(), 4)
    0.9
    >>> state_bytes(optimizer)
    8328
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        block_size: int = 256,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bits": bits,
            "block_size": block_size,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer; a group that is refused is not added."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for index, param in enumerate(group["params"]):
                reference.check_float(param, _name_of(group, index))
                if group["stochastic_rounding"] and param.dtype == torch.float16:
                    raise UnsupportedDtypeError(
                        f"{_name_of(group, index)} has dtype torch.float16; stochastic_rounding is for bfloat16 "
                        "parameters (float32 ones need none)"
                    )
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returned.

        Args:
            closure: called first, with gradients enabled.
            grad_scale: gradients are multiplied by it on their way, and are not changed: what `clip_scale` gives.

        Raises:
            RuntimeError: a gradient is sparse; no parameter has been changed.
            NonFiniteError: a gradient is NaN, infinite or beyond fp32 when squared, and its moments are kept in 8 bits.
                Parameters before it have been updated, on a GPU all others, so the run should go on from saved state.
                With fp32 moments such an element becomes NaN as in torch.optim.AdamW: check the gradient's norm first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not math.isfinite(grad_scale):
            raise ValueError(f"grad_scale must be finite, got {grad_scale!r}")
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(f"{_name_of(group, index)} has a sparse gradient, which AdamW does not take")
        number = 0
        refused = cuda_optim.Refused()
        for group in self.param_groups:
            rules: dict[int, AdamWRule] = {}
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._step_one(param, group, index, number, rules, grad_scale, refused)
                number += 1
        refused.check()
        return loss

    def _step_one(
        self,
        param: Tensor,
        group: dict[str, Any],
        index: int,
        number: int,
        rules: dict[int, AdamWRule],
        grad_scale: float,
        refused: cuda_optim.Refused,
    ) -> None:
        state = self.state[param]
        if not state:
            state.update(_new_state(param, group))
        step = int(state["step"]) + 1
        if step not in rules:
            rules[step] = adamw_rule(
                step, float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], grad_scale
            )
        key = None
        if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
            key = rounding_key(group["seed"], step, number)
        moments = [state[name] for name in _MOMENTS]
        assert param.grad is not None
        on_gpu = cuda_optim.supports(param)
        backend = cuda_optim if on_gpu else cpu_optim if cpu_optim.supports(param) else reference_optim
        if _SCALES[0] in state:
            scales = [state[name] for name in _SCALES]
            name = f"the gradient of {_name_of(group, index)}"
            more = {"refused": refused} if on_gpu else {}
            backend.adamw_8bit(
                param, param.grad, *moments, *scales, group["block_size"], rules[step], key=key, name=name, **more
            )
        else:
            backend.adamw_32bit(param, param.grad, *moments, rules[step], key=key)
        state["step"].fill_(step)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, bit for bit, as copies on each parameter's device.

        torch's own method casts state to the parameter's dtype, which would round fp32 moments of bf16 parameters and
        make numbers of codes. Options that the saved groups do not name keep their values.

        Raises:
            ValueError: groups, parameters or state do not fit; the optimizer has not been changed.
        """
        saved = [
            {**{name: value for name, value in ours.items() if name != "params"}, **theirs}
            for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        sizes = [len(group["params"]) for group in self.param_groups]
        states: list[tuple[Tensor, dict[str, Tensor]]] = []
        if [len(group["params"]) for group in state_dict["param_groups"]] == sizes:
            for ours, theirs in zip(self.param_groups, saved, strict=True):
                _check_options(theirs)
                for index, (param, place) in enumerate(zip(ours["params"], theirs["params"], strict=True)):
                    if state_dict["state"].get(place):
                        given = state_dict["state"][place]
                        states.append((param, _loaded_state(given, param, theirs, _name_of(ours, index))))
            state_dict = {**state_dict, "param_groups": saved}
        super().load_state_dict({**state_dict, "state": {}})  # raises where the groups do not fit
        self.state.update(states)


def _name_of(group: dict[str, Any], index: int) -> str:
    """How messages call a parameter: by name where the optimizer was given names."""
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"


def _check_options(options: dict[str, Any]) -> None:
    """Raises ValueError, or FormatError for block_size, which is one."""

    def number(name: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> None:
        good = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if not (good and math.isfinite(value) and holds(float(value))):
            raise ValueError(f"{name} must be a number {allowed}, got {value!r}")

    for name in ("lr", "eps", "weight_decay"):
        number(name, options[name], "of at least 0", lambda value: value >= 0)
    if not isinstance(options["betas"], tuple | list) or len(options["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {options['betas']!r}")
    for beta in options["betas"]:
        number("betas", beta, "of at least 0 and below 1, each", lambda value: 0 <= value < 1)
    if options["bits"] not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, got {options['bits']!r}")
    check_block_size(options["block_size"])
    if not isinstance(options["stochastic_rounding"], bool):
        raise ValueError(f"stochastic_rounding must be True or False, got {options['stochastic_rounding']!r}")
    if isinstance(options["seed"], bool) or not isinstance(options["seed"], int):
        raise ValueError(f"seed must be an integer, got {options['seed']!r}")


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
    # A group of parts of parameters decides by the whole ones.
    if group["bits"] == 8 and param.numel() >= group.get("min_8bit_size", MIN_8BIT_SIZE):
        for moment, scale, signed in zip(_MOMENTS, _SCALES, (True, False), strict=True):
            state[moment], state[scale] = reference_optim.empty_moment(param, group["block_size"], signed)
    else:
        for moment in _MOMENTS:
            state[moment] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
    return state


def _loaded_state(state: dict[str, Any], param: Tensor, group: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Copies of a parameter's saved state; ValueError (LayoutError) if it is not that of such a parameter."""
    names = {"step", *_MOMENTS, *(_SCALES if _SCALES[0] in state else ())}
    if set(state) != names:
        raise LayoutError(f"{name}: its saved state holds {sorted(state)}; AdamW's is {sorted(names)}")
    loaded = {"step": torch.tensor(int(state["step"]), dtype=torch.int64, device="cpu")}
    for key in sorted(names - {"step"}):
        value, shape = state[key], param.shape
        codes = key in _MOMENTS and _SCALES[0] in state
        if key in _SCALES:
            shape = torch.Size((-(-param.numel() // group["block_size"]),))
        if value.shape != shape or (value.dtype != torch.uint8 if codes else not value.is_floating_point()):
            raise LayoutError(
                f"{name}: its saved {key} is {value.dtype} {tuple(value.shape)}; "
                f"{'uint8' if codes else 'a floating dtype'} {tuple(shape)} is needed"
            )
        dtype = torch.uint8 if codes else torch.float32
        loaded[key] = torch.empty(shape, dtype=dtype, device=param.device).copy_(value)
    return loaded


def clip_scale(
    parameters: Iterable[Tensor], max_norm: float | None, whole: Callable[[float], float] | None = None
) -> tuple[Tensor, float]:
    """The norm of all gradients together, and the factor that clips it to `max_norm`.

    The factor is torch.nn.utils.clip_grad_norm_'s, min(1, max_norm / (norm + 1e-6)), for `AdamW.step(grad_scale=...)`:
    clipping then takes no pass of its own over the gradients. On the CPU and on NVIDIA GPUs, which are waited for once,
    the norm has the same bits, for any number of threads.

    Args:
        parameters: those without a gradient do not count.
        max_norm: above 0; None clips nothing.
        whole: makes the sum of squares of all gradients of that of these, which are only a part of them.

    Returns:
        The norm, fp32, 0-dim, on the CPU, infinite or NaN where a gradient is (or is beyond fp32 when squared; the
        factor is then 0 or NaN); and the factor.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, or None for no clipping; got {max_norm!r}")
    grads = [param.grad for param in parameters if param.grad is not None]
    on_gpu = [grad for grad in grads if cuda_optim.serves(grad)]
    squares = cuda_optim.sums_of_squares(on_gpu) if on_gpu else []  # whose core may not have been built
    for grad in grads:
        if not cuda_optim.serves(grad):
            if grad.device.type == "mps":
                grad = grad.cpu()  # float64, in which squares are added, is not there
            backend = cpu_optim if grad.device.type == "cpu" else reference_optim
            squares.append(backend.sum_of_squares(grad))
    total = sum(squares) if not all(map(math.isfinite, squares)) else math.fsum(squares)
    total = total if whole is None else whole(total)
    norm = torch.tensor(math.sqrt(total), dtype=torch.float32, device="cpu")
    if max_norm is None:
        return norm, 1.0
    scale = max_norm / (float(norm) + 1e-6)
    return norm, scale if math.isnan(scale) else min(1.0, scale)


def step_scaled(optimizer: torch.optim.Optimizer, grad_scale: float) -> None:
    """A step on gradients times `grad_scale`: in the same pass with `AdamW`, by multiplying them first with others."""
    if isinstance(optimizer, AdamW):
        optimizer.step(grad_scale=grad_scale)
        return
    if grad_scale != 1.0:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(grad_scale)
    optimizer.step()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; state comes into being with a parameter's first step."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def build_optimizer(
    name: str,
    groups: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    block_size: int = 256,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """An optimizer by name over parameters or groups of them.

    Args:
        name: "adamw" and "adamw8bit": `AdamW`. "lion": the package lion-pytorch (arXiv 2302.06675), which takes no
            eps. "sgd": torch.optim.SGD, which takes lr, momentum and weight_decay.
        stochastic_rounding, block_size, seed: of `AdamW`.

    Raises:
        ValueError: an unknown name, or stochastic rounding with an optimizer that has none.
        ImportError: lion-pytorch is not installed.
    """
    if name in ("adamw", "adamw8bit"):
        return AdamW(
            groups,
            lr,
            betas,
            eps,
            weight_decay,
            bits=8 if name == "adamw8bit" else 32,
            block_size=block_size,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
    if name not in ("lion", "sgd"):
        raise ValueError(f"optimizer must be one of adamw, adamw8bit, lion, sgd; got {name!r}")
    if stochastic_rounding:
        raise ValueError(f"stochastic_rounding goes with adamw and adamw8bit; the optimizer is {name!r}")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    try:
        from lion_pytorch import Lion
    except ImportError as error:
        raise ImportError("optimizer 'lion' needs the package lion-pytorch: pip install 'nybble[lion]'") from error
    return Lion(groups, lr=lr, betas=betas, weight_decay=weight_decay)
