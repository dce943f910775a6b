# SPDX-License-Identifier: Apache-2.0
"""Bringing a model's bytes to one card.

Pieces are joined into messages, a few of which are under way at a time.  What is brought where is
said by ggml/architectures.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import trio

from spanker.actors.frame import Deferred
from spanker.actors.message import MapFile, Ok, Request, WriteBuffers
from spanker.device.base import Fill
from spanker.errors import LocalProtocolError, SpankerError
from spanker.ggml.architectures import llama

ItemT = TypeVar("ItemT")
Batch = list[tuple[str, llama.Piece]]
Job = Callable[[], object]
"""An async callable."""

# Buffers or pieces that one message is about.
BATCH_MAX = 64


def batched(items: Sequence[ItemT], most: int) -> Iterator[Sequence[ItemT]]:
    """The items in order, at most so many at a time."""
    for begin in range(0, len(items), most):
        yield items[begin : begin + most]


def _batches(uploads: Sequence[llama.Upload]) -> Iterator[Batch]:
    """Pieces in order, as many at a time as make one message of about UPLOAD_BYTES."""
    batch: Batch = []
    nbytes = 0
    for upload in uploads:
        for piece in upload.pieces:
            if batch and (nbytes + piece.nbytes > llama.UPLOAD_BYTES or len(batch) == BATCH_MAX):
                yield batch
                batch, nbytes = [], 0
            batch.append((upload.buffer, piece))
            nbytes += piece.nbytes
    if batch:
        yield batch


class _Fills:
    """The fills of one upload that have yet to be done, and the first error of any.

    The threads that do them, a card's or those in front of a stream, know nothing of the upload,
    and a message may reach them after it has ended, or lie about for longer than its file is open:
    messages carry only a number.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._left: dict[int, Fill] = {}
        self._running = 0
        self._ended = False
        self._all_done = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()

    def deferred(self, piece: llama.Piece) -> Deferred:
        """What a message carries for a piece."""
        number = next(self._numbers)
        self._left[number] = piece.fill
        return Deferred(piece.nbytes, functools.partial(self._fill, number))

    def _fill(self, number: int, out: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            fill = self._left.pop(number, None)
            if fill is None or self.error is not None:
                raise LocalProtocolError("the upload has ended, this piece is not wanted any more")
            self._running += 1
        try:
            fill(out)
        except BaseException as error:
            self._done(error)
            raise
        self._done(None)

    def _done(self, error: BaseException | None) -> None:
        with self._lock:
            if self.error is None:
                self.error = error
            self._running -= 1
            if self._ended and not self._running:
                self._trio.run_sync_soon(self._all_done.set)

    async def end(self) -> None:
        """Let none begin any more, and wait for those that run."""
        with self._lock:
            self._ended = True
            self._left.clear()
            running = self._running
        if running:
            # Shielded, as they use what the caller would close and free.
            with trio.CancelScope(shield=True):
                await self._all_done.wait()
        # The traceback refers to frames that refer to this: a cycle.
        self.error = None


Ask = Callable[[Request[Ok]], Awaitable[Ok]]
"""Has a card do something and waits until it has."""


async def upload(
    ask: Ask,
    uploads: Sequence[llama.Upload],
    handles: Mapping[str, int],
    at_once: int,
    sent: Callable[[int], None],
) -> None:
    """Write all pieces, up to `at_once` messages at a time.

    The bytes are made where they are needed: by threads of the card in its own memory where it is
    in this process, else in front of the stream.  An error of a piece's `fill` is raised itself.
    However this ends, cancellation included, no piece is being filled then, or will be.
    """
    batches = _batches(uploads)
    fills = _Fills()

    async def send() -> None:
        for batch in batches:
            request = WriteBuffers(
                tuple((handles[name], piece.offset, piece.nbytes) for name, piece in batch),
                buffers=tuple(fills.deferred(piece) for _, piece in batch),
            )
            try:
                await ask(request)
            except SpankerError:
                if fills.error is None:
                    raise
            if fills.error is not None:
                raise fills.error
            sent(sum(piece.nbytes for _, piece in batch))

    try:
        await run_all([send] * at_once)
    finally:
        await fills.end()


async def map_all(
    ask: Ask,
    file: int,
    uploads: Sequence[llama.Upload],
    handles: Mapping[str, int],
    sent: Callable[[int], None],
) -> None:
    """Have a card map what the packed copy with this descriptor has."""
    for batch in batched(uploads, BATCH_MAX):
        places = tuple([(handles[u.buffer], u.place or 0, u.nbytes) for u in batch])
        await ask(MapFile(file, places))
        sent(sum(upload.nbytes for upload in batch))


async def run_all(jobs: Sequence[Job]) -> None:
    """Run async callables together; the first error, alone, is what is raised."""
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(job: Job) -> None:
            try:
                await job()  # type: ignore[misc]
            except Exception as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        for job in jobs:
            nursery.start_soon(run, job)
    try:
        if errors:
            raise errors[0]
    finally:
        # The tracebacks refer to the frames that refer to the list: a cycle.
        errors.clear()
