"""`nybble.planning.rank`: what is counted, what is named, and that figures are those of the known change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spectra import with_spectrum

import nybble
from nybble.checkpoint.adapter import read_adapter, write_adapter
from nybble.errors import CheckpointError, NonFiniteError
from nybble.planning.noise import RoundingNoise
from nybble.planning.plots import plot_spectra
from nybble.planning.rank import kinds_of, rank

Write = Callable[..., Path]
VALUES = [4.0, 2.0, 1.0, 1.0]


def pair_of(write: Write, **changes: torch.Tensor) -> tuple[Path, Path]:
    """Checkpoints of two blocks and an embedding; the second one's matrices are moved by VALUES, and by `changes`."""
    torch.manual_seed(0)
    base = {f"layers.{i}.{kind}.weight": torch.randn(12, 8) for i in range(2) for kind in ("q_proj", "mlp.up")}
    base |= {"embed_tokens.weight": torch.randn(30, 8), "norm.weight": torch.ones(8)}
    tuned = {name: value.clone() for name, value in base.items()}
    for i, name in enumerate(base):
        if base[name].dim() == 2:
            tuned[name] = (base[name].double() + with_spectrum(VALUES, *base[name].shape, seed=i)).float()
    return write("base", base), write("tuned", {**tuned, **changes})


def test_figures_are_those_of_the_change(write: Write, tmp_path: Path) -> None:
    base, tuned = pair_of(write, **{"norm.weight": torch.full((8,), 1.5)})
    seen: list[tuple[str, int, int]] = []
    report = rank(base, tuned, progress=lambda *call: seen.append(call))
    assert [row.name for row in report.layers] == sorted(
        load_file(tuned / "model.safetensors").keys() - {"norm.weight"}
    )
    before = load_file(base / "model.safetensors")
    for row in report.layers:
        # Both weights are rounded to fp32: half a unit in the last place of each element at most.
        bound = 2**-24 * float(before[row.name].abs().max() + 4) * (before[row.name].numel()) ** 0.5
        assert len(row.singular_values) == 8 and row.full_rank == 8
        assert max(abs(a - b) for a, b in zip(row.singular_values, [*VALUES, 0, 0, 0, 0], strict=True)) <= bound
        assert row.norm == pytest.approx(22**0.5, rel=1e-6)
        assert row.relative == pytest.approx(22**0.5 / float(before[row.name].norm()), rel=1e-6)
        assert row.stable_rank == pytest.approx(22 / 16, rel=1e-6)
        # exp of the entropy of (4, 2, 1, 1) / 8: 2^1.75
        assert row.effective_rank == pytest.approx(2**1.75, rel=1e-4)
        assert (row.rank_90, row.rank_95, row.rank_99) == (2, 3, 4)
    assert [(kind.kind, kind.layers) for kind in report.kinds()] == [("embed_tokens", 1), ("up", 2), ("q_proj", 2)]
    assert report.others == {"norm.weight": pytest.approx(0.5)}
    assert seen[0] == ("embed_tokens.weight", 0, 5) and seen[-1] == ("", 5, 5)
    content = json.loads(report.write(tmp_path / "out")[0].read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert b"<svg" in (tmp_path / "out" / "rank.svg").read_bytes()[:1000]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rank.json", "rank.svg"]
    plot_spectra(content, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "out" / "rank.svg").read_bytes()
    plot_spectra(content, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_gram_gives_the_same_figures(write: Write) -> None:
    base, tuned = pair_of(write)
    for ours, theirs in zip(rank(base, tuned).layers, rank(base, tuned, method="gram").layers, strict=True):
        assert (ours.method, theirs.method) == ("svd", "gram")
        assert ours.singular_values[:4] == pytest.approx(theirs.singular_values[:4], rel=1e-9)
        assert ours.effective_rank == pytest.approx(theirs.effective_rank, rel=1e-4)


def test_what_is_not_compared_is_named(write: Write) -> None:
    base, tuned = pair_of(
        write, **{"layers.1.mlp.up.weight": torch.zeros(8, 8), "layers.0.extra.weight": torch.ones(4, 4)}
    )
    content = load_file(tuned / "model.safetensors")
    del content["embed_tokens.weight"]
    content["layers.0.q_proj.weight"] = load_file(base / "model.safetensors")["layers.0.q_proj.weight"]
    save_file(content, tuned / "model.safetensors")
    report = rank(base, tuned)
    assert report.unchanged == ["layers.0.q_proj.weight"]
    assert report.missing == ["embed_tokens.weight"] and report.extra == ["layers.0.extra.weight"]
    assert report.reshaped == {"layers.1.mlp.up.weight": ((12, 8), (8, 8))}
    assert [row.name for row in report.layers] == ["layers.0.mlp.up.weight", "layers.1.q_proj.weight"]
    assert not report.others and not report.notes


@pytest.mark.parametrize("which", ["both", "base", "tuned"])
def test_a_tied_head_counts_once(write: Write, which: str) -> None:
    paths = dict(zip(("base", "tuned"), pair_of(write), strict=True))
    for name, path in paths.items():
        if which in ("both", name):
            content = load_file(path / "model.safetensors")
            content["lm_head.weight"] = content["embed_tokens.weight"].clone()
            save_file(content, path / "model.safetensors")
    report = rank(paths["base"], paths["tuned"])
    assert report.tied == {"lm_head.weight": "embed_tokens.weight"}
    assert len(report.layers) == 5 and not report.missing and not report.extra
    content = load_file(paths["tuned"] / "model.safetensors")
    if which == "both":
        content["lm_head.weight"][0, 0] += 1  # not tied any more: it counts for itself
        save_file(content, paths["tuned"] / "model.safetensors")
        report = rank(paths["base"], paths["tuned"])
        assert not report.tied and "lm_head.weight" in [row.name for row in report.layers]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantized_base_is_what_its_codes_stand_for(write: Write, tmp_path: Path, format: str) -> None:
    torch.manual_seed(0)
    weights = {"q_proj.weight": torch.randn(64, 64)}
    base = write("base", weights)
    packed = tmp_path / "packed"
    nybble.quantize(base, packed, nybble.QuantConfig(format, double_quant=False))
    decoded = nybble.QuantTensor.quantize(
        weights["q_proj.weight"], nybble.QuantConfig(format, double_quant=False)
    ).dequantize(torch.float32)
    change = with_spectrum([3.0, 1.0], 64, 64)
    tuned = write("tuned", {"q_proj.weight": (decoded.double() + change).float()})
    report = rank(packed, tuned)
    assert report.layers[0].singular_values[:3] == pytest.approx([3.0, 1.0, 0.0], abs=1e-4)
    assert any("BASE is quantized" in note for note in report.notes)
    # And the other way around: what quantizing itself changed.
    lost = rank(base, packed).layers[0]
    expected = torch.linalg.svdvals((decoded - weights["q_proj.weight"]).double())
    assert lost.singular_values == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)


def test_shards_and_single_files_are_read(write: Write, tmp_path: Path) -> None:
    base, tuned = pair_of(write)
    content = load_file(tuned / "model.safetensors")
    names = sorted(content)
    shards = tmp_path / "shards"
    shards.mkdir()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: content[name] for name in names if where[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    expected = rank(base, tuned).layers
    assert rank(base / "model.safetensors", shards).layers == expected


def test_16_bit_files_say_that_rounding_is_in_it(write: Write) -> None:
    base, tuned = pair_of(write)
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    larger = {name: (16 * value).bfloat16() for name, value in before.items()}  # beside which the change is small
    save_file(larger, base / "model.safetensors")
    changed = {name: (larger[name] + after[name] - before[name]).bfloat16() for name in larger}
    save_file(changed, tuned / "model.safetensors")
    report = rank(base, tuned)
    assert report.notes[0].startswith("rounding to the dtype that TUNED is stored in is")
    assert report.noisy and all(row.noise_share > 0 and row.above_noise == 4 for row in report.layers)
    assert [column.header for column in report.table().columns][-2:] == ["noise", "above"]
    assert report.kinds()[0].above_noise == 4


def test_fp32_files_have_no_rounding_to_speak_of(write: Write) -> None:
    report = rank(*pair_of(write))
    assert not report.noisy and not report.notes
    assert [column.header for column in report.layer_table().columns][-1] == "99%"
    assert all(row.noise_edge < 1e-5 and row.noise_share < 1e-10 for row in report.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_differ", [False, True])
def test_a_planted_rank_is_what_stands_above_rounding(write: Write, dtype: torch.dtype, rows_differ: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(256, 192, generator=generator)
    if rows_differ:  # as in real models: then one variance for all would put the edge too low
        weight *= torch.exp(0.7 * torch.randn(256, 1, generator=generator))
    before = weight.to(dtype)
    probe = RoundingNoise(dtype, 192)
    probe.add(before.double(), torch.ones(256, 192, dtype=torch.float64) * 1e-4)
    # Well above the edge, where a change of rank 5 is still a fraction of the spacing of most elements.
    change = with_spectrum([probe.edge * size for size in (4.0, 3.5, 3.0, 2.5, 2.0)], 256, 192)
    tuned = write("tuned", {"q_proj.weight": (before.double() + change).to(dtype)})
    (row,) = rank(write("base", {"q_proj.weight": before}), tuned).layers
    assert row.above_noise == 5
    assert row.rank_99 > 20  # which energy alone does not tell


def test_quantized_weights_have_no_known_rounding(write: Write, tmp_path: Path) -> None:
    base = write("base", {"q_proj.weight": torch.randn(64, 64)})
    nybble.quantize(base, tmp_path / "packed")
    report = rank(base, tmp_path / "packed")
    row = report.layers[0]
    assert row.noise_edge is row.above_noise is row.noise_share is None
    assert report.kinds()[0].noise_share is None and not report.noisy


def test_a_stack_of_experts_counts_matrix_by_matrix(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 12, 8)
    change = torch.stack([with_spectrum([2.0, 1.0][: i + 1], 12, 8, seed=i) if i < 2 else torch.zeros(12, 8).double()
                          for i in range(3)])  # fmt: skip
    name = "layers.0.mlp.experts.gate_up_proj"
    base, tuned = write("base", {name: stack}), write("tuned", {name: (stack.double() + change).float()})
    monkeypatch.setattr("nybble.planning.difference.ELEMENTS", 40)  # five rows
    report = rank(base, tuned)
    assert [row.name for row in report.layers] == [f"{name}[0]", f"{name}[1]"]
    assert report.unchanged == [f"{name}[2]"] and not report.others
    assert [(kind.kind, kind.layers) for kind in report.kinds()] == [("gate_up_proj", 2)]
    for row, values in zip(report.layers, ([2.0, 0.0], [2.0, 1.0]), strict=True):
        assert row.singular_values[:2] == pytest.approx(values, abs=1e-5)
        assert row.relative == pytest.approx(row.norm / float(stack[int(row.name[-2])].norm()), rel=1e-6)


def write_lora(directory: Path, layers: dict[str, tuple[int, int]], r: int, **settings: object) -> Path:
    """An adapter with random factors for these layers, alpha = 2 r."""
    tensors = {}
    for path, (rows, columns) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, columns)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, r)
    write_adapter(directory, {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, **settings}, tensors)
    return directory


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (3, 8)])
def test_an_adapter_is_what_it_adds(write: Write, tmp_path: Path, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = {f"layers.{i}.q_proj.weight": torch.randn(shape) for i in range(2)}
    adapter = write_lora(tmp_path / "adapter", {"layers.1.q_proj": shape}, 4)
    layer = read_adapter(adapter).layers["layers.1.q_proj"]
    a, b = layer.factors()
    values = torch.linalg.svdvals(2 * b.double() @ a.double())
    report = rank(write("base", base), adapter)
    (row,) = report.layers
    assert (row.name, row.method, row.shape) == ("layers.1.q_proj.weight", "factors", shape)
    assert row.singular_values == pytest.approx(values.tolist(), abs=1e-12)
    assert row.norm == pytest.approx(float(values.norm()))
    assert row.relative == pytest.approx(row.norm / float(base["layers.1.q_proj.weight"].norm()), rel=1e-6)
    assert not report.missing and any("TUNED is an adapter" in note for note in report.notes)


def test_an_adapter_that_is_no_update_of_the_base_is_refused(write: Write, tmp_path: Path) -> None:
    base = write("base", {"q_proj.weight": torch.randn(12, 8), "norm.weight": torch.ones(8)})
    other = write_lora(tmp_path / "other", {"fc": (12, 8)}, 2)
    with pytest.raises(CheckpointError, match=r"other: has an update of 'fc.weight', which .*base has not"):
        rank(base, other)
    odd = write_lora(tmp_path / "odd", {"q_proj": (9, 8)}, 2)
    with pytest.raises(CheckpointError, match=r"no weight of two dimensions in common with .*; 1 have other shapes"):
        rank(base, odd)
    dora = write_lora(tmp_path / "dora", {"q_proj": (12, 8)}, 2)
    content = load_file(dora / "adapter_model.safetensors")
    content["base_model.model.q_proj.lora_magnitude_vector"] = torch.ones(12)
    config = json.loads((dora / "adapter_config.json").read_text())
    write_adapter(dora, {**config, "use_dora": True}, content)
    with pytest.raises(CheckpointError, match="q_proj: DoRA rescales whole weights; merge the adapter"):
        rank(base, dora)


def test_full_copies_in_an_adapter_are_compared(write: Write, tmp_path: Path) -> None:
    base = write("base", {"q_proj.weight": torch.randn(12, 8), "norm.weight": torch.ones(8)})
    adapter = write_lora(tmp_path / "adapter", {"q_proj": (12, 8)}, 2)
    content = load_file(adapter / "adapter_model.safetensors")
    content["base_model.model.norm.weight"] = torch.full((8,), 1.5)
    write_adapter(adapter, json.loads((adapter / "adapter_config.json").read_text()), content)
    assert rank(base, adapter).others == {"norm.weight": pytest.approx(0.5)}


def test_a_weight_is_read_in_slabs(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair_of(write)
    expected = rank(base, tuned).layers
    monkeypatch.setattr("nybble.planning.difference.ELEMENTS", 24)  # three rows
    found = rank(base, tuned).layers
    assert [row.singular_values for row in found] == [row.singular_values for row in expected]


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_nan_is_refused_by_name(write: Write, which: str) -> None:
    paths = dict(zip(("base", "tuned"), pair_of(write), strict=True))
    content = load_file(paths[which] / "model.safetensors")
    content["layers.1.q_proj.weight"][3, 2] = float("nan")
    save_file(content, paths[which] / "model.safetensors")
    text = rf"layers.1.q_proj.weight \(.*{which}.*the value at flat index 26, row-major in \[12, 8\], is not finite"
    with pytest.raises(NonFiniteError, match=text):
        rank(paths["base"], paths["tuned"])


def test_what_cannot_be_compared_is_refused(write: Write, tmp_path: Path) -> None:
    base, tuned = pair_of(write)
    other = write("other", {"conv.weight": torch.zeros(3, 3, 3)})
    with pytest.raises(CheckpointError, match="BASE and TUNED are the same checkpoint"):
        rank(base, base)
    with pytest.raises(CheckpointError, match="has no weight of two dimensions in common with"):
        rank(base, other)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        rank(base, tmp_path / "nothing")
    with pytest.raises(ValueError, match="method must be 'auto', 'svd' or 'gram', got 'qr'"):
        rank(base, tuned, method="qr")
    with pytest.raises(ValueError, match="device is 'mps', which has no fp64; cpu"):
        rank(base, tuned, device="mps")
    with pytest.raises(ValueError, match="device is 'tpu', which names no device"):
        rank(base, tuned, device="tpu")
    with pytest.raises(ValueError, match="device is 'cpu:x', which names no device"):
        rank(base, tuned, device="cpu:x")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"m.gguf: a GGUF file; `nybble import` makes a checkpoint of it"):
        rank(base, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="no weight changed, there is nothing to plot"):
        plot_spectra({"layers": []}, tmp_path / "x.svg")


def test_blocks_come_in_the_order_of_their_numbers(write: Write) -> None:
    names = [f"layers.{i}.q_proj.weight" for i in (0, 2, 10)]
    base, tuned = ({name: torch.full((4, 4), value) for name in names} for value in (1.0, 2.0))
    assert [row.name for row in rank(write("base", base), write("tuned", tuned)).layers] == names


def test_kinds_stay_apart() -> None:
    names = [f"encoder.layer.{i}.{part}.weight" for i in (0, 1) for part in ("attention.output.dense", "output.dense")]
    kinds = kinds_of([*names, "encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight"])
    assert list(dict.fromkeys(kinds.values())) == ["attention.output.dense", "output.dense", "query", "word_embeddings"]
    assert len(set(kinds_of(["a.0.x.weight", "a.0.y.x.weight", "b.0.x.weight"]).values())) == 2
