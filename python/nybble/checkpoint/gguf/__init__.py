"""GGUF, the file format of llama.cpp and Ollama: export of a model directory, import into one.

This folder is what knows the package `gguf` (extra `hf`) and the format
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); it is imported on use.
"""

from __future__ import annotations

try:
    import gguf as _gguf  # noqa: F401
except ImportError as error:
    raise ImportError("GGUF files need the package gguf: pip install 'nybble[hf]'") from error

from .export import TYPES, export_gguf
from .importing import import_gguf
from .report import GGUFReport

__all__ = ["TYPES", "GGUFReport", "export_gguf", "import_gguf"]
