"""nybble.quantize: what is in the files it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig, QuantTensor
from nybble.checkpoint import bnb
from nybble.checkpoint.files import open_source
from nybble.checkpoint.slabs import CHUNK, ErrorSums
from nybble.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DestinationExistsError,
    NonFiniteError,
    PatternError,
)

Make = Callable[..., Path]
LINEAR = 14  # of the tiny Llama without its head


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by safetensors itself."""
    result: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        result.update(load_file(path))
    return result


def check(source: Path, out: Path, config: QuantConfig) -> None:
    """Every tensor of `out` is the source's, or the source's as QuantTensor quantizes it, bit for bit."""
    before, after = tensors(source), tensors(out)
    groups = bnb.group(after)
    assert len(groups.quantized) == LINEAR
    for module, members in groups.quantized.items():
        expected = QuantTensor.quantize(before.pop(f"{module}.weight"), config).state()
        assert expected.keys() == members.keys()
        for key, value in expected.items():
            assert after[members[key]].dtype == value.dtype
            assert torch.equal(after[members[key]], value)
    assert before.keys() == set(groups.plain)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", ["5GB", "50KB"])
def test_tensors_of_every_kind_of_source(
    make: Make, tmp_path: Path, dtype: torch.dtype, tied: bool, shards: str
) -> None:
    source = make(dtype=dtype, tied=tied, max_shard_size=shards)
    assert (source / "model.safetensors.index.json").exists() == (shards == "50KB")
    report = nybble.quantize(source, tmp_path / "out")
    check(source, tmp_path / "out", QuantConfig())
    assert report.shards == ["model.safetensors"]
    assert report.notes == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    block = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert block["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    assert block["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(format="fp4", block_size=256, double_quant=False),
        QuantConfig(format="int4", block_size=32),
        QuantConfig(format=[i / 8 for i in range(-8, 8)]),
        QuantConfig(format="int8"),
        QuantConfig(search="mse"),
    ],
    ids=lambda c: f"{c.format_name}-{c.search}",
)
def test_formats(make: Make, tmp_path: Path, config: QuantConfig) -> None:
    source = make()
    report = nybble.quantize(source, tmp_path / "out", config)
    check(source, tmp_path / "out", config)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    readable = config.format_name in {"nf4", "fp4", "int8"}
    assert block["quant_method"] == ("bitsandbytes" if readable else "nybble")
    assert QuantConfig.from_dict(block["nybble"]) == config
    assert 0 < report.mean_relative_error < 0.2


def test_output_shards_and_their_index(make: Make, tmp_path: Path) -> None:
    source, out = make(), tmp_path / "out"
    report = nybble.quantize(source, out, max_shard_size=20_000)
    assert len(report.shards) > 2
    count = len(report.shards)
    assert report.shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors(out).values())
    assert index["weight_map"] == {
        name: path.name for path in sorted(out.glob("*.safetensors")) for name in load_file(path)
    }
    assert all(sum(t.nbytes for t in load_file(out / name).values()) <= 20_000 for name in report.shards)
    assert open_source(out).tensors.keys() == index["weight_map"].keys()
    check(source, out, QuantConfig())


def test_report(make: Make, tmp_path: Path) -> None:
    source = make(dtype=torch.float32)
    seen: list[tuple[int, int, str]] = []
    report = nybble.quantize(source, tmp_path / "out", progress=lambda *args: seen.append(args))
    before = tensors(source)
    weights = {name: before[name] for name in before if "proj" in name}
    assert report.parameters == sum(t.numel() for t in before.values())
    assert report.quantized_parameters == sum(t.numel() for t in weights.values())
    assert report.bytes_before == sum(t.nbytes for t in before.values())
    assert report.bytes_after == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    # Small matrices: the last nested block is partial, so a little above the limit of 4.127.
    assert 4.127 < report.bits_per_weight < 4.14
    assert report.bits_per_weight_total == 8 * report.bytes_after / report.parameters
    total = 0.0
    for row in report.tensors:
        exact = weights[row.name]
        error = (exact - QuantTensor.quantize(exact, QuantConfig()).dequantize()).norm() / exact.norm()
        assert row.relative_error == pytest.approx(error.item(), rel=1e-5)
        total += error.item() * exact.numel()
    assert report.mean_relative_error == pytest.approx(total / report.quantized_parameters, rel=1e-5)
    assert seen[-1][:2] == (report.bytes_before, report.bytes_before)
    assert sorted({name for _, _, name in seen}) == sorted(open_source(source).tensors)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert report.table().row_count == 8


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_relative_error_of_values_whose_squares_leave_fp32(scale: float) -> None:
    weight = (torch.randn(300, 500, dtype=torch.float64) * scale).float()
    decoded = QuantTensor.quantize(weight, QuantConfig()).dequantize()
    expected = (decoded.double() - weight.double()).norm() / weight.double().norm()
    largest = (decoded.double() - weight.double()).abs().max()
    sums = ErrorSums()
    for start in range(0, weight.numel(), CHUNK):
        sums.add(weight.view(-1)[start : start + CHUNK], decoded.view(-1)[start : start + CHUNK])
    assert sums.figures() == (pytest.approx(expected.item(), rel=1e-5), pytest.approx(largest.item(), rel=1e-5))
    zeros = ErrorSums()
    zeros.add(torch.zeros(64), torch.zeros(64))
    assert zeros.figures() == (0.0, 0.0)


def test_what_is_carried_along(make: Make, tmp_path: Path) -> None:
    source, out = make(), tmp_path / "out"
    for name in ("tokenizer.model", "vocab.txt", "LICENSE", "modeling_x.py", "1_Pooling/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "model.gguf", "x.pt", "pytorch_model.bin.index.json", ".gitattributes"):
        (source / name).write_text(name)
    for name in ("original/params.json", "1_Pooling/pytorch_model.bin", "onnx/model.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    report = nybble.quantize(source, out)
    carried = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert carried == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja",
        "tokenizer.model", "vocab.txt", "LICENSE", "modeling_x.py", "1_Pooling/config.json",
    }  # fmt: skip
    assert (out / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()
    assert report.notes == ["weights in other files were not carried along: model.gguf, pytorch_model.bin, x.pt"]


def test_a_single_file_without_a_config(tmp_path: Path) -> None:
    weights = {
        "layers.0.fc.weight": torch.randn(32, 64),
        "layers.0.fc.bias": torch.randn(32),
        "embed_tokens.weight": torch.randn(10, 64),
        "norm.weight": torch.ones(64),
        "conv.weight": torch.randn(4, 4, 3),
        "steps": torch.tensor(7),
    }
    save_file(weights, tmp_path / "net.safetensors")
    (tmp_path / "unrelated.txt").write_text("x")
    report = nybble.quantize(tmp_path / "net.safetensors", tmp_path / "out")
    assert [row.name for row in report.tensors] == ["layers.0.fc.weight"]
    assert report.notes == ["no config.json: linear layers were recognized by their names"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in weights.keys() - {"layers.0.fc.weight"}:
        assert torch.equal(after[name], weights[name])


def test_the_model_class_decides_where_names_would_err(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="no weight of a linear layer"):
        nybble.quantize(tmp_path / "gpt2", tmp_path / "out")  # all are Conv1D, whose weights are [in, out]
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**settings, vocab_size=50))
    bert.save_pretrained(tmp_path / "bert")
    report = nybble.quantize(tmp_path / "bert", tmp_path / "out", QuantConfig(skip=()))
    linear = {n for n, m in bert.named_modules() if type(m) is torch.nn.Linear} - {"cls.predictions.decoder"}
    assert {row.name.removesuffix(".weight") for row in report.tensors} == linear


def test_names_decide_where_the_model_cannot_be_built(make: Make, tmp_path: Path) -> None:
    source = make()
    settings = json.loads((source / "config.json").read_text())
    settings["architectures"] = ["NoSuchModel"]
    (source / "config.json").write_text(json.dumps(settings))
    report = nybble.quantize(source, tmp_path / "out")
    check(source, tmp_path / "out", QuantConfig())
    assert len(report.notes) == 1
    assert "recognized by their names" in report.notes[0]


def test_skip_and_overrides(make: Make, tmp_path: Path) -> None:
    overrides = {"down_proj": {"block_size": 32, "double_quant": False}, "*.layers.0.*.q_proj": None, "k_proj": "fp4"}
    config = QuantConfig(skip=("lm_head", "v_proj"), overrides=overrides)
    report = nybble.quantize(make(), tmp_path / "out", config)
    rows = {row.name.removesuffix(".weight"): row for row in report.tensors}
    assert not any("v_proj" in name for name in rows)
    assert "model.layers.0.self_attn.q_proj" not in rows
    assert rows["model.layers.1.mlp.down_proj"].block_size == 32
    assert rows["model.layers.1.mlp.down_proj"].bits_per_weight == 5.0
    assert rows["model.layers.1.self_attn.k_proj"].format == "fp4"
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "nybble"
    assert block["modules_to_not_convert"] == [
        "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip


def test_the_head_is_quantized_on_request_unless_tied(make: Make, tmp_path: Path) -> None:
    report = nybble.quantize(make(), tmp_path / "out", QuantConfig(skip=()))
    assert "lm_head.weight" in [row.name for row in report.tensors]
    tied = make("tied", tied=True)
    save_file(
        {**tensors(tied), "lm_head.weight": tensors(tied)["model.embed_tokens.weight"].clone()},
        tied / "model.safetensors",
    )
    report = nybble.quantize(tied, tmp_path / "out2", QuantConfig(skip=()))
    assert "lm_head.weight" not in [row.name for row in report.tensors]
    assert report.notes == ["lm_head.weight left as it is: tied to model.embed_tokens"]


def refused(out: Path, error: type[Exception], message: str, source: Path, **settings: Any) -> None:
    """The call fails with that error and leaves nothing."""
    with pytest.raises(error, match=message):
        nybble.quantize(source, out, **settings)
    assert not out.exists() or not any(out.iterdir())


def test_bad_sources(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(out, CheckpointNotFoundError, "absent: no such file", tmp_path / "absent")
    source = make()
    nybble.quantize(source, tmp_path / "once")
    refused(out, CheckpointError, r"config\.json: .* already quantized \(by bitsandbytes\)", tmp_path / "once")
    (tmp_path / "once" / "config.json").unlink()
    refused(out, CheckpointError, r"model\.safetensors: tensor '.*' is already quantized", tmp_path / "once")
    (source / "config.json").write_text("{")
    refused(out, CheckpointError, r"config\.json: not valid JSON", source)
    (source / "model.safetensors").write_bytes(b"x" * 100)
    refused(out, CheckpointError, r"model\.safetensors: not a safetensors file", source)


def test_non_finite_weights_name_tensor_and_file(make: Make, tmp_path: Path) -> None:
    source = make(max_shard_size="50KB")
    victim = open_source(source).tensors["model.layers.1.mlp.up_proj.weight"].path
    values = load_file(victim)
    values["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(values, victim)
    refused(tmp_path / "out", NonFiniteError, rf"model\.layers\.1\.mlp\.up_proj\.weight \({victim}\)", source)


def test_bad_arguments(make: Make, tmp_path: Path) -> None:
    source, out = make(), tmp_path / "out"
    refused(
        out, PatternError, "skip: pattern 'q_prj' matches no linear layer", source, config=QuantConfig(skip=("q_prj",))
    )
    refused(out, PatternError, "overrides: pattern 'x'", source, config=QuantConfig(overrides={"x": None}))
    refused(out, CheckpointError, "no weight of a linear layer", source, config=QuantConfig(skip=("*",)))
    refused(out, ValueError, "max_shard_size: a positive number", source, max_shard_size=0)
    refused(out, TypeError, "config: a QuantConfig is needed, not str", source, config="nf4")
    refused(source / "out", CheckpointError, "lies inside", source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(DestinationExistsError, match="not empty"):
        nybble.quantize(source, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


PEAK = textwrap.dedent("""
    import sys, torch, nybble, nybble.checkpoint.merging
    def peak():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
    source, adapter, out, ceiling, to = *sys.argv[1:4], float(sys.argv[4]), sys.argv[5]
    nybble.QuantTensor.quantize(torch.randn(64, 64), nybble.QuantConfig()).dequantize()
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far, of the imports, is forgotten
    before = peak()
    if adapter:
        nybble.merge(source, adapter, out, to, max_memory=ceiling, workers=2)
    else:
        nybble.quantize(source, out, nybble.QuantConfig(to), max_memory=ceiling, workers=2)
    print(peak() - before)
""")


def added(source: Path, out: Path, ceiling: float, to: str, adapter: Path | str = "") -> int:
    """Bytes that the peak of a process of its own grows by in quantizing, or in merging an adapter."""
    command = [sys.executable, "-c", PEAK, source, adapter, out, ceiling, to]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A weight of 100 MB in bf16 and 200 in fp32, each more than is allowed, and an adapter for it."""
    folder = tmp_path_factory.mktemp("huge")
    for name in ("bf16", "fp32", "adapter"):
        (folder / name).mkdir()
    value = torch.randn(6144, 8192)
    save_file({"fc.weight": value}, folder / "fp32" / "model.safetensors")
    save_file({"fc.weight": value.bfloat16()}, folder / "bf16" / "model.safetensors")
    factors = {"lora_A": torch.randn(16, 8192) * 0.01, "lora_B": torch.randn(6144, 16)}
    adapter = {f"base_model.model.fc.{name}.weight": factor for name, factor in factors.items()}
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    yield folder
    shutil.rmtree(folder)


CEILINGS = [
    ("bf16", "int8", False, 48e6),
    ("fp32", "nf4", False, 80e6),
    ("fp32", "int8", False, 48e6),
    ("bf16", "bf16", True, 64e6),
    ("fp32", "nf4", True, 80e6),
    ("fp32", "int8", True, 64e6),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
@pytest.mark.parametrize(("source", "to", "merged", "ceiling"), CEILINGS)
def test_max_memory_holds_for_one_weight_that_is_larger(
    huge: Path, tmp_path: Path, source: str, to: str, merged: bool, ceiling: float
) -> None:
    used = added(huge / source, tmp_path / "out", ceiling, to, huge / "adapter" if merged else "")
    shutil.rmtree(tmp_path / "out")
    assert used <= ceiling


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
@pytest.mark.parametrize("ceiling", [64e6, 160e6])
def test_max_memory_is_what_the_process_adds_at_most(tmp_path: Path, ceiling: float) -> None:
    count = 8  # 192 MB in bf16 matrices of 24 MB
    (tmp_path / "src").mkdir()
    weight = torch.randn(3072, 4096).bfloat16()
    for i in range(count):
        save_file({f"layers.{i}.fc.weight": weight}, tmp_path / "src" / f"model-{i}.safetensors")
    del weight
    names = {f"layers.{i}.fc.weight": f"model-{i}.safetensors" for i in range(count)}
    (tmp_path / "src" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    used = added(tmp_path / "src", tmp_path / "out", ceiling, "nf4")
    shutil.rmtree(tmp_path / "src")
    assert used <= ceiling
