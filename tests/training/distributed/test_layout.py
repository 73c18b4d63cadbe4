"""How a parameter is cut for FSDP2, and what is refused before any process group is needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import llama

from nybble import LoRAConfig, TrainConfig, add_lora, finetune
from nybble.training.distributed import World
from nybble.training.distributed.layout import Layout
from nybble.training.distributed.sharded import _units
from nybble.training.state import owner

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


@given(SHAPES, st.integers(1, 9))
def test_parts_make_up_the_parameter_as_torch_cuts_it(shape: tuple[int, ...], processes: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    layout = Layout(shape, processes)
    parts = [layout.cut(whole, rank) for rank in range(processes)]
    assert torch.equal(torch.cat(parts), whole)
    for rank, (part, wanted) in enumerate(zip(parts, list(whole.chunk(processes)), strict=False)):
        assert torch.equal(part, wanted)
        assert layout.sizes(part, rank) == [len(p) for p in parts]


@given(st.integers(1, 40), st.sampled_from([1, 64, 256, 320]), st.integers(1, 9))
def test_scales_of_whole_blocks_are_cut_and_joined(rows: int, columns: int, processes: int) -> None:
    layout = Layout((rows, columns), processes)
    scales = torch.arange(-(-rows * columns // 256)) + 0.5
    if layout.blocks_are_whole and len(scales) > 1:
        parts = [layout.cut(scales, rank) for rank in range(processes)]
        assert torch.equal(torch.cat(parts), scales)
        assert all(layout.sizes(part, rank) == [len(p) for p in parts] for rank, part in enumerate(parts))
    else:
        assert processes > 1 or len(scales) == 1
    step = torch.tensor(3)
    assert layout.cut(step, 0) is step and layout.sizes(step, 0) is None


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 1 << 62))
def test_every_row_is_computed_once_and_every_process_has_random_numbers_of_its_own(
    count: int, size: int, seed: int
) -> None:
    worlds: list[World] = []
    for rank in range(size):
        worlds.append(World())
        worlds[-1].rank, worlds[-1].size = rank, size
    assert [i for world in worlds for i in world.rows(count)] == list(range(count))
    seeds = [world.seed(seed) for world in worlds]
    assert seeds[0] == seed and len(set(seeds)) == size and not {s + 1 for s in seeds} & set(seeds)


def test_a_snapshot_s_tensors_know_their_parameter() -> None:
    names = ("parameter.a.b", "mean.a.b", "optimizer.exp_avg.a.b", "losses", "losses.a")
    assert [owner(name) for name in names] == ["a.b", "a.b", "a.b", None, None]


def test_layers_are_gathered_one_at_a_time_and_an_embedding_alone_unless_it_is_tied() -> None:
    tied, free = llama(), llama(tie_word_embeddings=False)
    assert _units(tied) == list(tied.model.layers)
    assert _units(free) == [*free.model.layers, free.model.embed_tokens]


def small() -> Any:
    model = llama()
    add_lora(model, LoRAConfig(r=2, alpha=4))
    return model


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_without_a_launcher_it_says_how_to_start(parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = TrainConfig(steps=1, seq_len=8, parallel=parallel)
    with pytest.raises(ValueError, match=rf"parallel='{parallel}' needs processes: start them with torchrun"):
        finetune(small(), torch.arange(99), config, show=False)


def test_parallel_is_one_of_its_choices_and_no_part_of_a_run_s_identity() -> None:
    with pytest.raises(ValueError, match="parallel must be 'auto', 'none', 'ddp' or 'fsdp', got 'dp'"):
        TrainConfig(parallel="dp")
    config = TrainConfig()
    assert dataclasses.replace(config, parallel="fsdp").identity() == config.identity()


def test_blocks_of_8_bit_moments_that_would_depend_on_the_processes_are_refused() -> None:
    from nybble.training.distributed.sharded import _check_blocks

    _check_blocks("w", Layout((128, 64), 4))
    with pytest.raises(ValueError, match=r"w \[128, 64\] would be cut into parts of 43 rows, 2752 elements"):
        _check_blocks("w", Layout((128, 64), 3))
