# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/kernels that take a set of kernels: any set, so a guest's, too.

A test file here makes them its own with the name of an instruction set, of which conftest.py makes
the fixture `kernels` (guest_kernels.GuestKernels), and

    ISA = "rvv"

    globals().update(kernel_tests())

or, of an instruction set that has products only, with some of MODULES.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import test_attention_equals_reference
import test_elements_equal_reference
import test_kernel_independence
import test_logits_equal_reference
import test_matmul_equals_reference
import test_ops_equal_reference
import test_quantize_equals_reference

MODULES = (
    test_attention_equals_reference,
    test_elements_equal_reference,
    test_kernel_independence,
    test_logits_equal_reference,
    test_matmul_equals_reference,
    test_ops_equal_reference,
    test_quantize_equals_reference,
)


def kernel_tests(*modules: ModuleType) -> dict[str, Callable[..., None]]:
    """Those tests, which compare every operation with reference.py, by their names."""
    found: dict[str, Callable[..., None]] = {}
    for module in modules or MODULES:
        for name, test in vars(module).items():
            if name.startswith("test_") and "kernels" in inspect.signature(test).parameters:
                assert name not in found, f"two tests are named {name}"
                found[name] = test
    return found
