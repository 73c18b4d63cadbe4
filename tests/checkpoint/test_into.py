"""nybble.load_into: a module of the user's own, by name, with the tensors in the mapped file."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nybble
from nybble import LoRALinear, QuantConfig, QuantLinear
from nybble.errors import CheckpointError


class Net(nn.Module):
    """A little of everything: biases, a tied head, norms, buffers, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(64, 96), "out": nn.Linear(96, 64, bias=False)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["out"](torch.relu(layer["fc"](x)))
        return self.head(self.norm(x)) * self.scale.sum()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.steps += 7
        net.scale += torch.randn(3)
    return net


def write(net: Net, directory: Path, config: QuantConfig | None = None) -> Path:
    directory.mkdir()
    state = {name: value.clone() for name, value in net.state_dict().items() if name != "head.weight"}
    save_file(state, directory / "model.safetensors")
    if config is None:
        return directory
    nybble.quantize(directory, directory / "../quantized", config)
    return (directory / "../quantized").resolve()


IDS = torch.arange(20).reshape(2, 10)


@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("meta", [False, True])
def test_values_arrive_and_ties_hold(net: Net, tmp_path: Path, format: str | None, meta: bool) -> None:
    directory = write(net, tmp_path / "net", None if format is None else QuantConfig(format))
    expected = net
    if format is not None:
        nybble.quantize_(expected, QuantConfig(format, skip=("head",)))
    with torch.device("meta" if meta else "cpu"):
        other = Net()
    if meta:
        other.cache = torch.ones(1)
    assert nybble.load_into(other, directory) == []
    assert torch.equal(other(IDS), expected(IDS))
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.steps, torch.full((2,), 7))
    assert sum(isinstance(module, QuantLinear) for module in other.modules()) == (0 if format is None else 4)
    assert other.scale.requires_grad


def test_existing_quantlinears_and_their_loras(net: Net, tmp_path: Path) -> None:
    directory = write(net, tmp_path / "net", QuantConfig())
    other = Net()
    other.layers[0]["fc"] = QuantLinear(64, 96)
    other.layers[0]["fc"].bias = nn.Parameter(torch.zeros(96))
    other.layers[1]["fc"] = LoRALinear.from_base(other.layers[1]["fc"], r=2, alpha=2)
    kept = other.layers[1]["fc"].lora_A.detach().clone()
    nybble.load_into(other, directory)
    nybble.quantize_(net, QuantConfig(skip=("head",)))
    assert torch.equal(other(IDS), net(IDS))
    assert torch.equal(other.layers[1]["fc"].lora_A, kept)
    assert isinstance(other.layers[1]["fc"].base, QuantLinear)


def test_layers_that_share_a_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    pair[1].weight = pair[0].weight
    (tmp_path / "p").mkdir()
    state = {name: value.clone() for name, value in pair.state_dict().items() if name != "1.weight"}
    save_file(state, tmp_path / "p" / "model.safetensors")
    nybble.quantize(tmp_path / "p", tmp_path / "q")
    for other in (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), None):
        if other is None:
            other = nn.Sequential(QuantLinear(64, 64), QuantLinear(64, 64))
            nybble.quantize_(pair)
            other = pair
        else:
            other[1].weight = other[0].weight
        nybble.load_into(other, tmp_path / "q")
        assert other[0].weight is other[1].weight
        assert not torch.equal(other[0].bias, other[1].bias)


def test_errors_change_nothing(net: Net, tmp_path: Path) -> None:
    directory = write(net, tmp_path / "net", QuantConfig())
    path = directory / "model.safetensors"
    good = load_file(path)
    torch.manual_seed(1)
    other = Net()
    before = {name: value.clone() for name, value in other.state_dict().items()}

    def refused(message: str, **changes: torch.Tensor | None) -> None:
        values = {name: value.clone() for name, value in good.items()}
        for name, value in changes.items():
            values.pop(name, None)
            if value is not None:
                values[name] = value
        save_file(values, path)
        with pytest.raises(ValueError, match=message):
            nybble.load_into(other, directory)
        after = other.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    refused(r"'scale' is not in the file", scale=None)
    refused(r"'extra' is not in the module", extra=torch.ones(1))
    refused(r"tensor 'scale' has shape \[4\], the module wants \[3\]", scale=torch.ones(4))
    refused(r"tensor 'steps' has dtype torch.float32, the module wants torch.int64", steps=torch.ones(2))
    refused(r"tensor 'head.weight' differs from 'embed.weight'", **{"head.weight": torch.ones(50, 64)})
    name = "layers.0.fc.weight.quant_state.bitsandbytes__nf4"
    text = bytes(good[name].tolist()).replace(b"[96, 64]", b"[64, 96]")
    refused(r"has shape \[64, 96\], the module wants \[96, 64\]", **{name: torch.tensor(list(text), dtype=torch.uint8)})
    save_file({**good, "extra": torch.ones(1)}, path)
    assert nybble.load_into(other, directory, strict=False) == ["'extra' is not in the module"]
    with pytest.raises(CheckpointError, match=r"a bare nn\.Linear cannot be replaced"):
        save_file(nybble.QuantTensor.quantize(torch.randn(64, 64)).state(), tmp_path / "bare.safetensors")
        nybble.load_into(nn.Linear(64, 64, bias=False), tmp_path / "bare.safetensors")
    bare = QuantLinear(64, 64)
    nybble.load_into(bare, tmp_path / "bare.safetensors")
    assert bare(torch.ones(1, 64)).shape == (1, 64)


def test_a_header_that_only_safetensors_refuses(tmp_path: Path) -> None:
    deep: object = []
    for _ in range(200):  # serde, which safetensors reads with, stops at 128
        deep = [deep]
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "more": deep}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'weight': safetensors cannot read it"):
        nybble.load_into(nn.Linear(2, 2, bias=False), path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_tensors_stay_in_the_file(tmp_path: Path) -> None:
    size = 16 << 20  # 64 MB of nf4
    program = textwrap.dedent("""
        import sys, torch, nybble, nybble.checkpoint
        from torch import nn
        with torch.device("meta"):
            net = nn.Sequential(*[nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16) for _ in range(8)])
        def anonymous():
            lines = open("/proc/self/smaps_rollup").read().split("\\n")
            return int(next(l for l in lines if l.startswith("Anonymous")).split()[1]) << 10
        small = nn.Linear(64, 64); nybble.quantize_(nn.Sequential(small))
        before = anonymous()
        nybble.load_into(net, sys.argv[1])
        print(anonymous() - before)
        data = open(sys.argv[1] + "/model.safetensors", "rb").read()
        with torch.no_grad():
            net[0].weight.zero_()  # copied on write, never into the file
        assert open(sys.argv[1] + "/model.safetensors", "rb").read() == data
    """)
    weights = {f"{i}.weight": torch.randn(4096, 4096).bfloat16() for i in range(8)}
    save_file(weights, tmp_path / "model.safetensors")
    nybble.quantize(tmp_path / "model.safetensors", tmp_path / "q")
    command = [sys.executable, "-c", program, str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < size
