# SPDX-License-Identifier: Apache-2.0
"""The RVV kernels pass every test of this machine's kernels, whatever the length of a register."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_kernels import LENGTHS, Guest, GuestKernels, cpu, qemu
from kernel_tests import kernel_tests


@pytest.fixture(scope="session", params=LENGTHS)
def guest(request: pytest.FixtureRequest, kernel_server: Path) -> Iterator[Guest]:
    with Guest([*qemu(cpu(request.param)), str(kernel_server)], "rvv") as guest:
        guest.start()
        assert guest.vector_bytes * 8 == request.param
        yield guest


@pytest.fixture
def kernels(guest: Guest) -> GuestKernels:
    return GuestKernels(guest)


globals().update(kernel_tests())
