"""Rotary embeddings between Hugging Face's configurations and GGUF: row order, and the scaling of long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What transformers computes when a YaRN configuration leaves these out; llama.cpp computes the same.
_YARN_DEFAULTS: dict[str, Any] = {
    "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None,
    "truncate": True,
}  # fmt: skip
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def permute_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from Hugging Face's rotary order (halves) to llama.cpp's (pairs side by side).

    weight: [heads * head_dim, ...]. Row j * head_dim / 2 + i of a head becomes row 2 i + j (j is 0 or 1), because
    llama.cpp's rotary embedding turns neighbouring elements in models of its "llama" architecture.
    """
    return _reorder(weight, heads, (heads, 2, -1))


def unpermute_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute_rope`."""
    return _reorder(weight, heads, (heads, -1, 2))


def _reorder(weight: np.ndarray, heads: int, split: tuple[int, int, int]) -> np.ndarray:
    rows = weight.shape[0]
    if heads <= 0 or rows % (2 * heads):
        raise ValueError(f"heads={heads} does not divide the {rows} rows of the projection into even parts")
    return weight.reshape(*split, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def scaling_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rope scaling of a config.json (either spelling of transformers 4 and 5), None for none.

    Raises ValueError for a kind, or a setting of one, that llama.cpp computes otherwise or not at all.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"rope parameters {given!r}: one set for all layers is needed")
    for place in (config, given):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor {place['partial_rotary_factor']} is not supported")
    kind = given.get("rope_type", given.get("type")) or "default"
    needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS, "yarn": ("factor",)}.get(kind)
    if needed is None:
        raise ValueError(f"rope_type {kind!r} has no counterpart; supported are default, linear, llama3 and yarn")
    if kind == "default":
        return None
    settings = {key: value for key, value in given.items() if key not in _COMMON_KEYS and value is not None}
    if kind == "yarn":
        for key, default in _YARN_DEFAULTS.items():
            if settings.pop(key, default) != default:
                raise ValueError(f"rope_type 'yarn' with {key}={given[key]!r} is not supported, only {default!r}")
        settings.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    missing = [key for key in needed if not isinstance(settings.get(key), (int, float)) or not settings[key] > 0]
    if missing:
        raise ValueError(f"rope_type {kind!r} needs a positive {missing[0]}, not {settings.get(missing[0])!r}")
    return {"rope_type": kind, **settings}


def theta_of(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies, wherever config.json states it."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0)


def llama3_factors(scaling: Mapping[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """What each rotary frequency is divided by under Llama 3's scaling, fp32 [head_dim / 2].

    Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor are stretched by
    `factor`, and between them the frequency is interpolated. GGUF keeps these as the tensor `rope_freqs.weight`.
    """
    factor, low, high, original = (float(scaling[key]) for key in _LLAMA3_KEYS)
    if not high > low:
        raise ValueError(f"high_freq_factor {high} must be above low_freq_factor {low}")
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> dict[str, Any]:
    """The settings whose factors these are, for the frequency limits and original context that Llama 3 models have.

    Raises ValueError when no such settings reproduce them.
    """
    factor = round(float(factors.max()), 4)
    for original in (8192, 4096, 16384, 32768):
        scaling: dict[str, Any] = dict(zip(_LLAMA3_KEYS, (factor, 1.0, 4.0, original), strict=True))
        expected = llama3_factors(scaling, head_dim, theta)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", **scaling}
    raise ValueError("its factors are not those of Llama 3's rope scaling (frequency limits 1 and 4)")
