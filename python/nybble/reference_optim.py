"""The executable specification of the optimizer step: AdamW with moments in fp32 or in blocks of 8-bit codes.

Plain torch, on any device; the compiled step (`nybble.backends.cpu_optim`) has the same signatures and gives the same
bits (a NaN may differ in its payload). Arithmetic is fp32 without fused multiply-adds, in the order written, whatever
the dtype of the parameter, which is rounded once at the end. Nothing here is written for speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .errors import LayoutError, NonFiniteError
from .formats import check_block_size, dynamic_map

_LOW_32 = 0xFFFFFFFF
_LOW_64 = 0xFFFFFFFFFFFFFFFF
_INFINITY = 0x7F800000


class AdamWRule(NamedTuple):
    """The numbers of one step, which fp32 then rounds; see `adamw_rule`. In the order of the core's struct."""

    grad_scale: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    decay: float
    step_size: float
    root_scale: float
    eps: float


def adamw_rule(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_scale: float = 1.0
) -> AdamWRule:
    """The numbers of step `step` (1 is the first) of AdamW (arXiv 1711.05101), as torch.optim.AdamW has them."""
    beta1, beta2 = betas
    return AdamWRule(
        grad_scale=grad_scale,
        beta1=beta1,
        rest1=1.0 - beta1,
        beta2=beta2,
        rest2=1.0 - beta2,
        decay=1.0 - lr * weight_decay,
        step_size=lr / (1.0 - beta1**step),
        root_scale=1.0 / math.sqrt(1.0 - beta2**step),
        eps=eps,
    )


@torch.no_grad()
def adamw_32bit(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, rule: AdamWRule, key: int | None = None) -> None:
    """One step on fp32 moments; `param`, `m` and `v` are changed in place.

    Args:
        param: fp32, fp16 or bf16, any shape and strides.
        grad: param's shape, any of the three dtypes.
        m: running mean of the gradient, fp32, as many elements as param, in its row-major order.
        v: running mean of the gradient's square, likewise.
        key: None rounds param to nearest; a 64-bit number rounds a bf16 param stochastically (`stochastic_bf16`).

    What is not finite spreads within its element, as in torch.optim.AdamW.

    Raises:
        UnsupportedDtypeError, LayoutError: `check_step`.
    """
    check_step(param, grad, key, {"m": m, "v": v})
    rule = _in_fp32(rule)
    flat_m, flat_v = m.reshape(-1), v.reshape(-1)
    new_m, new_v = _moments(grad, flat_m, flat_v, rule)
    _update(param, new_m, new_v, rule, key)
    flat_m.copy_(new_m)
    flat_v.copy_(new_v)


@torch.no_grad()
def adamw_8bit(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor,
    v_absmax: Tensor,
    block_size: int,
    rule: AdamWRule,
    key: int | None = None,
    name: str = "grad",
) -> None:
    """One step on moments that are kept in 8 bits; `param`, the codes and the scales are changed in place.

    The moments are decoded, brought up to date, used in fp32, and encoded again by `reference.quantize_8bit`'s rule: m
    with the signed dynamic map, v with the unsigned one. One thing differs: a v above 0 never gets the code of 0. Its
    element's step would be m / eps, thousands of times too long, because small values of m outlive the squares of
    theirs in v. So it counts as the map's least code, 3.2e-7 of the block's largest v, and the step is rather short.

    Args:
        param, grad, key: as for `adamw_32bit`.
        m, v: codes, uint8, as many as param has elements, in its row-major order; for what a fresh state holds see
            `empty_moment`.
        m_absmax, v_absmax: fp32 [ceil(n / block_size)].
        block_size: one of `formats.BLOCK_SIZES`.
        name: what the error calls the gradient.

    Raises:
        NonFiniteError: a block's new moments are not all finite. Such a block is left as it was, its part of param
            too; all other blocks have been updated.
        UnsupportedDtypeError, LayoutError, FormatError: `check_step`.
    """
    check_block_size(block_size)
    check_step(param, grad, key, {}, {"m": m, "v": v}, {"m_absmax": m_absmax, "v_absmax": v_absmax}, block_size)
    rule = _in_fp32(rule)
    n = param.numel()
    m_map, v_map = (dynamic_map(signed).to(param.device) for signed in (True, False))
    flat_m, flat_v = m.reshape(-1), v.reshape(-1)
    new_m, new_v = _moments(
        grad,
        reference.dequantize_8bit(flat_m, m_absmax, m_map, block_size, torch.float32),
        reference.dequantize_8bit(flat_v, v_absmax, v_map, block_size, torch.float32),
        rule,
    )
    m_blocks, v_blocks = reference.to_blocks(new_m, block_size), reference.to_blocks(new_v, block_size)
    good = (torch.isfinite(m_blocks) & torch.isfinite(v_blocks)).all(1)
    kept = good.repeat_interleave(block_size)[:n]
    _update(param, new_m, new_v, rule, key, kept)
    for codes, absmax, blocks, table in ((flat_m, m_absmax, m_blocks, m_map), (flat_v, v_absmax, v_blocks, v_map)):
        scales = reference.block_absmax(blocks)
        picked = reference.pick_codes(blocks, scales, table)
        if table is v_map:
            above = (blocks * (1.0 / scales).unsqueeze(1)) > 0
            picked = torch.where(above, picked.clamp(min=1), picked)
        codes.copy_(torch.where(kept, picked.reshape(-1)[:n], codes))
        absmax.copy_(torch.where(good, scales, absmax))
    if not bool(good.all()):
        raise non_finite_moments(name, int((~good).to(torch.uint8).argmax()), block_size)


def empty_moment(like: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, `like`'s shape) and scales (fp32 [blocks]) of a moment that is 0 everywhere, on like's device."""
    code = int(dynamic_map(signed).abs().argmin())
    codes = torch.full(like.shape, code, dtype=torch.uint8, device=like.device)
    blocks = -(-like.numel() // block_size)
    return codes, torch.full((blocks,), reference.MIN_ABSMAX, dtype=torch.float32, device=like.device)


def stochastic_bf16(values: Tensor, key: int) -> Tensor:
    """fp32 [n] to bf16, up or down by chance, on average the value itself: small updates are not lost.

    The 16 bits that bf16 drops, plus 16 random ones, carry into those that it keeps. The random bits are a hash of the
    64-bit `key` (see `rounding_key`) and the element's number, so they are the same in every run and need no state.
    What is not finite stays as it is.
    """
    index = torch.arange(values.numel(), device=values.device, dtype=torch.int64)
    low, high = key & _LOW_32, (key >> 32) & _LOW_32
    # In int64, whose products wrap: the low 32 bits are right.
    x = (index & _LOW_32) ^ low
    x = ((x ^ (x >> 16)) * 0x7FEB352D + high + (index >> 32)) & _LOW_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW_32
    random = (((x ^ (x >> 16)) * 0x7FEB352D) & _LOW_32) >> 16
    bits = values.contiguous().view(torch.int32)
    finite = (bits & _INFINITY) != _INFINITY
    rounded = (bits.to(torch.int64) + random) & 0xFFFF0000
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32)
    return torch.where(finite, rounded, bits).view(torch.float32).to(torch.bfloat16)


def rounding_key(seed: int, step: int, number: int) -> int:
    """The key of stochastic rounding in step `step` of parameter `number`: 64 bits, mixed by splitmix64's finalizer."""
    mixed = 0
    for part in (seed, step, number):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _LOW_64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _LOW_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _LOW_64
        mixed ^= mixed >> 31
    return mixed


def sum_of_squares(x: Tensor) -> float:
    """The sum of the squares of all elements, in float64."""
    return float(x.double().square().sum())


def check_step(
    param: Tensor,
    grad: Tensor,
    key: int | None,
    floats: dict[str, Tensor],
    codes: dict[str, Tensor] | None = None,
    scales: dict[str, Tensor] | None = None,
    block_size: int = 1,
) -> None:
    """Checks the tensors of one step.

    Raises:
        UnsupportedDtypeError: param or grad is not fp32, fp16 or bf16.
        LayoutError: sizes, dtypes or devices do not fit together, state is not contiguous, or `key` is given for a
            param that is not bf16.
    """
    reference.check_float(param, "param")
    reference.check_float(grad, "grad")
    if grad.shape != param.shape or grad.device != param.device:
        raise LayoutError(
            f"grad has shape {tuple(grad.shape)} on {grad.device}; param has {tuple(param.shape)} on {param.device}"
        )
    if key is not None and param.dtype != torch.bfloat16:
        raise LayoutError(f"stochastic rounding is for bfloat16 parameters; param has dtype {param.dtype}")
    count = param.numel()
    for group, dtype, expected in (
        (floats, torch.float32, count),
        (codes or {}, torch.uint8, count),
        (scales or {}, torch.float32, -(-count // block_size)),
    ):
        for name, tensor in group.items():
            fits = tensor.dtype == dtype and tensor.numel() == expected and tensor.device == param.device
            if not (fits and tensor.is_contiguous()):
                raise LayoutError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; a param of {count} elements "
                    f"on {param.device} needs {expected} contiguous elements of {dtype} there"
                )


def non_finite_moments(name: str, block: int, block_size: int) -> NonFiniteError:
    """What is raised for the first block whose moments would not be finite."""
    return NonFiniteError(
        name,
        block * block_size,
        1,
        f"the moments of block {block}, elements {block * block_size} to {(block + 1) * block_size - 1}, would not be "
        "finite: the gradient there is NaN, infinite or too large to be squared; that block has not been updated",
    )


def _in_fp32(rule: AdamWRule) -> AdamWRule:
    return AdamWRule(*torch.tensor(rule, dtype=torch.float64).float().tolist())


def _moments(grad: Tensor, m: Tensor, v: Tensor, rule: AdamWRule) -> tuple[Tensor, Tensor]:
    """Both moments, flat, with this gradient in them."""
    g = grad.reshape(-1).float() * rule.grad_scale
    return m * rule.beta1 + g * rule.rest1, v * rule.beta2 + (g * rule.rest2) * g


def _update(param: Tensor, m: Tensor, v: Tensor, rule: AdamWRule, key: int | None, kept: Tensor | None = None) -> None:
    """Takes the step, where `kept` says so if it is given."""
    old = param.reshape(-1)
    # torch's fp32 root is off by a unit in the last place for one number in 150 (MKL's, 2.13).
    root = v.double().sqrt().float()
    new = old.float() * rule.decay - (m * rule.step_size) / (root * rule.root_scale + rule.eps)
    rounded = new.to(param.dtype) if key is None else stochastic_bf16(new, key)
    param.copy_((rounded if kept is None else torch.where(kept, rounded, old)).view(param.shape))
