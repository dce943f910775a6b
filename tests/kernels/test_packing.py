# SPDX-License-Identifier: Apache-2.0
"""Packing into memory of the caller's, and folding statistics: what the host does around cards."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import FORMATS, GUARD, assert_same_bits, depths, floats, seed_of, strided, weights

from spanker.errors import CardCommandError
from spanker.kernels import reference
from spanker.kernels.formats import Format, pack, packed_bytes
from spanker.kernels.native import NativeKernels, fold_stats

# --- pack(out=) --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_packing_into_given_memory_writes_all_of_it_and_nothing_else(name: str, rows: int) -> None:
    """Whatever was there before: missing rows are zeros, and bits that are joined start at none."""
    fmt = Format[name.upper()]
    for k in depths(name, 1, 2, 3):
        case = ("pack out", name, rows, k)
        source = weights(np.random.default_rng(seed_of(*case)), name, rows, k)
        expected = pack(fmt, source, k)
        for offset in (64, 65, 66):  # the kernels want 32 bytes of alignment; packing wants none
            memory = np.full(expected.size + 128, GUARD, np.uint8)
            out = memory[offset : offset + expected.size]
            assert pack(fmt, strided(source, 7) if rows else source, k, out) is out
            assert_same_bits(out, expected, *case)
            assert (memory[:offset] == GUARD).all()
            assert (memory[offset + expected.size :] == GUARD).all()


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q6_k", "bf16"])
def test_memory_that_does_not_fit_is_refused_and_left_alone(name: str) -> None:
    fmt = Format[name.upper()]
    (k,) = depths(name, 2)
    source = weights(np.random.default_rng(1), name, 17, k)
    size = packed_bytes(fmt, 17, k)
    memory = np.full(2 * size + 2, GUARD, np.uint8)
    for out in (
        memory[: size - 1],
        memory[: size + 1],
        memory[: 2 * size : 2],
        memory[:size].reshape(2, -1),
        memory[:size].view(np.int8),
        memory[:size].view(np.uint16),
    ):
        with pytest.raises(CardCommandError, match=f"needs {size} contiguous bytes"):
            pack(fmt, source, k, out)
    assert (memory == GUARD).all()


# --- folding statistics ------------------------------------------------------------------------


def numpy_fold(total: float, stats: np.ndarray, top: float, inv_temperature: float) -> float:
    """The definition: float64, one term after the other (np.add.accumulate has no other order)."""
    with np.errstate(over="ignore"):
        x = (stats[:, 0] - np.float32(top)) * np.float32(inv_temperature)
    terms = reference.exp(x).astype(np.float64) * stats[:, 1].astype(np.float64)
    return float(np.add.accumulate(np.concatenate([[total], terms]))[-1])


@pytest.mark.parametrize("chunks", [0, 1, 2, 7, 16, 17, 192, 1000])
@pytest.mark.parametrize("kind", ["normal", "zeros", "subnormal", "mixed", "one_huge"])
def test_folded_statistics_are_numpys_bit_for_bit(chunks: int, kind: str) -> None:
    case = ("fold", chunks, kind)
    rng = np.random.default_rng(seed_of(*case))
    stats = np.empty((chunks, 2), np.float32)
    stats[:, 0] = floats(rng, (chunks,), kind)
    stats[:, 1] = rng.uniform(1, 256, chunks)
    top = float(stats[:, 0].max(initial=np.float32(-1e30)))
    for total in (0.0, -0.0, 1 / 3, 5e-324, 1e300):
        for inv_temperature in (1.0, 1 / 0.8, 0.0, 1e-3, 100.0, 3.0e38):
            inverse = float(np.float32(inv_temperature))
            got = fold_stats(total, memoryview(stats.tobytes()), top, inverse)
            expected = numpy_fold(total, stats, top, inverse)
            assert_same_bits(np.array([got]), np.array([expected]), *case, total, inv_temperature)


def test_statistics_are_folded_in_order_and_may_come_in_parts() -> None:
    """Another order gives other bits; parts, one after the other, give the same."""
    rng = np.random.default_rng(9)
    stats = np.stack([rng.normal(0, 4, 600), rng.uniform(1, 256, 600)], 1).astype(np.float32)
    top = float(stats[:, 0].max())

    def folded(rows: np.ndarray, total: float = 0.0) -> float:
        return fold_stats(total, memoryview(rows.tobytes()), top, 1.25)

    whole = folded(stats)
    assert whole != folded(stats[::-1])
    assert whole != folded(stats[300:]) + folded(stats[:300])
    for cut in (0, 1, 255, 599, 600):
        assert folded(stats[cut:], folded(stats[:cut])) == whole


def test_folded_statistics_of_logits_are_their_sum_of_exps(kernels: NativeKernels) -> None:
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 3, 5000).astype(np.float32)
    stats = kernels.logit_stats(logits, 0.7)
    top = float(logits.max())
    got = fold_stats(0.0, memoryview(stats.tobytes()), top, float(np.float32(0.7)))
    exact = np.exp((logits.astype(np.float64) - top) * 0.7).sum()
    assert got == pytest.approx(exact, rel=1e-6)
