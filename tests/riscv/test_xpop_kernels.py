# SPDX-License-Identifier: Apache-2.0
"""The kernels that use Xpop_matmul, emulated by trap, pass the tests of products, whatever the
length of a vector register is; their other operations are those of RVV."""

from __future__ import annotations

import test_kernel_independence
import test_matmul_equals_reference
from kernel_tests import kernel_tests

ISA = "xpop"

globals().update(kernel_tests(test_matmul_equals_reference, test_kernel_independence))
