"""What an export or an import of a GGUF file did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: Called with (tensors done, tensors in all, name of the tensor that is next).
Progress = Callable[[int, int, str], None]


@dataclass
class GGUFReport:
    """Result of `export_gguf` or `import_gguf`.

    Attributes:
        source, destination: as given.
        architecture: as GGUF calls it ("llama", "qwen2", "qwen3").
        types: number of tensors of each type in the GGUF file.
        bytes_written: size of the tensors written.
        notes: what a user should know: tensors that kept another type, a normalization that llama.cpp does not do.
    """

    source: Path
    destination: Path
    architecture: str
    types: Counter[str] = field(default_factory=Counter)
    bytes_written: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in self.types.most_common())
        return f"{self.architecture}: {sum(self.types.values())} tensors ({kinds}), {self.bytes_written / 1e6:.1f} MB"
