"""What nybble.merge refuses: adapters and bases that do not go together, names, other methods, numbers not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters_on_disk import ONES, Make, write_adapter, write_factors, write_weights
from safetensors.torch import load_file, save_file

import nybble
from nybble.checkpoint.peft import adapted_layers
from nybble.errors import CheckpointError, NonFiniteError, PatternError


def test_what_does_not_fit_is_refused(make: Make, tmp_path: Path) -> None:
    base = make(dtype=torch.float32)
    adapter = write_adapter(base, tmp_path / "adapter")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="to is 'q4_0'; allowed are bf16"):
        nybble.merge(base, adapter, out, "q4_0")
    with pytest.raises(ValueError, match="block_size and search are for a quantized result"):
        nybble.merge(base, adapter, out, "bf16", search="mse")
    with pytest.raises(CheckpointError, match="lies inside it"):
        nybble.merge(base, adapter, adapter / "out")
    small = make("small", dtype=torch.float32, intermediate_size=256)
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.\d\.mlp\.\w+' is for a weight \[.*\]; '.*' in .*small is"
    ):
        nybble.merge(small, adapter, out)
    fewer = make("fewer", dtype=torch.float32, num_hidden_layers=1)
    with pytest.raises(PatternError, match=r"'model\.layers\.1\..*': .*fewer has no weight for it"):
        nybble.merge(fewer, adapter, out)
    assert not out.exists()
    assert len(adapted_layers(nybble.load(base))) == 0


def test_a_name_loses_or_gains_only_the_base_models_prefix(tmp_path: Path) -> None:
    base = write_weights(tmp_path / "base", fc__weight=torch.zeros(8, 8), b__fc__weight=torch.zeros(8, 8))
    for number, layers in enumerate([{"a__fc": ONES}, {"a__fc": ONES, "c__fc": ONES}]):
        with pytest.raises(PatternError, match=r"'a\.fc': .*base has no weight for it"):
            nybble.merge(base, write_factors(tmp_path / f"a{number}", **layers), tmp_path / "x", "fp32")
    for number, layers in enumerate([{"model__fc": ONES}, {"model__fc": ONES, "model__b__fc": ONES}]):
        adapter = write_factors(tmp_path / f"b{number}", **layers)
        assert len(nybble.merge(base, adapter, tmp_path / f"out{number}", "fp32").rows) == number + 1
    assert load_file(tmp_path / "out0" / "model.safetensors")["fc.weight"].sum() == 64
    inner = write_weights(tmp_path / "inner", model__fc__weight=torch.zeros(8, 8), model__d__weight=torch.zeros(8, 8))
    nybble.merge(inner, write_factors(tmp_path / "c", fc=ONES, d=ONES), tmp_path / "added", "fp32")
    both = write_factors(tmp_path / "d", fc=ONES, model__fc=ONES)
    with pytest.raises(CheckpointError, match=r"'fc' and 'model\.fc' would both change 'fc\.weight'"):
        nybble.merge(base, both, tmp_path / "x", "fp32")
    # One way for all: `fc` would gain what `model.d` has.
    with pytest.raises(PatternError, match=r"'(fc|e)': .* has no weight for it"):
        nybble.merge(inner, write_factors(tmp_path / "e", fc=ONES, e=ONES), tmp_path / "x", "fp32")
    assert not (tmp_path / "x").exists()


def test_a_base_of_another_method_is_refused(tmp_path: Path) -> None:
    base = write_weights(
        tmp_path / "base", fc__weight=torch.zeros(8, 8), p__qweight=torch.zeros(4, 4, dtype=torch.int32)
    )
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    adapter = write_factors(tmp_path / "adapter", fc=ONES)
    nybble.quantize(write_weights(tmp_path / "plain", fc__weight=torch.randn(8, 8)), tmp_path / "nf4")
    for call in (
        lambda: nybble.merge(base, adapter, tmp_path / "x"),
        lambda: nybble.unmerge(base, adapter, tmp_path / "x"),
        lambda: nybble.merge(tmp_path / "nf4", adapter, tmp_path / "x", onto=base),
    ):
        with pytest.raises(
            CheckpointError, match=r"base.config\.json: the checkpoint is already quantized \(by gptq\)"
        ):
            call()
    (tmp_path / "nf4" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(CheckpointError, match="quantized by 'awq', whose layout nybble does not read"):
        nybble.merge(tmp_path / "nf4", adapter, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1], ids=["A", "B"])
def test_adapters_that_are_not_finite(tmp_path: Path, value: float, part: int) -> None:
    base = write_weights(tmp_path / "base", fc__weight=torch.zeros(8, 8))
    factors = [factor.clone() for factor in ONES]
    factors[part].view(-1)[3] = value
    adapter = write_factors(tmp_path / "adapter", fc=tuple(factors))
    name = rf"fc\.lora_{'AB'[part]}\.weight \(.*adapter_model\.safetensors\): the value at flat index 3"
    for to in ("fp32", "bf16", "nf4"):
        with pytest.raises(NonFiniteError, match=name):
            nybble.merge(base, adapter, tmp_path / "x", to)
    for rank in (None, 1):
        with pytest.raises(NonFiniteError, match=name):
            nybble.combine_adapters([(adapter, 1.0)], tmp_path / "x", rank)
    large = write_factors(tmp_path / "large", fc=(ONES[0] * 3e38, ONES[1] * 3e38))
    with pytest.raises(NonFiniteError, match=r"fc\.weight \(.*base.model\.safetensors\): the merged value"):
        nybble.merge(base, large, tmp_path / "x", "fp32")
    tensors = {
        "base_model.model.fc.weight": torch.full((8, 8), value),
        **load_file(adapter / "adapter_model.safetensors"),
    }
    tensors = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "modules_to_save": ["fc"]}')
    with pytest.raises(NonFiniteError, match=r"fc\.weight \(.*adapter_model"):
        nybble.merge(base, adapter, tmp_path / "x", "fp32")
    assert not (tmp_path / "x").exists()
