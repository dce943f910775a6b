# SPDX-License-Identifier: Apache-2.0
"""From options to a loaded model: what run, chat, eval and bench begin with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

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
    from spanker.testing.fault_plan import FaultPlan
    from spanker.testing.injection import Injection

HANG_TIMEOUT_S = 10.0


@attrs.frozen
class Opened:
    """A fleet with the model on it, how long that took to load, when the fleet was there (`open_s`,
    by trio's clock), and what happens to it, if anything is to."""

    fleet: Fleet
    model: Model
    load_s: float
    open_s: float
    injection: Injection | None = None


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
async def open_model(
    where: FleetOptions,
    ctx: int | None = None,
    *,
    hang_timeout_s: float = HANG_TIMEOUT_S,
    faults: FaultPlan | None = None,
) -> AsyncIterator[Opened]:
    """Open the cards and load the model, with a progress bar; `ctx` overrides that of `where`, and
    `faults` are what is to happen to the cards.

    The cards get KV memory for one sequence, which is all that a command runs at a time.
    """
    async with _open_cards(where, hang_timeout_s, faults) as (fleet, injection):
        open_s = trio.current_time()
        fleet.events.listen(lambda event: note(str(event)))
        inspected = inspect(where.model)
        context = ctx or where.ctx or min(inspected.model.shape.context, DEFAULT_CONTEXT)
        begin = trio.current_time()
        with progress_bar(f"loading {inspected.path.name}") as progress:
            model = await fleet.load(
                inspected.path,
                plan=where.plan,
                ctx=context,
                prompt_chunk=where.prompt_chunk,
                kv_tokens=context,
                kv_copies=where.kv_copies,
                progress=progress,
            )
        yield Opened(fleet, model, trio.current_time() - begin, open_s, injection)


@contextlib.asynccontextmanager
async def _open_cards(
    where: FleetOptions, hang_timeout_s: float, faults: FaultPlan | None
) -> AsyncIterator[tuple[Fleet, Injection | None]]:
    options: dict[str, Any] = {
        "profile": where.profile,
        "throttle": where.throttle,
        "hang_timeout_s": hang_timeout_s,
        "audit_every": where.audit,
        "rebalance": where.rebalance,
    }
    if faults is None:
        async with open_fleet(where.cards, **options) as fleet:
            yield fleet, None
    else:
        from spanker.testing.injection import faulty_fleet

        async with faulty_fleet(where.cards, faults, **options) as opened:
            yield opened
