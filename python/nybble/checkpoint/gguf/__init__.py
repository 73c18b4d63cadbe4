"""GGUF, the file format of llama.cpp and Ollama: export of a model directory, import into one.

This folder is what knows the package `gguf` (extra `hf`) and the format
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The package is imported when a function is called.
"""

from __future__ import annotations

import os

from .report import GGUFReport, Progress

__all__ = ["GGUFReport", "export_gguf", "import_gguf"]


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'nybble[hf]'") from error


def export_gguf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type: str = "q8_0",
    *,
    name: str | None = None,
    pre: str | None = None,
    context: int | None = None,
    progress: Progress | None = None,
) -> GGUFReport:
    """Write a model directory as one GGUF file that llama.cpp and Ollama run, with its tokenizer and chat template.

    The directory may be plain (16 or 32 bits) or quantized in bitsandbytes' layout, 4-bit or int8; such weights are
    decoded to fp32 first, and rounded once. Architectures: Llama (SmolLM2 and others of its kind), Mistral, Qwen2,
    Qwen3. Tensors are converted some rows at a time. The file gets its name only when it is complete.

    As llama.cpp does: vectors stay F32; under Q4_0 and Q4_1 the output matrix (the embedding, where they are tied) gets
    Q8_0; a matrix whose rows blocks of 32 do not divide gets F16.

    Args:
        src: a Hugging Face directory with config.json and tokenizer.json.
        dst: the file to write; must not exist.
        type: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1".
        name: the model's name in the file; by default the directory's.
        pre: llama.cpp's name of the pre-tokenizer (`tokenizer.ggml.pre`), where it is not one of those told by
            themselves from tokenizer.json.
        context: a context length to state instead of the model's, no longer than that.
        progress: called with (tensors done, tensors in all, name).

    Raises:
        CheckpointNotFoundError: the directory, its tensors or its tokenizer.json are missing.
        CheckpointError: a file is damaged; an architecture, feature or tokenizer without a counterpart; a tensor is
            missing, superfluous, of the wrong shape, or holds NaN, infinity or what the type cannot hold.
        DestinationExistsError: `dst` exists.
        StorageFullError: the disk is full; no file is left.
    """
    _require_gguf()
    from .export import export

    return export(src, dst, type, name, pre, context, progress)


def import_gguf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    pre: str | None = None,
    max_shard_size: float = 5e9,
    progress: Progress | None = None,
) -> GGUFReport:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face directory: safetensors, config, tokenizer.

    Architectures: llama (Llama, SmolLM2, Mistral, ...), qwen2, qwen3; tensor types: all that the package gguf decodes
    (F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q5, K-quants, ...). Tensors are decoded some rows at a time, so memory does not
    grow with the model. The files get their names only when all are complete.

    Args:
        src: the file.
        dst: a directory that is new or empty.
        dtype: "bfloat16", "float16", "float32", or "auto": what most of the file's matrices have if it is one of
            these, else bfloat16. Only float32 keeps every bit of a quantized type's values.
        pre: name of the pre-tokenizer, where the file's own is not known here.
        max_shard_size: bytes; a larger model is written as several files with an index.
        progress: called with (tensors done, tensors in all, name).

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is damaged; an architecture, tensor type or tokenizer that cannot be converted; tensors that
            do not fit the architecture. The message names the file and the tensor or key.
        DestinationExistsError: the destination is a file, or not empty.
        StorageFullError: the disk is full; no file is left.
    """
    _require_gguf()
    from .importing import import_

    return import_(src, dst, dtype, pre, max_shard_size, progress)
