"""Calibrated checkpoints: what is in them, from which inputs, and that an interrupted run comes to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nybble
from nybble import Calibration, QuantConfig, QuantTensor, Rounding
from nybble.calibration.rounding import Moments, round_weight
from nybble.errors import CalibrationError, CheckpointError, DestinationExistsError

transformers = pytest.importorskip("transformers")

CAMPAIGN = Path(__file__).parents[1] / "checkpoint" / "kill_campaign.py"
TOKENS = torch.randint(1, 256, (2000,), generator=torch.Generator().manual_seed(2))
SETTINGS = Rounding(sweeps=1)
SMALL = Calibration(TOKENS, samples=4, seq=64, rounding=SETTINGS)


def weight_of(directory: Path, module: str) -> QuantTensor:
    tensors = load_file(directory / "model.safetensors")
    prefix = f"{module}."
    return QuantTensor.from_state({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})


def layout(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size | None]]:
    """Names, dtypes and shapes; the JSON of a quant_state is as long as its numbers."""
    tensors = load_file(directory / "model.safetensors")
    return {name: (t.dtype, None if "quant_state" in name else t.shape) for name, t in tensors.items()}


def input_of(model: torch.nn.Module, module: str, windows: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        for row in windows:
            model(input_ids=row[None], use_cache=False)
    hook.remove()
    return torch.cat([x.flatten(0, 1) for x in seen])


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
def test_outputs_err_less_in_the_same_files(format: str, make: Callable[..., Path], tmp_path: Path) -> None:
    source = make()
    config = QuantConfig(format, double_quant=format != "int8")
    report = nybble.quantize(source, tmp_path / "q", config, calibration=SMALL)
    plain = nybble.quantize(source, tmp_path / "plain", config)
    assert len(report.tensors) == len(plain.tensors) == 21
    for row in report.tensors:
        assert row.output_error is not None and row.output_error_plain is not None
        assert row.output_error < 0.95 * row.output_error_plain, row.name
    assert layout(tmp_path / "q") == layout(tmp_path / "plain")
    assert (tmp_path / "q" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert nybble.load(tmp_path / "q")(TOKENS[None, :16]).logits.isfinite().all()


def test_each_layer_sees_what_the_quantized_layers_before_it_make(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make()
    nybble.quantize(source, tmp_path / "q", QuantConfig(block_size=32), calibration=SMALL)
    windows = SMALL.windows(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    order = ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    others = {"self_attn.v_proj": ["self_attn.q_proj", "self_attn.k_proj"], "mlp.up_proj": ["mlp.gate_proj"]}
    for block in range(2):
        for name in order:
            module = f"model.layers.{block}.{name}"
            x = input_of(model, module, windows)
            layer = model.get_submodule(module)
            exact = layer.weight.data.clone()
            found = weight_of(tmp_path / "q", module)
            h = x.t() @ x / x.shape[0]
            expected = round_weight(exact, Moments(h, SETTINGS), QuantConfig(block_size=32), torch.bfloat16, module)
            # Moments are summed sample by sample there, so a near-tie may go the other way here and there.
            assert (found.packed == expected.tensor.packed).float().mean() > 0.97, module
            for each in (name, *others.get(name, [])):
                path = f"model.layers.{block}.{each}"
                model.get_submodule(path).weight.data = weight_of(tmp_path / "q", path).dequantize(torch.float32)


def test_killed_at_any_step_the_same_call_goes_on_to_the_same_bytes(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(num_hidden_layers=2)
    keywords = {
        "src": str(source),
        "dst": "{out}",
        "max_shard_size": 60_000,
        "calibration": TOKENS[:600].tolist(),
    }
    arguments = [CAMPAIGN, "nybble.checkpoint.stream:quantize", json.dumps(keywords), tmp_path, 20]
    script = (
        "import sys, json, runpy, torch, nybble.checkpoint.stream as s\n"
        "from nybble import Calibration, Rounding\n"
        "torch.set_num_threads(1)\n"
        "plain = s.quantize\n"
        "def quantize(calibration, **k):\n"
        "    return plain(calibration=Calibration(calibration, samples=2, seq=64, rounding=Rounding(sweeps=1)), **k)\n"
        "s.quantize = quantize\n"
        f"sys.argv = {[str(item) for item in arguments]}\n"
        f"runpy.run_path({str(CAMPAIGN)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["points"] == found["same"] == 20


def test_an_interrupted_run_goes_over_finished_blocks_without_rounding_them_again(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.calibration import calibrate
    from nybble.checkpoint import recorder

    monkeypatch.setattr(recorder, "SYNC_SECONDS", 0.0)
    source = make()
    nybble.quantize(source, tmp_path / "whole", calibration=SMALL)
    rounded: list[str] = []

    def counting(weight, moments, config, dtype, name):
        if len(rounded) == limit:
            raise KeyboardInterrupt
        rounded.append(name)
        return round_weight(weight, moments, config, dtype, name)

    monkeypatch.setattr(calibrate, "round_weight", counting)
    limit = 17  # in the third block
    with pytest.raises(KeyboardInterrupt):
        nybble.quantize(source, tmp_path / "q", calibration=SMALL)
    first = list(rounded)
    with pytest.raises(DestinationExistsError, match="calibration: rounding: sweeps was 1, is 2"):
        nybble.quantize(source, tmp_path / "q", calibration=Calibration(TOKENS, 4, 64, Rounding(sweeps=2)))
    with pytest.raises(DestinationExistsError, match="calibration"):
        nybble.quantize(source, tmp_path / "q", calibration=Calibration(TOKENS[100:], 4, 64, SETTINGS))
    rounded.clear()
    limit = -1
    report = nybble.quantize(source, tmp_path / "q", calibration=SMALL)
    assert report.resumed >= 14
    assert all(".layers.2." in name for name in rounded) and len(first) == 17
    a, b = (load_file(tmp_path / which / "model.safetensors") for which in ("q", "whole"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_formats_by_pattern_and_layers_outside_of_blocks(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(tie_word_embeddings=False)
    config = QuantConfig(skip=(), overrides={"*.layers.1.*": None, "down_proj": "int8", "up_proj": "fp4"})
    report = nybble.quantize(source, tmp_path / "q", config, calibration=SMALL)
    assert {row.name: row.format for row in report.tensors if "mlp" in row.name} == {
        f"model.layers.{i}.mlp.{name}_proj.weight": format
        for i in (0, 2)
        for name, format in (("gate", "nf4"), ("up", "fp4"), ("down", "int8"))
    }
    head = next(row for row in report.tensors if row.name == "lm_head.weight")
    assert head.output_error is None
    assert any("lm_head.weight rounded without calibration" in note for note in report.notes)


def test_blocks_of_scales_that_straddle_rows(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(hidden_size=48, intermediate_size=80)
    report = nybble.quantize(source, tmp_path / "q", QuantConfig(block_size=64), calibration=SMALL)
    assert all(row.output_error < row.output_error_plain for row in report.tensors)


def test_learned_codebooks(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make(tie_word_embeddings=False)
    config = QuantConfig("learned", skip=())
    report = nybble.quantize(source, tmp_path / "q", config, calibration=SMALL)
    fixed = nybble.quantize(source, tmp_path / "nf4", QuantConfig("nf4"), calibration=SMALL)
    names = load_file(tmp_path / "q" / "model.safetensors").keys()
    assert sum("quant_state.nybble__custom" in name for name in names) == 22
    assert not any("bitsandbytes" in name for name in names)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "nybble"
    blocks = [row for row in report.tensors if row.output_error is not None]
    assert [row.bits_per_weight for row in blocks] == [row.bits_per_weight for row in fixed.tensors]
    assert sum(row.output_error for row in blocks) < sum(row.output_error for row in fixed.tensors)
    a = weight_of(tmp_path / "q", "model.layers.0.mlp.up_proj").codebook
    b = weight_of(tmp_path / "q", "model.layers.1.mlp.up_proj").codebook
    assert bool((a[1:] > a[:-1]).all()) and not torch.equal(a, b)
    ours = nybble.load(tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(ours(TOKENS[None, :16]).logits, theirs(TOKENS[None, :16]).logits)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(nybble.load(tmp_path / "again")(TOKENS[None, :16]).logits, ours(TOKENS[None, :16]).logits)
    for call in (
        lambda: nybble.quantize(source, tmp_path / "no", config),
        lambda: QuantTensor.quantize(torch.ones(4, 64), config),
        lambda: nybble.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)), config),
    ):
        with pytest.raises(ValueError, match="found by calibration"):
            call()
    assert not (tmp_path / "no").exists()


def test_encoders_too(make: Callable[..., Path], tmp_path: Path) -> None:
    report = nybble.quantize(make("bert"), tmp_path / "q", calibration=SMALL)
    assert sum(row.output_error is not None for row in report.tensors) == 18
    assert any("pooler.dense.weight rounded without calibration" in note for note in report.notes)


def test_text_is_tokenized_and_spread(make: Callable[..., Path], tmp_path: Path, text: list[str]) -> None:
    source = make()
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text[0]}) + "\n")
    a = Calibration(tmp_path / "t.jsonl", samples=3, seq=100).windows(source)
    b = Calibration(text, samples=3, seq=100).windows(source)
    assert torch.equal(a, b) and a.shape == (3, 100)
    tokens = torch.arange(1000) % 256
    spread = Calibration(tokens, samples=3, seq=100).windows(source)
    assert [int(row[0]) for row in spread] == [0, 450 % 256, 900 % 256]
    windows = tokens[:300].view(3, 100)
    assert torch.equal(Calibration(windows).windows(source), windows)
    with pytest.raises(CalibrationError, match=r"torch\.float32"):
        Calibration(windows.float()).windows(source)
    report = nybble.quantize(source, tmp_path / "q", calibration=Calibration(tokens, samples=50, seq=100))
    assert any("calibrated on 10 windows of 100 tokens" in note for note in report.notes)


def test_what_cannot_be_calibrated_is_refused_before_anything_is_written(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    source = make()
    for calibration, what in (
        (Calibration(TOKENS[:20], seq=64), "20 tokens, which is not one window of seq=64"),
        (Calibration(tmp_path / "none.txt"), r"none\.txt: no such file"),
        (Calibration(torch.full((200,), 999), seq=64), "vocabulary has 256"),
        (Calibration(torch.ones(2000, dtype=torch.int64), seq=300), "longer than the model's context"),
    ):
        with pytest.raises((CalibrationError, FileNotFoundError, ValueError), match=what):
            nybble.quantize(source, tmp_path / "q", calibration=calibration)
        assert not (tmp_path / "q").exists()
    with pytest.raises(CheckpointError, match="max_memory"):
        nybble.quantize(source, tmp_path / "q", calibration=SMALL, max_memory=1e6)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(CalibrationError, match="no tokenizer"):
        nybble.quantize(source, tmp_path / "q", calibration=["some text"])
    with pytest.raises(ValueError, match="samples is 0"):
        Calibration(TOKENS, samples=0)
    with pytest.raises(ValueError, match="damping is 0"):
        Rounding(damping=0)


def test_dead_inputs_and_few_tokens(make: Callable[..., Path], tmp_path: Path) -> None:
    """Far fewer tokens than columns, and an input that is zero: H is singular but for the damping."""
    source = make()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    few = Calibration(TOKENS, samples=1, seq=4, rounding=SETTINGS)
    report = nybble.quantize(source, tmp_path / "q", calibration=few)
    dead = next(row for row in report.tensors if "layers.1.self_attn.q_proj" in row.name)
    assert dead.output_error == dead.output_error_plain == 0.0
    # Nothing is known of its inputs, so it is rounded as where every error counts alike.
    assert dead.relative_error < 0.12
    assert nybble.load(tmp_path / "q")(TOKENS[None, :16]).logits.isfinite().all()


def rounded(
    weight: torch.Tensor, config: QuantConfig, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(decoded, its plain counterpart, the errors of the outputs of both) for inputs that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    k = weight.shape[1]
    x = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    h = x.t() @ x / x.shape[0]
    found = round_weight(weight, Moments(h, SETTINGS), config, torch.float32, "w").tensor.dequantize()
    plain = QuantTensor.quantize(weight, config).dequantize()
    scale = (weight.double() @ x.t().double()).norm(dim=1).clamp_min(1e-300)
    errors = [((weight - each).double() @ x.t().double()).norm(dim=1) / scale for each in (found, plain)]
    return found, plain, *(float(e.mean()) for e in errors)


def test_scales_below_zero_are_used_as_they_are() -> None:
    """Under double quantization small blocks beside large ones may decode to scales below 0."""
    base = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight = torch.where(torch.arange(64)[:, None] % 16 == 0, 1000 * base, base)
    assert bool((QuantTensor.quantize(weight).absmax_float() < 0).any())
    _, _, ours, plain = rounded(weight, QuantConfig())
    assert ours < plain


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig("int8", double_quant=False)], ids=["nf4", "int8"])
def test_rows_of_zeros_stay_zeros(config: QuantConfig) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    weight[5] = 1e-40
    found, _, _, _ = rounded(weight, config if not config.is_4bit else QuantConfig(double_quant=False))
    assert bool((found[3] == 0).all()) and float(found[5].abs().max()) < 1e-37


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_weights_of_any_magnitude(scale: float) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)) @ torch.randn(128, 128)
    h = x.t() @ x / 512
    a = round_weight(weight, Moments(h.clone(), SETTINGS), QuantConfig(double_quant=False), torch.float32, "w")
    b = round_weight(weight * scale, Moments(h.clone(), SETTINGS), QuantConfig(double_quant=False), torch.float32, "w")
    assert b.error == pytest.approx(a.error, rel=0.05) and b.error_plain == pytest.approx(a.error_plain, rel=0.01)
    c = round_weight(weight, Moments(h * 1e-20, SETTINGS), QuantConfig(double_quant=False), torch.float32, "w")
    assert c.error == pytest.approx(a.error, rel=0.05)


def test_the_plain_rule_is_absmax_whatever_the_search(make: Callable[..., Path], tmp_path: Path) -> None:
    source = make()
    a = nybble.quantize(source, tmp_path / "a", QuantConfig(), calibration=SMALL)
    b = nybble.quantize(source, tmp_path / "b", QuantConfig(search="mse"), calibration=SMALL)
    assert [r.output_error_plain for r in a.tensors] == [r.output_error_plain for r in b.tensors]


def test_refits_lower_the_error(make: Callable[..., Path]) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1)) @ torch.randn(256, 256)
    h = x.t() @ x / 1024
    errors = [
        round_weight(weight, Moments(h.clone(), Rounding(refits=n)), QuantConfig(), torch.float32, "w").error
        for n in (0, 1, 2)
    ]
    assert errors[1] < errors[0] and errors[2] <= errors[1]


def test_experts_in_three_dimensions_are_run_as_they_are_written(tmp_path: Path, make: Callable[..., Path]) -> None:
    from nybble.calibration import moments

    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no GPT-OSS")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GptOssConfig(
        **sizes, num_key_value_heads=2, head_dim=16, vocab_size=256, num_local_experts=2, num_experts_per_tok=1
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    seen = []
    run = moments.run

    def watch(block, calls, hidden):
        seen.append(block.mlp.experts.down_proj.clone())
        run(block, calls, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "run", watch)
        nybble.quantize(tmp_path / "model", tmp_path / "q", calibration=SMALL)
    nybble.quantize(tmp_path / "model", tmp_path / "learned", QuantConfig("learned"), calibration=SMALL)
    exact = model.model.layers[0].mlp.experts.down_proj.detach()
    plain = QuantTensor.quantize(exact, QuantConfig()).dequantize(torch.float32)
    assert torch.equal(seen[0], plain) and not torch.equal(seen[0], exact)


def test_layers_that_no_sample_reaches_are_run_as_they_are_written(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an expert that tokens are sent to only once the layers before it are quantized."""
    from nybble.calibration import moments

    source = make(num_hidden_layers=1)
    groups, run, seen = moments.groups, moments.run, []
    monkeypatch.setattr(moments, "groups", lambda *given: groups(*given)[:-1])

    def watch(block, calls, hidden):
        seen.append(block.mlp.down_proj.weight.clone())
        run(block, calls, hidden)

    monkeypatch.setattr(moments, "run", watch)
    report = nybble.quantize(source, tmp_path / "q", calibration=SMALL)
    assert torch.equal(seen[0], weight_of(tmp_path / "q", "model.layers.0.mlp.down_proj").dequantize(torch.float32))
    assert any("down_proj.weight rounded by the plain rule: no sample reached it" in note for note in report.notes)
