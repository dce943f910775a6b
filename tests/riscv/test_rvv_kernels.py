# SPDX-License-Identifier: Apache-2.0
"""The RVV kernels pass every test of this machine's kernels, whatever the length of a register."""

from __future__ import annotations

from kernel_tests import kernel_tests

ISA = "rvv"

globals().update(kernel_tests())
