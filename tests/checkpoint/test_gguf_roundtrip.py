"""Export to GGUF and import of it: the same weights, or exactly what the quantized type holds; the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import CASES, VOCABULARY, build, write_model, write_tokenizer
from safetensors.torch import load_file, save_file

import nybble
from nybble.errors import CheckpointError, CheckpointNotFoundError, DestinationExistsError

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# yarn's and Llama 3's lengths are longer than the tiny models' context, about which transformers logs.
IDS = torch.arange(3, 83).reshape(2, 40)


def logits(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def through(weight: torch.Tensor, name: str) -> torch.Tensor:
    """What a matrix is after gguf's own quantizer and back; blocks lie along rows, so their order does not matter."""
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.float().numpy(), kind), kind).copy())


@pytest.mark.parametrize("case", CASES)
def test_f32_and_back_is_the_same_model(case: str, tmp_path: Path) -> None:
    kind, pre, changes = CASES[case]
    source = write_model(tmp_path / "model", kind, pre, **changes)
    report = nybble.export_gguf(source, tmp_path / "model.gguf", "f32")
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(source), logits(tmp_path / "back"))
    assert report.types == {"F32": len(before) + (case == "llama 3's rope")}
    first, second = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "back"))
    assert second["max_position_embeddings"] == first["max_position_embeddings"]
    assert [second.get(f"{k}_token_id") for k in ("bos", "eos", "pad")] == [1, 2, 2]


@pytest.mark.parametrize("case", ["llama", "llama, tied", "llama, biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantized_types_hold_exactly_what_gguf_makes_of_the_weights(case: str, type: str, tmp_path: Path) -> None:
    kind, pre, changes = CASES[case]
    source = write_model(tmp_path / "model", kind, pre, **changes)
    nybble.export_gguf(source, tmp_path / "model.gguf", type.lower())
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype="float32")
    expected = weights(source)
    head = "model.embed_tokens.weight" if "tied" in case else "lm_head.weight"
    for name, weight in expected.items():
        if weight.dim() == 2:
            expected[name] = through(weight, "Q8_0" if name == head and type.startswith("Q") else type)
    after = weights(tmp_path / "back")
    assert all(torch.equal(expected[name], after[name]) for name in expected)
    write_expected = tmp_path / "expected"
    build(kind, **changes).save_pretrained(write_expected)
    save_file(expected, write_expected / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(write_expected), logits(tmp_path / "back"))


@pytest.mark.parametrize(
    "format, block_size, double_quant, slab",
    [("nf4", 64, True, 1 << 20), ("nf4", 256, True, 100), ("fp4", 4096, False, 100), ("int4", 64, False, 64),
     ("int8", 64, False, 100)],
)  # fmt: skip
def test_quantized_checkpoints_are_decoded_to_fp32(
    format: str, block_size: int, double_quant: bool, slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.checkpoint.gguf.export._SLAB_ELEMENTS", slab)
    source = write_model(tmp_path / "model", "llama", dtype=torch.bfloat16, intermediate_size=112)
    config = nybble.QuantConfig(format=format, block_size=block_size, double_quant=double_quant)
    nybble.quantize(source, tmp_path / "quantized", config)
    nybble.export_gguf(tmp_path / "quantized", tmp_path / "model.gguf", "f32")
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    after = weights(tmp_path / "back")
    layers = [
        (n, m) for n, m in nybble.load(tmp_path / "quantized").named_modules() if isinstance(m, nybble.QuantLinear)
    ]
    assert len(layers) == 14
    for name, module in layers:
        assert torch.equal(module.dequantize(torch.float32), after[f"{name}.weight"])
    assert torch.equal(weights(source)["lm_head.weight"].float(), after["lm_head.weight"])
    report = nybble.export_gguf(tmp_path / "quantized", tmp_path / "twice.gguf", "q4_0")
    assert any("had 4 bits already" in note for note in report.notes) == (format != "int8")


def test_slabs_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    nybble.export_gguf(source, tmp_path / "a.gguf", "q4_1")
    nybble.import_gguf(tmp_path / "a.gguf", tmp_path / "a")
    for module in ("export", "importing"):
        monkeypatch.setattr(f"nybble.checkpoint.gguf.{module}._SLAB_ELEMENTS", 1000)
    nybble.export_gguf(source, tmp_path / "b.gguf", "q4_1", name="model")
    nybble.import_gguf(tmp_path / "b.gguf", tmp_path / "b", max_shard_size=40_000)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    shards = sorted((tmp_path / "b").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 110_000 for shard in shards)
    parts = [load_file(shard) for shard in shards]
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(joined)
    assert all(torch.equal(tensor, joined[name]) for name, tensor in weights(tmp_path / "a").items())
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


def test_the_file_says_what_gguf_readers_look_for(tmp_path: Path) -> None:
    source = write_model(tmp_path / "Small-Llama", "llama", "llama-bpe", **CASES["llama 3's rope"][2])
    nybble.export_gguf(source, tmp_path / "model.gguf", "q4_0", context=128)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "Small-Llama",
        "general.file_type": 2, "general.quantization_version": 2, "llama.context_length": 128,
        "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": 16, "llama.vocab_size": VOCABULARY, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert "im_start" in fields["tokenizer.chat_template"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds.pop("output.weight") == "Q8_0" and kinds.pop("rope_freqs.weight") == "F32"
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q4_0"}


def test_rows_that_blocks_do_not_divide_stay_f16(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama", intermediate_size=80, dtype=torch.bfloat16)
    report = nybble.export_gguf(source, tmp_path / "model.gguf", "q8_0")
    assert report.types["F16"] == 2
    assert report.notes == [f"blk.{i}.ffn_down.weight stays F16: its rows of 80 are no multiple of 32" for i in (0, 1)]
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype="float32")
    assert torch.isfinite(logits(tmp_path / "back")).all()


@pytest.mark.parametrize("dtype, expected", [("auto", torch.float16), ("bfloat16", torch.bfloat16)])
def test_dtype_of_an_import(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "qwen2", "qwen2")
    nybble.export_gguf(source, tmp_path / "model.gguf", "f16")
    nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back", dtype=dtype)
    assert {tensor.dtype for tensor in weights(tmp_path / "back").values()} == {expected}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == expected


def change(directory: Path, **settings: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "gpt_bigcode"}, r"'gpt_bigcode'; supported are llama, mistral, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' has no counterpart"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast=16 is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs a positive low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 3}, r"tensor 'model\.layers\.2\.input_layernorm\.weight' is missing"),
        ({"num_hidden_layers": 1}, "9 tensors have no place in a llama GGUF file"),
        ({"intermediate_size": 96}, r"has shape \[128, 64\], config\.json says \[96, 64\]"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
    ],
)
def test_what_an_export_refuses(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    change(source, **settings)
    with pytest.raises(CheckpointError, match=message) as error:
        nybble.export_gguf(source, tmp_path / "model.gguf")
    assert str(source) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "mistral", sliding_window=64)
    with pytest.raises(CheckpointError, match="ask for a context of 64"):
        nybble.export_gguf(source, tmp_path / "model.gguf")
    nybble.export_gguf(source, tmp_path / "model.gguf", context=64)
    with pytest.raises(ValueError, match="context is 1000"):
        nybble.export_gguf(source, tmp_path / "long.gguf", context=1000)


def test_values_that_a_type_cannot_hold(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tensors = weights(source)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][5, 7] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for type in ("f16", "q4_1"):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight' holds 99840, more than .* export as bf16 or f32"):
            nybble.export_gguf(source, tmp_path / "model.gguf", type)
    for type in ("bf16", "q8_0", "q4_0"):
        nybble.export_gguf(source, tmp_path / f"{type}.gguf", type)
    with pytest.raises(CheckpointError, match=r"holds values beyond the range of torch\.float16"):
        nybble.import_gguf(tmp_path / "bf16.gguf", tmp_path / "back", dtype="float16")
    tensors[name][5, 7] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' holds NaN or infinity"):
        nybble.export_gguf(source, tmp_path / "model.gguf", "f32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16.gguf", "model", "q4_0.gguf", "q8_0.gguf"]


def test_tiny_values_become_zero_without_a_warning(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    tensors = weights(source)
    tensors["lm_head.weight"][:10] = 1e-42
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for type in ("q8_0", "q4_0", "q4_1"):
        nybble.export_gguf(source, tmp_path / f"{type}.gguf", type)
        nybble.import_gguf(tmp_path / f"{type}.gguf", tmp_path / type)
        assert not weights(tmp_path / type)["lm_head.weight"][:10].any()


def test_destinations_and_sources(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match="type is 'q5_k'; allowed are f32, f16"):
        nybble.export_gguf(source, tmp_path / "model.gguf", "q5_k")
    nybble.export_gguf(source, tmp_path / "new" / "folder" / "model.gguf")
    path = tmp_path / "new" / "folder" / "model.gguf"
    before = path.read_bytes()
    with pytest.raises(DestinationExistsError, match=r"model\.gguf: exists already"):
        nybble.export_gguf(source, path)
    with pytest.raises(DestinationExistsError, match="not empty"):
        nybble.import_gguf(path, source)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        nybble.import_gguf(path, tmp_path / "back", dtype="int8")
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match=r"a directory with config\.json is needed"):
        nybble.export_gguf(source / "model.safetensors", tmp_path / "other.gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"tokenizer\.json: no such file"):
        nybble.export_gguf(source, tmp_path / "other.gguf")
    write_tokenizer(source)
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        nybble.import_gguf(tmp_path / "none.gguf", tmp_path / "back")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    source = write_model(
        tmp_path / "model", "llama", dtype=torch.bfloat16, hidden_size=1024,
        intermediate_size=8192, num_hidden_layers=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    size = (source / "model.safetensors").stat().st_size
    program = textwrap.dedent("""
        import sys, nybble, gguf, tokenizers
        import nybble.checkpoint.gguf
        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
        before = peak()
        nybble.export_gguf(sys.argv[1], sys.argv[2], "q8_0")
        nybble.import_gguf(sys.argv[2], sys.argv[3])
        print(peak() - before)
    """)
    arguments = [str(source), str(tmp_path / "model.gguf"), str(tmp_path / "back")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert size > 150 << 20
    # One slab and its temporaries: measured 56 MiB.
    assert int(done.stdout) < 96 << 20


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_leaves_nothing(limit: int, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source = write_model(tmp_path / "model", "llama")
    nybble.export_gguf(source, tmp_path / "model.gguf", "f32")
    names = sorted(p.name for p in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(nybble.checkpoint.StorageFullError, match=r"other\.gguf: .* nothing was left behind"):
            nybble.export_gguf(source, tmp_path / "other.gguf", "f32")
        with pytest.raises(nybble.checkpoint.StorageFullError, match="nothing was left behind"):
            nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_missing_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'nybble\[hf\]'"):
        nybble.export_gguf(tmp_path, tmp_path / "model.gguf")
    with pytest.raises(ImportError, match=r"pip install 'nybble\[hf\]'"):
        nybble.import_gguf(tmp_path / "model.gguf", tmp_path / "out")
