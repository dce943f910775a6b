# SPDX-License-Identifier: Apache-2.0
"""An element of a result depends on its own row and token only.

This is what makes one answer possible: however a step batches its tokens, and however a plan
splits the rows among cards, each element is the same.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FORMATS,
    ISAS,
    SUPER_BLOCKS,
    activations,
    assert_same_bits,
    depths,
    floats,
    seed_of,
    weights,
)

from spanker.kernels.formats import Format, pack
from spanker.kernels.native import KvPool, NativeKernels

# Derandomised: the same examples in every run.  A failure prints its example, seed included.
bounded = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
@bounded
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_matmul_may_be_cut_anywhere(isa: str, name: str, data: st.DataObject, seed: int) -> None:
    kernels, rng = NativeKernels(isa), np.random.default_rng(seed)
    rows, tokens = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 30))
    (k,) = depths(name, data.draw(st.integers(1, 2 if name in SUPER_BLOCKS else 5)))
    w, x = weights(rng, name, rows, k), activations(rng, name, tokens, k)
    fmt = Format[name.upper()]
    whole = kernels.matmul(name, w, x)
    # Any tokens, in any order, more than once.
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=20))
    assert_same_bits(kernels.matmul(name, w, np.ascontiguousarray(x[chosen])), whole[chosen])
    # Ranges of tiles of the same packed weights, in pieces.
    packed, tiles = pack(fmt, w, k), -(-rows // 16)
    cuts = sorted({0, tiles, *data.draw(st.lists(st.integers(0, tiles), max_size=3))})
    out = np.zeros_like(whole)
    for begin, end in itertools.pairwise(cuts):
        kernels.matmul_packed(name, packed, rows, x, tiles=(begin, end), out=out)
    assert_same_bits(out, whole)
    # Rows of another card: any consecutive share, packed for itself.
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert_same_bits(kernels.matmul(name, w[first:last], x), whole[:, first:last])


@pytest.mark.parametrize("isa", ISAS)
@bounded
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_query_attends_alike_in_any_company(isa: str, data: st.DataObject, seed: int) -> None:
    kernels, rng = NativeKernels(isa), np.random.default_rng(seed)
    positions = data.draw(st.integers(1, 70))
    head_dim = data.draw(st.sampled_from([16, 24, 64]))
    page_positions = data.draw(st.sampled_from([16, 32, 64]))
    count = -(-positions // page_positions)
    kv = KvPool.zeros(count, 1, page_positions, head_dim)
    pages = [int(p) for p in rng.permutation(count)]
    for p in range(positions):
        k, v = floats(rng, (1, head_dim)), floats(rng, (1, head_dim))
        kernels.kv_append(kv, pages[p // page_positions], p % page_positions, k, v)
    visible = data.draw(st.lists(st.integers(1, positions), min_size=1, max_size=9))
    q = floats(rng, (len(visible), head_dim))
    together = kernels.attention(kv, pages, 0, q, visible, 0.125)
    for i, n in enumerate(visible):
        alone = kernels.attention(kv, pages[: -(-n // page_positions)], 0, q[i : i + 1], [n], 0.125)
        assert_same_bits(alone[0], together[i])


def test_rows_of_the_other_kernels_are_independent(kernels: NativeKernels) -> None:
    case = ("rows",)
    rng = np.random.default_rng(seed_of(*case))
    x, y, w = floats(rng, (9, 96)), floats(rng, (9, 96)), floats(rng, (96,))
    table, positions = floats(rng, (9, 8, 2)), np.arange(9, dtype=np.uint32)
    heads = x.reshape(9, 6, 16)
    whole = [
        kernels.quantize_q8(x),
        kernels.rmsnorm(x, w, 1e-5),
        kernels.swiglu(x, y),
        kernels.add(x, y),
        kernels.rope(heads, table, positions, 16).reshape(9, 96),
    ]
    for t in range(9):
        one = slice(t, t + 1)
        alone = [
            kernels.quantize_q8(x[one]),
            kernels.rmsnorm(x[one], w, 1e-5),
            kernels.swiglu(x[one], y[one]),
            kernels.add(x[one], y[one]),
            kernels.rope(heads[one], table, positions[one], 16).reshape(1, 96),
        ]
        for a, b in zip(alone, whole, strict=True):
            assert_same_bits(a, b[one], *case, t)


def test_blocks_of_activations_may_be_quantised_apart(kernels: NativeKernels) -> None:
    """A share that is a multiple of 32 gives the same Q8 bytes as the whole row."""
    x = floats(np.random.default_rng(seed_of("blocks")), (4, 160), "mixed").clip(-8e6, 8e6)
    whole = kernels.quantize_q8(x)
    for begin, end in ((0, 32), (32, 128), (128, 160)):
        part = kernels.quantize_q8(x[:, begin:end])
        assert_same_bits(part, whole[:, begin // 32 * 34 : end // 32 * 34])


def test_chunks_of_logits_may_lie_on_different_cards(kernels: NativeKernels) -> None:
    x = floats(np.random.default_rng(seed_of("chunks")), (1000,))
    whole = kernels.logit_stats(x, 0.8)
    parts = [kernels.logit_stats(x[b:e], 0.8) for b, e in ((0, 256), (256, 768), (768, 1000))]
    assert_same_bits(np.concatenate(parts), whole)
