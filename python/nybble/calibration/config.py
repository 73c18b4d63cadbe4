"""`Calibration`: which text, how much of it, and how codes are picked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _core
from ..errors import CalibrationError
from .settings import SAMPLES, SEQ, Rounding

Text = str | os.PathLike[str] | Sequence[str] | Sequence[int] | np.ndarray[Any, Any] | Tensor

_ALLOWED = (
    "a path of text, a list of texts, token ids (integers: a list, or a tensor or array [tokens]) or windows "
    "of at least 2 token ids (a tensor or array [samples, tokens])"
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The text that a checkpoint's weights are rounded by. Equal to itself alone, since its data may be a tensor.

    Attributes:
        data: path of a text file, a .jsonl file of {"text": ...} or a directory of them; a list of texts; token ids (a
            list, or a tensor or numpy array [tokens]); or whole windows, a tensor or array of token ids
            [samples, tokens], at least 2 tokens each, which are taken as they are.
        samples: windows of text, spread evenly over the data; fewer if it has no more.
        seq: tokens in a window.
        rounding: how codes are picked; see `Rounding`.

    Raises:
        CalibrationError, TypeError: `data` is empty or nothing of these.
        ValueError: `samples` or `seq` is too small.
    """

    data: Text
    samples: int = SAMPLES
    seq: int = SEQ
    rounding: Rounding = field(default_factory=Rounding)

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seq", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
        if not isinstance(self.rounding, Rounding):
            raise TypeError(f"rounding is a {type(self.rounding).__name__}; a Rounding is needed")
        ids = _token_ids(self.data)
        if isinstance(self.data, np.ndarray):
            object.__setattr__(self, "data", ids)

    def windows(self, directory: Path) -> Tensor:
        """The token ids, int64 [samples, seq]; `directory` has the tokenizer.

        Raises:
            CalibrationError: the data has not one whole window, or the directory no tokenizer.
        """
        from ..training.data import to_tokens

        tokens = _token_ids(self.data)
        if tokens is None:
            text: Any = Path(self.data) if isinstance(self.data, os.PathLike) else self.data
            tokens = to_tokens(text, _tokenizer(directory), "calibration data")
        if tokens.dim() == 2:
            return tokens
        count = min(self.samples, tokens.numel() // self.seq)
        if not count:
            raise CalibrationError(
                f"calibration data has {tokens.numel()} tokens, which is not one window of seq={self.seq}"
            )
        room = tokens.numel() - self.seq
        starts = [room * i // max(1, count - 1) for i in range(count)]
        return torch.stack([tokens[start : start + self.seq] for start in starts])


def identity(windows: Tensor, rounding: Rounding) -> dict[str, Any]:
    """What decides the codes, for a journal: a run that goes on where any of it differs would mix two results.

    torch's products may depend on the number of threads and on the processor, a forward pass on transformers'
    version.
    """
    import transformers

    return {
        "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "shape": list(windows.shape),
        "rounding": {name: getattr(rounding, name) for name in rounding.__dataclass_fields__},
        "threads": torch.get_num_threads(),
        "isa": _core.active_isa(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _token_ids(data: Any) -> Tensor | None:
    """Token ids as int64 [tokens] or [samples, tokens] on the CPU; None for text, which is not read."""
    if isinstance(data, (Tensor, np.ndarray)):
        integers = np.issubdtype(data.dtype, np.integer) if isinstance(data, np.ndarray) else _is_integer(data.dtype)
        if not integers or len(data.shape) not in (1, 2) or 0 in data.shape or data.shape[1:] == (1,):
            raise CalibrationError(f"calibration data is {data.dtype} {list(data.shape)}; it must be {_ALLOWED}")
        return torch.from_numpy(data.astype(np.int64)) if isinstance(data, np.ndarray) else data.to("cpu", torch.int64)
    if isinstance(data, (str, os.PathLike)) and data != "":
        return None
    if not isinstance(data, Sequence) or isinstance(data, (bytes, bytearray)):
        raise TypeError(f"calibration data is a {type(data).__name__}; it must be {_ALLOWED}")
    if not data:
        raise CalibrationError(f"calibration data is empty; it must be {_ALLOWED}")
    if all(isinstance(item, str) for item in data):
        return None
    if all(isinstance(item, Integral) and not isinstance(item, bool) for item in data):
        return torch.tensor([int(item) for item in data])
    kinds = ", ".join(sorted({type(item).__name__ for item in data}))
    raise TypeError(f"calibration data is a {type(data).__name__} of {kinds}; it must be {_ALLOWED}")


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _tokenizer(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("transformers is needed to calibrate: pip install 'nybble[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{directory}: no tokenizer that transformers can load ({error})") from error
