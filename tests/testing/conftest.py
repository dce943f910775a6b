# SPDX-License-Identifier: Apache-2.0
"""What the tests of failing fleets share."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spanker.testing import write_tiny_llama


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for prompts and answers that take a while."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "long.gguf", context=2048)


def _held() -> tuple[set[threading.Thread], set[str], int]:
    """Python threads, descriptors and where they lead, and the number of native threads."""
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            descriptors.add(f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}")
    return set(threading.enumerate()), descriptors, len(os.listdir("/proc/self/task"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A fleet gives back its threads, native ones too, and descriptors, however it ends."""
    gc.collect()
    threads, descriptors, native = _held()
    yield
    gc.collect()
    # A thread that was joined is listed a moment longer.
    deadline = time.monotonic() + 2
    while _held()[2] > native and time.monotonic() < deadline:
        time.sleep(0.001)
    now = _held()
    assert now[0] - threads == set()
    assert now[1] - descriptors == set()
    assert now[2] <= native
