"""The codecs on a GPU: what the CPU's are held to, the reference's bits above all, and no access beyond a tensor."""

from __future__ import annotations

import inspect

import pytest
import torch
from codec import test_bad_input, test_codec_4bit, test_codec_8bit, test_dequantize_out, test_search, test_thresholds
from codec.equality import assert_same_bits
from codec.strategies import DTYPES, block_sizes, dtypes, weight
from hypothesis import given
from hypothesis import strategies as st
from shim.guarded import guarded

from nybble import reference
from nybble.backends.addresses import DTYPE_CODES, SEARCHES
from nybble.formats import codebook, dynamic_map

# Every test there of one instruction set or one codec, but those of thread counts, which a GPU has none of.
_SHARED = (test_bad_input, test_codec_4bit, test_codec_8bit, test_dequantize_out, test_search, test_thresholds)
for _module in _SHARED:
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and inspect.isfunction(_test):
            _taken = inspect.signature(_test).parameters
            if ("isa" in _taken or "codec" in _taken) and "threads" not in _taken:
                globals()[_name] = _test


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # as in tests/codec


@pytest.fixture
def isa(on_shim, monkeypatch):
    for module in _SHARED:
        monkeypatch.setattr(module, "cpu", on_shim, raising=False)


@pytest.fixture
def codec(on_shim):
    return on_shim


# ---- memory ----------------------------------------------------------------------------------------------------------

NF4 = codebook("nf4")
FINITE = torch.iinfo(torch.int64).max

counts = st.one_of(st.sampled_from((1, 2, 3, 127, 128, 256, 257, 1024, 1025, 2048)), st.integers(1, 3000))
places = st.builds(
    lambda end, alignment: {"end": end, "alignment": alignment}, st.booleans(), st.sampled_from((16, None))
)
seeds = st.integers(0, 2**31 - 1)


class Memory:
    """Tensors at unmapped pages: what is given is read-only, what is asked for is to be written."""

    def __init__(self, place):
        self._place, self._kept = place, []

    def given(self, tensor):
        self._kept.append(guarded(tensor, **self._place, read_only=True))
        return self._kept[-1].data_ptr()

    def new(self, n, dtype):
        return guarded(torch.zeros(n, dtype=dtype), **self._place)


@given(
    n=counts, dtype=dtypes, block_size=block_sizes, search=st.sampled_from(tuple(SEARCHES)), place=places, seed=seeds
)
def test_quantizing_to_4_bits_stays_within_its_tensors(cuda, n, dtype, block_size, search, place, seed):
    x, importance = weight("normal", n, seed, dtype), torch.rand(1 + seed % 70)
    weights = importance if search == "importance" else None
    expected = cuda.quantize_4bit(x, NF4, block_size, search, importance=weights)
    memory, failed = Memory(place), torch.full((1,), FINITE)
    packed, absmax = memory.new(-(-n // 2), torch.uint8), memory.new(-(-n // block_size), torch.float32)
    cuda.core().quantize_4bit(
        memory.given(x),
        DTYPE_CODES[dtype],
        n,
        block_size,
        memory.given(NF4),
        SEARCHES[search],
        memory.given(importance),
        importance.numel(),
        packed.data_ptr(),
        absmax.data_ptr(),
        failed.data_ptr(),
        0,
        0,
    )
    assert int(failed) == FINITE
    assert_same_bits(packed.unsqueeze(1), expected[0])
    assert_same_bits(absmax, expected[1])


@given(n=counts, dtype=dtypes, block_size=block_sizes, place=places, seed=seeds)
def test_quantizing_to_8_bits_stays_within_its_tensors(cuda, n, dtype, block_size, place, seed):
    x, code = weight("normal", n, seed, dtype), dynamic_map()
    memory, failed = Memory(place), torch.full((1,), FINITE)
    q, absmax = memory.new(n, torch.uint8), memory.new(-(-n // block_size), torch.float32)
    cuda.core().quantize_8bit(
        memory.given(x),
        DTYPE_CODES[dtype],
        n,
        block_size,
        memory.given(code),
        q.data_ptr(),
        absmax.data_ptr(),
        failed.data_ptr(),
        0,
        0,
    )
    assert int(failed) == FINITE
    for found, expected in zip((q, absmax), reference.quantize_8bit(x, code, block_size), strict=True):
        assert_same_bits(found, expected)
    out = memory.new(n, dtype)
    cuda.core().dequantize_8bit(
        memory.given(q),
        memory.given(absmax),
        memory.given(code),
        n,
        block_size,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        0,
        0,
    )
    assert_same_bits(out, reference.dequantize_8bit(q, absmax, code, block_size, dtype))


@given(
    rows=st.integers(1, 5),
    cols=st.one_of(st.integers(1, 300), st.sampled_from((1023, 1024, 1032, 1028))),
    dtype=dtypes,
    place=places,
    seed=seeds,
)
def test_int8_rows_stay_within_their_tensors(cuda, rows, cols, dtype, place, seed):
    x = weight("normal", rows * cols, seed, dtype).view(rows, cols)
    memory, failed = Memory(place), torch.full((1,), FINITE)
    q, absmax = memory.new(rows * cols, torch.int8), memory.new(rows, torch.float32)
    cuda.core().quantize_int8(
        memory.given(x), DTYPE_CODES[dtype], rows, cols, q.data_ptr(), absmax.data_ptr(), failed.data_ptr(), 0, 0
    )
    assert int(failed) == FINITE
    for found, expected in zip((q.view(rows, cols), absmax), reference.quantize_int8(x), strict=True):
        assert_same_bits(found, expected)
    out = memory.new(rows * cols, dtype)
    cuda.core().dequantize_int8(
        memory.given(q), memory.given(absmax), rows, cols, out.data_ptr(), DTYPE_CODES[dtype], 0, 0
    )
    assert_same_bits(out.view(rows, cols), reference.dequantize_int8(q.view(rows, cols), absmax, dtype))


@given(
    n=st.one_of(counts, st.sampled_from((8192, 8192 * 3 + 5))),
    dtype=dtypes,
    block_size=block_sizes,
    nested_block=st.sampled_from((0, 1, 4, 256)),
    place=places,
    seed=seeds,
)
def test_dequantizing_4_bits_stays_within_its_tensors(cuda, n, dtype, block_size, nested_block, place, seed):
    """And takes scales of any kind in one launch; 0: they are not nested."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (-(-n // 2), 1), generator=generator, dtype=torch.uint8)
    blocks, memory = -(-n // block_size), Memory(place)
    if nested_block:
        codes = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        nested, offset = torch.rand(-(-blocks // nested_block), generator=generator), torch.tensor([0.7])
        scales = dynamic_map()[codes.long()] * nested.repeat_interleave(nested_block)[:blocks] + offset
        stored = [memory.given(each) for each in (codes, nested, dynamic_map(), offset)]
    else:
        scales = torch.rand(blocks, generator=generator)
        stored = [memory.given(scales), 0, 0, 0]
    out = memory.new(n, dtype)
    cuda.core().dequantize_4bit(
        memory.given(packed),
        *stored,
        nested_block,
        memory.given(NF4),
        block_size,
        n,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        0,
        0,
    )
    assert_same_bits(out, reference.dequantize_4bit(packed, scales, NF4, block_size, (n,), dtype))


# ---- what a GPU alone could get wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_bits_whatever_runs_first(cuda, shim, search):
    x = weight("normal", 20_001, 3, torch.bfloat16)
    importance = torch.rand(97) if search == "importance" else None
    found = []
    for seed, schedule in enumerate(("in order", "reverse", "random", "random")):
        shim.schedule(schedule)
        shim.seed(seed)
        packed, absmax = cuda.quantize_4bit(x, NF4, 64, search, importance=importance)
        found.append((packed, absmax, cuda.dequantize_4bit(packed, absmax, NF4, 64, x.shape, torch.bfloat16)))
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_more_than_a_grid_of_blocks(cuda, shim, dtype, block_size):
    """Warps that go on with what lies a whole grid further: 48 of them have 49,152 elements to decode at once."""
    shim.device(90, 1)
    x = weight("normal", 120_003, 3, dtype)
    packed, absmax = cuda.quantize_4bit(x, NF4, block_size)
    for found, expected in zip((packed, absmax), reference.quantize_4bit(x, NF4, block_size), strict=True):
        assert_same_bits(found, expected)
    found = cuda.dequantize_4bit(packed, absmax, NF4, block_size, x.shape, dtype)
    assert_same_bits(found, reference.dequantize_4bit(packed, absmax, NF4, block_size, x.shape, dtype))
    q, absmax = cuda.quantize_8bit(x, dynamic_map(), block_size)
    for found, expected in zip((q, absmax), reference.quantize_8bit(x, dynamic_map(), block_size), strict=True):
        assert_same_bits(found, expected)
    found = cuda.dequantize_8bit(q, absmax, dynamic_map(), block_size, dtype)
    assert_same_bits(found, reference.dequantize_8bit(q, absmax, dynamic_map(), block_size, dtype))


def test_more_rows_than_a_grid_of_blocks(cuda, shim):
    shim.device(90, 1)
    q = torch.randint(-127, 128, (120, 1032), dtype=torch.int8)
    scb = torch.rand(120)
    assert_same_bits(cuda.dequantize_int8(q, scb, torch.bfloat16), reference.dequantize_int8(q, scb, torch.bfloat16))
