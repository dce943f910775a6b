# SPDX-License-Identifier: Apache-2.0
"""Threads for short work: in order, errors raised, cancellation waits, an end that leaves none."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing
from waiting import until

from spanker.actors.threads import WorkThreads


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("spanker-test")]


@pytest.fixture
def none_left() -> Iterator[None]:
    yield
    assert alive() == []


@pytest.fixture
async def threads(none_left: None) -> AsyncIterator[WorkThreads]:
    made = WorkThreads("spanker-test", 3)
    with trio.fail_after(10):
        yield made
    made.close()


async def test_work_is_done_in_another_thread_and_waited_for(threads: WorkThreads) -> None:
    where: list[threading.Thread] = []
    with trio.testing.assert_checkpoints():
        await threads.run(lambda: where.append(threading.current_thread()))
    assert where[0] is not threading.current_thread()
    assert where[0].name.startswith("spanker-test")


async def test_at_most_so_many_run_side_by_side(threads: WorkThreads) -> None:
    together = threading.Barrier(3)
    running = most = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(5)
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(threads.run, work)
    assert most == 3 and len(alive()) == 3


async def test_one_thread_works_in_the_order_asked(none_left: None) -> None:
    one = WorkThreads("spanker-test", 1)
    done: list[int] = []
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one.run, lambda number=number: done.append(number))
            await trio.lowlevel.checkpoint()
    assert done == list(range(20))
    one.close()


async def test_what_work_raises_is_raised_and_the_thread_goes_on(threads: WorkThreads) -> None:
    error = OSError(5, "disk")

    def fail() -> None:
        raise error

    for _ in range(5):
        with pytest.raises(OSError, match="disk") as caught:
            await threads.run(fail)
        assert caught.value is error
    await threads.run(lambda: None)


async def test_an_error_keeps_nothing_alive(threads: WorkThreads) -> None:
    """What the work holds, an open file perhaps, goes with its error, without a collection."""

    class Held:
        pass

    async def failing() -> weakref.ref[Held]:
        held = Held()

        def fail() -> None:
            raise OSError(held.__class__.__name__)

        with pytest.raises(OSError, match="Held"):
            await threads.run(fail)
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        held = await failing()
        # The thread forgets its last work when it gets the next.
        await threads.run(lambda: None)
        assert held() is None
    finally:
        gc.enable()


async def test_cancellation_waits_for_the_work(threads: WorkThreads) -> None:
    started, go_on = threading.Event(), threading.Event()
    ended = False

    def work() -> None:
        nonlocal ended
        started.set()
        go_on.wait(5)
        ended = True

    scope = trio.CancelScope()
    left = False

    async def run() -> None:
        nonlocal left
        with scope:
            await threads.run(work)
        left = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until(started.is_set)
        scope.cancel()
        await trio.sleep(0.02)
        assert not left and not ended
        go_on.set()
    assert scope.cancelled_caught and ended


async def test_cancellation_may_cut_the_work_short(threads: WorkThreads) -> None:
    started, cut = threading.Event(), threading.Event()
    where: list[threading.Thread] = []

    def work() -> None:
        started.set()
        assert cut.wait(20)

    def cut_short() -> None:
        where.append(threading.current_thread())
        cut.set()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, work, cut_short)
            await until(started.is_set)
            scope.cancel()
    assert scope.cancelled_caught and where == [threading.current_thread()]
    # Work that ends by itself is not.
    await threads.run(lambda: None, cut_short)
    assert len(where) == 1


async def test_work_of_a_cancelled_task_does_not_begin(threads: WorkThreads) -> None:
    done: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await threads.run(lambda: done.append(1))
    assert scope.cancelled_caught and done == [] and alive() == []


async def test_threads_start_only_for_work_and_end_with_close(threads: WorkThreads) -> None:
    assert alive() == []
    await threads.run(lambda: None)
    assert len(alive()) == 1
    await threads.run(lambda: None)
    assert len(alive()) == 1
    for _ in range(3):
        threads.close()
        assert alive() == []
    with pytest.raises(RuntimeError):
        await threads.run(lambda: None)


async def test_close_blocks_nobody_while_work_is_done(threads: WorkThreads) -> None:
    started, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work() -> None:
        started.set()
        go_on.wait(5)
        done.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.run, work)
        await until(started.is_set)
        begin = time.monotonic()
        threads.close()
        threads.close()
        assert time.monotonic() - begin < 2 and not done
        go_on.set()
    # With the work its thread has ended.
    assert done == [1] and alive() == []
