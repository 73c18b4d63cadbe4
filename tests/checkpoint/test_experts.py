"""Mixtures whose experts are one parameter of three dimensions: quantized on disk, packed in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble
from nybble import QuantConfig, QuantTensor
from nybble.errors import CheckpointError

transformers = pytest.importorskip("transformers")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1,
        layer_types=["full_attention", "full_attention"], pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.mark.filterwarnings("ignore")
def test_experts_are_quantized_and_computed_with(source: Path, tmp_path: Path) -> None:
    before = load_file(source / "model.safetensors")
    names = [name for name, value in before.items() if value.ndim == 3]
    assert len(names) == 4
    report = nybble.quantize(source, tmp_path / "q")
    assert set(names) < {row.name for row in report.tensors}
    model = nybble.load(tmp_path / "q")
    reference = transformers.GptOssForCausalLM.from_pretrained(source)
    for name, module in list(model.named_modules()):
        if isinstance(module, nybble.QuantLinear):
            reference.get_submodule(name).weight.data = module.dequantize()
    for name in names:
        reference.get_parameter(name).data = QuantTensor.quantize(before[name], QuantConfig()).dequantize()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, ours = reference.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    owner, _, leaf = names[0].rpartition(".")
    packed = model.get_submodule(owner).parametrizations[leaf].original
    assert packed.dtype == torch.uint8 and packed.numel() == before[names[0]].numel() // 2
    with pytest.raises(CheckpointError, match="already quantized"):
        nybble.quantize(tmp_path / "q", tmp_path / "again")


@pytest.mark.filterwarnings("ignore")
def test_a_shape_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    nybble.quantize(source, tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    values = {name: value.clone() for name, value in load_file(path).items()}
    name = next(name for name in values if "experts" in name and ".quant_state." in name)
    text = bytes(values[name].tolist()).replace(b"[4, ", b"[2, 2, ")
    values[name] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(values, path)
    with pytest.raises(CheckpointError, match=r"has shape \[2, 2, .*\], the model wants \[4, "):
        nybble.load(tmp_path / "q")
