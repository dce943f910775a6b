# SPDX-License-Identifier: Apache-2.0
"""Every instruction set stores keys and values, and attends, exactly as reference.py does."""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt
import pytest
from kernel_cases import Guarded, assert_same_bits, floats, seed_of, strided

from spanker.kernels import reference
from spanker.kernels.native import KvPool, NativeKernels

F16 = npt.NDArray[np.float16]
HEAD_DIMS = (16, 64, 80, 24)


@attrs.frozen(eq=False)
class Cache:
    """A sequence in a pool: its pages, and the keys and values (positions, heads, head_dim)."""

    kv: KvPool
    pages: list[int]
    keys: F16
    values: F16


def expected_pool(cache: Cache, fill: int) -> npt.NDArray[np.uint16]:
    """The pool's words by the layout's definition, every word not written being `fill`."""
    kv = cache.kv
    words = np.full(kv.words.shape, fill, np.uint16)
    for p in range(cache.keys.shape[0]):
        page, at = cache.pages[p // kv.page_positions], p % kv.page_positions
        for h in range(kv.kv_heads):
            k = words[h, 0, page].reshape(-1, kv.head_dim, 16)
            v = words[h, 1, page].reshape(-1, kv.head_dim)
            k[at // 16, :, at % 16] = cache.keys[p, h].view(np.uint16)
            v[at] = cache.values[p, h].view(np.uint16)
    return words


def make_cache(
    rng: np.random.Generator,
    positions: int,
    kv_heads: int,
    head_dim: int,
    page_positions: int,
    kind: str = "normal",
) -> Cache:
    """A filled cache whose pages lie in shuffled order; what was never written is NaN."""
    count = -(-positions // page_positions)
    pages = [int(p) for p in rng.permutation(count + 3)[:count]]
    shape = (positions, kv_heads, head_dim)
    keys = reference.to_f16(floats(rng, shape, kind))
    values = reference.to_f16(floats(rng, shape, kind))
    kv = KvPool.zeros(count + 3, kv_heads, page_positions, head_dim)
    cache = Cache(kv, pages, keys, values)
    kv.words[...] = expected_pool(cache, 0x7E00)
    return cache


def expected_attention(
    cache: Cache, kv_head: int, q: np.ndarray, visible: list[int], scale: np.float32
) -> np.ndarray:
    return np.stack(
        [
            reference.attention(
                q[i], cache.keys[:n, kv_head], cache.values[:n, kv_head], np.float32(scale)
            )
            for i, n in enumerate(visible)
        ]
    )


def scale_of(head_dim: int) -> np.float32:
    return np.float32(1.0) / np.sqrt(np.float32(head_dim))


# --- storing ------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_positions", [16, 48])
def test_kv_append_writes_its_position_and_nothing_else(
    kernels: NativeKernels, head_dim: int, page_positions: int
) -> None:
    case = ("append", head_dim, page_positions)
    rng = np.random.default_rng(seed_of(*case))
    k, v = floats(rng, (70, 2, head_dim), "mixed"), floats(rng, (70, 2, head_dim), "mixed")
    k, v = np.clip(k, -65504, 65504), np.clip(v, -65504, 65504)
    kv = KvPool.zeros(8, 2, page_positions, head_dim)
    kv.words[...] = 0xA5A5
    pages = [int(p) for p in rng.permutation(8)][: -(-70 // page_positions)]
    for p in range(70):
        page, at = pages[p // page_positions], p % page_positions
        kernels.kv_append(kv, page, at, k[p], v[p])
        if p in (0, 15, 16, 69):
            seen = Cache(kv, pages, reference.to_f16(k[: p + 1]), reference.to_f16(v[: p + 1]))
            assert_same_bits(kv.words, expected_pool(seen, 0xA5A5), *case)


def test_every_f16_and_every_boundary_is_rounded_alike(kernels: NativeKernels) -> None:
    """All finite f16, the midpoints between them, and the floats on either side of each."""
    grid = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    upper = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (grid + upper) / np.float32(2)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    near = [grid, middle, np.nextafter(middle, up), np.nextafter(middle, down)]
    x = np.concatenate([*near, np.array([65504, 65519.996, 1e-45, 1e-38], np.float32)])
    x = np.concatenate([x, -x])[None, :]
    kv = KvPool.zeros(1, 1, 16, x.shape[1])
    kernels.kv_append(kv, 0, 3, x, x)
    stored = reference.to_f16(x[0]).view(np.uint16)
    assert_same_bits(kv.words[0, 1, 0].reshape(16, -1)[3], stored)
    assert_same_bits(kv.words[0, 0, 0].reshape(-1, 16)[:, 3].copy(), stored)


@pytest.mark.parametrize("bad", [65520.0, -65520.0, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("at", [(0, 0), (1, 23)])
def test_keys_and_values_beyond_f16_are_an_error(
    kernels: NativeKernels, bad: float, where: str, at: tuple[int, int]
) -> None:
    kv = KvPool.zeros(1, 2, 16, 24)
    x = {"keys": np.ones((2, 24), np.float32), "values": np.ones((2, 24), np.float32)}
    x[where][at] = bad
    with pytest.raises(reference.F16RangeError):
        kernels.kv_append(kv, 0, 0, x["keys"], x["values"])
    with pytest.raises(reference.F16RangeError):
        reference.to_f16(x[where])


# --- attending ----------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_over_every_number_of_positions(kernels: NativeKernels, head_dim: int) -> None:
    """1 to 100 positions, each as the newest of up to four neighbouring tokens."""
    case = ("positions", head_dim)
    rng = np.random.default_rng(seed_of(*case))
    cache = make_cache(rng, 100, 2, head_dim, 32)
    q = floats(rng, (100, head_dim))
    scale = scale_of(head_dim)
    expected = expected_attention(cache, 1, q, list(range(1, 101)), scale)
    for first in range(100):
        count = min(1 + first % 4, 100 - first)
        out = Guarded((count, head_dim), np.float32)
        visible = list(range(first + 1, first + 1 + count))
        queries = strided(q[first : first + count])
        kernels.attention(cache.kv, cache.pages, 1, queries, visible, scale, out=out.rows)
        assert_same_bits(out.rows, expected[first : first + count], *case, first)
        out.assert_intact()


@pytest.mark.parametrize("head_dim", [64, 24])
@pytest.mark.parametrize("page_positions", [16, 256])
def test_attention_over_thousands_of_positions(
    kernels: NativeKernels, head_dim: int, page_positions: int
) -> None:
    case = ("long", head_dim, page_positions)
    rng = np.random.default_rng(seed_of(*case))
    cache = make_cache(rng, 4001, 1, head_dim, page_positions)
    q = floats(rng, (3, head_dim))
    visible = [4000, 4001, 3999]
    got = kernels.attention(cache.kv, cache.pages, 0, q, visible, scale_of(head_dim))
    expected = expected_attention(cache, 0, q, visible, scale_of(head_dim))
    assert_same_bits(got, expected, *case)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_grouped_query_heads_share_a_kv_head(
    kernels: NativeKernels, group: int, tokens: int
) -> None:
    case = ("group", group, tokens)
    rng = np.random.default_rng(seed_of(*case))
    cache = make_cache(rng, 45, 3, 16, 16)
    q = floats(rng, (tokens * group, 16))
    visible = [40 + t for t in range(tokens) for _ in range(group)]
    for kv_head in range(3):
        got = kernels.attention(cache.kv, cache.pages, kv_head, q, visible, scale_of(16))
        expected = expected_attention(cache, kv_head, q, visible, scale_of(16))
        assert_same_bits(got, expected, *case)


def test_queries_of_very_different_lengths_in_one_call(kernels: NativeKernels) -> None:
    case = ("lengths",)
    rng = np.random.default_rng(seed_of(*case))
    cache = make_cache(rng, 100, 1, 24, 16)
    for visible in ([1, 100, 16, 17], [100, 1, 1], [15, 16, 17, 33, 1, 2], [64] * 7):
        q = floats(rng, (len(visible), 24))
        got = kernels.attention(cache.kv, cache.pages, 0, q, visible, scale_of(24))
        assert_same_bits(got, expected_attention(cache, 0, q, visible, scale_of(24)), *case)


def test_sequences_that_share_pages(kernels: NativeKernels) -> None:
    """A common prefix of 32 positions, then each its own page; the pages in any order."""
    case = ("shared",)
    rng = np.random.default_rng(seed_of(*case))
    one = make_cache(rng, 48, 2, 16, 16)
    free = next(p for p in range(6) if p not in one.pages)
    keys, values = one.keys.copy(), one.values.copy()
    keys[32:], values[32:] = -keys[32:], values[32:] * np.float16(0.5)
    two = Cache(one.kv, [*one.pages[:2], free], keys, values)
    for p in range(32, 48):
        kernels.kv_append(
            one.kv, free, p - 32, keys[p].astype(np.float32), values[p].astype(np.float32)
        )
    q = floats(rng, (2, 16))
    for cache in (one, two):
        got = kernels.attention(cache.kv, cache.pages, 1, q, [47, 48], scale_of(16))
        assert_same_bits(got, expected_attention(cache, 1, q, [47, 48], scale_of(16)), *case)


@pytest.mark.parametrize("kind", ["zeros", "mixed", "one_huge"])
def test_extreme_queries(kernels: NativeKernels, kind: str) -> None:
    case = ("queries", kind)
    rng = np.random.default_rng(seed_of(*case))
    cache = make_cache(rng, 37, 1, 80, 16)
    q = floats(rng, (5, 80), kind)
    visible = [33, 34, 35, 36, 37]
    got = kernels.attention(cache.kv, cache.pages, 0, q, visible, scale_of(80))
    assert_same_bits(got, expected_attention(cache, 0, q, visible, scale_of(80)), *case)


@pytest.mark.parametrize("bits", [0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x0000, 0x8000])
def test_extreme_keys_and_values(kernels: NativeKernels, bits: int) -> None:
    case = ("kv", bits)
    rng = np.random.default_rng(seed_of(*case))
    cache = make_cache(rng, 37, 1, 24, 16)
    extreme = np.full((37, 1, 24), bits, np.uint16).view(np.float16)
    cache = attrs.evolve(cache, keys=extreme, values=extreme)
    cache.kv.words[...] = expected_pool(cache, 0x7E00)
    q = floats(rng, (3, 24))
    got = kernels.attention(cache.kv, cache.pages, 0, q, [16, 30, 37], scale_of(24))
    assert_same_bits(got, expected_attention(cache, 0, q, [16, 30, 37], scale_of(24)), *case)


def test_scores_far_apart_clamp_instead_of_vanishing(kernels: NativeKernels) -> None:
    """exp clamps its argument to -87, so a hopeless position still has its tiny share."""
    cache = make_cache(np.random.default_rng(1), 20, 1, 16, 16)
    keys = np.zeros((20, 1, 16), np.float16)
    keys[3] = 60000
    cache = attrs.evolve(cache, keys=keys)
    cache.kv.words[...] = expected_pool(cache, 0x7E00)
    q = np.full((1, 16), 1000, np.float32)
    got = kernels.attention(cache.kv, cache.pages, 0, q, [20], scale_of(16))
    assert_same_bits(got, expected_attention(cache, 0, q, [20], scale_of(16)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("visible", [1, 16, 17, 40])
@pytest.mark.parametrize("query", [0, 4, 5])
def test_a_score_that_is_not_finite_is_an_error(
    kernels: NativeKernels, bad: float, visible: int, query: int
) -> None:
    cache = make_cache(np.random.default_rng(visible), 40, 1, 16, 16)
    keys = np.full((40, 1, 16), 2, np.float16)
    cache = attrs.evolve(cache, keys=keys)
    cache.kv.words[...] = expected_pool(cache, 0x7E00)
    q = np.ones((6, 16), np.float32)
    q[query, 7] = bad
    with pytest.raises(reference.NonFiniteError):
        kernels.attention(cache.kv, cache.pages, 0, q, [visible] * 6, 0.25)
    with pytest.raises(reference.NonFiniteError):
        reference.attention(q[query], keys[:visible, 0], keys[:visible, 0], np.float32(0.25))


def test_no_queries_write_nothing(kernels: NativeKernels) -> None:
    cache = make_cache(np.random.default_rng(2), 3, 1, 16, 16)
    out = kernels.attention(cache.kv, cache.pages, 0, np.empty((0, 16), np.float32), [], 0.25)
    assert out.shape == (0, 16)
