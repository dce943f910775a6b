# SPDX-License-Identifier: Apache-2.0
"""What the kernel benchmark multiplies is what it says."""

from __future__ import annotations

import kernels as bench
import numpy as np
import pytest
from kernels import Measured
from probe import Limits

from spanker.kernels.formats import Format, packed_bytes
from spanker.kernels.native import NativeKernels

LIMITS = Limits(1, 1 << 28, 20.0, "avx2", 200.0, "avx2")


@pytest.mark.parametrize("fmt", bench.known_formats(), ids=lambda fmt: fmt.name)
def test_copies_of_packed_tiles_are_a_taller_matrix(fmt: Format, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "DISTINCT_WEIGHTS", 32 * 512)
    packed = bench.packed_rows(fmt, 100, 512)
    rows = 128  # whole copies of the 32 distinct rows
    assert packed.size == packed_bytes(fmt, rows, 512)
    kernels = NativeKernels("scalar")
    out = kernels.matmul_packed(fmt.name, packed, rows, bench.activations(kernels, fmt, 2, 512))
    assert np.array_equal(out, np.tile(out[:, :32], (1, 4)))
    assert len(np.unique(out[0, :32])) == 32


def test_every_format_of_the_kernels_is_measured():
    assert bench.known_formats() == list(Format)


def test_rates_and_shares_are_of_the_best_call():
    one = Measured(
        op="matmul",
        format="q4_0",
        shape="n x 64",
        tokens=1,
        isa="avx2",
        samples=(0.2, 0.1, 0.3),
        nbytes=10**9,
        multiply_adds=2 * 10**9,
        int8=True,
        from_memory=True,
    )
    record = one.record(LIMITS)
    assert (record["gb_per_s"], record["gmac_per_s"]) == (10.0, 20.0)
    assert (record["share_of_read"], record["share_of_int8"]) == (0.5, 0.1)


def test_shares_that_mean_nothing_are_left_out():
    record = Measured("swiglu", "f32", "64", 1, "avx2", (0.1,), 10**9).record(LIMITS)
    assert record["gb_per_s"] == 10.0
    assert [record[key] for key in ("gmac_per_s", "share_of_read", "share_of_int8")] == [None] * 3


def test_the_best_call_counts_and_what_an_empty_one_costs_is_taken_off(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    # The first call warms up, the second one sets how often it is repeated: here once.
    slow = iter([9.0, 1.0, 1.5, 1.25, 2.0, 3.0, 1.5])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(slow)

    def empty() -> None:
        now[0] += 0.25

    samples = bench.net_of(call, empty)
    assert samples == pytest.approx((1.25, 1.0, 1.75, 2.75, 1.25))
