"""`nybble.planning.extract`: the adapter is the change's best approximation, loads here and in PEFT, names the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spectra import with_spectrum
from tiny import write_model
from tiny_models import ids

import nybble
from nybble.checkpoint.adapter import read_adapter
from nybble.errors import CheckpointError, NonFiniteError, PatternError
from nybble.planning.extract import extract

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Write = Callable[..., Path]
EPS = 2.0**-24  # of fp32


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama with a tied head, and the same with every parameter changed: linear ones by rank 4 at most."""
    base = write_model(tmp_path / "base")
    model = nybble.load(base)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            change = with_spectrum([1.0, 0.7, 0.5, 0.3], *parameter.shape, seed=i) if parameter.dim() == 2 else 0.05
            parameter.add_(change if "embed" not in name else 0.1 * change)
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    return base, tmp_path / "tuned"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def updates(directory: Path) -> dict[str, torch.Tensor]:
    """Layer -> scaling * B A, fp64."""
    result = {}
    for path, layer in read_adapter(directory).layers.items():
        a, b = layer.factors()
        result[path] = layer.scaling * (b.double() @ a.double())
    return result


@settings(max_examples=12)
@given(rows=st.integers(2, 24), columns=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
def test_the_error_is_the_tail_of_the_spectrum(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder = tmp_path_factory.mktemp("pair")
    base, tuned = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    save_file({"fc.weight": base}, folder / "a.safetensors")
    save_file({"fc.weight": tuned}, folder / "b.safetensors")
    rank = data.draw(st.integers(1, 30))
    report = extract(folder / "a.safetensors", folder / "b.safetensors", folder / "out", rank)
    change = tuned.double() - base.double()
    values = torch.linalg.svdvals(change)
    kept = min(rank, len(values))
    tail = float(values[kept:].square().sum().sqrt())
    found = updates(folder / "out")["fc"]
    # Factors are rounded to fp32: half a unit of each element of A and B, each of norm sum(sigma)^0.5 at most.
    bound = 4 * EPS * float(values[:kept].sum()) + 1e-12
    assert abs(float((change - found).norm()) - tail) <= bound
    (row,) = report.rows
    assert (row.path, row.shape, row.rank) == ("fc", (rows, columns), kept)
    assert row.error == pytest.approx(tail / float(change.norm()), abs=1e-7)
    assert row.kept == pytest.approx(1 - row.error**2, abs=1e-12) and report.kept == pytest.approx(row.kept)
    assert report.parameters == kept * (rows + columns)


@pytest.mark.parametrize("base_format", ["fp32", "nf4"])
def test_at_full_rank_with_the_rest_it_is_the_tuned_model(
    models: tuple[Path, Path], tmp_path: Path, base_format: str
) -> None:
    base, tuned = models
    if base_format == "nf4":
        base = tmp_path / "nf4"
        nybble.quantize(models[0], base)
    report = extract(base, tuned, tmp_path / "out", 64, save_others=True)
    assert not report.uncovered and len(report.rows) == 14 and len(report.saved) == 7
    model = nybble.load(base)
    before = logits(model)
    nybble.load_adapter(model, tmp_path / "out")
    expected = logits(nybble.load(tuned))
    # Weights are right to fp32; two layers of 64 to 128 terms carry that on.
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 0.5


def test_merged_at_full_rank_it_gives_the_weights_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    extract(base, tuned, tmp_path / "out", 64)
    nybble.merge(base, tmp_path / "out", tmp_path / "merged", "fp32")
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", tuned))
    start = load_file(base / "model.safetensors")
    for name, value in expected.items():
        if "_proj" not in name:
            assert torch.equal(found[name], start[name])
            continue
        # The sum of 64 products of factors whose norms are (sum sigma)^0.5, and the weight's own rounding.
        bound = 64 * EPS * 2.5 + EPS * float(value.abs().max())
        assert (found[name] - value).abs().max() <= bound


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers' old name
def test_it_loads_in_peft_with_the_same_logits(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    extract(base, tuned, tmp_path / "out", energy=0.8)
    assert read_adapter(tmp_path / "out").settings["rank_pattern"] == {}  # the same spectrum everywhere
    extract(base, tuned, tmp_path / "out", 3, energy=0.99, target=("q_proj", "*.0.mlp.*"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == [
        "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "q_proj",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 3, "CAUSAL_LM")
    ours = nybble.load(base)
    nybble.load_adapter(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-5)


def test_ranks_that_differ_are_a_pattern(write: Write, tmp_path: Path) -> None:
    spectra = {"a": [1.0], "b": [1.0, 1.0, 1.0], "c": [1.0, 1.0, 0.01]}
    base = {f"{name}.weight": torch.zeros(8, 6) for name in spectra}
    tuned = {f"{name}.weight": with_spectrum(values, 8, 6).float() for name, values in spectra.items()}
    report = extract(write("base", base), write("tuned", tuned), tmp_path / "out", energy=0.99)
    assert {row.path: row.rank for row in report.rows} == {"a": 1, "b": 3, "c": 2}
    layers = read_adapter(tmp_path / "out").layers
    assert {path: (layer.r, layer.scaling) for path, layer in layers.items()} == {"a": (1, 1), "b": (3, 1), "c": (2, 1)}
    assert report.rows[0].relative == float("inf") and report.to_dict()["rows"][0]["relative"] is None
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_what_has_no_counterpart_is_named(write: Write, tmp_path: Path) -> None:
    base = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4), "weight": torch.zeros(3, 3)}
    tuned = {
        "a.weight": torch.ones(4, 4),
        "b.weight": torch.ones(5, 4),
        "c.bias": torch.ones(2),
        "weight": torch.eye(3),
    }
    report = extract(write("base", base), write("tuned", tuned), tmp_path / "out", 1)
    assert [row.path for row in report.rows] == ["a"]
    assert "only in TUNED, and not in the adapter: c.bias" in report.notes
    assert "reshaped, and not in the adapter: b.weight" in report.notes
    assert report.uncovered["weight"][1] == "not a layer's weight"


def test_what_it_does_not_hold_is_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    report = extract(base, tuned, tmp_path / "out", 4, target="*.1.self_attn.*")
    assert len(report.rows) == 4 and not report.saved
    reasons = {name: why for name, (_, why) in report.uncovered.items()}
    assert reasons["model.embed_tokens.weight"] == "the head shares it"
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "not in target"
    assert reasons["model.norm.weight"] == "not a matrix"
    assert len(reasons) == 10 + 1 + 5
    assert report.uncovered["model.norm.weight"][0] == pytest.approx(0.05, rel=1e-5)
    assert 0.9999 < report.kept_covered <= 1 and 0.2 < report.kept < 0.35
    everything = extract(base, tuned, tmp_path / "out", 4, save_others=True)
    assert everything.saved == [
        "model.embed_tokens", "lm_head", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_embedding_of_its_own_can_be_a_target(tmp_path: Path) -> None:
    from tiny import llama

    torch.manual_seed(0)
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(with_spectrum([2.0, 1.0], 256, 64))
        model.lm_head.weight.add_(with_spectrum([1.0], 256, 64))
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 2)
    assert [row.path for row in report.rows] == ["lm_head"]
    assert report.uncovered["model.embed_tokens.weight"][1] == "an embedding; name it in target"
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 2, target=("embed_tokens", "lm_head"))
    assert [row.path for row in report.rows] == ["lm_head", "model.embed_tokens"] and not report.uncovered
    ours = nybble.load(tmp_path / "base")
    nybble.load_adapter(ours, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=2e-5)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=2e-5)


def test_a_bias_beside_an_update_stays_uncovered(write: Write, tmp_path: Path) -> None:
    base = {"fc.weight": torch.zeros(4, 4), "fc.bias": torch.zeros(4), "norm.weight": torch.ones(4)}
    tuned = {name: value + 0.5 for name, value in base.items()}
    report = extract(write("base", base), write("tuned", tuned), tmp_path / "out", 1, save_others=True)
    assert report.saved == ["norm"]
    assert report.uncovered["fc.bias"][1] == "its layer has a low-rank update, beside which no copy can be"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.norm.weight"]
    assert torch.equal(saved, tuned["norm.weight"])


def test_an_adapter_is_cut_to_a_lower_rank(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    whole = extract(base, tuned, tmp_path / "whole", 4)
    cut = extract(base, tmp_path / "whole", tmp_path / "cut", 2)
    direct = extract(base, tuned, tmp_path / "direct", 2)
    found, expected = updates(tmp_path / "cut"), updates(tmp_path / "direct")
    assert found.keys() == expected.keys() and len(found) == len(whole.rows) == 14
    for path in found:
        # The changes are of rank 4 with values apart, so both cut the same directions, up to fp32's rounding.
        torch.testing.assert_close(found[path], expected[path], rtol=0, atol=1e-5)
    assert cut.kept_covered == pytest.approx(direct.kept_covered, abs=1e-5)
    assert {row.rank for row in extract(base, tmp_path / "whole", tmp_path / "again", 64).rows} == {4}


def test_a_rank_that_takes_rounding_in_is_said(write: Write, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 48).bfloat16()
    tuned = (weight.double() + with_spectrum([3.0], 48, 48)).bfloat16()
    base, after = write("base", {"fc.weight": weight}), write("tuned", {"fc.weight": tuned})
    text = "1 layers have a larger rank than TUNED's rounding"
    assert text not in " ".join(extract(base, after, tmp_path / "out", 1).notes)
    assert text in " ".join(extract(base, after, tmp_path / "out", 2).notes)


def test_what_the_model_has_no_module_for_is_not_saved(tmp_path: Path) -> None:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
    model.save_pretrained(tmp_path / "base")  # a file an expert, which the model holds as one stack
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 4, save_others=True)
    assert len(report.uncovered) == 6
    assert all("experts" in name and "has no module" in why for name, (_, why) in report.uncovered.items())
    ours = nybble.load(tmp_path / "base")
    nybble.load_adapter(ours, tmp_path / "out")  # and the file can be loaded


def test_layers_held_as_gpt2_does_are_said(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    text = r"differs from .*; 1 other tensors do, among them .*c_attn.weight \(held \[inputs, outputs\]"
    with pytest.raises(CheckpointError, match=text):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 4)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_factors_can_be_stored_in_16_bits(write: Write, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    base, tuned = write("base", {"fc.weight": torch.zeros(9, 9)}), write("tuned", {"fc.weight": torch.randn(9, 9)})
    extract(base, tuned, tmp_path / "out", 9, dtype=dtype)
    layer = read_adapter(tmp_path / "out").layers["fc"]
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (name, name)
    large = write("large", {"fc.weight": torch.full((9, 9), 1e12)})
    if dtype == torch.float16:
        with pytest.raises(
            NonFiniteError, match=r"fc.lora_A.weight: the value at flat index 0 overflows torch.float16"
        ):
            extract(base, large, tmp_path / "other", 1, dtype=dtype)
        assert not (tmp_path / "other").exists()


def test_bad_input_is_named_and_nothing_is_written(write: Write, tmp_path: Path) -> None:
    base, tuned = write("base", {"fc.weight": torch.zeros(4, 4)}), write("tuned", {"fc.weight": torch.ones(4, 4)})
    same = write("same", {"fc.weight": torch.zeros(4, 4)})
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ValueError, "rank: give a rank, a share of the energy, or both; got neither"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": True}, ValueError, "rank must be an integer of at least 1, got True"),
        ({"energy": 1.5}, ValueError, "energy must be a number above 0 and at most 1, got 1.5"),
        ({"rank": 1, "dtype": torch.float64}, ValueError, "dtype must be one of torch.float32"),
        ({"rank": 1, "device": "mps"}, ValueError, "device is 'mps', which has no fp64"),
        ({"rank": 1, "method": "qr"}, ValueError, "method must be 'auto', 'svd' or 'gram', got 'qr'"),
        ({"rank": 1, "target": "attn"}, PatternError, "target: the pattern 'attn' matches none of"),
    ]
    for options, error, text in cases:
        with pytest.raises(error, match=text.replace("(", r"\(")):
            extract(base, tuned, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match=r"no layer of the target \(all-linear\) differs from"):
        extract(base, same, tmp_path / "out", 1)
    with pytest.raises(CheckpointError, match="the destination is the source"):
        extract(base, tuned, base, 1)
    assert not (tmp_path / "out").exists()
