"""Mean errors on normal values, held against the published table (bitsandbytes' own tests state it)."""

from __future__ import annotations

import pytest
import torch

from nybble.formats import QuantConfig, codebook
from nybble.tensor import QuantTensor

# Block size -> (mean absolute error, its standard deviation over seeds, mean relative error, its deviation).
NF4 = {
    32: (0.067746, 0.000069, 0.189726, 0.000304),
    64: (0.072798, 0.000074, 0.203339, 0.000340),
    128: (0.076831, 0.000091, 0.215237, 0.000391),
    256: (0.080337, 0.000102, 0.226105, 0.000398),
    512: (0.083547, 0.000143, 0.236079, 0.000544),
    1024: (0.086610, 0.000187, 0.245370, 0.000600),
    2048: (0.089592, 0.000251, 0.254163, 0.000747),
    4096: (0.092547, 0.000360, 0.262473, 0.000999),
}
FP4 = {
    32: (0.088925, 0.000091, 0.242443, 0.000330),
    64: (0.096543, 0.000111, 0.260125, 0.000379),
    128: (0.102969, 0.000134, 0.275817, 0.000433),
    256: (0.108684, 0.000182, 0.289831, 0.000497),
    512: (0.114115, 0.000234, 0.302881, 0.000583),
    1024: (0.119333, 0.000320, 0.315000, 0.000757),
    2048: (0.124556, 0.000455, 0.326607, 0.000955),
    4096: (0.129536, 0.000612, 0.337169, 0.001239),
}


@pytest.fixture(scope="module")
def x():
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def errors(x, y):
    error = (x - y).abs()
    return error.mean().item(), (error / (x.abs() + 1e-8)).mean().item()


@pytest.mark.parametrize(
    ("fmt", "block_size", "row"),
    [(fmt, block_size, row) for fmt, table in (("nf4", NF4), ("fp4", FP4)) for block_size, row in table.items()],
)
def test_within_seven_standard_deviations_of_the_table(codec, x, fmt, block_size, row):
    packed, absmax = codec.quantize_4bit(x, codebook(fmt), block_size)
    absolute, relative = errors(x, codec.dequantize_4bit(packed, absmax, codebook(fmt), block_size, x.shape, x.dtype))
    assert absolute <= row[0] + 7 * row[1]
    assert relative <= row[2] + 7 * row[3]


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_double_quantization_stays_under_its_limits(isa, x, fmt, block_size):
    quantized = QuantTensor.quantize(x, QuantConfig(format=fmt, block_size=block_size, double_quant=True))
    absolute, relative = errors(x, quantized.dequantize())
    assert absolute < 0.11
    assert relative < 0.28
