# SPDX-License-Identifier: Apache-2.0
"""The plain kernels of a RISC-V machine without vectors pass every test of this machine's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_kernels import Guest, GuestError, cpu, qemu
from kernel_tests import kernel_tests


@pytest.fixture(scope="session")
def guest(kernel_server: Path) -> Iterator[Guest]:
    with Guest([*qemu(cpu(None)), str(kernel_server)], "scalar") as guest:
        yield guest


globals().update(kernel_tests())


def test_a_machine_without_vectors_has_no_vector_kernels(kernel_server: Path) -> None:
    with Guest([*qemu(cpu(None)), str(kernel_server)], "rvv") as guest:
        with pytest.raises(GuestError, match="an instruction set that this machine has"):
            guest.start()
