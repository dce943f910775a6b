# SPDX-License-Identifier: Apache-2.0
"""The GGML backend: model files, tokenizers, chat templates, sampling, architectures.

Nothing in this package imports trio or a device.
"""
