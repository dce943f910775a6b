# SPDX-License-Identifier: Apache-2.0
"""Everything here needs a cross compiler and qemu-user, and is run by `make test-riscv`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from guest_kernels import LENGTHS, Guest, GuestKernels, cpu, qemu

ROOT = Path(__file__).resolve().parents[2]
# Cases, rigs and tests of these run here, too.
sys.path[:0] = [str(ROOT / "tests" / "kernels"), str(ROOT / "tests" / "device")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.riscv)


@pytest.fixture(scope="session")
def kernel_server() -> Path:
    """The program of tests/native/cross/kernel_server.c for riscv64."""
    tool = [sys.executable, "tools/build_kernel_server.py", "riscv64"]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / done.stdout.strip()


@pytest.fixture(scope="module", params=LENGTHS)
def guest(request: pytest.FixtureRequest, kernel_server: Path) -> Iterator[Guest]:
    """A guest with vectors for the kernels that the module's ISA names, at every length."""
    with Guest([*qemu(cpu(request.param)), str(kernel_server)], request.module.ISA) as guest:
        guest.start()
        assert guest.vector_bytes * 8 == request.param
        yield guest


@pytest.fixture
def kernels(guest: Guest) -> GuestKernels:
    return GuestKernels(guest)


@pytest.fixture(autouse=True)
def _reference_may_overflow() -> Iterator[None]:
    """Infinities are results like any other here; numpy would warn of each."""
    with np.errstate(all="ignore"):
        yield
