# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test directories share."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spanker.ggml import catalog

if TYPE_CHECKING:
    from crowd import Answers


def pytest_collection_finish() -> None:
    """Fifteen thousand tests are some million objects, which every later collection would look at:
    a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The catalogue's smallest real model, pulled if the cache does not have it."""
    return catalog.pull("smollm2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of crowd.py: small, and with something of everything to share."""
    from spanker.testing import write_tiny_llama

    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_tiny_llama(path, layers=3, hidden=128, heads=8, kv_heads=4, ffn=256)


@pytest.fixture(scope="session")
def expected(tiny: Path) -> Answers:
    """What a crowd gets of a fleet of one card, to which nothing happens."""
    import trio
    from crowd import Crowd

    import spanker

    async def main() -> Answers:
        async with spanker.open_fleet(1) as fleet:
            return await Crowd(await fleet.load(tiny)).run()

    return trio.run(main)


@pytest.fixture(scope="session")
def firmware() -> Path:
    """The firmware of RISC-V cards, from the sources as they are."""
    return _built()


@pytest.fixture(scope="session")
def card_process() -> Path:
    """The same as a program of this machine, with sanitizers."""
    if not shutil.which(os.environ.get("CC", "cc").split()[0]):
        pytest.skip("needs a C compiler")
    return _built("--here")


def _built(*options: str) -> Path:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "tools/build_firmware.py", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / done.stdout.split()[-1]


def _held() -> tuple[set[threading.Thread], frozenset[str], int]:
    """Python threads, descriptors and where they lead, and the number of native threads."""
    from spanker.testing.assertions import open_descriptors

    threads = set(threading.enumerate())
    return threads, open_descriptors(), len(os.listdir("/proc/self/task"))


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """A fleet gives back its threads, native ones too, and descriptors, however it ends."""
    threads, descriptors, native = _held()

    def extra() -> tuple[set[threading.Thread], frozenset[str], int]:
        now = _held()
        return now[0] - threads, now[1] - descriptors, max(now[2] - native, 0)

    yield
    nothing: tuple[set[threading.Thread], frozenset[str], int] = (set(), frozenset(), 0)
    if extra() != nothing:
        gc.collect()
    # A thread that was joined is listed a moment longer.
    deadline = time.monotonic() + 2
    while extra() != nothing and time.monotonic() < deadline:
        time.sleep(0.001)
    assert extra() == nothing
