"""Every way in which a checkpoint on disk can be wrong gives an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.checkpoint.files import check_destination, open_source, read_bytes, read_header, read_tensor
from nybble.errors import CheckpointError, CheckpointNotFoundError, DestinationExistsError


def sharded(directory: Path) -> Path:
    """Two shards and an index; returns the index."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": torch.ones(2, 4)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.zeros(3)}, directory / "model-00002-of-00002.safetensors")
    index = directory / "model.safetensors.index.json"
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}  # type: ignore[call-overload]


def test_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 2, 2).bfloat16(),
        "u8": torch.arange(9, dtype=torch.uint8),
        "i64": torch.tensor(-5),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    infos, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert infos[name].numel == tensor.numel()
        read = read_tensor(infos[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert b"".join(read_bytes(infos[name], chunk=4)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_file_a_directory_and_shards_are_found(tmp_path: Path) -> None:
    index = sharded(tmp_path / "sharded")
    assert list(open_source(index.parent).tensors) == ["a.weight", "b.weight"]
    single = tmp_path / "single"
    single.mkdir()
    save_file({"weight": torch.ones(2)}, single / "model.safetensors")
    assert open_source(single).is_directory
    assert not open_source(single / "model.safetensors").is_directory
    (single / "model.safetensors").rename(single / "other-name.safetensors")
    assert list(open_source(single).tensors) == ["weight"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"absent: no such file or directory"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointNotFoundError, match=r"no safetensors checkpoint .* an empty directory"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match=r"found notes\.txt"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match=r"found only pytorch_model\.bin, .* another format"):
        open_source(tmp_path)


def test_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="holds an adapter"):
        open_source(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files .* no model\.safetensors\.index\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layer.weight": torch.randn(16, 16)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: .*truncated{'.*layer.weight' if keep < 0 else ''}"
    ):
        open_source(tmp_path)


def test_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_header(path)
    path.write_bytes(b"<!DOCTYPE html><html><body>Not found</body></html>" * 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file"):
        read_header(path)
    path.write_bytes((10).to_bytes(8, "little") + b"not json!!")
    with pytest.raises(CheckpointError, match="header is not valid JSON"):
        read_header(path)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_header(write_raw(path, [1]))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {"dtype": "F32"}}, "dtype, shape and data_offsets are needed"),
        ({"x": entry("F33")}, "unknown dtype 'F33'"),
        ({"x": entry(shape=[-2])}, "not a list of sizes"),
        ({"x": entry(shape=[True, 2])}, "not a list of sizes"),
        ({"x": entry(offsets=[0])}, "not .begin, end."),
        ({"x": entry(shape=[3])}, "needs 12 bytes"),
        ({"x": entry(offsets=[8, 0])}, "needs 8 bytes"),
        ({"x": entry(offsets=[4, 12])}, "starts at byte"),
        ({"x": entry(), "y": entry()}, "starts at byte"),
        ({"x": entry(shape=[2**70, 0], offsets=[0, 0])}, "more than a tensor can have"),
        ({"x": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "more than a tensor can have"),
        ({"x": entry("F4", [3], [0, 2])}, "does not end at a whole byte"),
    ],
)
def test_bad_headers_name_file_and_tensor(tmp_path: Path, header: object, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, b"\0" * 12)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: tensor '[xy]'.*{message}"):
        read_header(path)


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": {"b": "c"}}, {"a": None}, {"a": "\ud800"}, [], 0, "", False])
def test_metadata_maps_strings_to_strings(tmp_path: Path, metadata: object) -> None:
    header = {"__metadata__": metadata, "x": entry()}
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: .* __metadata__ does not map strings to strings"):
        read_header(write_raw(tmp_path / "bad.safetensors", header, b"\0" * 8))
    assert read_header(write_raw(tmp_path / "null.safetensors", {**header, "__metadata__": None}, b"\0" * 8))[1] == {}


def test_half_a_surrogate_pair_is_no_name(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "bad.safetensors", {"fc.weight": entry(), "\ud800": entry(offsets=[8, 16])}, b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: tensor '\\ud800': the name is not valid Unicode"):
        read_header(path)


def test_bytes_after_the_last_tensor_and_repeated_names(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "bad.safetensors", {"x": entry()}, b"\0" * 12)
    with pytest.raises(CheckpointError, match="4 bytes follow the last tensor"):
        read_header(path)
    text = json.dumps({"x": entry()})[:-1] + "," + json.dumps({"x": entry()})[1:]
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"\0" * 8)
    with pytest.raises(CheckpointError, match="a name occurs twice"):
        read_header(path)


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../model.safetensors", "a/../../b", "C:\\x", "..\\x", "\\x", "", "\ud800", 3]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, shard: object) -> None:
    index = sharded(tmp_path / "m")
    content = json.loads(index.read_text())
    content["weight_map"]["b.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'b.weight' .* only files inside the directory"):
        open_source(index.parent)


def test_a_tensor_in_two_shards_is_a_stale_copy_only_if_the_index_says_so(tmp_path: Path) -> None:
    index = sharded(tmp_path / "m")
    second = index.parent / "model-00002-of-00002.safetensors"
    save_file({"b.weight": torch.zeros(3), "a.weight": torch.zeros(2, 4)}, second)
    assert open_source(index.parent).tensors["a.weight"].path.name == "model-00001-of-00002.safetensors"
    for number in (1, 2):
        name = "ab"[number - 1]
        shard = index.parent / f"model-0000{number}-of-00002.safetensors"
        save_file({f"{name}.weight": torch.zeros(2), "extra": torch.full((2,), number)}, shard)
    match = r"model-00002-of-00002\.safetensors: tensor 'extra' is also in .*model-00001-of-00002\.safetensors"
    with pytest.raises(CheckpointError, match=match):
        open_source(index.parent)


def test_bad_indexes(tmp_path: Path) -> None:
    index = sharded(tmp_path / "m")
    good = index.read_text()
    (index.parent / "model-00002-of-00002.safetensors").rename(tmp_path / "aside")
    with pytest.raises(CheckpointNotFoundError, match=r"1 of 2 shards missing: model-00002-of-00002\.safetensors"):
        open_source(index.parent)
    (tmp_path / "aside").rename(index.parent / "model-00002-of-00002.safetensors")
    index.write_text(good.replace('"b.weight"', '"c.weight"'))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: tensor 'c.weight', listed in"):
        open_source(index.parent)
    for text in ("{", "[" * 10**5, f"[{'1' * 5000}]", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff"):
        index.write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"index\.json: "):
            open_source(index.parent)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64)}, path)
    info = open_source(path).tensors["w"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated while tensor 'w'"):
        read_tensor(info)
    with pytest.raises(CheckpointError, match="truncated while tensor 'w'"):
        list(read_bytes(info))


def test_a_dtype_that_torch_lacks_is_copied_but_not_computed_with(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"x": entry("F8_E8M0", [12], [0, 12])}, b"\1" * 12)
    info = read_header(path)[0]["x"]
    assert b"".join(read_bytes(info)) == b"\1" * 12
    with pytest.raises(CheckpointError, match="'x' has dtype F8_E8M0"):
        read_tensor(info)


def test_destinations(tmp_path: Path) -> None:
    source = sharded(tmp_path / "m").parent
    check_destination(source, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_destination(source, tmp_path / "empty")
    for inside in (source, source / "out", source / "x" / ".." / "out", tmp_path / "empty" / ".." / "m"):
        with pytest.raises(CheckpointError, match=r"is the source .* or lies inside"):
            check_destination(source, inside)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="is the source"):
        check_destination(source, tmp_path / "link")
    (tmp_path / "empty" / "kept.txt").write_text("x")
    with pytest.raises(DestinationExistsError, match=r"not empty \(kept\.txt\)"):
        check_destination(source, tmp_path / "empty")
    with pytest.raises(DestinationExistsError, match="is a file"):
        check_destination(source, tmp_path / "empty" / "kept.txt")
    assert load_file(source / "model-00001-of-00002.safetensors").keys() == {"a.weight"}
