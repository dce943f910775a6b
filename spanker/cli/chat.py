# SPDX-License-Identifier: Apache-2.0
"""`spanker chat`: a conversation, one line a message."""

from __future__ import annotations

import contextlib
import signal
import sys
import time

import attrs
import click
import trio

from spanker.cli import terminal
from spanker.cli.commands import TEXT_BYTES_MAX
from spanker.cli.errors import Failure, Interrupted
from spanker.cli.interrupts import Interrupts, run_async, signals_raise
from spanker.cli.opening import open_model
from spanker.cli.options import FleetOptions, SamplingOptions
from spanker.cli.run import check
from spanker.errors import RequestError
from spanker.fleet import Model

try:
    import readline
except ImportError:  # an interpreter built without it: plain lines then
    readline = None  # type: ignore[assignment]

PROMPT = "> "


def chat(where: FleetOptions, how: SamplingOptions, system: str | None) -> None:
    check(how)

    async def job(interrupts: Interrupts) -> None:
        async with open_model(where) as opened:
            await _Conversation(opened.model, how, system, interrupts).run()

    run_async(job)


class _Conversation:
    def __init__(
        self, model: Model, how: SamplingOptions, system: str | None, interrupts: Interrupts
    ) -> None:
        self._model = model
        self._options = attrs.asdict(how)
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)
        self._interrupts = interrupts
        self._out = terminal.Output()
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    async def run(self) -> None:
        if self._interactive:
            terminal.note(f"{self._model.name}: /clear forgets, /exit or Ctrl-D ends")
        while (line := await self._next_line()) is not None:
            if line in ("/exit", "/quit"):
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
        if not self._interactive:
            return self._guarded(_read_line)
        while True:
            try:
                line = self._guarded(_ask)
            except Interrupted as interrupted:
                terminal.note()
                if interrupted.number == signal.SIGINT and _typed():
                    continue
                self._interrupts.stop(interrupted.number)
                await trio.lowlevel.checkpoint()
                return None
            if line is None:
                terminal.note()
            return line

    async def _turn(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        answer = ""
        stopping = self._interrupts.stoppable() if self._interactive else contextlib.nullcontext()
        try:
            with stopping:
                begin = time.perf_counter()
                generation = self._model.chat(messages, **self._options)
                try:
                    async for token in generation:
                        await self._out.write(token.text)
                finally:
                    generation.close()
                    answer = generation.text
            await self._out.write("\n")
        except RequestError as error:
            if not self._interactive:
                raise
            Failure(f"{error}; or forget the conversation with /clear").show()
            return
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
