# SPDX-License-Identifier: Apache-2.0
"""Kernels compute the same in a thread that flushes subnormals or rounds another way."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kernel_cases import FLOATS, FORMATS, QUANTISED, assert_same_bits, floats, seed_of, weights

from spanker.kernels import native
from spanker.kernels.native import NativeKernels

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="fenv_t's layout is known for x86-64 only"
)

MXCSR_AT = 28  # of glibc's fenv_t: 28 bytes of x87 state come first
FLUSH = 0x8000 | 0x0040  # flush results to zero, read subnormals as zero
ROUND_UP = 0x4000


def libm() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")


def mxcsr() -> int:
    state = ctypes.create_string_buffer(64)
    libm().fegetenv(state)
    return int(struct.unpack_from("<I", state, MXCSR_AT)[0])


@contextmanager
def hostile(bits: int) -> Iterator[None]:
    """This thread with other floating-point modes; put back at the end."""
    m = libm()
    saved, changed = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    m.fegetenv(saved)
    ctypes.memmove(changed, saved, 64)
    struct.pack_into("<I", changed, MXCSR_AT, struct.unpack_from("<I", saved, MXCSR_AT)[0] | bits)
    m.fesetenv(changed)
    try:
        yield
    finally:
        m.fesetenv(saved)


@pytest.mark.parametrize("bits", [FLUSH, ROUND_UP, FLUSH | ROUND_UP])
def test_kernels_ignore_the_modes_of_their_thread(kernels: NativeKernels, bits: int) -> None:
    case = ("hostile", bits)
    rng = np.random.default_rng(seed_of(*case))
    small = floats(rng, (3, 256), "subnormal")
    x = floats(rng, (3, 256))
    w = {name: weights(rng, name, 17, 256) for name in FORMATS}

    def results() -> list[np.ndarray]:
        return [
            kernels.add(small, small),
            kernels.swiglu(x, small),
            kernels.rmsnorm(x, x[0], 1e-5),
            kernels.quantize_q8(x),
            kernels.logit_stats(x[0], 1.0),
            *(kernels.matmul(name, w[name], small) for name in FLOATS),
            *(kernels.matmul(name, w[name], kernels.quantize_q8(x)) for name in QUANTISED),
            *(kernels.dequantize_row(name, w[name], 256) for name in FORMATS),
        ]

    expected = results()
    with hostile(bits):
        assert mxcsr() & bits == bits, "the test did not set the modes"
        got = results()
        scalars = native.exp(-0.3), native.f32_from_f16(1), native.f16_from_f32(1 + 2**-11)
        assert mxcsr() & bits == bits, "a kernel did not restore the modes"
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b, *case)
    assert scalars == (native.exp(-0.3), 2.0**-24, 0x3C00)
