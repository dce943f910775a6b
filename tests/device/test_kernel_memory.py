# SPDX-License-Identifier: Apache-2.0
"""Memory that is mapped from a card which goes: whoever touches it lives on.

A file that is cut short stands for the card: its pages answer SIGBUS, as those of a card that is
gone do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from spanker.device import uapi
from spanker.native import ffi

NBYTES = 64 << 12


def view(at: object) -> np.ndarray:
    return np.frombuffer(ffi.buffer(ffi.cast("char *", at), NBYTES), np.uint8)


@pytest.fixture
def fd(tmp_path: Path) -> int:
    fd = os.open(tmp_path / "card", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 2 * NBYTES)
    return fd


def test_who_touches_memory_of_a_card_that_is_gone_goes_on(fd: int) -> None:
    gone, there = (uapi.LINUX.map(fd, offset, NBYTES) for offset in (NBYTES, 0))
    view(gone)[:] = view(there)[:] = 7
    os.ftruncate(fd, NBYTES)
    assert not view(gone).any()
    view(gone)[-5:] = 1
    assert view(there).min() == 7
    for at in (gone, there):
        uapi.LINUX.unmap(at, NBYTES)
    os.close(fd)


def test_threads_that_write_while_the_card_goes_go_on(fd: int) -> None:
    at = [uapi.LINUX.map(fd, i * NBYTES, NBYTES) for i in range(2)]
    begun, stop = threading.Barrier(5), threading.Event()

    def write(number: int) -> None:
        begun.wait()
        while not stop.is_set():
            view(at[number % 2])[:] = number

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    os.ftruncate(fd, 0)
    for mapped in at:
        view(mapped)[:] = 9
    stop.set()
    for thread in threads:
        thread.join()
    for mapped in at:
        uapi.LINUX.unmap(mapped, NBYTES)
    os.close(fd)


# What a process does that has a mapping of a card, and one of its own that is cut short.
OTHERS = """
import mmap, os, signal, sys
from spanker.device import uapi
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8192)
at = uapi.LINUX.map(fd, 0, 4096)
own = mmap.mmap(fd, 4096, offset=4096)
if sys.argv[2] == "after": uapi.LINUX.unmap(at, 4096)
os.ftruncate(fd, 0)
if sys.argv[2] == "sent": os.kill(os.getpid(), signal.SIGBUS)
own[0]
"""


@pytest.mark.parametrize("how", ["before", "after", "sent"])
@pytest.mark.parametrize("faulthandler", ["0", "1"])
def test_other_bus_errors_end_the_process_as_ever(
    how: str, faulthandler: str, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OTHERS, tmp_path / "f", how],
        env={**os.environ, "PYTHONFAULTHANDLER": "" if faulthandler == "0" else "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in ended.stderr) == (faulthandler == "1")
