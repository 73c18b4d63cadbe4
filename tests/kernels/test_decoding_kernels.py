"""A few rows times a dense matrix, and attention of one token over a cache: within derived bounds, under every ISA."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, UNIT
from torch import Tensor

from nybble import reference_attention
from nybble.backends import decoding

U = 2.0**-24
_dtypes = st.sampled_from(DTYPES)
_seeds = st.integers(0, 2**31 - 10)


def gamma(n: float) -> float:
    return n * U / (1 - n * U)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- dense -----------------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, decoding.MOST_ROWS),
    rows=st.one_of(st.sampled_from((1, 3, 63, 64, 65, 130)), st.integers(1, 200)),
    cols=st.one_of(st.sampled_from((1, 7, 16, 31, 64, 576)), st.integers(1, 300)),
    dtype=_dtypes,
    weight_dtype=_dtypes,
    out_dtype=_dtypes,
    bias=st.booleans(),
    seed=_seeds,
)
def test_dense_is_the_product(isa, m, rows, cols, dtype, weight_dtype, out_dtype, bias, seed) -> None:
    """A sum of n products in fp32 is off by gamma_(n + 1) of the sum of their magnitudes, whatever its order."""
    wide = normal(seed, m, cols + 3, dtype=dtype)
    x, w = wide[:, :cols], normal(seed + 1, rows, cols, dtype=weight_dtype)
    b = normal(seed + 2, rows, dtype=dtype) if bias else None
    out = torch.full((m, rows), math.nan, dtype=out_dtype)
    decoding.dense(x, w, b, out)()
    exact = x.double() @ w.double().T
    sizes = x.double().abs() @ w.double().abs().T
    if b is not None:
        exact, sizes = exact + b.double(), sizes + b.double().abs()
    bound = gamma(cols + 2) * sizes
    if out_dtype != torch.float32:
        bound = bound + UNIT[out_dtype] * (exact.abs() + bound) + 2.0**-24
    assert bool(((out.double() - exact).abs() <= bound).all())


def test_a_row_of_dense_does_not_depend_on_its_neighbours_or_on_threads(isa, threads) -> None:
    x, w = normal(0, 8, 300, dtype=torch.bfloat16), normal(1, 200, 300, dtype=torch.bfloat16)
    results = []
    for count, number in ((8, 1), (8, 3), (5, 2), (1, 1)):
        threads(number)
        out = torch.empty(count, 200)
        decoding.dense(x[:count], w, None, out)()
        results.append(out)
    for out in results[1:]:
        assert torch.equal(out, results[0][: len(out)])


# ---- attention -------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    depth=st.sampled_from((2, 6, 16, 20, 64, 80, 128)),
    slot=st.one_of(st.integers(0, 40), st.sampled_from((255, 256, 300, 600))),
    dtype=_dtypes,
    table=st.sampled_from((None, *DTYPES)),
    seed=_seeds,
)
def test_attention_step_is_its_specification(isa, batch, kv_heads, group, depth, slot, dtype, table, seed) -> None:
    """Against float64 of the same rounded inputs. With scores s, |s| <= S: s is off by e = gamma_(D + 6) S, a weight
    exp(s - m) / sum by a factor within exp(2 e) (1 + gamma_(keys + 12)), the result by that of sum p |v|."""
    slots, heads = slot + 3, kv_heads * group
    joined = normal(seed, batch, (heads + 2 * kv_heads) * depth, dtype=dtype)
    query, key, value = (
        part.view(batch, -1, depth) for part in joined.split([heads * depth, kv_heads * depth, kv_heads * depth], 1)
    )
    keys, values = (normal(seed + i, batch, kv_heads, slots, depth, dtype=dtype) for i in (1, 2))
    first = torch.randint(0, slot + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    turns = None
    if table is not None:
        angles = normal(seed + 3, batch, depth)
        turns = angles.cos().to(table), angles.sin().to(table)
    scale = depth**-0.5
    expected_keys, expected_values = keys.clone(), values.clone()
    reference_attention.step(query, key, value, turns, expected_keys, expected_values, first, slot, scale)
    out = torch.full((batch, heads, depth), math.nan, dtype=dtype)
    decoding.attention_step(query, key, value, turns, keys, values, first, scale, out)(slot)
    unit = UNIT[dtype] if dtype != torch.float32 else U
    assert torch.equal(values, expected_values)
    new, wanted = keys[:, :, slot].double(), expected_keys[:, :, slot].double()
    keys_off = (new - wanted).abs() - 2 * unit * wanted.abs() - 8 * U * 2 * key.abs().max().double()
    assert bool((keys_off <= 0).all())
    keys[:, :, slot] = expected_keys[:, :, slot]
    assert torch.equal(keys, expected_keys)  # no other slot was touched

    # The new key may have been rounded to its neighbour: the kernel's own is what its scores are of.
    exact, bound = _exact(query, turns, keys, values, first, slot, scale)
    wrong = (out.double() - exact).abs() > bound + 2 * unit * (exact.abs() + bound) + 2.0**-24 + _of_new_key(
        query, key, values, unit, scale
    )
    assert not bool(wrong.any())


def _exact(query, turns, keys, values, first, slot, scale) -> tuple[Tensor, Tensor]:
    q = query.double()
    if turns is not None:
        cos, sin = (t.double()[:, None] for t in turns)
        one, two = q.chunk(2, -1)
        q = q * cos + torch.cat([-two, one], -1) * sin
    group = query.shape[1] // keys.shape[1]
    k, v = (x[:, :, : slot + 1].double().repeat_interleave(group, 1) for x in (keys, values))
    scores = (k @ q[..., None])[..., 0] * scale
    sizes = (k.abs() @ (2 * q.abs().max(-1, keepdim=True).values.expand_as(q))[..., None])[..., 0] * scale
    hidden = (torch.arange(slot + 1) < first[:, None])[:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    p = scores.softmax(-1)
    error = gamma(keys.shape[3] + 6) * sizes.masked_fill(hidden, 0).amax(-1)
    factor = torch.expm1(2 * error) + gamma(slot + 14)
    return (p[..., None, :] @ v)[..., 0, :], factor[..., None] * (p[..., None, :] @ v.abs())[..., 0, :] * 2


def _of_new_key(query, key, values, unit, scale) -> Tensor:
    """What a new key that is rounded to its neighbour changes: its score by 2 unit |q| |k|, the result by that of v."""
    change = 2 * unit * query.double().abs().sum(-1).max() * 2 * key.double().abs().max() * 2 * scale
    return torch.expm1(2 * change) * values.double().abs().max()


def test_attention_step_gives_the_same_bits_for_any_threads_neighbours_and_places(isa, threads) -> None:
    """A row alone, in a batch, and further on in memory."""
    count, depth, slot = 3, 64, 700
    query, key, value = (normal(i, count, 4, depth, dtype=torch.bfloat16) for i in range(3))
    keys, values = (normal(i, count, 4, slot + 1, depth, dtype=torch.bfloat16) for i in (3, 4))
    first = torch.tensor([0, 17, 300])

    def run(rows: slice, number: int, back: int = 0) -> Tensor:
        threads(number)
        own = [x[rows].clone() for x in (query, key, value)]
        kept = [x[rows, :, back:].clone() for x in (keys, values)]
        out, begin = torch.empty_like(own[0]), first[rows] - back
        decoding.attention_step(*own, None, *kept, begin, 0.125, out)(slot - back)
        return out

    whole = run(slice(0, 3), 1)
    assert torch.equal(run(slice(0, 3), 3), whole)
    assert torch.equal(run(slice(2, 3), 2), whole[2:])
    assert torch.equal(run(slice(1, 2), 1, back=17), whole[1:2])
