"""Files appear whole and together or not at all; shards are valid safetensors whatever order tensors come in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from nybble.checkpoint.files import DTYPE_NAMES, read_header
from nybble.checkpoint.writer import ShardWriter, Slot, Staging, StorageFullError, tensor_bytes
from nybble.errors import CheckpointError

resource = pytest.importorskip("resource")  # not on Windows
DTYPES = [torch.uint8, torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.float64]


@given(
    tensors=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8),
    texts=st.lists(st.binary(max_size=40), max_size=4),
    seed=st.integers(0, 99),
)
def test_a_shard_reads_back_in_safetensors(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[torch.dtype, list[int]]],
    texts: list[bytes],
    seed: int,
) -> None:
    directory = tmp_path_factory.mktemp("shard")
    values = {f"t{i}": torch.randn(shape).mul(9).to(dtype) for i, (dtype, shape) in enumerate(tensors)}
    slots = [Slot(name, DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in values.items()]
    slots += [Slot(f"text{i}", "U8", None, 40) for i in range(len(texts))]
    order = list(range(len(slots)))
    random.Random(seed).shuffle(order)
    with Staging(directory) as staging:
        writer = ShardWriter(staging, "x.safetensors", slots, {"format": "pt"})
        for i in order:
            slot = slots[i]
            if slot.shape is None:
                text = texts[i - len(values)]
                writer.write(slot.name, "U8", (len(text),), [text])
            else:
                writer.write(slot.name, slot.dtype, slot.shape, [tensor_bytes(values[slot.name])])
        writer.finish()
        staging.commit()
    read = load_file(directory / "x.safetensors")
    assert read.keys() == {slot.name for slot in slots}
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    for i, text in enumerate(texts):
        assert bytes(read[f"text{i}"].tolist()) == text
    with safe_open(directory / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for info in read_header(directory / "x.safetensors")[0].values():
        size = torch.empty(0, dtype=values[info.name].dtype).element_size() if info.name in values else 1
        assert info.start % size == 0, "every tensor is aligned to its dtype"


def test_what_comes_must_be_what_was_planned(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        writer = ShardWriter(staging, "x.safetensors", [Slot("a", "F32", (2,)), Slot("t", "U8", None, 3)], {})
        with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'b': nothing was planned"):
            writer.write("b", "F32", (2,), [])
        with pytest.raises(CheckpointError, match=r"'a': F32 \(2,\) was planned, F32 \(3,\) came"):
            writer.write("a", "F32", (3,), [])
        with pytest.raises(CheckpointError, match="'a' was never written"):
            writer.finish()
        with pytest.raises(CheckpointError, match="4 bytes came, 8 planned"):
            writer.write("a", "F32", (2,), [b"1234"])
        with pytest.raises(CheckpointError, match="came twice"):
            writer.write("a", "F32", (2,), [b"12345678"])
        with pytest.raises(CheckpointError, match="5 bytes, at most 3 planned"):
            writer.write("t", "U8", (5,), [b"12345"])
    assert not (tmp_path / "out").exists()


def test_nothing_stays_of_a_failed_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"), Staging(out) as staging:
        staging.write("config.json", b"{}")
        staging.write("sub/tokens.txt", b"x")
        staging.open("model.safetensors").write(b"half")
        assert not any(path.name in {"config.json", "model.safetensors"} for path in out.rglob("*"))
        raise RuntimeError("stop")
    assert not out.exists()


def test_a_failed_run_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), Staging(tmp_path) as staging:
        staging.write("a.txt", b"new")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]
    with Staging(tmp_path) as staging:
        staging.write("a.txt", [b"ne", b"w"])
        staging.commit()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "new")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where the machine lets us mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("claim", [True, False], ids=["claimed first", "while writing"])
def test_a_full_disk_names_the_file_and_leaves_none(
    small_disk: Path, claim: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not claim:  # as on systems without posix_fallocate
        monkeypatch.delattr(os, "posix_fallocate")
    tensor = torch.zeros(1 << 19)
    with pytest.raises(StorageFullError, match=r"x\.safetensors: no space left on device"), Staging(small_disk) as s:
        writer = ShardWriter(s, "x.safetensors", [Slot("a", "F32", (1 << 19,))], {})
        writer.write("a", "F32", (1 << 19,), [tensor_bytes(tensor)])
        writer.finish()
        s.commit()
    assert list(small_disk.iterdir()) == []
    with pytest.raises(StorageFullError, match=r"big\.txt"), Staging(small_disk) as staging:
        staging.write("big.txt", b"x" * (2 << 20))
    assert list(small_disk.iterdir()) == []


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageFullError, match=r"a\.bin: file too large"), Staging(tmp_path / "out") as staging:
            staging.write("a.bin", b"x" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_the_header_is_padded_json_of_a_multiple_of_eight(tmp_path: Path) -> None:
    with Staging(tmp_path) as staging:
        writer = ShardWriter(staging, "x.safetensors", [Slot("t", "U8", None, 10**6)], {"format": "pt"})
        writer.write("t", "U8", (2,), [b"{}"])
        writer.finish()
        staging.commit()
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert len(raw) == 8 + length + 2
    assert json.loads(raw[8 : 8 + length])["t"] == {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
