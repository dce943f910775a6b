# SPDX-License-Identifier: Apache-2.0
"""CRC32C against the vectors of RFC 3720, and against its definition bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from spanker.kernels.native import copy_crc32c, crc32c


def by_definition(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


def test_every_length_and_alignment_around_a_word() -> None:
    data = np.random.default_rng(5).bytes(80)
    for begin in range(9):
        for end in range(begin, 64):
            assert crc32c(data[begin:end]) == by_definition(data[begin:end])


def test_it_goes_on_from_a_prefix() -> None:
    data = np.random.default_rng(6).bytes(1000)
    for cut in (0, 1, 7, 8, 500, 1000):
        assert crc32c(memoryview(data)[cut:], crc32c(data[:cut])) == crc32c(data)


def test_long_runs_of_every_kind_equal_the_short_one() -> None:
    """Around one and several rounds of three streams, and of wide registers."""
    data = np.random.default_rng(7).bytes(8000)
    for n in (256, 512, 1536, 3072, 4608, 7900):
        for end in (n - 1, n, n + 1, n + 37):
            for begin in (0, 1, 5):
                assert crc32c(data[begin:end], 77) == piecewise(data[begin:end], 77), (begin, end)


def piecewise(data: bytes, crc: int) -> int:
    """In pieces that are too short for anything but one word at a time."""
    for at in range(0, len(data), 40):
        crc = crc32c(data[at : at + 40], crc)
    return crc


@pytest.mark.parametrize("n", [0, 1, 7, 8, 255, 256, 257, 1535, 1536, 1537, 4000])
def test_copying_gives_the_same_and_the_bytes(n: int) -> None:
    data = np.random.default_rng(n).bytes(n)
    to = bytearray(b"\xa5" * (n + 9))
    assert copy_crc32c(to, data, 5) == crc32c(data, 5)
    assert to[:n] == data and to[n:] == b"\xa5" * 9
