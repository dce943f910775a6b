# SPDX-License-Identifier: Apache-2.0
"""`spanker chat`: a conversation, one line a message."""

from __future__ import annotations

import contextlib
import signal
import sys

import attrs
import trio

from spanker.cli import terminal
from spanker.cli.commands import TEXT_BYTES_MAX
from spanker.cli.errors import Failure, Interrupted
from spanker.cli.generation import check
from spanker.cli.interrupts import Interrupts, run_async, signals_raise
from spanker.cli.opening import open_model
from spanker.cli.options import FleetOptions, SamplingOptions
from spanker.errors import RequestError
from spanker.fleet import Model

with contextlib.suppress(ImportError):  # without it, lines are just not editable
    import readline

PROMPT = "> "


def chat(where: FleetOptions, how: SamplingOptions, system: str | None) -> None:
    check(how)

    async def job(interrupts: Interrupts) -> None:
        async with open_model(where) as opened:
            await _Conversation(opened.model, how, system, interrupts).run()

    run_async(job)


class _Conversation:
    """Interactive on a terminal; otherwise a script's messages, where any error is the end."""

    def __init__(
        self, model: Model, how: SamplingOptions, system: str | None, interrupts: Interrupts
    ) -> None:
        self._model = model
        self._how = how
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)
        self._interrupts = interrupts
        self._out = terminal.Output()
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    async def run(self) -> None:
        if self._interactive:
            terminal.note(f"{self._model.name}. /clear forgets the conversation, /exit ends it.")
        while (line := await self._next_line()) is not None:
            if line == "/exit":
                return
            if line == "/clear":
                self._messages = list(self._start)
            elif line:
                await self._turn(line)

    async def _next_line(self) -> str | None:
        """The next message, or None at the end.

        Blocks the trio loop, which has nothing else to do: the cards are idle.
        """
        await trio.lowlevel.checkpoint()
        while True:
            try:
                with signals_raise():
                    return _ask() if self._interactive else _read_line()
            except Interrupted as interrupted:
                if self._interactive and interrupted.number == signal.SIGINT and _half_typed():
                    terminal.note()
                    continue
                self._interrupts.stop(interrupted.number)
                await trio.lowlevel.checkpoint()

    async def _turn(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        try:
            generation = self._model.chat(messages, **attrs.asdict(self._how))
            async with generation:
                with self._interrupts.stoppable() if self._interactive else trio.CancelScope():
                    async for token in generation:
                        await self._out.write(token.text)
                await self._out.write("\n")
        except RequestError as error:
            if not self._interactive:
                raise
            Failure(f"{error}; or start anew with /clear").show()
            return
        if generation.text:
            self._messages = [*messages, {"role": "assistant", "content": generation.text}]
        if self._interactive and generation.finish_reason == "length":
            terminal.note(f"(cut off after {self._how.max_tokens} tokens: see --max-tokens)")
        elif self._interactive and generation.finish_reason == "context":
            terminal.note("(cut off: the context is full; /clear, or start with a larger --ctx)")


def _ask() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        if sys.stdout is not None and sys.stdout.isatty():
            return input(PROMPT).strip()
        # input() would put its prompt among the answers.
        print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.strip() if line else None
    except EOFError:
        terminal.note()
        return None
    except UnicodeDecodeError:
        Failure("that line was not UTF-8 text: type it again").show()
        return ""


def _half_typed() -> bool:
    """Whether the interrupted line had some text: then Ctrl-C clears the line and no more."""
    return "readline" in globals() and bool(readline.get_line_buffer())


def _read_line() -> str | None:
    """A line from a pipe or file; None at its end."""
    if sys.stdin is None:
        return None
    data = sys.stdin.buffer.readline(TEXT_BYTES_MAX + 1)
    if len(data) > TEXT_BYTES_MAX:
        raise Failure(f"a message has more than {TEXT_BYTES_MAX >> 20} MiB: shorten it")
    try:
        return data.decode().strip() if data else None
    except UnicodeDecodeError:
        raise Failure("a message on stdin is not UTF-8 text: convert it") from None
