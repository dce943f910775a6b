# SPDX-License-Identifier: Apache-2.0
"""What ends a command before its time: errors as one line, and signals.

Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any, NoReturn

import click

from spanker.errors import SpankerError

# What a terminal would take for a command of its own, should a file or a model contain it.
_CONTROLS = {c: "�" for c in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(c) not in "\t\n\r"}


class Failure(click.ClickException):
    """Ends the command with exit code 1 and its message as one line on stderr."""

    def show(self, file: IO[Any] | None = None) -> None:
        line = printable(" ".join(self.message.split()))
        click.echo(f"spanker: error: {line}", file=file, err=file is None)


class Interrupted(BaseException):
    """A signal ended the command.  Raised only once nothing is left running."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.number = number


def raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """A signal handler for synchronous code."""
    raise Interrupted(number)


def printable(text: str) -> str:
    """The text without control characters, save tab and line ends."""
    return text.translate(_CONTROLS)


def discard_stdout() -> None:
    """Let what is still buffered for stdout go nowhere: flushing it at exit would fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into a `Failure`, a quiet exit or an `Interrupted`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        discard_stdout()
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None
    except Exception as error:
        cause = _spanker_error(error)
        if cause is None:
            raise
        raise Failure(str(cause)) from error


def _spanker_error(error: BaseException) -> SpankerError | None:
    """The error itself, or the first of a group that holds nothing else."""
    if isinstance(error, SpankerError):
        return error
    parts = [_spanker_error(e) for e in getattr(error, "exceptions", ())]
    return parts[0] if parts and None not in parts else None
