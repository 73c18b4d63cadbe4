"""GGUF files that are truncated, damaged or not what they say: an error that names the file, and nothing written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import write_model
from hypothesis import given, settings
from hypothesis import strategies as st

import nybble
from nybble.checkpoint.gguf.architecture import from_metadata
from nybble.checkpoint.gguf.reader import read_gguf
from nybble.checkpoint.gguf.rope import llama3_factors, llama3_scaling, permute_rope, unpermute_rope
from nybble.errors import CheckpointError

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    nybble.export_gguf(write_model(root / "model", "llama"), root / "model.gguf", "q8_0")
    return root / "model.gguf"


def test_the_header_is_what_gguf_reads(whole: Path) -> None:
    file, reader = read_gguf(whole), gguf.GGUFReader(whole)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.fields == fields
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist())) and mine.type == tensor.tensor_type
        assert mine.start == tensor.data_offset and mine.nbytes == tensor.n_bytes
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(mine.rows, mine.columns)
        assert np.array_equal(file.read_rows(mine, 0, mine.rows), expected)


def test_truncation_anywhere(whole: Path, tmp_path: Path) -> None:
    raw = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    header = read_gguf(whole).tensors["token_embd.weight"].start
    for size in [*range(0, 200, 7), *range(200, header, 997), header, header + 5, len(raw) - 33]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            nybble.import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(at=st.integers(0, 1 << 30), value=st.integers(0, 255), width=st.sampled_from([1, 8]))
@settings(max_examples=300)
def test_a_changed_header_is_read_or_refused(at: int, value: int, width: int, whole: Path) -> None:
    raw = bytearray(whole.read_bytes())
    end = read_gguf(whole).tensors["token_embd.weight"].start
    at %= end
    raw[at : at + width] = bytes([value]) * width
    path = whole.with_name("changed.gguf")
    path.write_bytes(raw)
    try:
        file = read_gguf(path)
        list(from_metadata(file).tensors())
    except CheckpointError as error:
        assert str(path) in str(error)


def tensor_field(raw: bytes, name: str) -> int:
    """Where the number of dimensions of a tensor's entry lies."""
    at = raw.index(struct.pack("<Q", len(name)) + name.encode())
    return at + 8 + len(name)


def patched(whole: Path, path: Path, change: Callable[[bytearray], Any]) -> Path:
    raw = bytearray(whole.read_bytes())
    change(raw)
    path.write_bytes(raw)
    return path


NORM = "blk.1.attn_norm.weight"  # one dimension: its size, type and offset follow the dimensions' number
MATRIX = "blk.1.ffn_up.weight"


@pytest.mark.parametrize(
    "name, offset, code, value, message",
    [
        (NORM, 0, "I", 5, "has 5 dimensions; 1 to 4"),
        (NORM, 4, "Q", 0, r"impossible shape \[0\]"),
        (NORM, 4, "Q", 1 << 62, r"impossible shape"),
        (NORM, 4, "Q", 1 << 40, r"truncated or damaged"),
        (NORM, 12, "I", 4, "unknown type 4"),
        (NORM, 16, "Q", 33, "not at a multiple of 32"),
        (NORM, 16, "Q", 1 << 40, "truncated or damaged"),
        (NORM, 16, "Q", 0, "overlaps tensor"),
        (NORM, 4, "Q", 32, r"has shape \[32\], the metadata says \[64\]"),
        (MATRIX, 4, "Q", 33, r"rows of 33, which blocks of 32 \(Q8_0\) do not divide"),
        (MATRIX, 20, "I", 24, "type I8, which gguf cannot decode"),
    ],
)
def test_lying_tensor_entries(
    name: str, offset: int, code: str, value: int, message: str, whole: Path, tmp_path: Path
) -> None:
    def change(raw: bytearray) -> None:
        struct.pack_into(f"<{code}", raw, tensor_field(raw, name) + offset, value)

    path = patched(whole, tmp_path / "lie.gguf", change)
    with pytest.raises(CheckpointError, match=message) as error:
        nybble.import_gguf(path, tmp_path / "out")
    assert str(path) in str(error.value) and f"'{name}'" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "start, data, message",
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1;"),
        (4, struct.pack(">I", 3), r"version 50331648 \(a big-endian file\)"),
        (8, struct.pack("<Q", 1 << 60), "1152921504606846976 tensors claimed"),
        (16, struct.pack("<Q", 1 << 60), "metadata keys claimed"),
        (24, struct.pack("<Q", 1 << 60), "a key takes 1152921504606846976 bytes"),
    ],
)
def test_lying_headers(start: int, data: bytes, message: str, whole: Path, tmp_path: Path) -> None:
    def change(raw: bytearray) -> None:
        raw[start : start + len(data)] = data

    with pytest.raises(CheckpointError, match=message):
        nybble.import_gguf(patched(whole, tmp_path / "lie.gguf", change), tmp_path / "out")


def write(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], whole: Path) -> Path:
    """`whole` written anew by gguf's writer, with metadata {key: (value, type)} and tensors {name: array} changed."""
    reader = gguf.GGUFReader(whole)
    skip = ("GGUF.", "general.architecture")
    fields = {k: (f.contents(), f.types) for k, f in reader.fields.items() if not k.startswith(skip)}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", (architecture,))[0])
    for key, (value, types) in fields.items():
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


STRING, UINT, FLOAT = ([gguf.GGUFValueType[name]] for name in ("STRING", "UINT32", "FLOAT32"))


@pytest.mark.parametrize(
    "key, value, types, message",
    [
        ("general.architecture", "mamba", STRING, "'mamba'; supported are llama, mistral, qwen2, qwen3"),
        ("llama.block_count", 1 << 31, UINT, "block_count is 2147483648"),
        ("llama.block_count", 1 << 30, UINT, "1073741824 blocks claimed"),
        ("llama.block_count", 1, UINT, "9 tensors that LlamaForCausalLM does not have"),
        ("llama.attention.head_count", 8, UINT, "has shape|rope.dimension_count is 16"),
        ("llama.attention.head_count", 0, UINT, "head_count is 0"),
        ("llama.expert_count", 8, UINT, "llama.expert_count is 8, which has no counterpart"),
        ("llama.attention.scale", 0.5, FLOAT, "llama.attention.scale is 0.5, which has no counterpart"),
        ("llama.rope.scaling.type", "longrope", STRING, "rope.scaling.type is 'longrope'"),
        ("split.count", 3, UINT, "one of 3 parts; join them"),
        ("tokenizer.ggml.model", "bert", STRING, "tokenizer.ggml.model is 'bert'"),
        ("tokenizer.ggml.eos_token_id", 1 << 20, UINT, "eos_token_id is 1048576, not a token"),
        ("tokenizer.ggml.tokens", "abc", STRING, "tokenizer.ggml.tokens is not a list of str"),
        ("general.alignment", 48, UINT, "general.alignment is 48"),
    ],
)
def test_lying_metadata(key: str, value: Any, types: Any, message: str, whole: Path, tmp_path: Path) -> None:
    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        fields[key] = (value, types)

    path = write(tmp_path / "lie.gguf", change, whole)
    with pytest.raises(CheckpointError, match=message) as error:
        nybble.import_gguf(path, tmp_path / "out")
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_missing_superfluous_or_not_finite(whole: Path, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Any, Any], Any]] = {
        r"tensor 'blk\.1\.ffn_up\.weight' \(model\.layers\.1\.mlp\.up_proj\.weight\) is missing": (
            lambda fields, tensors: tensors.pop(MATRIX)
        ),
        r"1 tensors that LlamaForCausalLM does not have: blk\.0\.extra": (
            lambda fields, tensors: tensors.update({"blk.0.extra": np.zeros(3, np.float32)})
        ),
        r"tensor 'blk\.1\.ffn_up\.weight' holds NaN or infinity": (
            lambda fields, tensors: tensors[MATRIX].__setitem__((3, 4), np.nan)
        ),
        r"tensor 'rope_freqs\.weight': its factors are not those": (
            lambda fields, tensors: tensors.update({"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})
        ),
        r"tensor 'rope_freqs\.weight' has shape \[3\]": (
            lambda fields, tensors: tensors.update({"rope_freqs.weight": np.ones(3, np.float32)})
        ),
    }
    for message, change in changes.items():
        path = write(tmp_path / "lie.gguf", change, whole)
        with pytest.raises(CheckpointError, match=message) as error:
            nybble.import_gguf(path, tmp_path / "out")
        assert str(path) in str(error.value)
        assert not (tmp_path / "out").exists()


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to a q or k projection, row by row: halves of a head become neighbours."""
    head_dim = weight.shape[0] // heads
    permuted = np.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            for half in range(2):
                permuted[head * head_dim + 2 * i + half] = weight[head * head_dim + half * head_dim // 2 + i]
    return permuted


@pytest.mark.parametrize("heads, head_dim, columns", [(1, 2, 3), (3, 8, 5), (9, 64, 4)])
def test_the_rotary_order(heads: int, head_dim: int, columns: int) -> None:
    weight = np.arange(heads * head_dim * columns, dtype=np.float32).reshape(heads * head_dim, columns)
    stored = llama_cpp_order(weight, heads)
    assert head_dim == 2 or not np.array_equal(stored, weight)
    assert np.array_equal(permute_rope(weight, heads), stored)
    assert np.array_equal(unpermute_rope(stored, heads), weight)
    assert np.array_equal(permute_rope(weight[:, 0], heads), stored[:, 0])


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="heads=5 does not divide the 12 rows"):
        unpermute_rope(np.zeros((12, 3)), 5)


def test_llama_3s_factors_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor, original in ((8.0, 8192), (32.0, 8192)):
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = original
        config = transformers.LlamaConfig(
            hidden_size=512, num_attention_heads=4, head_dim=128, rope_scaling=dict(scaling), rope_theta=500000.0,
            max_position_embeddings=131072,
        )  # fmt: skip
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
        factors = llama3_factors(scaling, 128, 500000.0)
        assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-5)
        assert llama3_scaling(factors, 128, 500000.0) == scaling
