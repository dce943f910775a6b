# SPDX-License-Identifier: Apache-2.0
"""Kernels: formats, the numpy reference that defines every operation, programs, native code."""
