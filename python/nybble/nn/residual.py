"""Starting values of LoRA from what quantization lost: LoftQ (arXiv 2310.08659) and PiSSA (arXiv 2404.02948)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, PatternError
from ..tensor import QuantTensor
from .factors import LoRA
from .linear import QuantLinear
from .lora import LoRALinear
from .names import adapted_layers

METHODS = ("loftq", "pissa")

# Up to this size an exact decomposition takes under a second; above it a randomized one is used.
_EXACT = 1024


@dataclass(frozen=True)
class ResidualRow:
    """What one layer gained.

    Attributes:
        before: ||W - Wq|| / ||W||, the base as it was, without an update.
        after: ||W - (Wq' + scaling * B A)|| / ||W||.
    """

    before: float
    after: float


@torch.no_grad()
def init_from_residual(
    model: nn.Module,
    original: str | os.PathLike[str] | Mapping[str, Tensor],
    method: str = "loftq",
    iterations: int = 1,
    name: str | None = None,
) -> dict[str, ResidualRow]:
    """Set every LoRALinear over a QuantLinear to start near the original weight W instead of at its quantized one.

    "loftq": A and B are the r leading singular directions of W - Wq. With one iteration the base keeps its bytes, so
    that the adapter goes with any copy of it; each further one first quantizes W - scaling * B A anew, which CHANGES
    the base: save it with the adapter.
    "pissa": A and B are the r leading singular directions of W itself, and the base is W - scaling * B A, quantized: it
    changes always. Training then moves the directions that matter most, and quantization errs on the rest.

    Args:
        model: with `LoRALinear` layers, as `add_lora` makes them; changed in place.
        original: the checkpoint directory that the base was quantized from, or {"path.weight": tensor [out, in]}.
        method: "loftq" or "pissa". iterations: of "loftq", 1 or more; 5 is the paper's.
        name: of the adapter; by default the one that acts, or the only one. Where the base changes there must be no
            other.

    Returns:
        Layer path -> relative error before and after.

    Raises:
        ValueError: an argument is not allowed, no layer fits, or a weight has another shape; names it.
        PatternError: `original` lacks a layer's weight.
        NonFiniteError: a weight holds NaN or infinity; names it, and no layer is changed.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; it must be 1 or more")
    layers = {
        path: (layer, layer.adapter(name))
        for path, layer in adapted_layers(model, (LoRALinear,)).items()
        if isinstance(layer.base, QuantLinear) and (name is None or name in layer.adapters)
    }
    if not layers:
        raise ValueError("model has no LoRALinear over a QuantLinear; see nybble.quantize_ and nybble.add_lora")
    weights = original if isinstance(original, Mapping) else _Checkpoint(original)
    changes = method == "pissa" or iterations > 1
    for path, (layer, adapter) in layers.items():
        if f"{path}.weight" not in weights:
            raise PatternError(f"original: there is no weight {path + '.weight'!r}")
        if adapter.dora:
            raise ValueError(f"{path}: DoRA layers start at their base's norms; residual starts are for plain LoRA")
        if changes and len(layer.adapters) > 1:
            others = ", ".join(repr(other) for other, module in layer.adapters.items() if module is not adapter)
            raise ValueError(f"{path}: {method} would change the base, which adapter {others} is for too")
    for path, (layer, _) in layers.items():
        _check(path, layer, weights)
    return {
        path: _init(path, layer, adapter, weights[f"{path}.weight"], method, iterations)
        for path, (layer, adapter) in layers.items()
    }


def _check(path: str, layer: LoRALinear, weights: Mapping[str, Tensor]) -> None:
    """Before anything is changed: a layer's weight has its shape and is finite."""
    name = f"{path}.weight"
    weight = weights[name]
    want = [layer.base.out_features, layer.base.in_features]
    if list(weight.shape) != want:
        raise ValueError(f"original: {name} has shape {list(weight.shape)}; the layer needs {want}")
    finite = torch.isfinite(weight).reshape(-1)
    if not bool(finite.all()):
        index, count = int((~finite).to(torch.uint8).argmax()), int((~finite).sum())
        where = weights.where(name) if isinstance(weights, _Checkpoint) else name
        detail = f"the value at flat index {index}, row-major in {list(weight.shape)}, is not finite"
        raise NonFiniteError(f"original: {where}", index, count, detail)


def _init(path: str, layer: LoRALinear, adapter: LoRA, weight: Tensor, method: str, iterations: int) -> ResidualRow:
    base = layer.base
    assert isinstance(base, QuantLinear)
    exact = weight.float().to(base.weight.device)
    norm = torch.linalg.vector_norm(exact).clamp_min(torch.finfo(torch.float32).tiny)

    def error(update: Tensor | float) -> float:
        return float(torch.linalg.vector_norm(exact - base.dequantize(torch.float32) - update) / norm)

    before = error(0.0)
    if method == "pissa":
        _set_factors(adapter, exact)
        _requantize(base, exact - adapter.delta_weight(), path)
    else:
        _set_factors(adapter, exact - base.dequantize(torch.float32))
        for _ in range(iterations - 1):
            _requantize(base, exact - adapter.delta_weight(), path)
            _set_factors(adapter, exact - base.dequantize(torch.float32))
    return ResidualRow(before, error(adapter.delta_weight()))


def _set_factors(adapter: LoRA, target: Tensor) -> None:
    """scaling * B A = the best approximation of `target` of that rank; both factors get the same share of it."""
    rank = min(adapter.r, *target.shape)
    if min(target.shape) <= _EXACT:
        u, s, vt = torch.linalg.svd(target, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(target, q=min(rank + 16, *target.shape), niter=4)
        vt = v.T
    root = (s[:rank] / adapter.scaling).sqrt()
    adapter.lora_A.zero_()
    adapter.lora_B.zero_()
    adapter.lora_A[:rank] = root[:, None] * vt[:rank]
    adapter.lora_B[:, :rank] = u[:, :rank] * root


def _requantize(base: QuantLinear, weight: Tensor, path: str) -> None:
    tensor = QuantTensor.quantize(weight.to(base.dtype), base.config, f"{path}.weight")
    base.load_quant_tensor(tensor)


class _Checkpoint(Mapping[str, Tensor]):
    """A checkpoint directory's tensors, each read when it is asked for."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        from ..checkpoint.files import open_source, read_tensor

        self._source, self._read = open_source(directory), read_tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._source.tensors[name])

    def where(self, name: str) -> str:
        return f"{name} ({self._source.tensors[name].path})"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)
