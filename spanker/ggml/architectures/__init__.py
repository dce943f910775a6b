# SPDX-License-Identifier: Apache-2.0
"""One module per model architecture: what it reads from a GGUF, and its card programs."""
