"""Every backend refuses bad arguments of a codec with the words of the specification, before it touches a device."""

import pytest
import torch

from nybble import reference
from nybble.backends import cpu, cuda, mps
from nybble.backends.weight import PackedWeight
from nybble.errors import FormatError, LayoutError, UnsupportedDtypeError

CODES, MAP = torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256)
X, NOT_FLOAT = torch.ones(4, 64), torch.ones(4, 64, dtype=torch.int32)
PACKED, ONE_SCALE = torch.zeros(128, 1, dtype=torch.uint8), torch.ones(1)
Q8, Q_INT8 = torch.zeros(64, dtype=torch.uint8), torch.zeros(2, 64, dtype=torch.int8)
HALF = torch.float16
REFUSALS = (FormatError, LayoutError, UnsupportedDtypeError)

REFUSED = {
    "quantize_4bit, dtype": ("quantize_4bit", (NOT_FLOAT, CODES, 64)),
    "quantize_4bit, block size": ("quantize_4bit", (X, CODES, 63)),
    "quantize_4bit, codebook": ("quantize_4bit", (X, MAP, 64)),
    "quantize_4bit, search": ("quantize_4bit", (X, CODES, 64, "other")),
    "quantize_4bit, importance": ("quantize_4bit", (X, CODES, 64, "importance", "w")),
    "dequantize_4bit, block size": ("dequantize_4bit", (PACKED, ONE_SCALE, CODES, 63, (4, 64), HALF)),
    "dequantize_4bit, codebook": ("dequantize_4bit", (PACKED, ONE_SCALE, MAP, 64, (4, 64), HALF)),
    "dequantize_4bit, dtype": ("dequantize_4bit", (PACKED, torch.ones(4), CODES, 64, (4, 64), torch.int8)),
    "dequantize_4bit, scales": ("dequantize_4bit", (PACKED, ONE_SCALE, CODES, 64, (4, 64), HALF)),
    "dequantize_4bit, packed": ("dequantize_4bit", (PACKED[1:], torch.ones(4), CODES, 64, (4, 64), HALF)),
    "quantize_8bit, dtype": ("quantize_8bit", (NOT_FLOAT, MAP, 64, "w")),
    "quantize_8bit, block size": ("quantize_8bit", (X, MAP, 63)),
    "quantize_8bit, map": ("quantize_8bit", (X, CODES, 64)),
    "dequantize_8bit, block size": ("dequantize_8bit", (Q8, ONE_SCALE, MAP, 63, HALF)),
    "dequantize_8bit, map": ("dequantize_8bit", (Q8, ONE_SCALE, CODES, 64, HALF)),
    "dequantize_8bit, scales": ("dequantize_8bit", (Q8, torch.ones(2), MAP, 64, HALF)),
    "dequantize_8bit, dtype": ("dequantize_8bit", (Q8, ONE_SCALE, MAP, 64, torch.int8)),
    "quantize_int8, dtype": ("quantize_int8", (NOT_FLOAT, "w")),
    "quantize_int8, axes": ("quantize_int8", (X[0], "w")),
    "dequantize_int8, axes": ("dequantize_int8", (Q_INT8[0], ONE_SCALE, HALF)),
    "dequantize_int8, scales": ("dequantize_int8", (Q_INT8, ONE_SCALE, HALF)),
    "dequantize_int8, dtype": ("dequantize_int8", (Q_INT8, torch.ones(2), torch.int8)),
}
BACKENDS = pytest.mark.parametrize("backend", [cpu, cuda, mps], ids=["cpu", "cuda", "mps"])


@BACKENDS
@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_by_the_specification(backend, case):
    name, args = REFUSED[case]
    with pytest.raises(REFUSALS) as expected:
        getattr(reference, name)(*args)
    with pytest.raises(type(expected.value)) as found:
        getattr(backend, name)(*args)
    assert str(found.value) == str(expected.value)


@BACKENDS
def test_dequantize_refuses_an_out_that_does_not_fit_and_leaves_it(backend):
    weight = PackedWeight(Q_INT8, torch.ones(2), None, None, None, None, 2, 64, 0, 1)
    out = torch.full((2, 63), 7.0)
    with pytest.raises(REFUSALS, match=r"out has shape \[2, 63\]; it must be \[2, 64\]"):
        backend.dequantize(weight, torch.float32, out=out)
    assert out.eq(7).all() and out._version == 0
