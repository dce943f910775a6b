# SPDX-License-Identifier: Apache-2.0
"""Every kernel test runs once for each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from kernel_cases import ISAS

from spanker.kernels.native import NativeKernels


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(request.param)


@pytest.fixture(autouse=True)
def _reference_may_overflow() -> Iterator[None]:
    """Infinities are results like any other here; numpy would warn of each."""
    with np.errstate(all="ignore"):
        yield
