"""Weights in pieces: what readers decode and sinks write is what the whole weight gives, whatever the pieces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import nybble
from nybble import QuantConfig, QuantTensor
from nybble.checkpoint import bnb
from nybble.checkpoint.files import open_source
from nybble.checkpoint.job import Job
from nybble.checkpoint.slabs import CHUNK, PlainReader, QuantizedReader, QuantSink, ScaledReader, pump
from nybble.checkpoint.task import Output, Task
from nybble.errors import CheckpointError, LayoutError, NonFiniteError

CONFIGS = [
    QuantConfig(),
    QuantConfig("fp4", block_size=4096, double_quant=False),
    QuantConfig("int4", block_size=32, search="mse"),
    QuantConfig([i / 8 for i in range(-8, 8)], block_size=256),
    QuantConfig("int8"),
]


def written(weight: torch.Tensor, config: QuantConfig, folder: Path, room: int) -> tuple[dict[str, Any], Any]:
    """A weight through PlainReader and QuantSink in pieces of `room` bytes: the tensors of the file, the report."""
    save_file({"weight": weight}, folder / "in.safetensors")
    info = open_source(folder / "in.safetensors").tensors["weight"]

    def run(out: Output) -> dict[str, Any]:
        out.room = room
        return pump(PlainReader(info), QuantSink("weight", info.shape, weight.dtype, config), out, info.nbytes)

    task = Task("weight", QuantSink("weight", info.shape, weight.dtype, config).slots(), info.nbytes, run)
    with Job(folder / "out", {}) as job:
        results = job.run([task], max_shard_size=10**9, metadata={})
        job.commit({})
    source = open_source(folder / "out")
    from safetensors import safe_open

    with safe_open(source.shards[0], "pt") as file:
        return {name: file.get_tensor(name).clone() for name in source.tensors}, results[0]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 900),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    config=st.sampled_from(CONFIGS),
    pieces=st.integers(1, 4),
)
def test_a_weight_in_pieces_is_the_weight_quantized_whole(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    config: QuantConfig,
    pieces: int,
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(dtype)
    folder = tmp_path_factory.mktemp("slabs")
    tensors, report = written(weight, config, folder, weight.nbytes // pieces)
    whole = QuantTensor.quantize(weight, config)
    expected = whole.state()
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key
    difference = whole.dequantize(torch.float32).double() - weight.double()
    assert report["relative_error"] == pytest.approx((difference.norm() / weight.double().norm()).item(), rel=1e-4)
    assert report["max_error"] == pytest.approx(difference.abs().max().item(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), config=st.sampled_from(CONFIGS), rows=st.integers(1, 300), columns=st.integers(1, 500))
def test_any_range_of_a_quantized_weight(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, config: QuantConfig, rows: int, columns: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    whole = QuantTensor.quantize(weight, config)
    folder = tmp_path_factory.mktemp("reader")
    save_file(whole.state(), folder / "q.safetensors")
    source = open_source(folder / "q.safetensors")
    members = {key: source.tensors[name] for key, name in bnb.group(source.tensors).quantized[""].items()}
    reader = QuantizedReader(members)
    assert (reader.shape, reader.config.format_name) == ((rows, columns), config.format_name)
    start = data.draw(st.integers(0, rows * columns - 1))
    stop = data.draw(st.integers(start + 1, rows * columns))
    assert torch.equal(reader.read(start, stop), whole.dequantize(torch.float32).view(-1)[start:stop])


def test_scales_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    whole = QuantTensor.quantize(torch.randn(64, 64), QuantConfig(double_quant=False))
    whole.absmax[7] = float("nan")
    save_file(whole.state(), tmp_path / "q.safetensors")
    source = open_source(tmp_path / "q.safetensors")
    reader = QuantizedReader({key: source.tensors[key] for key in whole.state()})
    reader.read(0, 64 * 7)
    with pytest.raises(LayoutError, match="its scales hold NaN"):
        reader.read(64 * 6, 64 * 8)


@pytest.mark.parametrize("room", [10**9, 10**6])
def test_the_place_of_a_value_that_is_not_finite(tmp_path: Path, room: int) -> None:
    weight = torch.randn(600, 700)
    weight[500, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=rf"the value at flat index {500 * 700 + 3}, row-major in \[600, 700\]"):
        written(weight, QuantConfig(), tmp_path, room)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scales", ["none", "one", "row", "column of rows", "tiles"])
def test_fp8_weights_are_decoded_by_their_scales(tmp_path: Path, dtype: torch.dtype, scales: str) -> None:
    codes = (torch.randn(300, 200) * 8).to(dtype)
    shape = {"one": (), "row": (300,), "column of rows": (300, 1), "tiles": (3, 2)}.get(scales)
    scale = None if shape is None else torch.rand(shape) + 0.5
    expected = codes.float()
    if scale is not None and scales == "tiles":
        expected = expected * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    elif scale is not None:
        expected = expected * (scale if scale.ndim != 1 else scale[:, None])
    tensors = {"w": codes} | ({} if scale is None else {"s": scale})
    save_file(tensors, tmp_path / "x.safetensors")
    infos = open_source(tmp_path / "x.safetensors").tensors
    reader = ScaledReader(infos["w"], infos.get("s"), (128, 128))
    for start, stop in ((0, 60_000), (1, 2), (199, 201), (12_345, 54_321)):
        assert torch.equal(reader.read(start, stop), expected.reshape(-1)[start:stop])
    save_file({"w": codes, "s": torch.ones(7)}, tmp_path / "y.safetensors")
    infos = open_source(tmp_path / "y.safetensors").tensors
    with pytest.raises(CheckpointError, match=r"tensor 's' has shape \[7\]; for 'w' \[300, 200\] it must be"):
        ScaledReader(infos["w"], infos["s"], (128, 128))


def test_an_fp8_checkpoint_is_quantized_from_its_decoded_values(tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    source.mkdir()
    codes = {f"layers.{i}.fc.weight": (torch.randn(256, 256) * 8).to(torch.float8_e4m3fn) for i in range(2)}
    scales = {f"{name}_scale_inv": torch.rand(2, 2) for name in codes}
    others = {"layers.0.fc.input_scale": torch.ones(()), "norm.weight": torch.ones(256)}
    save_file({**codes, **scales, **others}, source / "model.safetensors")
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(f'{{"quantization_config": {str(block).replace(chr(39), chr(34))}}}')
    config = QuantConfig(skip=("layers.1.*",))
    report = nybble.quantize(source, tmp_path / "out", config)
    assert [row.name for row in report.tensors] == ["layers.0.fc.weight"]
    assert any("fp8 weights were decoded" in note for note in report.notes)
    out = open_source(tmp_path / "out").tensors
    assert not any("scale_inv" in name or "input_scale" in name for name in out)
    values = [
        c.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)
        for c, s in zip(codes.values(), scales.values(), strict=True)
    ]
    from safetensors.torch import load_file

    after = load_file(tmp_path / "out" / "model.safetensors")
    expected = QuantTensor.quantize(values[0], config)
    expected.dtype = torch.bfloat16
    for key, value in expected.state().items():
        assert torch.equal(after[f"layers.0.fc.{key}"], value)
    assert torch.equal(after["layers.1.fc.weight"], values[1].bfloat16())
    del after
    save_file({**codes, **others}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'layers\.0\.fc\.weight' is F8_E4M3, but neither"):
        nybble.quantize(source, tmp_path / "out2", config)


def test_fp8_weights_without_scales(tmp_path: Path) -> None:
    path, codes = tmp_path / "x.safetensors", (torch.randn(64, 64) * 8).to(torch.float8_e4m3fn)
    plain = {"fc.weight": codes, "fc.input_scale": torch.ones(()), "other.scale": torch.ones(64)}
    save_file(plain, path)
    notes = nybble.quantize(path, tmp_path / "plain").notes
    assert notes[1:] == [
        "1 fp8 weights have no scales: their values were taken as they are; those not quantized are bf16 now"
    ]
    scaled = {**plain, "b.weight": codes.clone(), "b.weight_scale": torch.ones(())}
    save_file(scaled, path)
    notes = nybble.quantize(path, tmp_path / "scaled").notes
    assert [note.split(";")[0] for note in notes[1:]] == [
        "1 fp8 weights were decoded by their scales",
        "1 fp8 weights have no scales: their values were taken as they are",
    ]
    for name in ("fc.scale_weight", "fc.weight_scale_2", "fc.WScale", "b.weight_scale_2"):
        save_file({**scaled, name: torch.ones(())}, path)
        weight = f"{name[0].replace('f', 'fc')}.weight"
        with pytest.raises(CheckpointError, match=rf"x\.safetensors: tensor '{weight}' is F8_E4M3, .* scale '{name}'"):
            nybble.quantize(path, tmp_path / "out")


def test_experts_in_three_dimensions(tmp_path: Path) -> None:
    weights = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 96, 64),
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.randn(4, 64),
        "model.layers.0.conv.weight": torch.randn(4, 8, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64),
    }
    save_file(weights, tmp_path / "moe.safetensors")
    report = nybble.quantize(tmp_path / "moe.safetensors", tmp_path / "out")
    assert [row.name for row in report.tensors] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    from safetensors.torch import load_file

    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = QuantTensor.quantize(weights[name], QuantConfig())
    for key, value in expected.state().items():
        assert torch.equal(after[f"{name}{key.removeprefix('weight')}"], value)
    config = QuantConfig(overrides={"experts.*": "int8"})
    notes = nybble.quantize(tmp_path / "moe.safetensors", tmp_path / "out8", config).notes
    assert f"{name} left as it is: int8 takes matrices, it has three dimensions" in notes


@pytest.mark.parametrize("memory", [60e6, 200e6, None])
@pytest.mark.parametrize("workers", [1, 3])
def test_memory_and_threads_do_not_change_a_byte(tmp_path: Path, memory: float | None, workers: int) -> None:
    torch.manual_seed(0)
    weights = {f"layers.{i}.fc.weight": torch.randn(1500 + i, 1000).bfloat16() for i in range(3)}
    save_file(weights, tmp_path / "m.safetensors")
    report = nybble.quantize(tmp_path / "m.safetensors", tmp_path / "a", max_memory=memory, workers=workers)
    again = nybble.quantize(tmp_path / "m.safetensors", tmp_path / "b", workers=2)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert report.tensors == again.tensors
    assert math.ceil(1500 * 1000 / CHUNK) > 4  # several pieces under the lowest ceiling


def test_include_exclude_and_the_report_file(tmp_path: Path) -> None:
    weights = {f"layers.{i}.{part}.weight": torch.randn(64, 64) for i in range(2) for part in ("fc", "down_proj")}
    save_file(weights, tmp_path / "m.safetensors")
    config = QuantConfig(include=("layers.0.*",), skip=("fc",), overrides={"layers.1.down_proj": "int8"})
    report = nybble.quantize(tmp_path / "m.safetensors", tmp_path / "out", config)
    assert {row.name: row.format for row in report.tensors} == {
        "layers.0.down_proj.weight": "nf4",
        "layers.1.down_proj.weight": "int8",
    }
    written = report.write(tmp_path / "report.json")
    assert [path.name for path in written] == ["report.json", "report.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    for bad in (tmp_path / "r.png", tmp_path / "r.PNG", tmp_path, tmp_path / "m.safetensors" / "sub" / "r.json"):
        with pytest.raises(ValueError, match=r"^report: "):
            report.write(bad)
    import json

    rows = {row["name"]: row for row in json.loads(written[0].read_text())["tensors"]}
    row = rows["layers.0.down_proj.weight"]
    assert row["snr_db"] == pytest.approx(-20 * math.log10(row["relative_error"]))
    assert 0 < row["max_error"] < 1
    with pytest.raises(nybble.errors.PatternError, match="include: pattern 'nothing'"):
        nybble.quantize(tmp_path / "m.safetensors", tmp_path / "x", QuantConfig(include=("nothing",)))
