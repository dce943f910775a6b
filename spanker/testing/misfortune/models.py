# SPDX-License-Identifier: Apache-2.0
"""The models of scenarios: as small as they can be and still be divided in every way.

Their files are written when they are first needed, into a directory that goes with the process.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spanker.sched.plan import ModelShape
from spanker.testing.models import write_tiny_llama

CONTEXT = 128
# Words in two chunks of the vocabulary, so that two cards have some.
VOCABULARY = 272

MODELS: Mapping[str, Mapping[str, Any]] = {
    "small": {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 64},
    # A matrix of three heads of its own divides unevenly; untied, there is an output matrix.
    "uneven": {
        "layers": 1,
        "hidden": 96,
        "heads": 3,
        "kv_heads": 3,
        "ffn": 96,
        "format": "q8_0",
        "tied": False,
    },
    "deep": {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64, "format": "q5_1"},
    # Rows are whole blocks of 256.
    "blocks": {
        "layers": 1,
        "hidden": 256,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 256,
        "format": "q4_k",
    },
    # Float weights: float32 is gathered where others have Q8.
    "float": {"layers": 1, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 32, "format": "f16"},
}


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="spanker-misfortune-")


@functools.cache
def path_of(name: str) -> Path:
    """The file of a model."""
    options: dict[str, Any] = {"vocabulary": VOCABULARY, "context": CONTEXT, "seed": len(name)}
    return write_tiny_llama(Path(_directory().name) / f"{name}.gguf", **options, **MODELS[name])


@functools.cache
def shape_of(name: str) -> ModelShape:
    """The sizes of a model."""
    from spanker.ggml.architectures import llama
    from spanker.ggml.gguf import GGUFFile

    with GGUFFile(path_of(name)) as gguf:
        return llama.read_model(gguf).shape
