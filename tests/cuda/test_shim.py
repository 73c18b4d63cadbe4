"""The shim itself: a sound kernel passes under every schedule, and one with a planted fault fails, and says why."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from shim import build
from shim.guarded import guarded
from torch import Tensor

SCHEDULES = ("random", "in order", "reverse")
SEEDS = range(20)

generator = torch.Generator().manual_seed(5)
NUMBERS = torch.randint(1, 1000, (1024,), dtype=torch.int32, generator=generator)
FIRST = NUMBERS[:128]
CHUNKS = NUMBERS[:512]
PARTS = torch.arange(4, dtype=torch.int32).unsqueeze(1) + torch.arange(128, dtype=torch.int32)
KEPT_OUT = torch.arange(128) == 5  # the copy that is not valid


def chunks_reversed() -> Tensor:
    chunks = CHUNKS.view(128, 4).clone()
    chunks[KEPT_OUT] = 0
    return chunks.flip(0).flatten()


# kernel -> what goes in and what must come out
SOUND: dict[str, tuple[Tensor, Tensor]] = {
    "reverse": (FIRST, FIRST.flip(0)),
    "reverse_warp": (FIRST, FIRST.view(4, 32).flip(1).flatten()),
    "sum_warp": (FIRST, FIRST.view(4, 32).sum(1, dtype=torch.int32).repeat_interleave(32)),
    "reverse_chunks": (CHUNKS, chunks_reversed()),
    "sum_rounds": (NUMBERS, NUMBERS.view(8, 128).roll(-1, 1).sum(0, dtype=torch.int32)),
    "sum_stages": (NUMBERS[:512], NUMBERS[:512].view(8, 64).roll(-32, 1).sum(0, dtype=torch.int32)),
    "hand_over": (FIRST[:64], FIRST[:64].flip(0)),
    "sum_blocks": (FIRST[:1], torch.tensor([36, *range(1, 9), 0], dtype=torch.int32)),
    "sum_parts": (
        FIRST[:1],
        torch.cat([PARTS.sum(0, dtype=torch.int32), PARTS.flatten(), torch.zeros_like(FIRST[:1])]),
    ),
    "plain": (FIRST, FIRST),
}


def run(shim: ModuleType, kernel: str, fault: int) -> bool:
    """Whether the kernel gives what it should; raises what the shim reports."""
    given, expected = SOUND[kernel]
    x = guarded(given, read_only=True, name="in")
    out = guarded(torch.zeros_like(expected), name="out")
    shim.run_faulty(kernel, fault, x.data_ptr(), out.data_ptr())
    return torch.equal(out, expected)


def outcomes(shim: ModuleType, once: Callable[[], bool]) -> set[str]:
    """What comes of it under many schedules: "right", "wrong" or the message."""
    found = set()
    for schedule in SCHEDULES:
        shim.schedule(schedule)
        for seed in SEEDS if schedule == "random" else [0]:
            shim.seed(seed)
            try:
                found.add("right" if once() else "wrong")
            except RuntimeError as error:
                found.add(str(error))
    return found


@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernels(shim: ModuleType, kernel: str) -> None:
    assert outcomes(shim, lambda: run(shim, kernel, 0)) == {"right"}


# (kernel, fault, what must be among the outcomes)
FAULTS = [
    ("reverse", 1, "wrong"),  # no __syncthreads
    ("reverse", 2, "wrong"),  # reads 4 bytes beyond what it has written
    ("reverse", 3, "shared memory was written 0 bytes past its end"),
    ("reverse", 4, "0 bytes past the end of in"),
    ("reverse", 5, "0 bytes past the end of out"),
    ("reverse", 6, "of in, which is only to be read"),
    ("reverse_warp", 1, "wrong"),  # no __syncwarp
    ("sum_warp", 1, "lanes 0x00000080 have returned"),
    ("sum_warp", 2, "returns, while"),  # half of the lanes skip the shuffles
    ("sum_warp", 3, "the mask 0x0000FFFF does not have this lane"),
    ("sum_warp", 4, "lanes of the warp are at"),  # different operations
    ("sum_warp", 5, "while other lanes of the warp are at __shfl_xor_sync"),
    ("reverse_chunks", 1, "returns while 1 of its copies are under way"),
    ("reverse_chunks", 2, "returns while"),  # one group may be under way after the wait
    ("reverse_chunks", 3, "wrong"),  # no barrier after the wait
    ("reverse_chunks", 4, "is not aligned to 16 bytes"),
    ("reverse_chunks", 5, "returns while"),  # waits, but has not committed
    ("sum_rounds", 1, "wrong"),  # copies over what others still read
    ("sum_rounds", 2, "wrong"),  # one group too many may be under way
    ("sum_stages", 1, "wrong"),  # the consumer's parity
    ("sum_stages", 2, "deadlock"),  # the producer's
    ("sum_stages", 3, "the mbarrier is not initialized"),
    ("sum_stages", 4, "deadlock"),  # waits for an arrival more than there are
    ("sum_stages", 5, "wrong"),  # arrives before its copies
    ("sum_stages", 6, "wrong"),  # reads without waiting
    ("sum_stages", 7, "wrong"),  # writes without waiting
    ("hand_over", 1, "deadlock"),
    ("hand_over", 2, "barrier 3 is for"),  # sizes that differ
    ("hand_over", 3, "threads arrived at barrier 3 and nobody came to wait"),
    ("hand_over", 4, "barrier 16; allowed are 1 to 15"),
    ("sum_blocks", 1, "wrong"),  # trusts that the last block comes last
    ("sum_blocks", 2, "no end"),  # waits for other blocks
    ("sum_blocks", 3, "no __threadfence"),
    ("sum_parts", 1, "wrong"),  # no barrier before the block counts itself
    ("plain", 1, "wrong"),  # reads a variable before it is written
    ("plain", 2, "faults.cu"),  # index
    ("plain", 3, "is shifted by"),
    ("plain", 4, "is not aligned to 16 bytes"),
    ("plain", 5, "division by zero"),
]


@pytest.mark.parametrize(("kernel", "fault", "outcome"), FAULTS)
def test_planted_faults(shim: ModuleType, kernel: str, fault: int, outcome: str) -> None:
    if (kernel, fault) == ("plain", 1) and not build.fills_variables():
        pytest.skip("the compiler has no -ftrivial-auto-var-init")
    found = outcomes(shim, lambda: run(shim, kernel, fault))
    assert any(outcome in each for each in found), found


def test_messages_name_the_place(shim: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"reverse.*block \(0, 0, 0\) thread 127: .* \[seed 0, random\]"):
        run(shim, "reverse", 5)
    with pytest.raises(RuntimeError, match=r"deadlock: .*thread \d+.* more\] waits for mbarrier_wait, parity 0"):
        run(shim, "sum_stages", 2)


def test_schedules_repeat(shim: ModuleType) -> None:
    def results(seed: int) -> list[int]:
        shim.seed(seed)
        out = torch.zeros(128, dtype=torch.int32)
        shim.run_faulty("reverse", 1, FIRST.contiguous().data_ptr(), out.data_ptr())
        return out.tolist()

    assert results(3) == results(3)
    assert len({tuple(results(seed)) for seed in SEEDS}) > 1


# ---- the tensor cores ------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# kernel -> rows, columns and k of the product, and whether A and B lie transposed
TILES = {
    "warp": (16, 8, 16, False, False),
    "warp transposed": (16, 8, 16, False, True),
    "warpgroup 16": (64, 16, 64, False, False),
    "warpgroup 128": (64, 128, 64, False, False),
    "warpgroup 256, B transposed": (64, 256, 64, False, True),
    "warpgroup 64, A transposed": (64, 64, 64, True, False),
}


def run_tile(shim: ModuleType, name: str, kernel: str, fault: int) -> bool:
    rows, columns, depth, a_transposed, b_transposed = TILES[kernel]
    random = torch.Generator().manual_seed(7)
    # Small integers: exact in any order of the sum.
    a = torch.randint(-8, 9, (64, 64), generator=random).to(DTYPES[name])
    b = torch.randint(-8, 9, (64, columns) if b_transposed else (columns, 64), generator=random).to(DTYPES[name])
    if kernel == "warp transposed":
        b = b[:16].contiguous()
    operands = guarded(torch.cat([a.flatten(), b.flatten()]), read_only=True, name="in")
    out = guarded(torch.full((rows, columns), 77.0), name="out")
    shim.run_faulty(f"{name} {kernel}", fault, operands.data_ptr(), out.data_ptr())
    left = a.t() if a_transposed else a
    right = b if b_transposed else b.t()
    return torch.equal(out, left[:rows, :depth].float() @ right[:depth, :columns].float())


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("name", DTYPES)
def test_tiles(shim: ModuleType, name: str, kernel: str) -> None:
    assert outcomes(shim, lambda: run_tile(shim, name, kernel, 0)) == {"right"}


TILE_FAULTS = [
    ("warp", 1, "wrong"),  # no __syncwarp between writing and load_matrices
    ("warp", 3, "bytes from the beginning of shared memory, which has 768"),  # off by 16 bytes
    ("warp", 4, "returns, while"),  # one lane does not multiply
    ("warp transposed", 2, "wrong"),
    ("warpgroup 16", 1, "wrong"),  # waits for all groups but one
    ("warpgroup 16", 2, "no wgmma_fence"),
    ("warpgroup 128", 3, "wrong"),  # the descriptor's stride
    ("warpgroup 256, B transposed", 3, "wrong"),
    ("warpgroup 64, A transposed", 3, "wrong"),
    ("warpgroup 16", 4, "without fence_async_shared"),
    ("warpgroup 16", 9, "thread 77 wrote without fence_async_shared"),
    ("warpgroup 16", 5, "wrote after another had issued it"),  # no barrier after the writes
    ("warpgroup 16", 6, "wrong"),  # not swizzled
    ("warpgroup 16", 7, "while another thread of the warpgroup has"),
    ("warpgroup 16", 8, "wrong"),  # keeps what was in the registers
]


@pytest.mark.parametrize(("kernel", "fault", "outcome"), TILE_FAULTS)
def test_faults_of_tiles(shim: ModuleType, kernel: str, fault: int, outcome: str) -> None:
    found = outcomes(shim, lambda: run_tile(shim, "bf16", kernel, fault))
    assert any(outcome in each for each in found), found


def test_fence_of_the_readers(shim: ModuleType) -> None:
    # Those that multiply may fence as well, after they know of the writes; here those that wrote do, too.
    assert outcomes(shim, lambda: run_tile(shim, "bf16", "warpgroup 16", 10)) == {"right"}


def test_wgmma_needs_hopper(shim: ModuleType) -> None:
    shim.device(80)
    with pytest.raises(RuntimeError, match="only sm_90a has it, and this is sm_80"):
        run_tile(shim, "bf16", "warpgroup 16", 0)


@pytest.mark.parametrize("fault", [0, 1])
def test_int8_tile(shim: ModuleType, fault: int) -> None:
    operands = torch.randint(-128, 128, (24, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(7))
    given = guarded(operands, read_only=True, name="in")
    out = guarded(torch.zeros(16, 8, dtype=torch.int32), name="out")
    shim.run_faulty("int8", fault, given.data_ptr(), out.data_ptr())
    assert torch.equal(out, operands[:16].int() @ operands[16:].int().t()) == (fault == 0)
