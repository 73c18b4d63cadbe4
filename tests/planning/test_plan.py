"""What a plan says: sizes that are held against real tensors, and how they must change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llama

import nybble
from nybble.nn.adapters import acting_parameters
from nybble.planning import BUILT_IN, Work, estimate, plan, shape_of
from nybble.planning import machine as machine_module
from nybble.planning.choose import LOW_MEMORY, WAYS
from nybble.planning.memory import CUDA_WORKSPACE
from nybble.planning.work import (
    BASES,
    METHODS,
    OPTIMIZERS,
    optimizer_bytes,
    packed_bytes,
    trained_count,
    trained_tensors,
)
from nybble.training.methods import Method, apply
from nybble.training.optim import build_optimizer, state_bytes

SHAPE = BUILT_IN["Llama-3.1-8B"]
PAIRS = [("lora", "nf4"), ("lora", "bf16"), *((way.method, way.base) for way in WAYS if way.method != "lora")]
TRAINING = [pair for pair in dict.fromkeys(PAIRS) if pair[0] != "inference"]


def small() -> Any:
    """A Llama whose tensors are on both sides of what 8-bit moments are for."""
    return llama(hidden_size=96, intermediate_size=208, num_attention_heads=6)


# ---- against real tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "inference"])
def test_what_is_trained_is_what_the_method_trains(method: str) -> None:
    model = small()
    shape = shape_of(model)
    options = {"lora": {"rank": 3}, "dora": {"rank": 3}, "bottleneck": {"size": 5}, "prefix": {"tokens": 7}}
    apply(model, Method(method, **options.get(method, {})))
    work = Work(rank=3, size=5, tokens=7 if method == "prefix" else 20)
    trained = [p for p in acting_parameters(model).values() if p.requires_grad]
    assert trained_count(shape, method, work) == sum(p.numel() for p in trained)
    if method not in ("full", "bottleneck"):  # biases and norms of these are summed up
        sizes = sorted(p.numel() for p in trained)
        assert sorted(n for n, count in trained_tensors(shape, method, work) for _ in range(count)) == sizes


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS if o != "lion"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_optimizers_state_has_the_bytes_that_are_said(method: str, optimizer: str) -> None:
    model = small()
    shape = shape_of(model)
    apply(model, Method(method))
    trained = [p for p in acting_parameters(model).values() if p.requires_grad]
    made = build_optimizer(optimizer, trained, lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    steps = 8 * len(trained) if optimizer.startswith("adamw") else 0  # a counter a tensor
    assert optimizer_bytes(trained_tensors(shape, method, Work()), optimizer) == state_bytes(made) - steps


def test_packed_weights_and_scales_have_the_bytes_that_are_said() -> None:
    model = small()
    shape = shape_of(model)
    nybble.quantize_(model)
    weights = scales = 0
    for module in model.modules():
        if isinstance(module, nybble.QuantLinear):
            weights += module.weight.nbytes
            tensors = (module.absmax, module.nested_absmax, module.codebook, module.nested_map, module.nested_offset)
            scales += sum(t.nbytes for t in tensors if t is not None)
    assert packed_bytes(shape) == (weights, scales)


def test_the_weights_are_the_checkpoints(tmp_path: Path) -> None:
    """Within what a file's header takes."""
    model = llama(torch.bfloat16, hidden_size=256, intermediate_size=512)
    model.save_pretrained(tmp_path / "plain")
    nybble.quantize(tmp_path / "plain", tmp_path / "packed", nybble.QuantConfig())
    shape = shape_of(model)
    for name, base in (("plain", "bf16"), ("packed", "nf4")):
        size = sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors"))
        found = estimate(shape, "inference", base, Work())
        # Every packed layer's file entry has bitsandbytes' tensors of a name, a shape and some JSON beside the bytes.
        assert 0 <= size - found.part("weights") - found.part("scales") < 2000 * (len(shape.matrices) * 2 + 4)


# ---- how it must change ----------------------------------------------------------------------------------------------

shapes = st.sampled_from(sorted(BUILT_IN))
works = st.builds(
    Work,
    batch=st.integers(1, 16),
    seq=st.integers(16, 4096),
    rank=st.integers(1, 128),
    optimizer=st.sampled_from(OPTIMIZERS),
    device=st.sampled_from(("cpu", "cuda", "unified")),
)


@settings(deadline=None, max_examples=60)
@given(
    shapes,
    works,
    st.sampled_from(TRAINING),
    st.booleans(),
    st.sampled_from((("batch", 1), ("seq", 1), ("rank", 1), ("size", 8), ("tokens", 3), ("loss_chunk", 64))),
)
def test_more_of_anything_never_takes_less(
    name: str, work: Work, pair: tuple[str, str], checkpointing: bool, more: tuple[str, int]
) -> None:
    larger = replace(work, **{more[0]: getattr(work, more[0]) + more[1]})
    before, after = (estimate(BUILT_IN[name], *pair, w, checkpointing).total for w in (work, larger))
    # The fixed price of an 8-bit block is less than that of a tensor below 4,096 elements, which keeps 32 bits.
    slack = 6 * 4096 * 2 * 7 * BUILT_IN[name].layers * 2 if work.optimizer == "adamw8bit" else 0
    assert after + slack >= before


@settings(deadline=None, max_examples=60)
@given(shapes, works, st.sampled_from(TRAINING))
def test_checkpointing_never_takes_more(name: str, work: Work, pair: tuple[str, str]) -> None:
    plain, checkpointed = (estimate(BUILT_IN[name], *pair, work, c).total for c in (False, True))
    assert checkpointed <= plain


@settings(deadline=None, max_examples=60)
@given(shapes, works, st.sampled_from(PAIRS), st.booleans())
def test_lines_add_up_to_the_peak(name: str, work: Work, pair: tuple[str, str], checkpointing: bool) -> None:
    found = estimate(BUILT_IN[name], *pair, work, checkpointing and pair[0] != "inference")
    assert all(line.bytes > 0 for line in found.lines)
    assert found.total == sum(line.bytes for line in found.lines)
    rounding = 1 + 0.03 * (work.device == "cuda")
    assert found.phases[found.phase] == max(found.phases.values())
    assert found.phases[found.phase] <= found.total <= rounding * found.phases[found.phase] + 1


@settings(deadline=None, max_examples=40)
@given(shapes, works)
def test_methods_are_ordered_as_they_must_be(name: str, work: Work) -> None:
    def total(method: str, base: str) -> int:
        return estimate(BUILT_IN[name], method, base, work, True).total

    assert total("lora", "nf4") < total("lora", "bf16") <= total("dora", "bf16") < total("full", "fp32")
    lora = estimate(BUILT_IN[name], "lora", "bf16", work).part("optimizer")
    eight = estimate(BUILT_IN[name], "lora", "bf16", replace(work, optimizer="adamw8bit")).part("optimizer")
    if work.optimizer == "adamw":  # of very few parameters the moments stay in fp32
        assert eight < lora if work.rank >= 16 else eight <= lora


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_what_fits_comes_first_the_lightest_at_the_top() -> None:
    found = plan("Llama-3.1-8B", 24e9)
    fitting = [row for row in found.rows if row.fits != "no"]
    assert list(found.rows[: len(fitting)]) == fitting
    totals = [row.estimate.total for row in fitting]
    assert totals == sorted(totals) and all(total <= found.memory.free for total in totals)
    assert all(row.estimate.total > found.memory.free for row in found.rows[len(fitting) :])
    assert found.recommended is not None and found.recommended.way.key == "lora"
    assert found.row("LoRA (bf16)").fits == "with checkpointing"
    assert not found.advice


def test_commands_are_those_of_the_package() -> None:
    found = plan("Llama-3.1-8B", 24e9, batch=2, seq=512, rank=8, optimizer="adamw8bit")
    quantize, finetune = found.row("qlora").commands
    assert quantize == "nybble quantize path/to/Llama-3.1-8B path/to/Llama-3.1-8B-nf4"
    assert finetune.removesuffix(f" {LOW_MEMORY}") == (
        "nybble finetune path/to/Llama-3.1-8B-nf4 TEXT RUN_DIR --rank 8 --batch-size 2 --seq-len 512 "
        "--optimizer adamw8bit"
    )
    tight = plan("Llama-3.1-8B", 24e9).row("lora")
    assert tight.fits == "with checkpointing" and "--gradient-checkpointing" in tight.commands[0]


def test_where_memory_is_scarce_a_run_gives_it_back() -> None:
    scarce, ample = (plan("SmolLM2-135M", size).row("lora").commands[-1] for size in (4e9, 400e9))
    assert scarce.endswith(LOW_MEMORY) and LOW_MEMORY not in ample


def test_where_nothing_fits_it_says_what_would() -> None:
    found = plan("Llama-3.1-8B", 8e9, batch=4)
    assert all(row.fits == "no" for row in found.rows if row.checkpointed is not None)
    assert "QLoRA (NF4) with checkpointing needs" in found.advice[0]
    assert any(line.startswith("optimizer adamw8bit") for line in found.advice)
    assert any("which fits" in line for line in found.advice) or "a machine of" in found.advice[-1]
    assert "a machine of" in plan("Llama-3.1-70B", 8e9).advice[-1]


def test_a_quantized_checkpoint_leaves_what_needs_the_original_out(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    nybble.quantize(tmp_path / "plain", tmp_path / "packed", nybble.QuantConfig())
    found = plan(tmp_path / "packed", 8e9)
    assert {row.way.base for row in found.rows} == {"nf4"}
    (command,) = found.row("qlora").commands
    assert command.startswith(f"nybble finetune {tmp_path / 'packed'} ")


def test_gpus_decode_a_whole_weight_for_many_rows_only() -> None:
    def workspace(device: str, seq: int) -> list[int]:
        found = estimate(SHAPE, "lora", "nf4", Work(seq=seq, device=device))
        words = ("partial sums", "largest weight")
        return [line.bytes for line in found.lines if any(word in line.formula for word in words)]

    assert workspace("cuda", 64) == [CUDA_WORKSPACE]
    assert workspace("cuda", 2048) == [CUDA_WORKSPACE, 2 * SHAPE.ffn * SHAPE.hidden]
    assert workspace("unified", 2048) == workspace("cpu", 2048) == []


def test_other_devices_say_that_they_were_not_measured() -> None:
    for device in ("cuda", "unified"):
        found = plan("Llama-3.1-8B", 24e9, device=device)
        assert any("nothing of this has been measured" in note for note in found.notes)
        assert any("where an installation has none" in note for note in found.notes)
    assert plan("Llama-3.1-8B", 24e9, device="unified").memory.system == 6e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq": 0}, "seq must be an integer of at least 1, got 0"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, adamw8bit"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, unified"),
        ({"memory": -1}, "memory must be a number of bytes above 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan("Llama-3.1-8B", **options)
    with pytest.raises(ValueError, match="base is 'nf4' with method 'full'"):
        estimate(SHAPE, "full", "nf4", Work())
    assert set(BASES) == {"nf4", "bf16", "fp32"}


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_physical", lambda: 64_000_000_000)
    whole = machine_module.here(root=tmp_path)
    assert (whole.bytes, whole.system) == (64_000_000_000, 3_200_000_000)
    places = tmp_path / "v2"
    (places / "sys/fs/cgroup/jobs/one").mkdir(parents=True)
    (places / "proc/self").mkdir(parents=True)
    (places / "proc/self/cgroup").write_text("0::/jobs/one\n")
    (places / "sys/fs/cgroup/jobs/one/memory.max").write_text("max\n")
    (places / "sys/fs/cgroup/jobs/memory.max").write_text("8000000000\n")
    found = machine_module.here(root=places)
    assert (found.bytes, found.system) == (8_000_000_000, 0)
    assert "/sys/fs/cgroup/jobs/memory.max" in found.found


def test_a_limit_of_the_first_version_of_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_physical", lambda: 64_000_000_000)
    group = tmp_path / "sys/fs/cgroup/memory/one"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu:/\n4:cpuset,memory:/one\n")
    (group / "memory.limit_in_bytes").write_text("4000000000\n")
    (group.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert machine_module.here(root=tmp_path).bytes == 4_000_000_000
