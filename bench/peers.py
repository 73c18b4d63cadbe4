"""The layers that are raced: nybble's own, torch's and bitsandbytes'. Each is built from one bf16 weight.

A factory takes the weight [N, K] and the bytes to rotate through and gives `Layers`; it raises `Missing` where its
package is absent or cannot run here. `Layers.check` compares what is computed with the weight that is stood for, so
that nothing is raced that does other work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Call, copies_for
from torch import Tensor, nn

import nybble

GROUP = 64


class Missing(Exception):
    """A peer that cannot take part, and why."""


@dataclass
class Layers:
    """Copies of one layer.

    Attributes:
        what: package, version and settings.
        dense: gives the weight [N, K] that the copies stand for.
        bind: input x [M, K] -> contestant. What the peer needs of x (its dtype, its buffers) is made here.
        output: what a call returned, as a tensor [M, N].
        tolerance: relative error (Frobenius) that its arithmetic explains.
    """

    what: str
    dense: Callable[[], Tensor]
    bind: Callable[[Tensor], Call]
    output: Callable[[object], Tensor] = lambda y: y
    tolerance: float = 0.01

    def check(self, name: str, x: Tensor) -> None:
        """Raises Missing unless the first two copies compute x W^T."""
        expected = x.float() @ self.dense().float().t()
        call = self.bind(x)
        for turn in range(2):
            error = ((self.output(call(turn)).float() - expected).norm() / expected.norm()).item()
            if not error <= self.tolerance:
                raise Missing(f"computes something else than x W^T: relative error {error:.3g}")


def modules(layers: list[nn.Module]) -> Callable[[Tensor], Call]:
    """Calls one module after the other without gradient."""

    def bind(x: Tensor) -> Call:
        def call(turn: int) -> object:
            with torch.no_grad():
                return layers[turn % len(layers)](x)

        return call

    return bind


def copies(layer: nn.Module, weight_bytes: int, rotation: int) -> list[nn.Module]:
    """The layer and as many deep copies of it as the rotation takes."""
    return [layer, *(copy.deepcopy(layer) for _ in range(copies_for(weight_bytes, rotation) - 1))]


def plain(weight: Tensor) -> nn.Linear:
    """nn.Linear over the weight, frozen, without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def quantized(weight: Tensor, **config: object) -> nybble.QuantLinear:
    """nybble's layer over the weight; Missing while this version does not take the configuration."""
    try:
        return nybble.QuantLinear.from_linear(plain(weight), nybble.QuantConfig(**config))
    except (nybble.errors.FormatError, TypeError) as error:
        raise Missing(f"QuantConfig({config}): {error}") from error


def nybble_layers(**config: object) -> Callable[[Tensor, int], Layers]:
    """nybble with this QuantConfig."""

    def build(weight: Tensor, rotation: int) -> Layers:
        layer = quantized(weight, **config)
        tolerance = 0.03 if config.get("compute") == "int8" else 0.01
        layers = copies(layer, layer.quant_tensor().nbytes, rotation)
        return Layers(f"nybble {nybble.__version__}", layer.dequantize, modules(layers), tolerance=tolerance)

    return build


def torch_plain(dtype: torch.dtype) -> Callable[[Tensor, int], Layers]:
    """nn.Linear on the unquantized weight."""

    def build(weight: Tensor, rotation: int) -> Layers:
        base = plain(weight.to(dtype))
        layers = copies(base, weight.numel() * base.weight.element_size(), rotation)
        return Layers(f"torch {torch.__version__} nn.Linear", lambda: base.weight, modules(layers))

    return build


def group_quantized(weight: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Signed integers [N, K / 64, 64] and scales [N, K / 64] that fp16 and bf16 both hold."""
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    top = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1) / top).bfloat16().half().float()
    return (groups / scales[..., None]).round().clamp(-top - 1, top), scales


def ungrouped(weight: Tensor, bits: int = 4) -> Tensor:
    """The weight that `group_quantized` stands for."""
    q, scales = group_quantized(weight, bits)
    return (q * scales[..., None]).reshape(weight.shape)


def torch_int4pack(weight: Tensor, rotation: int) -> Layers:
    """torch's int4 weight-only matmul, group 64, bf16."""
    q, scales = group_quantized(weight)
    codes = (q + 8).reshape(weight.shape).to(torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    except (RuntimeError, AttributeError) as error:
        raise Missing(f"torch int4pack: {error}") from error
    scales_and_zeros = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).bfloat16().contiguous()
    size = packed.nbytes + scales_and_zeros.nbytes
    sets = [(packed.clone(), scales_and_zeros.clone()) for _ in range(copies_for(size, rotation))]

    def bind(x: Tensor) -> Call:
        def call(turn: int) -> object:
            w, s = sets[turn % len(sets)]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, s)

        return call

    return Layers(f"torch {torch.__version__} _weight_int4pack_mm_for_cpu, group 64", lambda: ungrouped(weight), bind)


def torch_int8pack(weight: Tensor, rotation: int) -> Layers:
    """torch's int8 weight-only matmul, one scale a row, bf16."""
    scales = (weight.float().abs().amax(1) / 127).bfloat16()
    q = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    sets = [(q.clone(), scales.clone()) for _ in range(copies_for(q.nbytes, rotation))]

    def bind(x: Tensor) -> Call:
        def call(turn: int) -> object:
            w, s = sets[turn % len(sets)]
            return torch._weight_int8pack_mm(x, w, s)

        return call

    return Layers(f"torch {torch.__version__} _weight_int8pack_mm", lambda: q.float() * scales.float()[:, None], bind)


def bitsandbytes_package() -> object:
    """The package, or Missing; its per-call warnings about casts are silenced, they would be timed as printing."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise Missing("bitsandbytes is not installed") from error
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import warnings

    warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
    return bitsandbytes


def bitsandbytes_linear(weight: Tensor) -> nn.Module:
    """Linear4bit: NF4, block 64, double quantization, computing in the weight's dtype."""
    bnb = bitsandbytes_package()
    n, k = weight.shape
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True, device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=GROUP
    )
    return layer.to("cpu")


def bitsandbytes_nf4(weight: Tensor, rotation: int) -> Layers:
    """Linear4bit as in inference: after eval() its CPU kernel, where the machine has it, repacks the weight."""
    bnb = bitsandbytes_package()
    layer = bitsandbytes_linear(weight).eval()
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        layer(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
    layers = copies(layer, weight.numel() // 2, rotation)
    return Layers(f"bitsandbytes {bnb.__version__} Linear4bit NF4, eval", lambda: dense, modules(layers))


def bitsandbytes_nf4_train(weight: Tensor, rotation: int) -> Layers:
    """Linear4bit while training: x needs a gradient."""
    bnb = bitsandbytes_package()
    layer = bitsandbytes_linear(weight).train()
    layers = copies(layer, weight.numel() // 2, rotation)

    def bind(x: Tensor) -> Call:
        leaf = x.detach().clone().requires_grad_()
        return lambda turn: layers[turn % len(layers)](leaf)

    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return Layers(f"bitsandbytes {bnb.__version__} Linear4bit NF4, train", lambda: dense, bind)


def bitsandbytes_int8(weight: Tensor, rotation: int) -> Layers:
    """Linear8bitLt, threshold 0: int8 weights and int8 activations."""
    bnb = bitsandbytes_package()
    n, k = weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        layer(torch.zeros(1, k, dtype=weight.dtype))
    layers = copies(layer, weight.numel(), rotation)
    what = f"bitsandbytes {bnb.__version__} Linear8bitLt"
    return Layers(what, lambda: weight, modules(layers), tolerance=0.03)
