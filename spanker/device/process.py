# SPDX-License-Identifier: Apache-2.0
"""The process of a card: how it is started, what it has to say at its end, and that it ends.

It inherits one socket for requests and one for completions, and nothing else.  It ends when its
sockets do, which is when this process does; the card asks the system to be killed with the thread
that has started it, should it be stopped or stuck then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess

import attrs

from spanker.errors import CardLostError

# What it takes to end by itself; then it is killed.
_END_S = 0.5
_KILLED_S = 5.0
# Of what it has said on its standard error: so many of the last lines, and no more characters.
_LINES_MAX, _TEXT_MAX = 4, 400


@attrs.frozen
class Launch:
    """What to run: a command that takes the options of a card process, and inherited `files`."""

    command: tuple[str, ...]
    files: tuple[int, ...] = ()


class CardProcess:
    """One running card process.  `control` and `events` are the host's ends of its streams."""

    def __init__(
        self,
        number: int,
        launch: Launch,
        ddr_bytes: int,
        isa: str | None,
    ) -> None:
        self._number = number
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self.control, control = socket.socketpair()
            undo.callback(self.control.close)
            theirs.callback(control.close)
            self.events, events = socket.socketpair()
            undo.callback(self.events.close)
            theirs.callback(events.close)
            # What does not fit into the pipe any more is dropped: nobody waits for a reader.
            self._said, said = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._said)
            theirs.callback(os.close, said)
            command = [
                *launch.command,
                f"--control={control.fileno()}",
                f"--events={events.fileno()}",
                f"--serial={number}",
                f"--ddr={ddr_bytes}",
                *([f"--isa={isa}"] if isa else []),
            ]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=[control.fileno(), events.fileno(), *launch.files],
                    start_new_session=True,  # Ctrl-C is for the host, which ends it in order
                )
            except OSError as error:
                raise CardLostError(
                    f"card {number}: {launch.command[0]} cannot be started: {error.strerror}",
                    card=number,
                ) from error
            undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Have it end at once, while another thread waits for its answer, which finds that out.
        Does not block."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)

    def end(self, at_once: bool = False) -> str:
        """Have it end, and let go of everything but the sockets; how it has ended.

        Blocks until it is gone: a moment, half a second where it must be killed.  `at_once` where
        there is no sense in asking.  Idempotent.
        """
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        if self._said < 0:
            return ""
        code = self._wait(0 if at_once else _END_S)
        killed = code is None
        if killed:
            self._process.kill()
            code = self._wait(_KILLED_S)
        said, self._said = self._said, -1
        try:
            with open(said, "rb") as file:
                text = (file.read() or b"").decode("utf-8", "replace")
        except OSError:
            text = ""
        if killed:
            how = "it was killed"
        elif code is not None and code < 0:
            how = f"its process was ended by {_signal_name(-code)}"
        else:
            how = f"its process has ended with status {code}"
        last = " / ".join(text.strip().splitlines()[-_LINES_MAX:])[-_TEXT_MAX:]
        return f"{how}, and said: {last}" if last else how

    def _wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End it, and close the sockets.  Idempotent."""
        self.end()
        self.control.close()
        self.events.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
