"""`Calibration`: which text, how much of it, and how codes are picked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from .settings import Rounding

Text = str | os.PathLike[str] | Sequence[str] | Sequence[int] | Tensor


@dataclass(frozen=True)
class Calibration:
    """The text that a checkpoint's weights are rounded by.

    Attributes:
        data: path of a text file, a .jsonl file of {"text": ...} or a directory of them; a list of texts; token ids (a
            list, or a tensor [tokens]); or whole windows, a tensor of token ids [samples, tokens], which are taken as
            they are.
        samples: windows of text, spread evenly over the data; fewer if it has no more.
        seq: tokens in a window.
        rounding: how codes are picked; see `Rounding`.
    """

    data: Text = field(hash=False)
    samples: int = 16
    seq: int = 512
    rounding: Rounding = field(default_factory=Rounding)

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seq", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
        if not isinstance(self.rounding, Rounding):
            raise TypeError(f"rounding is a {type(self.rounding).__name__}; a Rounding is needed")

    def windows(self, directory: Path) -> Tensor:
        """The token ids, int64 [samples, seq]; `directory` has the tokenizer.

        Raises:
            CalibrationError: the data has not one whole window, or the directory no tokenizer.
        """
        from ..training.data import to_tokens

        if isinstance(self.data, Tensor) and self.data.dim() == 2:
            if self.data.is_floating_point() or self.data.dtype == torch.bool or not self.data.numel():
                raise CalibrationError(
                    f"calibration data is {self.data.dtype} {list(self.data.shape)}; windows are token ids, integers"
                )
            return self.data.to("cpu", torch.int64)
        data: Any = Path(self.data) if isinstance(self.data, os.PathLike) else self.data
        ids = isinstance(data, Tensor) or (
            not isinstance(data, (str, Path)) and len(data) > 0 and all(isinstance(item, int) for item in data)
        )
        tokens = to_tokens(data, None if ids else _tokenizer(directory), "calibration data")
        count = min(self.samples, tokens.numel() // self.seq)
        if not count:
            raise CalibrationError(
                f"calibration data has {tokens.numel()} tokens, which is not one window of seq={self.seq}"
            )
        room = tokens.numel() - self.seq
        starts = [room * i // max(1, count - 1) for i in range(count)]
        return torch.stack([tokens[start : start + self.seq] for start in starts])


def identity(windows: Tensor, rounding: Rounding) -> dict[str, Any]:
    """What decides the codes, for a journal. torch's products may depend on the number of threads, so it is in it."""
    return {
        "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "shape": list(windows.shape),
        "rounding": {name: getattr(rounding, name) for name in rounding.__dataclass_fields__},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _tokenizer(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("transformers is needed to calibrate: pip install 'nybble[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{directory}: no tokenizer that transformers can load ({error})") from error
