# SPDX-License-Identifier: Apache-2.0
"""Running the real command in a process of its own, with a terminal where a test needs one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

COMMAND = (sys.executable, "-m", "spanker")
TIMEOUT_S = 60.0
# What the one second of a prompt exit may become on a machine that is busy with other things.
EXIT_S = 1.0


def spanker(
    *args: str, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end without a terminal."""
    return subprocess.run(
        (*COMMAND, *args),
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, **(env or {})},
    )


def good(
    *args: str, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end, which must be a success without complaints."""
    done = spanker(*args, stdin=stdin, env=env)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr and b"Warning" not in done.stderr
    return done


@attrs.frozen
class Done:
    """How one call of a batch ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one line of JSON that a successful call printed."""
        assert self.code == 0 and self.out.count("\n") == 1, self
        return json.loads(self.out)


_BATCH = """
import io, json, sys
from spanker.cli import main
ours, results = sys.stdout, []
for args, stdin in json.load(sys.stdin):
    sys.stdin = io.TextIOWrapper(io.BytesIO(bytes.fromhex(stdin)), "utf-8")
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        main(args)
    except SystemExit as end:
        results.append((end.code, sys.stdout.getvalue(), sys.stderr.getvalue()))
json.dump(results, ours)
"""


def batch(*calls: tuple[str, ...] | tuple[tuple[str, ...], bytes]) -> list[Done]:
    """Many calls of main(), each args or (args, stdin), in one other process: that is quicker."""
    listed = [call if call and isinstance(call[0], tuple) else (call, b"") for call in calls]
    done = subprocess.run(
        (sys.executable, "-c", _BATCH),
        input=json.dumps([(args, stdin.hex()) for args, stdin in listed]),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [Done(*result) for result in json.loads(done.stdout)]


class Terminal:
    """The screen end of a pseudo-terminal: what a process wrote to it, and keys to press."""

    def __init__(self, columns: int = 80) -> None:
        self._screen, self.device = pty.openpty()
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.text = ""

    def wait_for(self, text: str, since: int = 0) -> None:
        """Read until `text` appears after the first `since` characters."""
        self._wait(lambda: text in self.text[since:], repr(text))

    def wait_for_more(self, characters: int) -> None:
        """Read until so many more characters have appeared."""
        enough = len(self.text) + characters
        self._wait(lambda: len(self.text) >= enough, f"{characters} more characters")

    def _wait(self, arrived: Callable[[], bool], what: str) -> None:
        give_up = time.monotonic() + TIMEOUT_S
        while not arrived():
            assert time.monotonic() < give_up, f"{what} never appeared in {self.text!r}"
            self._read(0.05)

    def drain(self) -> None:
        """Take in what a process that has ended wrote last."""
        while self._read(0.05):
            pass

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._screen], [], [], timeout_s)[0]:
            return False
        self.text += os.read(self._screen, 65536).decode(errors="replace")
        return True

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self.device)

    def close(self) -> None:
        os.close(self._screen)
        os.close(self.device)


@contextlib.contextmanager
def terminal(columns: int = 80) -> Iterator[Terminal]:
    made = Terminal(columns)
    try:
        yield made
    finally:
        made.close()


class Running:
    """A process under way in a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def signal_and_wait(self, number: int) -> float:
        """Send a signal; seconds until the process has ended."""
        begin = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(TIMEOUT_S)
        return time.monotonic() - begin

    def survivors(self) -> list[int]:
        """Processes left of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if entry.name.isdigit() and int(fields[3]) == self.process.pid:
                    found.append(int(entry.name))
        return found


@contextlib.contextmanager
def started(
    *args: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    command: tuple[str, ...] = COMMAND,
    env: dict[str, str] | None = None,
) -> Iterator[Running]:
    """Start the command; it is killed at the end if it still runs."""
    # Where the tests themselves run with SIGINT ignored (a background job), the process must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            (*command, *args),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", **(env or {})},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield Running(process)
        finally:
            if process.poll() is None:
                process.kill()
