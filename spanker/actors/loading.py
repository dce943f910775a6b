# SPDX-License-Identifier: Apache-2.0
"""Bringing a model's bytes to one card.

Pieces are joined into messages, and a thread fills the next message while the last one is on its
way; for modelled cards, which cannot wait for threads, that is done here and now.  What is brought
where is said by ggml/architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import trio

from spanker.actors.client import CardClient
from spanker.actors.message import WriteBuffers
from spanker.ggml.architectures import llama

ItemT = TypeVar("ItemT")
Batch = list[tuple[str, llama.Piece]]

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


async def upload(
    client: CardClient,
    uploads: Sequence[llama.Upload],
    handles: Mapping[str, int],
    sent: Callable[[int], None],
) -> None:
    """Write all pieces.  One staging buffer is filled in a thread, without the interpreter's lock
    where it matters, while the other one is on its way."""
    ready, filled = trio.open_memory_channel[WriteBuffers](0)

    async def fill_all() -> None:
        staging = [np.empty(0, np.uint8)] * 2
        async with ready:
            for batch in _batches(uploads):
                nbytes = sum(piece.nbytes for _, piece in batch)
                if staging[0].size < nbytes:
                    staging[0] = np.empty(max(nbytes, llama.UPLOAD_BYTES), np.uint8)
                await _in_thread(packer, _fill, batch, staging[0])
                await ready.send(_request(batch, handles, staging[0][:nbytes].data))
                staging.reverse()

    async def send_all() -> None:
        async for request in filled:
            await client.request(request)
            sent(len(request.buffers[0]))

    # trio's own threads would stay for a while; this one ends with the load.
    with ThreadPoolExecutor(1, thread_name_prefix="spanker-packer") as packer:
        # Closed only then: closed by a failing `send_all` it would fail `fill_all` too.
        with filled:
            await run_all([fill_all, send_all])


async def upload_at_once(
    client: CardClient,
    uploads: Sequence[llama.Upload],
    handles: Mapping[str, int],
    sent: Callable[[int], None],
    *,
    hollow: bool,
) -> None:
    """The same without a thread; for a hollow card with zeros that nobody looks at."""
    staging = np.empty(0, np.uint8)
    for batch in _batches(uploads):
        nbytes = sum(piece.nbytes for _, piece in batch)
        if staging.size < nbytes:
            staging = np.zeros(max(nbytes, llama.UPLOAD_BYTES), np.uint8)
        if not hollow:
            _fill(batch, staging[:nbytes])
        await client.request(_request(batch, handles, staging[:nbytes].data))
        sent(nbytes)


def _fill(batch: Batch, out: npt.NDArray[np.uint8]) -> None:
    at = 0
    for _, piece in batch:
        piece.fill(out[at : at + piece.nbytes])
        at += piece.nbytes


def _request(batch: Batch, handles: Mapping[str, int], data: memoryview) -> WriteBuffers:
    writes = tuple((handles[name], p.offset, p.nbytes) for name, p in batch)
    return WriteBuffers(writes, buffers=(data,))


async def _in_thread(pool: ThreadPoolExecutor, work: Callable[..., None], *args: object) -> None:
    """Run something of a few milliseconds in a thread of the pool."""
    done, token = trio.Event(), trio.lowlevel.current_trio_token()
    future = pool.submit(work, *args)
    future.add_done_callback(lambda _: token.run_sync_soon(done.set))
    # Shielded, as the thread is writing into what the caller would free.
    with trio.CancelScope(shield=True):
        await done.wait()
    await trio.lowlevel.checkpoint_if_cancelled()
    future.result()


async def run_all(jobs: Sequence[Callable[[], object]]) -> None:
    """Run async callables together; the first error, alone, is what is raised."""
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(job: Callable[[], object]) -> None:
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
