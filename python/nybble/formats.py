"""The quantization formats: codebooks by name, allowed block sizes, and `QuantConfig`.

A 4-bit format is a 16-entry codebook times one scale per block of consecutive elements of the flattened tensor, so a
format is data: three codebooks have names, and any 16 sorted numbers make another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .dynamic_maps import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from .errors import FormatError

__all__ = [
    "BLOCK_SIZES",
    "DYNAMIC_SIGNED",
    "DYNAMIC_UNSIGNED",
    "FP4",
    "INT4",
    "NESTED_BLOCK_SIZE",
    "NF4",
    "QuantConfig",
    "check_block_size",
    "codebook",
    "dynamic_map",
    "match_module",
]

#: NormalFloat 4 (QLoRA, arXiv 2305.14314, appendix E), ascending, as the fp32 values that checkpoints store.
NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: 4-bit float of bitsandbytes (1 sign, 2 exponent, 1 mantissa bit over 12), in the order of its bits: NOT sorted, and
#: codes 0 and 8 are both +0.0.
FP4: tuple[float, ...] = tuple(
    sign * value / 12.0 + 0.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)

#: Symmetric 4-bit integers over 7.
INT4: tuple[float, ...] = tuple(i / 7.0 for i in range(-8, 8))

#: Elements that share one scale.
BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)

#: Scales that share one nested scale under double quantization.
NESTED_BLOCK_SIZE = 256

_CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}
_LEARNED = "learned"
_FORMATS = (*_CODEBOOKS, "int8", _LEARNED)
_SEARCHES = ("absmax", "mse", "square")
_COMPUTES = (None, "int8")
_FP32_MAX = torch.finfo(torch.float32).max
_OVERRIDABLE = ("format", "block_size", "double_quant", "search", "compute", "outlier_threshold")


def check_block_size(block_size: int, argument: str = "block_size") -> int:
    """Returns `block_size` if it is one of `BLOCK_SIZES`; raises FormatError that lists them otherwise."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise FormatError(f"{argument} is {block_size!r}; allowed are {allowed}")
    return block_size


def dynamic_map(signed: bool = True) -> Tensor:
    """The dynamic 8-bit map as a new fp32 tensor [256], ascending (bitsandbytes' `create_dynamic_map`)."""
    return _constant(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED)


def _constant(values: Sequence[float]) -> Tensor:
    # On the CPU whatever torch.device context is active: models are often built under the meta device.
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def codebook(name_or_numbers: str | Sequence[float] | Tensor) -> Tensor:
    """The 16 codes of a 4-bit format, as a new fp32 tensor [16].

    Args:
        name_or_numbers: "nf4", "fp4", "int4", or 16 finite numbers in strictly ascending order (also as fp32).

    Raises:
        FormatError: unknown name, or numbers that are not 16, not finite or not ascending.

    >>> codebook("nf4")[7].item()
    0.0
    """
    if isinstance(name_or_numbers, str):
        if name_or_numbers not in _CODEBOOKS:
            raise FormatError(
                f"format is {name_or_numbers!r}; 4-bit formats are {', '.join(_CODEBOOKS)}, or 16 numbers"
            )
        return _constant(_CODEBOOKS[name_or_numbers])
    return _constant(_numbers(name_or_numbers))


def _numbers(values: Sequence[float] | Tensor) -> tuple[float, ...]:
    """A user's codebook as 16 floats that are exact in fp32."""
    try:
        items = values.tolist() if isinstance(values, Tensor) else list(values)
        numbers = torch.tensor([float(v) for v in items], dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise FormatError(f"codebook must be a name or 16 numbers, got {values!r}") from error
    if len(numbers) != 16:
        raise FormatError(f"codebook has {len(numbers)} numbers; it needs exactly 16")
    rounded = numbers.float()
    if not bool(torch.isfinite(rounded).all()):
        raise FormatError(f"codebook has a number that is not finite in fp32: {numbers.tolist()}")
    if not bool((rounded[1:] > rounded[:-1]).all()):
        at = int((rounded[1:] <= rounded[:-1]).nonzero()[0])
        raise FormatError(
            f"codebook must be strictly ascending in fp32; entry {at} is {numbers[at].item()!r} "
            f"and entry {at + 1} is {numbers[at + 1].item()!r}"
        )
    return tuple(rounded.tolist())


def match_module(name: str, pattern: str) -> bool:
    """Whether `pattern` (shell wildcards, case-sensitive) matches the dotted module name or one of its dotted suffixes.

    >>> match_module("model.layers.0.mlp.down_proj", "down_proj")
    True
    >>> match_module("model.layers.0.mlp.down_proj", "*.mlp.*")
    True
    >>> match_module("model.layers.0.mlp.down_proj", "mlp")
    False
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


@dataclass(frozen=True)
class QuantConfig:
    """How the weights of a model are quantized. Immutable; every field is checked on construction.

    Attributes:
        format: "nf4", "fp4", "int4", "int8" (row-wise, the LLM.int8 layout), or 16 ascending numbers as a codebook;
            "learned": 16 numbers of each weight's own, found by calibration (`nybble.quantize(calibration=...)` only).
            bitsandbytes reads nf4, fp4 and int8; the others are marked as nybble's own in the file.
        block_size: consecutive elements of the flattened weight that share a scale, one of `BLOCK_SIZES`; int8 has one
            scale a row and ignores it.
        double_quant: store the block scales themselves in 8 bits (4-bit formats only).
        search: how a block's scale is found; the file format is the same. "absmax": bit-exact with bitsandbytes; "mse":
            the scale of least squared error; "square": the same with every error weighed by the square of its weight,
            which keeps the large weights right.
        compute: None (activations keep their precision) or "int8": each row of x is rounded to int8 on the fly and
            multiplied in integers, for speed. That adds to every activation an error of up to half a step, which is
            the row's absmax / 254, and to every 4-bit weight one of up to 1 / 254 of the largest magnitude within
            512 columns of its row (for Gaussian inputs and weights about 0.011 of the output in all, where NF4 itself
            makes 0.09; inputs with outliers make it more). Forward only: gradients are computed as with None, and so is
            LoRA's side path. Where rounding gains no speed (one or two rows, on NVIDIA GPUs up to 16; see `explain`)
            nothing is rounded.
            How a layer computes, not what is stored: files do not keep it.
        skip: name patterns (see `match_module`) of modules that stay as they are.
        include: if not empty, only modules that match one of these patterns are quantized.
        overrides: name pattern -> a format, a dict of `format`, `block_size`, `double_quant`, `search`, `compute` and
            `outlier_threshold`, or None to skip. The first pattern that matches wins, also over `skip` and `include`.
        outlier_threshold: with compute="int8" only. Columns of x (features) in which any magnitude among all rows of a
            call reaches it are multiplied in x's own precision with the weight's own values, and only the others are
            rounded to int8 (LLM.int8, arXiv 2208.07339, which takes 6.0): one feature that is far larger than the rest
            then no longer sets the step of its row. None: every column is rounded. Forward only, and not stored, as
            `compute`.

    Raises:
        FormatError: a field has a value that is not allowed; the message lists those that are.
    """

    format: str | Sequence[float] = "nf4"
    block_size: int = 64
    double_quant: bool = True
    search: str = "absmax"
    compute: str | None = None
    skip: tuple[str, ...] = ("lm_head",)
    overrides: Mapping[str, str | Mapping[str, Any] | None] = field(default_factory=dict, hash=False)
    include: tuple[str, ...] = ()
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.format, str):
            if self.format not in _FORMATS:
                raise FormatError(f"format is {self.format!r}; known formats are {', '.join(_FORMATS)}, or 16 numbers")
        else:
            object.__setattr__(self, "format", _numbers(self.format))
        check_block_size(self.block_size)
        if not isinstance(self.double_quant, bool):
            raise FormatError(f"double_quant is {self.double_quant!r}; it must be True or False")
        if self.search not in _SEARCHES:
            raise FormatError(f"search is {self.search!r}; allowed are {', '.join(_SEARCHES)}")
        if self.search != "absmax" and self.format == "int8":
            raise FormatError(
                f"search is {self.search!r}, which 4-bit formats take; format 'int8' allows only 'absmax'"
            )
        if self.compute not in _COMPUTES:
            raise FormatError(
                f"compute is {self.compute!r}; allowed are None (activations keep their precision) and 'int8' "
                "(activations rounded to int8, row by row)"
            )
        self._check_threshold()
        for name in ("skip", "include"):
            value = getattr(self, name)
            patterns = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(pattern, str) and pattern for pattern in patterns):
                raise FormatError(f"{name} is {value!r}; it must be a sequence of non-empty name patterns")
            object.__setattr__(self, name, patterns)
        if not isinstance(self.overrides, Mapping):
            raise FormatError(f"overrides must map name patterns to a format, a dict or None, got {self.overrides!r}")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, override in self.overrides.items():
            self._overridden(pattern, override)

    def _check_threshold(self) -> None:
        threshold = self.outlier_threshold
        if threshold is None:
            return
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold <= _FP32_MAX:
            raise FormatError(
                f"outlier_threshold is {threshold!r}; it must be None or a number above 0 that fp32 can hold"
            )
        if self.compute != "int8":
            raise FormatError(
                f"outlier_threshold is {threshold!r} with compute={self.compute!r}; it takes compute='int8', which is "
                "what rounds activations"
            )
        object.__setattr__(self, "outlier_threshold", float(threshold))

    def _overridden(self, pattern: str, override: str | Mapping[str, Any] | None) -> QuantConfig | None:
        """This configuration with one override applied (None: skip)."""
        if not isinstance(pattern, str) or not pattern:
            raise FormatError(f"overrides has the key {pattern!r}; keys must be non-empty name patterns")
        if override is None:
            return None
        changes: dict[str, Any] = dict(override) if isinstance(override, Mapping) else {"format": override}
        unknown = [key for key in changes if key not in _OVERRIDABLE]
        if unknown:
            raise FormatError(f"overrides[{pattern!r}] has {unknown}; allowed are {', '.join(_OVERRIDABLE)}")
        if changes.get("format") == "int8":
            # The rest of the model may use a search that int8 does not have.
            changes.setdefault("search", "absmax")
        if changes.get("compute", self.compute) is None:
            # The rest of the model may round activations; this does not.
            changes.setdefault("outlier_threshold", None)
        try:
            return replace(self, **changes, overrides={})
        except FormatError as error:
            raise FormatError(f"overrides[{pattern!r}]: {error}") from error

    def for_module(self, name: str) -> QuantConfig | None:
        """The configuration for the module `name` (dotted), or None if it is to stay unquantized."""
        for pattern, override in self.overrides.items():
            if match_module(name, pattern):
                return self._overridden(pattern, override)
        if self.include and not any(match_module(name, pattern) for pattern in self.include):
            return None
        return None if any(match_module(name, pattern) for pattern in self.skip) else self

    @property
    def is_4bit(self) -> bool:
        """True for every format but int8."""
        return self.format != "int8"

    @property
    def quant_method(self) -> str:
        """What transformers looks a quantizer up by."""
        return "nybble"

    @property
    def format_name(self) -> str:
        """The format's name in files; "custom" for a codebook given as numbers, or learned."""
        return self.format if isinstance(self.format, str) and not self.is_learned else "custom"

    @property
    def is_learned(self) -> bool:
        """Whether each weight has a codebook of its own."""
        return self.format == _LEARNED

    @property
    def codebook(self) -> Tensor | None:
        """The codes as fp32 [16] (a new tensor), or None for int8.

        Raises:
            FormatError: they are to be learned.
        """
        if self.is_learned:
            raise FormatError(
                "format is 'learned': each weight's codebook is found by calibration (nybble.quantize with "
                "calibration=, nybble quantize --calibrate), there is none without"
            )
        return codebook(self.format) if self.is_4bit else None

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes with its share of the scales, in the limit of large tensors.

        >>> round(QuantConfig().bits_per_weight, 3)
        4.127
        """
        if not self.is_4bit:
            return 8.0
        if self.double_quant:
            return 4.0 + 8.0 / self.block_size + 32.0 / (self.block_size * NESTED_BLOCK_SIZE)
        return 4.0 + 32.0 / self.block_size

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values (tuples as lists)."""
        result = {f.name: getattr(self, f.name) for f in fields(self)}
        result["format"] = self.format if isinstance(self.format, str) else list(self.format)
        result["skip"], result["include"] = list(self.skip), list(self.include)
        result["overrides"] = {pattern: _jsonable(override) for pattern, override in self.overrides.items()}
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The inverse of `to_dict`. Missing fields take their defaults; unknown ones raise FormatError."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise FormatError(f"quantization configuration has unknown fields {unknown}; known are {', '.join(known)}")
        return cls(**values)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    return [_jsonable(item) for item in value] if isinstance(value, (list, tuple)) else value
