"""nybble.load: the same function as transformers computes with the decoded weights, without a second copy of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig, QuantLinear
from nybble.errors import CheckpointError, CheckpointNotFoundError

transformers = pytest.importorskip("transformers")
Make = Callable[..., Path]


def reference(source: Path, model: Any) -> Any:
    """The ordinary model of `source` with the quantized model's decoded weights in its linear layers."""
    plain = type(model).from_pretrained(source, dtype=model.dtype).eval()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            plain.get_submodule(name).weight.data = module.dequantize(model.dtype)
    return plain


def quantized(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def assert_same_function(model: Any, plain: Any, ids: torch.Tensor) -> None:
    """Logits agree up to the order of summation, which is at most some rounding steps of the dtype."""
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    tolerance = 16 * torch.finfo(model.dtype).eps * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", [5e9, 20_000], ids=["single", "sharded"])
def test_logits(
    make: Make, tmp_path: Path, token_ids: torch.Tensor, dtype: torch.dtype, tied: bool, shard_size: float
) -> None:
    source = make(dtype=dtype, tied=tied)
    nybble.quantize(source, tmp_path / "out", max_shard_size=shard_size)
    model = nybble.load(tmp_path / "out")
    assert not model.training
    assert model.dtype == dtype
    assert len(quantized(model)) == 14
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    plain = reference(source, model)
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert_same_function(model, plain, token_ids)


@pytest.mark.parametrize("format", ["fp4", "int4", "int8"])
def test_formats(make: Make, tmp_path: Path, token_ids: torch.Tensor, format: str) -> None:
    source = make(dtype=torch.float32, attention_bias=True)
    nybble.quantize(source, tmp_path / "out", QuantConfig(format=format, skip=()))
    model = nybble.load(tmp_path / "out")
    assert len(quantized(model)) == 15
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert_same_function(model, reference(source, model), token_ids)


def test_other_architectures(tmp_path: Path, token_ids: torch.Tensor) -> None:
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for kind in ("Bert", "GPTNeoX"):  # the first has buffers and a tied head with a bias, the second renames its head
        suffix = "MaskedLM" if kind == "Bert" else "CausalLM"
        config = getattr(transformers, f"{kind}Config")(**settings, vocab_size=50, bos_token_id=0, eos_token_id=0)
        getattr(transformers, f"{kind}For{suffix}")(config).save_pretrained(tmp_path / kind)
        nybble.quantize(tmp_path / kind, tmp_path / f"{kind}-out", QuantConfig(skip=()))
        model = nybble.load(tmp_path / f"{kind}-out")
        assert quantized(model)
        assert_same_function(model, reference(tmp_path / kind, model), token_ids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_are_the_mapped_file(make: Make, tmp_path: Path) -> None:
    nybble.quantize(make(), tmp_path / "out")
    model = nybble.load(tmp_path / "out")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "out") in line]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    packed = model.model.layers[0].mlp.up_proj.quant_tensor().packed
    for tensor in (packed, model.model.embed_tokens.weight):
        assert any(low <= tensor.data_ptr() < high for low, high in ranges)


def test_plain_directories_are_ordinary_models(make: Make, token_ids: torch.Tensor) -> None:
    source = make()
    model = nybble.load(source)
    assert quantized(model) == []
    plain = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)


def test_dtype_and_generation_config(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    source = make()
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "max_length": 9}')
    nybble.quantize(source, tmp_path / "out")
    model = nybble.load(tmp_path / "out", dtype=torch.float32)
    assert model.generation_config.eos_token_id == 7
    assert model.model.norm.weight.dtype == torch.float32
    assert_same_function(model, reference(source, model), token_ids)
    assert model.config.quantization_config["quant_method"] == "bitsandbytes"  # for save_pretrained


def test_a_head_stored_beside_the_embedding(make: Make, tmp_path: Path) -> None:
    source = make(tied=True)
    path = source / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    for stored, tied in ((embedding.clone(), True), (embedding + 1, False)):
        save_file({**weights, "lm_head.weight": stored}, path)
        nybble.quantize(source, tmp_path / f"out-{tied}")
        model = nybble.load(tmp_path / f"out-{tied}")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert torch.equal(model.lm_head.weight, stored)
        assert torch.equal(model.model.embed_tokens.weight, embedding)
    del weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding}, path)
    nybble.quantize(source, tmp_path / "out")
    model = nybble.load(tmp_path / "out")
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def rewritten(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, out / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"1 tensors of the model missing from the files: model\.norm\.weight"),
        (lambda w: w.update(extra=torch.ones(1)), r"1 tensors the model does not have: extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"'model\.norm\.weight' has shape \[3\], the model wants \[64\]",
        ),
        (
            lambda w: w.pop("model.layers.0.mlp.up_proj.weight.absmax"),
            r"'model\.layers\.0\.mlp\.up_proj\.weight\.absmax' is missing",
        ),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(7, 1, dtype=torch.uint8)}),
            r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.up_proj\.weight'",
        ),
        (
            lambda w: [w.update({k.replace("up_proj", "old_proj"): w.pop(k)}) for k in list(w) if "0.mlp.up_proj" in k],
            r"is quantized, but the model LlamaForCausalLM has no module at 'model\.layers\.0\.mlp\.old_proj'",
        ),
        (
            lambda w: [w.update({k.replace("up_proj", "act_fn"): w.pop(k)}) for k in list(w) if "0.mlp.up_proj" in k],
            r"is quantized, but the model LlamaForCausalLM has .* at 'model\.layers\.0\.mlp\.act_fn'",
        ),
        (
            lambda w: [
                w.update({k.replace("up_proj", "down_proj"): w.pop(k)}) for k in list(w) if "0.mlp.up_proj" in k
            ],
            r"has shape \[128, 64\], the model wants \[64, 128\]",
        ),
    ],
)
def test_files_that_do_not_fit_the_model(make: Make, tmp_path: Path, change: Any, message: str) -> None:
    nybble.quantize(make(), tmp_path / "out")
    rewritten(tmp_path / "out", change)
    with pytest.raises(ValueError, match=message):
        nybble.load(tmp_path / "out")


def test_directories_that_say_too_little(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointNotFoundError):
        nybble.load(out)
    nybble.quantize(make(), out)
    with pytest.raises(CheckpointError, match="a directory with config"):
        nybble.load(out / "model.safetensors")
    settings = json.loads((out / "config.json").read_text())
    for changes, message in (
        ({"architectures": ["NoModel"]}, r"architectures \['NoModel'\] are not classes"),
        ({"model_type": "no-such-type"}, r"config\.json: transformers cannot build this model"),
    ):
        (out / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(CheckpointError, match=message):
            nybble.load(out)
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        nybble.load(out)


BAD_CONFIGS = [
    {"quantization_config": 5},
    {"model_type": ["llama"]},
    {"architectures": 5},
    {"architectures": [5]},
    {"hidden_size": "x"},
    {"num_attention_heads": 0},
    {"hidden_size": -5},
    {"hidden_act": "no-such"},
    {"dtype": 5},
]


@pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
@pytest.mark.parametrize("of", ["plain", "quantized"])
def test_configs_that_no_model_can_have(make: Make, tmp_path: Path, changes: dict[str, Any], of: str) -> None:
    """Whatever exception transformers has for it, ours names the file; quantizing may go by the names instead."""
    directory = make()
    if of == "quantized":
        nybble.quantize(directory, tmp_path / "q")
        directory = tmp_path / "q"
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(CheckpointError, match=re.escape(str(directory / "config.json"))):
        nybble.load(directory)
    if of == "plain":
        try:
            notes = nybble.quantize(directory, tmp_path / "out").notes
        except CheckpointError as error:
            assert str(directory / "config.json") in str(error)
        else:
            assert "recognized by their names, as the model could not be built" in notes[0]


def test_another_method_is_refused(make: Make) -> None:
    source = make()
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="quantized by 'gptq'"):
        nybble.load(source)


@pytest.mark.bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_bitsandbytes_reads_the_same_weights(make: Make, tmp_path: Path, format: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    nybble.quantize(make(dtype=torch.float16), tmp_path / "out", QuantConfig(format=format))
    model = nybble.load(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].pop("nybble")  # by which nybble, imported here, would take the directory
    path.write_text(json.dumps(config))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    peers = {n: m for n, m in peer.named_modules() if type(m).__name__ in {"Linear4bit", "Linear8bitLt"}}
    assert sorted(peers) == sorted(quantized(model))
    for name, module in peers.items():
        theirs = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
        ours = model.get_submodule(name).dequantize(torch.float16)
        if format == "int8":  # it multiplies by 1/127 where the layout divides by 127
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-3, atol=1e-6)
        else:
            assert torch.equal(ours, theirs), name


@pytest.mark.bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_bitsandbytes_wrote(make: Make, tmp_path: Path, token_ids: torch.Tensor) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    source = make()
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    peer = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings)
    peer.save_pretrained(tmp_path / "theirs")
    model = nybble.load(tmp_path / "theirs")
    assert len(quantized(model)) == 14
    assert_same_function(model, reference(source, model), token_ids)
