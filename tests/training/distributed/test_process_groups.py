"""Two and four processes give what one gives, keep the packed bytes, and go on where another number of them stopped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from group_scenarios import KILLED, SCENARIOS
from safetensors.torch import load_file

HERE = Path(__file__).parent
PARALLEL = ("ddp", "fsdp")

#: Of a loss of about 5.8, and of an adapter's numbers below 1: 32 roundings to fp32. Only the order of sums differs: a
#: loss adds up to 500 tokens in chunks and rows, so some 10 partial sums; the weights behind it have taken 5 steps.
FP32 = 32 * 5.8 * 2**-24
#: bf16 rounds what passes between layers to 2^-9; the loss is a mean of 500 tokens, so that little of it is left.
BF16 = 5.8 * 2**-9


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def run_group(size: int, directory: Path, names: list[str]) -> Callable[[str], list[Any]]:
    """Runs scenarios in `size` processes; returns what each process came to, by scenario."""
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "group_process.py"), str(directory), *names]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **variables, **quiet, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=500)[0] for process in processes]
    # One that is killed is the last one.
    assert not any(p.returncode for p in processes[:-1]) and processes[-1].returncode in (0, KILLED), "\n".join(said)

    def result(name: str) -> list[Any]:
        files = (directory / f"{name}.{rank}.pt" for rank in range(size))
        found = [torch.load(file, weights_only=False) for file in files if file.exists()]
        assert len(found) == size - name.startswith("killed")
        for value in found:
            if isinstance(value, Exception):
                raise value
        return found

    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Scenarios in this process, each once."""
    directory, kept = tmp_path_factory.mktemp("alone"), {}
    torch.set_num_threads(1)

    def result(name: str) -> Any:
        if name not in kept:
            kept[name] = SCENARIOS[f"{name}-none"](directory)
        return kept[name]

    result.directory = directory  # type: ignore[attr-defined]
    return result


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("two")
    kinds = ("nf4", "full", "bf16", "mixed", "classifier", "stopped")
    names = [f"{kind}-{parallel}" for kind in kinds for parallel in PARALLEL]
    others = ("methods", "refusals", "commands", "poison", "mapped", "masters")
    result = run_group(2, directory, [*names, *(f"{kind}-fsdp" for kind in others), "chain-fsdp-2", "killed-fsdp"])
    return directory, result


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, two: Any) -> Any:
    """After two processes, and then one, have done a part of `chain`."""
    directory = tmp_path_factory.mktemp("four")
    for name in ("chain", "killed-fsdp"):
        shutil.copytree(two[0] / name, directory / name)
    link = SCENARIOS["chain-none-3"](directory)
    result = run_group(
        4, directory, ["nf4-ddp", "nf4-fsdp", "full-fsdp", "stopped-fsdp", "revived-fsdp", "chain-fsdp-None"]
    )
    return directory, result, link


def assert_like(found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    """Every process has the numbers of one process up to the tolerance, the same ones, and packed bytes as before."""
    for one in found:
        assert one["same_bytes"] and one["packed"] == expected["packed"]
        assert (one["tokens"], one["parameters"]) == (expected["tokens"], expected["parameters"])
        assert one["losses"] == found[0]["losses"] and one["evaluations"] == found[0]["evaluations"]
        assert one["losses"] == pytest.approx(expected["losses"], rel=0, abs=tolerance)
        assert one["adapter_losses"].keys() == expected["adapter_losses"].keys()
        for name, losses in one["adapter_losses"].items():
            assert losses == pytest.approx(expected["adapter_losses"][name], rel=0, abs=tolerance)
        for (step, loss, accuracy), (wanted_step, wanted, right) in zip(
            one["evaluations"], expected["evaluations"], strict=True
        ):
            assert (step, accuracy) == (wanted_step, right)
            assert loss == pytest.approx(wanted, rel=0, abs=tolerance)


def assert_same_files(found: Path, expected: Path) -> None:
    """The same names; tensors equal up to fp32's order of sums, whatever the number of processes that wrote them."""
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for file in expected.iterdir():
        if file.suffix == ".safetensors":
            tensors, wanted = load_file(found / file.name), load_file(file)
            assert tensors.keys() == wanted.keys()
            for name, value in wanted.items():
                # Adam divides a gradient by its own size: where it is all rounding, an element may go another way.
                close = torch.isclose(tensors[name], value, rtol=0, atol=FP32)
                assert tensors[name].shape == value.shape and close.float().mean() > 0.99, name
        elif file.suffix == ".json":
            assert (found / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("kind", ["nf4", "full", "mixed", "classifier"])
def test_two_processes_have_the_losses_of_one(kind: str, parallel: str, two: Any, alone: Any) -> None:
    assert_like(two[1](f"{kind}-{parallel}"), alone(kind), FP32)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_have_the_losses_of_one_in_bf16_with_layers_computed_again(
    parallel: str, two: Any, alone: Any
) -> None:
    assert_like(two[1](f"bf16-{parallel}"), alone("bf16"), BF16)


@pytest.mark.parametrize("method", ["dora", "bottleneck", "prefix", "prompt", "int8"])
def test_every_kind_of_adapter_is_sharded_and_saved_alike(method: str, two: Any, alone: Any) -> None:
    assert_like([found[method] for found in two[1]("methods-fsdp")], alone("methods")[method], FP32)
    saved = two[0] / "methods-fsdp" / method / "adapter"
    assert_same_files(saved, alone.directory / "methods-none" / method / "adapter")


@pytest.mark.parametrize("scenario", ["nf4-ddp", "nf4-fsdp", "full-fsdp"])
def test_four_processes_have_the_losses_of_one(scenario: str, four: Any, alone: Any) -> None:
    assert_like(four[1](scenario), alone(scenario.partition("-")[0]), FP32)


@pytest.mark.parametrize("kind", ["nf4", "full"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_what_is_saved_is_what_one_process_saves(kind: str, parallel: str, two: Any, alone: Any) -> None:
    alone(kind)
    for name in ("adapter", "best") if kind == "nf4" else ("adapter",):
        assert_same_files(two[0] / f"{kind}-{parallel}" / name, alone.directory / f"{kind}-none" / name)
    left = sorted(p.name for p in (two[0] / f"{kind}-{parallel}").iterdir())
    assert left == sorted(p.name for p in (alone.directory / f"{kind}-none").iterdir())


@pytest.mark.parametrize("scenario", ["stopped-ddp", "stopped-fsdp"])
def test_a_signal_to_one_stops_all_and_as_many_go_on_to_the_same_bits(scenario: str, two: Any) -> None:
    whole = two[1](scenario.replace("stopped", "nf4"))[0]
    for first, then in two[1](scenario):
        assert first["interrupted"] and len(first["losses"]) == 3
        assert then["resumed"] == 3 and then["losses"] == whole["losses"]
        assert then["evaluations"] == whole["evaluations"]
    saved, wanted = (
        load_file(two[0] / d / "adapter" / "adapter_model.safetensors") for d in (scenario, "nf4-" + scenario[8:])
    )
    assert all(torch.equal(saved[name], value) for name, value in wanted.items())


def test_a_process_that_dies_is_told_of_and_other_ones_go_on_with_the_run(two: Any, four: Any, alone: Any) -> None:
    (text,) = two[1]("killed-fsdp")
    assert text.startswith("PeerError: another process of this run failed or ended")
    assert all(found["resumed"] == 2 for found in four[1]("revived-fsdp"))
    assert_like(four[1]("revived-fsdp"), alone("nf4"), FP32)


def test_four_processes_go_on_to_the_same_bits(four: Any) -> None:
    whole = four[1]("nf4-fsdp")[0]
    assert all(then["losses"] == whole["losses"] for _, then in four[1]("stopped-fsdp"))


def test_two_then_one_then_four_processes_do_one_run(two: Any, four: Any, alone: Any) -> None:
    assert all(found["interrupted"] and len(found["losses"]) == 2 for found in two[1]("chain-fsdp-2"))
    assert four[2]["resumed"] == 2 and len(four[2]["losses"]) == 3
    last = four[1]("chain-fsdp-None")
    assert all(found["resumed"] == 3 for found in last)
    assert_like(last, alone("nf4"), FP32)


def test_a_backward_pass_reads_what_was_gathered_again_and_not_what_was_given_back(two: Any, alone: Any) -> None:
    """The same bits, though all that FSDP2 gives back is overwritten and comes back elsewhere."""
    wanted = alone("nf4")
    for found in two[1]("poison-fsdp"):
        for one in found:
            assert one["losses"] == pytest.approx(wanted["losses"][:3], rel=0, abs=FP32)
            assert one["same_bytes"]


def test_a_sharded_model_lets_go_of_the_file_that_it_came_from(two: Any) -> None:
    assert two[1]("mapped-fsdp") == [[], []]


def test_what_cannot_be_is_refused_in_every_process(two: Any) -> None:
    first, last = two[1]("refusals-fsdp")
    for found in (first, last):
        assert found["rows"].startswith("ValueError: batch_size=5 is not a multiple of the 2 processes")
        assert found["data"].startswith("ValueError: processes 0 and 1 differ in their data")
        assert found["seed"].startswith(
            "ValueError: processes 0 and 1 differ in their config.seed (0 and 1); give each"
        )
        assert found["nan"].startswith("NonFiniteLossError: step 3: the loss is nan")
        assert "is sharded already (parallel='fsdp' leaves a model so)" in found["sharded"]
        assert found["after"] == "nothing"
        assert found["dtypes"].startswith("ValueError: parallel='fsdp': trained parameters of one layer must have one")
    assert last["missing"].startswith("FileNotFoundError")
    assert first["missing"].startswith("PeerError: process 1 failed: FileNotFoundError")
    assert first["occupied"].startswith("DestinationExistsError")
    assert last["occupied"].startswith("PeerError: process 0 failed: DestinationExistsError")


def test_a_command_that_one_process_is_given_otherwise_is_refused_in_every_process(two: Any) -> None:
    for found in two[1]("commands-fsdp"):
        for name, what in (("parallel", "config.parallel (ddp and fsdp)"), ("lr", "config.lr (0.0001 and 0.001)")):
            assert found[name].startswith(f"ValueError: processes 0 and 1 differ in their {what}; give each the same")
        assert found["rank"].startswith("ValueError: processes 0 and 1 differ in their model's parameters")
        assert found["after"] == "nothing"


@pytest.mark.parametrize(
    ("name", "error"), [("model", "CheckpointNotFoundError"), ("text", "FileNotFoundError"), ("option", "ValueError")]
)
def test_others_hear_at_once_of_a_process_that_cannot_load(name: str, error: str, two: Any) -> None:
    first, last = two[1]("commands-fsdp")
    assert last[name].startswith(f"{error}: ")
    assert first[name].startswith(f"PeerError: process 1 failed: {last[name]}")


def test_weights_become_fp32_a_layer_at_a_time(two: Any, tmp_path: Path) -> None:
    whole, alone = SCENARIOS["masters-none"](tmp_path, whole=True), SCENARIOS["masters-none"](tmp_path)
    assert alone == whole and whole["dtypes"] == {"torch.float32"}
    for found in two[1]("masters-fsdp"):
        assert found["losses"] == pytest.approx(whole["losses"], rel=0, abs=FP32)
        assert found["dtypes"] == whole["dtypes"]
