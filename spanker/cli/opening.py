# SPDX-License-Identifier: Apache-2.0
"""From options to a loaded model: what run, chat, eval and bench begin with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from spanker.cli.errors import Failure
from spanker.cli.options import FleetOptions
from spanker.cli.terminal import note, progress_bar
from spanker.fleet import Fleet, Model, open_fleet
from spanker.ggml import catalog
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer
from spanker.sched.limits import DEFAULT_CONTEXT

if TYPE_CHECKING:
    from spanker.actors.trace import Trace


@attrs.frozen
class Opened:
    """A fleet with the model on it, and how long that took to load."""

    fleet: Fleet
    model: Model
    load_s: float


@attrs.frozen
class Inspected:
    """What a model file says, read without loading it."""

    path: Path
    gguf: GGUFFile
    model: llama.LlamaModel

    def tokenizer(self) -> Tokenizer:
        """Takes tens of milliseconds."""
        return Tokenizer.from_metadata(self.gguf.metadata)


def inspect(model: str) -> Inspected:
    """Read the header of a model by name or path; the file is closed again."""
    path = catalog.resolve(model)
    with GGUFFile(path) as gguf:
        return Inspected(path, gguf, llama.read_model(gguf))


def check_trace(path: str | None) -> None:
    """Raise, before anything else is done, where no trace could be written.  A file that is there
    keeps its content for now."""
    if path is not None:
        try:
            with open(path, "a"):
                pass
        except OSError as error:
            raise Failure(f"cannot write the trace {path}: {error.strerror}") from error


@contextlib.asynccontextmanager
async def maybe_trace(fleet: Fleet, path: str | None) -> AsyncIterator[Trace | None]:
    """A trace of what is done within the block, where one is wanted."""
    if path is None:
        yield None
        return
    async with fleet.trace(path) as trace:
        yield trace


@contextlib.asynccontextmanager
async def open_model(where: FleetOptions, ctx: int | None = None) -> AsyncIterator[Opened]:
    """Open the cards and load the model, with a progress bar; `ctx` overrides that of `where`.

    The cards get KV memory for one sequence, which is all that a command runs at a time.
    """
    async with open_fleet(where.cards, profile=where.profile, throttle=where.throttle) as fleet:
        fleet.events.listen(lambda event: note(str(event)))
        inspected = inspect(where.model)
        context = ctx or where.ctx or min(inspected.model.shape.context, DEFAULT_CONTEXT)
        begin = time.perf_counter()
        with progress_bar(f"loading {inspected.path.name}") as progress:
            model = await fleet.load(
                inspected.path,
                plan=where.plan,
                ctx=context,
                prompt_chunk=where.prompt_chunk,
                kv_tokens=context,
                progress=progress,
            )
        yield Opened(fleet, model, time.perf_counter() - begin)
