"""nybble's compiled core: raw addresses, sizes and thread counts; dtype codes 0 fp32, 1 fp16, 2 bf16."""

from collections.abc import Sequence

SQUARES_RUN: int

class NonFiniteBlock(ValueError): ...

class Weight:
    @staticmethod
    def four_bit(
        packed: int,
        absmax: int,
        nested_absmax: int,
        nested_map: int,
        nested_offset: int,
        nested_block_size: int,
        codebook: int,
        block_size: int,
        rows: int,
        cols: int,
    ) -> Weight: ...
    @staticmethod
    def int8_rows(q: int, absmax: int, rows: int, cols: int) -> Weight: ...

def isas() -> list[str]: ...
def active_isa() -> str: ...
def set_active_isa(name: str) -> str: ...
def force_kernel(name: str) -> str: ...
def quantize_4bit(
    x: int,
    dtype: int,
    count: int,
    block_size: int,
    codebook: int,
    search: int,
    importance: int,
    columns: int,
    packed: int,
    absmax: int,
    threads: int,
) -> None: ...
def dequantize_4bit(
    packed: int,
    absmax: int,
    nested_absmax: int,
    nested_map: int,
    nested_offset: int,
    nested_block_size: int,
    codebook: int,
    block_size: int,
    count: int,
    out: int,
    dtype: int,
    threads: int,
) -> None: ...
def quantize_8bit(
    x: int, dtype: int, count: int, block_size: int, map: int, codes: int, absmax: int, threads: int
) -> None: ...
def dequantize_8bit(
    codes: int, absmax: int, map: int, count: int, block_size: int, out: int, dtype: int, threads: int
) -> None: ...
def quantize_int8(x: int, dtype: int, rows: int, cols: int, q: int, absmax: int, threads: int) -> None: ...
def dequantize_int8(q: int, absmax: int, rows: int, cols: int, out: int, dtype: int, threads: int) -> None: ...
def round_feedback(
    target: int,
    rows: int,
    cols: int,
    matrix: int,
    order: int,
    absmax: int,
    codebook: int,
    block_size: int,
    sweeps: int,
    codes: int,
    threads: int,
) -> None: ...
def round_descent(
    target: int,
    rows: int,
    cols: int,
    matrix: int,
    order: int,
    absmax: int,
    codebook: int,
    block_size: int,
    sweeps: int,
    codes: int,
    threads: int,
) -> None: ...
def adamw_32bit(
    param: int,
    dtype: int,
    grad: int,
    grad_dtype: int,
    count: int,
    rule: Sequence[float],
    stochastic: bool,
    key: int,
    m: int,
    v: int,
    threads: int,
) -> None: ...
def adamw_8bit(
    param: int,
    dtype: int,
    grad: int,
    grad_dtype: int,
    count: int,
    rule: Sequence[float],
    stochastic: bool,
    key: int,
    block_size: int,
    m_map: int,
    v_map: int,
    m: int,
    v: int,
    m_absmax: int,
    v_absmax: int,
    threads: int,
) -> None: ...
def sum_of_squares(x: int, dtype: int, count: int, sums: int, threads: int) -> None: ...

MOST_RANK: int

def has_factor_kernels() -> bool: ...
def factor_apply(
    x: int,
    x_stride: int,
    m: int,
    k: int,
    rank: int,
    factor: int,
    factor_dtype: int,
    by_rank: bool,
    scale: float,
    out: int,
    threads: int,
) -> None: ...
def factor_gradient(
    left: int,
    x: int,
    x_stride: int,
    m: int,
    k: int,
    rank: int,
    out: int,
    out_rank_stride: int,
    out_column_stride: int,
    threads: int,
) -> None: ...

MAX_HEAD_DEPTH: int

def attention_forward(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dtype: int,
    mask: Sequence[int],
    mask_dtype: int,
    sizes: Sequence[int],
    diagonal: int,
    scale: float,
    output: Sequence[int],
    logsumexp: int,
    threads: int,
) -> None: ...
def attention_scores_grad(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    dtype: int,
    mask: Sequence[int],
    mask_dtype: int,
    sizes: Sequence[int],
    diagonal: int,
    scale: float,
    output: Sequence[int],
    grad_output: Sequence[int],
    logsumexp: Sequence[int],
    p: int,
    ds: int,
    out_dtype: int,
    threads: int,
) -> None: ...
def rms_norm(
    x: int,
    x_stride: int,
    dtype: int,
    rows: int,
    cols: int,
    weight: int,
    weight_dtype: int,
    offset: float,
    eps: float,
    out: int,
    out_dtype: int,
    rstd: int,
    threads: int,
) -> None: ...
def rms_norm_backward(
    grad: int,
    grad_stride: int,
    grad_dtype: int,
    x: int,
    x_stride: int,
    dtype: int,
    rows: int,
    cols: int,
    weight: int,
    weight_dtype: int,
    offset: float,
    rstd: int,
    grad_x: int,
    grad_weight: int,
    threads: int,
) -> None: ...
def gated(
    activation: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dtype: int,
    rows: int,
    cols: int,
    out: int,
    threads: int,
) -> None: ...
def gated_backward(
    activation: int,
    grad: int,
    grad_stride: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dtype: int,
    rows: int,
    cols: int,
    grad_gate: int,
    grad_up: int,
    threads: int,
) -> None: ...
def rotary(
    x: int,
    dtype: int,
    shape: Sequence[int],
    strides: Sequence[int],
    cos: int,
    sin: int,
    table_dtype: int,
    table_stride: int,
    transposed: bool,
    out: int,
    out_dtype: int,
    out_strides: Sequence[int],
    threads: int,
) -> None: ...

MOST_DENSE_ROWS: int

def dense_few(
    x: int,
    x_stride: int,
    dtype: int,
    m: int,
    weight: int,
    weight_dtype: int,
    rows: int,
    cols: int,
    bias: int,
    bias_dtype: int,
    out: int,
    out_dtype: int,
    threads: int,
) -> None: ...
def attention_step(
    inputs: Sequence[int],
    dtype: int,
    table: Sequence[int],
    cache: Sequence[int],
    first: int,
    slot: int,
    sizes: Sequence[int],
    scale: float,
    out: int,
    threads: int,
) -> None: ...
def linear(
    weight: Weight,
    grad_input: bool,
    compute: int,
    x: int,
    x_stride: int,
    m: int,
    dtype: int,
    side: int,
    side_dtype: int,
    side_weight: int,
    side_weight_dtype: int,
    rank: int,
    bias: int,
    bias_dtype: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def explain_linear(
    rows: int, cols: int, m: int, dtype: int, int8: bool, grad_input: bool, compute: int, block_size: int
) -> dict[str, str]: ...
