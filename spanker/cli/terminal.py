# SPDX-License-Identifier: Apache-2.0
"""Writing to the terminal: streamed text, one-shot results, tables, progress, sizes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
import trio

from spanker.cli.errors import Failure, discard_stdout, printable

# rich is imported where it is used: it takes 30 ms, and the first token does not need it.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Advance = Callable[[int, int], None]

# Lines in a file or log need not be folded.
NO_TERMINAL_COLUMNS = 160
_REFRESH_S = 0.1


class Output:
    """Text to stdout as it comes.

    A reader that has stopped reading (a pager, a terminal after Ctrl-S) must not block the trio
    loop, or Ctrl-C would not be seen: a pipe or terminal that is writable takes PIPE_BUF bytes
    without blocking.
    """

    def __init__(self) -> None:
        self.is_tty = sys.stdout is not None and sys.stdout.isatty()
        self._fd: int | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            self._fd = sys.stdout.fileno()
        self._pollable = True

    async def write(self, text: str) -> None:
        """Write all of it; a checkpoint.  Raises BrokenPipeError when nobody reads any more."""
        await trio.lowlevel.checkpoint()
        if self._fd is None:
            if sys.stdout is not None:  # something that only looks like a file
                sys.stdout.write(text)
            return
        if self.is_tty:
            text = printable(text)
        data = memoryview(text.encode(sys.stdout.encoding, "replace"))
        while data:
            await self._writable(self._fd)
            with _writing_stdout(), contextlib.suppress(BlockingIOError):
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]

    async def _writable(self, fd: int) -> None:
        if self._pollable:
            try:
                await trio.lowlevel.wait_writable(fd)
            except PermissionError:
                self._pollable = False  # a plain file: always ready, and epoll refuses it


@contextlib.contextmanager
def _writing_stdout() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, BlockingIOError):
        raise
    except OSError as error:
        discard_stdout()
        raise Failure(f"cannot write to stdout: {error.strerror}") from error


def emit(text: str) -> None:
    """Print a result and a line end on stdout.  Blocks."""
    with _writing_stdout():
        click.echo(text)


def emit_json(value: object) -> None:
    """Print a result on stdout as one line of JSON."""
    emit(json.dumps(value))


def note(text: str = "") -> None:
    """Print a line on stderr."""
    click.echo(printable(text), err=True)


def note_wrapped(text: str) -> None:
    """Print a long line on stderr, broken at words on a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        text = textwrap.fill(text, width(stderr=True) - 1, subsequent_indent="  ")
    note(text)


# --- tables ----------------------------------------------------------------------------


def table(*columns: str) -> Table:
    """An empty table; a column whose name starts with > is right-aligned."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column[:1] == ">" else "left")
    return made


def facts(rows: list[tuple[str, str]]) -> Table:
    """Names and values."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column()
    for name, value in rows:
        made.add_row(name, printable(value))
    return made


def show(what: Table, *, stderr: bool = False) -> None:
    """Print a table."""
    with _writing_stdout():
        _console(stderr).print(what)


def width(*, stderr: bool = False) -> int:
    """Columns of the terminal; ample where there is none."""
    return _console(stderr).width


def _console(stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    columns = None if stream is None or stream.isatty() else NO_TERMINAL_COLUMNS
    return Console(stderr=stderr, width=columns, highlight=False, markup=False, emoji=False)


def fold(parts: str, columns: int) -> str:
    """Break a comma-separated text into lines at its commas only."""
    lines = [""]
    for part in parts.split(", "):
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        if lines[-1] and len(joined) >= columns:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


# --- numbers ---------------------------------------------------------------------------


def size(nbytes: float) -> str:
    """Bytes in three digits: 0 B, 999 B, 1.5 KiB, 104 MiB, 16 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1024
        del units[0]
    return f"{nbytes:.3g} {units[0]}"


def seconds(value: float) -> str:
    """38 ms, 1.2 s, 75 s."""
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 999.5 else f"{value:.0f} s"


def rate(value: float | None) -> str:
    """Something per second, where there was enough to tell."""
    if value is None:
        return "-"
    return f"{value:.1f}/s" if value < 999.5 else f"{value:,.0f}/s"


# --- progress --------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(what: str, *, counts_bytes: bool = True) -> Iterator[Advance | None]:
    """A bar on stderr, gone at the end; `advance(done, total)` moves it.  None without a terminal.

    No thread redraws it: only `advance` does.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    import rich.progress
    from rich.console import Console

    numbers: rich.progress.ProgressColumn = (
        rich.progress.DownloadColumn(binary_units=True)
        if counts_bytes
        else rich.progress.MofNCompleteColumn()
    )
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        numbers,
        rich.progress.TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(printable(what), visible=False)
    drawn = -_REFRESH_S

    def advance(done: int, total: int) -> None:
        nonlocal drawn
        bar.update(task, completed=done, total=total, visible=True)
        if time.monotonic() - drawn >= _REFRESH_S or done == total:
            drawn = time.monotonic()
            bar.refresh()

    with bar:
        yield advance
