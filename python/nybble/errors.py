"""The exceptions of nybble. Each is a subclass of the built-in one that a caller would expect to catch.

Every message names the argument, tensor or file, what came, and what is allowed.
"""

from __future__ import annotations


class FormatError(ValueError):
    """A format, codebook, block size or other field of a quantization configuration is not one of the allowed ones."""


class LayoutError(ValueError):
    """Tensors do not fit together as the 4-bit or int8 layout says: a size, shape, dtype or key is wrong."""


class NonFiniteError(ValueError):
    """A tensor to quantize holds NaN or Inf; one such value would poison its whole block.

    Attributes:
        name: the tensor's name.
        index: flat (row-major) index of the first non-finite element.
        count: number of non-finite elements.
    """

    def __init__(self, name: str, index: int, count: int, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name
        self.index = index
        self.count = count
        self.detail = detail

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int, int, str]]:
        return type(self), (self.name, self.index, self.count, self.detail)


class UnsupportedDtypeError(TypeError):
    """A tensor has a dtype that the operation does not take."""


class CheckpointError(ValueError):
    """A checkpoint's files are damaged, contradict each other, or point outside their directory."""


class CheckpointNotFoundError(FileNotFoundError):
    """A checkpoint, or a file that it names, does not exist."""


class DestinationExistsError(FileExistsError):
    """The place to write to exists already and is not empty."""


class CalibrationError(CheckpointError):
    """A model cannot be calibrated, or not on the text that was given."""


class PatternError(ValueError):
    """A name pattern matches no module of the model."""
