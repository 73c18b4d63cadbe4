"""Checkpoints of random weights, and what the disk makes of files: for checkpoints.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

#: Elements that are drawn and written at once.
PIECE = 1 << 24


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) in the order of the files."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield f"{prefix}input_layernorm.weight", (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, self.hidden)
            yield f"{prefix}post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "torch_dtype": "bfloat16",
        }


LARGE = Shape(20, 4096, 11008, 32, 32, 32000, tied=False)  # Llama 2 7B's widths; 8.6 GB
PART = Shape(16, 2048, 8192, 32, 8, 128256, tied=True)  # Llama 3.2 1B; 2.5 GB, in NF4 1.0 GB
TINY = Shape(1, 128, 256, 4, 2, 256, tied=True)


def write(directory: Path, shape: Shape, shards: int = 1) -> Path:
    """Writes a checkpoint of normal weights in bf16, a piece at a time. One that is there stays as it is."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {name: 2 * torch.Size(dims).numel() for name, dims in shape.tensors()}
    total, done = sum(sizes.values()), 0
    files: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    for name, dims in shape.tensors():
        files[min(done * shards // total, shards - 1)].append((name, dims))
        done += sizes[name]
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, members in enumerate(files, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        weight_map.update({name: file for name, _ in members})
        _write_file(directory / file, members, generator)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return directory


def _write_file(path: Path, members: list[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dims in members:
        end = offset + 2 * torch.Size(dims).numel()
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in members:
            mean, deviation, left = (1.0 if "norm" in name else 0.0), 0.02, torch.Size(dims).numel()
            while left:
                piece = torch.empty(min(PIECE, left)).normal_(mean, deviation, generator=generator).bfloat16()
                file.write(piece.view(torch.uint8).numpy().data)
                left -= piece.numel()
        file.flush()
        os.fsync(file.fileno())


def size(directory: Path) -> int:
    """Bytes of the weights in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def drop_caches(directory: Path) -> None:
    """Takes the weights of a directory out of memory, so that they are read from the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):  # root's alone
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1\n")


def read(directory: Path) -> None:
    """Reads the weights of a directory, so that they are in memory."""
    buffer = bytearray(1 << 24)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy(source: Path, destination: Path) -> None:
    """`cp` of the weights, and the wait until the disk has them."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    weights = sorted(source.glob("*.safetensors"))
    subprocess.run(["cp", *map(str, weights), str(destination)], check=True)
    for path in destination.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
