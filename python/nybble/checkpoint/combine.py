"""Weighted sums of LoRA adapters, as an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .adapter import CONFIG_NAME, PREFIX, AdapterFile, read_adapter, write_adapter
from .files import check_outside, read_json


def combine_adapters(
    parts: Sequence[tuple[str | os.PathLike[str], float]], dst: str | os.PathLike[str], rank: int | None = None
) -> dict[str, float]:
    """Write the adapter whose update is the weighted sum of others': sum_i w_i * scaling_i * B_i A_i.

    Exact with rank None: the factors are set side by side, and the ranks add up. With a rank, each layer's sum is cut
    to that many singular directions, the best approximation in the Frobenius norm (computed from the factors; the sum
    is never formed).

    Args:
        parts: (adapter directory, weight). They need not have the same layers or ranks.
        dst: a directory for the new adapter, which replaces one that is there.
        rank: 1 or more, or None.

    Returns:
        Layer path -> ||sum - written|| / ||sum||; zeros where rank is None.

    Raises:
        ValueError: no parts, a weight that is not finite, or a rank below 1.
        NonFiniteError: a factor holds NaN or infinity; names the tensor and its file.
        CheckpointError: an adapter with DoRA or modules_to_save, whose change is not linear; layers of other shapes.
    """
    if not parts:
        raise ValueError("parts is empty; at least one adapter is needed")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}; it must be 1 or more, or None")
    if any(not math.isfinite(weight) for _, weight in parts):
        raise ValueError(f"weights must be finite numbers, got {[weight for _, weight in parts]}")
    files = []
    for directory, weight in parts:
        file = read_adapter(Path(directory))
        if file.settings["use_dora"] or file.saved:
            what = "DoRA" if file.settings["use_dora"] else "full copies of modules"
            raise CheckpointError(f"{file.directory}: {what} cannot be added up")
        check_outside(file.directory, Path(dst))
        files.append((file, weight))
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for path in dict.fromkeys(path for file, _ in files for path in file.layers):
        a, b, kind = _sum(path, files)
        errors[path] = 0.0
        if rank is not None and a.shape[0] > rank:
            a, b, errors[path] = _cut(a, b, rank)
        ranks[path] = a.shape[0]
        names = ("lora_A.weight", "lora_B.weight") if kind == "linear" else ("lora_embedding_A", "lora_embedding_B")
        tensors[f"{PREFIX}{path}.{names[0]}"], tensors[f"{PREFIX}{path}.{names[1]}"] = a, b
    _write(Path(dst), files, tensors, ranks)
    return errors


def _sum(path: str, files: list[tuple[AdapterFile, float]]) -> tuple[Tensor, Tensor, str]:
    """Factors whose product is the sum, with a scaling of 1; the scalings go into both alike."""
    stacked_a, stacked_b = [], []
    layers = [(file.layers[path], weight) for file, weight in files if path in file.layers]
    first = layers[0][0]
    for layer, weight in layers:
        if (layer.shape, layer.kind) != (first.shape, first.kind):
            raise CheckpointError(
                f"{layer.lora_A.path}: {path!r} is for a weight {list(layer.shape)}, in {first.lora_A.path} it is for "
                f"{list(first.shape)}"
            )
        a, b = layer.factors()
        scale = layer.scaling * weight
        stacked_a.append(a * math.sqrt(abs(scale)))
        stacked_b.append(b * math.copysign(math.sqrt(abs(scale)), scale))
    return torch.cat(stacked_a), torch.cat(stacked_b, dim=1), first.kind


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of a lower rank, from QR of both and the SVD of the small product between."""
    qa, ra = torch.linalg.qr(a.T.double())
    qb, rb = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    new_a, new_b = root[:, None] * (vt[:rank] @ qa.T), (qb @ u[:, :rank]) * root
    total = float(s.square().sum())
    error = math.sqrt(float(s[rank:].square().sum()) / total) if total else 0.0
    return new_a.float().contiguous(), new_b.float().contiguous(), error


def _write(
    directory: Path, files: list[tuple[AdapterFile, float]], tensors: dict[str, Tensor], ranks: dict[str, int]
) -> None:
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    raw = read_json(files[0][0].directory / CONFIG_NAME)
    config: dict[str, Any] = {
        **{key: raw.get(key) for key in ("task_type", "base_model_name_or_path")},
        "peft_type": "LORA",
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {path: r for path, r in ranks.items() if r != most},
        "alpha_pattern": {path: r for path, r in ranks.items() if r != most},
        "fan_in_fan_out": False,
    }
    write_adapter(directory, config, tensors)
