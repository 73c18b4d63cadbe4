"""Damaged files: whatever bytes are changed, reading ends in one of nybble's errors or in a model that computes.

The arithmetic of a damaged weight may be wrong numbers; what must not happen is a crash, another kind of exception, or
a read outside the file. Run under a sanitizer too (`make test-sanitize`).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import nybble
from nybble import QuantConfig, QuantLinear, QuantTensor, errors
from nybble.checkpoint.bnb import group
from nybble.checkpoint.files import open_source
from nybble.checkpoint.slabs import QuantizedReader

OURS = tuple(value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception))
FEW = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
CONFIGS = {"a": QuantConfig(), "b": QuantConfig("fp4", block_size=32, double_quant=False), "c": QuantConfig("int8")}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (QuantLinear(40, 24, config) for config in CONFIGS.values())
        self.norm = nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x) + self.b(x) + self.c(x))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    state = {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    for name, config in CONFIGS.items():
        for key, value in QuantTensor.quantize(torch.randn(24, 40), config).state().items():
            state[f"{name}.{key}"] = value
    path = tmp_path_factory.mktemp("good") / "x.safetensors"
    save_file(state, path, {"format": "pt", "by": "nybble"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read(place: Path, data: bytes) -> None:
    """Everything that reads a quantized file; only nybble's own errors are let through as refusals."""
    path = place / "model.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    net = Net()
    try:
        nybble.load_into(net, path)
    except OURS as error:
        assert "model.safetensors" in str(error) or str(place) in str(error) or isinstance(error, errors.LayoutError)
    else:
        assert net(torch.ones(3, 40)).shape == (3, 24)
        for layer in (net.a, net.b, net.c):
            assert layer.dequantize().shape == (24, 40)
    try:
        source = open_source(path)
        groups = group(source.tensors, str(path))
        for members in groups.quantized.values():
            reader = QuantizedReader({part: source.tensors[name] for part, name in members.items()})
            if 0 < reader.shape[0] * reader.shape[-1] < 10**6:
                reader.read(0, 1)
    except OURS:
        pass


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_the_good_file_is_read(place: Path, good: bytes) -> None:
    net = Net()
    (place / "model.safetensors").write_bytes(good)
    nybble.load_into(net, place / "model.safetensors")
    assert net.a.dequantize().abs().sum() > 0


@FEW
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(place: Path, good: bytes, changes: list[tuple[int, int]]) -> None:
    data = bytearray(good)
    for position, value in changes:
        data[position % len(data)] = value
    read(place, bytes(data))


@FEW
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_of_the_header(place: Path, good: bytes, changes: list[tuple[int, int]]) -> None:
    size = 8 + struct.unpack("<Q", good[:8])[0]
    data = bytearray(good)
    for position, value in changes:
        data[position % size] = value
    read(place, bytes(data))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(length=st.integers(0, 10**5), extra=st.binary(max_size=20))
def test_cut_and_lengthened_files(place: Path, good: bytes, length: int, extra: bytes) -> None:
    read(place, good[: length % (len(good) + 1)] + extra)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-5, 2**40), st.floats(), st.text(max_size=2), st.booleans()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["F32", "U8", "I8", "BF16", "F8_E4M3", "F4", [2**62, 4], [24, 40], [0], [-1, 5], [0, 2**63]]),
    st.sampled_from([[2**70, 0], [2**62, 2**62, 0], [0, 2**62, 2**62], "\ud800"]),
)  # fmt: skip


@FEW
@given(data=st.data())
def test_header_entries_that_lie(place: Path, good: bytes, data: st.DataObject) -> None:
    header, body = split(good)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        what = data.draw(st.sampled_from(["entry", "dtype", "shape", "data_offsets", "remove", "rename", "double"]))
        if what == "remove":
            header.pop(name)
        elif what == "rename":
            header[data.draw(st.text(max_size=8) | st.just("\ud800"))] = header.pop(name)
        elif what == "double":
            header[name + data.draw(st.sampled_from([".weight", ".SCB", ".absmax", ""]))] = header[name]
        elif what == "entry" or not isinstance(header[name], dict):
            header[name] = data.draw(ODD)
        else:
            header[name] = {**header[name], what: data.draw(ODD)}
        if not header:
            break
    read(place, join(header, body))


@FEW
@given(data=st.data())
def test_quant_states_that_lie(place: Path, good: bytes, data: st.DataObject) -> None:
    """The JSON beside a 4-bit weight: any key with any value, or text that is no JSON."""
    header, body = split(good)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    values = {name: body[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    name = data.draw(st.sampled_from([name for name in entries if ".quant_state." in name]))
    state = json.loads(values[name])
    if data.draw(st.integers(0, 9)) == 0:
        values[name] = data.draw(st.binary(max_size=60))
    else:
        for _ in range(data.draw(st.integers(1, 2))):
            key = data.draw(st.sampled_from(sorted(state)))
            if data.draw(st.integers(0, 4)) == 0:
                state.pop(key)
            else:
                state[key] = data.draw(ODD)
            if not state:
                break
        values[name] = json.dumps(state).encode()
    at, pieces = 0, []
    for key, value in values.items():
        size = len(value)
        shape = [size] if key == name else entries[key]["shape"]
        entries[key] = {**entries[key], "shape": shape, "data_offsets": [at, at + size]}
        pieces.append(value)
        at += size
    read(place, join(entries, b"".join(pieces)))


@FEW
@given(data=st.data())
def test_scales_and_codebooks_of_any_bits(place: Path, good: bytes, data: st.DataObject) -> None:
    header, body = split(good)
    raw = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from([n for n in header if n.endswith(("absmax", "map", "SCB", "weight_format"))]))
        begin, end = header[name]["data_offsets"]
        start = data.draw(st.integers(begin, end - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))[: end - start]
        raw[start : start + len(new)] = new
    read(place, join(header, bytes(raw)))


@pytest.mark.parametrize("depth", [1000, 200_000])
def test_deeply_nested_json(place: Path, good: bytes, depth: int) -> None:
    read(place, join(b"[" * depth + b"]" * depth, b""))
    read(place, join(b'{"a":' * depth + b"1" + b"}" * depth, b""))
