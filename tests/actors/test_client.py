# SPDX-License-Identifier: Apache-2.0
"""The coordinator's end of a channel: replies find who asked, and everyone hears of its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from waiting import until

from spanker.actors.channel import Channel, memory_channel_pair, unix_channel_pair
from spanker.actors.client import CardClient
from spanker.actors.message import (
    Abort,
    AllocBuffers,
    BufferData,
    BuffersAllocated,
    Describe,
    Failed,
    FreeBuffer,
    Message,
    Ok,
    ReadBuffer,
    RunLent,
    StepDone,
    WriteBuffers,
)
from spanker.device.base import CardDevice
from spanker.errors import (
    CardCommandError,
    CardHungError,
    CardLostError,
    LocalProtocolError,
    RemoteProtocolError,
    SpankerError,
)

PAIRS: dict[str, Callable[[], tuple[Channel, Channel]]] = {
    "memory": memory_channel_pair,
    "unix": unix_channel_pair,
}


@asynccontextmanager
async def connected(kind: str) -> AsyncIterator[tuple[CardClient, Channel]]:
    """A running client of card 5, and the card's end of its channel."""
    host, card = PAIRS[kind]()
    client = CardClient(5, host)
    with trio.fail_after(10):
        async with card, host, trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            yield client, card
            nursery.cancel_scope.cancel()


@pytest.fixture(params=PAIRS)
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[CardClient, Channel]]:
    async with connected(request.param) as pair:
        yield pair


Ends = tuple[CardClient, Channel]


async def test_replies_find_their_requests_in_any_order(ends: Ends) -> None:
    client, card = ends
    got: dict[int, int] = {}

    async def ask(nbytes: int) -> None:
        (got[nbytes],) = (await client.request(AllocBuffers((nbytes,)))).handles

    async with trio.open_nursery() as nursery:
        for nbytes in range(1, 11):
            nursery.start_soon(ask, nbytes)
        asked = [await card.receive() for _ in range(10)]
        assert len({request_id for request_id, _ in asked}) == 10
        for request_id, request in reversed(asked):
            assert isinstance(request, AllocBuffers)
            await card.send(BuffersAllocated((100 + request.sizes[0],)), request_id)
    assert got == {n: 100 + n for n in range(1, 11)}


async def test_a_failure_is_raised_to_who_asked_and_to_no_other(ends: Ends) -> None:
    client, card = ends
    errors: list[SpankerError] = []

    async def ask(handle: int) -> None:
        try:
            await client.request(FreeBuffer(handle))
        except SpankerError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0)
        nursery.start_soon(ask, 1)
        for _ in range(2):
            request_id, request = await card.receive()
            assert isinstance(request, FreeBuffer)
            reply: Message = Ok()
            if request.handle == 1:
                reply = Failed("CardCommandError", "no buffer 1", 5)
            await card.send(reply, request_id)
    (error,) = errors
    assert isinstance(error, CardCommandError)
    assert (str(error), error.card) == ("no buffer 1", 5)
    assert client.failure is None


@pytest.mark.parametrize(
    "reply",
    [Ok(), BufferData(buffers=(b"1234",)), BuffersAllocated((1,))],
    ids=["another class", "too short", "another reply"],
)
async def test_a_wrong_answer_is_an_error_of_that_request(ends: Ends, reply: Message) -> None:
    client, card = ends

    async def ask() -> None:
        with pytest.raises(RemoteProtocolError, match="reply to ReadBuffer"):
            await client.request(ReadBuffer(1, 0, 8))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        request_id, _ = await card.receive()
        await card.send(reply, request_id)


async def test_a_reply_that_nobody_asked_for_ends_the_client(ends: Ends) -> None:
    client, card = ends

    async def ask() -> None:
        with pytest.raises(CardLostError, match=r"card 5 is lost: .*request 77, which nobody made"):
            await client.request(Describe())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await card.receive()
        await card.send(Ok(), 77)
    assert isinstance(client.failure, CardLostError)
    # The channel is of no use any more, and closed.
    with pytest.raises(SpankerError):
        await card.receive()


async def test_a_second_reply_to_a_request_is_one_that_nobody_asked_for(ends: Ends) -> None:
    client, card = ends

    async def answer() -> None:
        request_id, _ = await card.receive()
        for _ in range(2):
            await card.send(Ok(), request_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        assert await client.request(Abort(2)) == Ok()
    await until(lambda: client.failure is not None)
    assert "nobody made" in str(client.failure)


async def test_the_end_of_the_channel_reaches_everyone_who_waits(ends: Ends) -> None:
    client, card = ends
    told: list[int | None] = []

    async def ask() -> None:
        with pytest.raises(CardLostError, match=r"card 5 is lost: .*closed") as caught:
            await client.request(Describe())
        told.append(caught.value.card)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        for _ in range(3):
            await card.receive()
        await card.aclose()
    assert told == [5, 5, 5]
    # And everyone who asks later.
    with pytest.raises(CardLostError, match="card 5 is lost"):
        await client.request(Describe())


async def test_the_first_failure_is_the_one_that_is_told(ends: Ends) -> None:
    client, _ = ends
    reason = CardHungError("card 5 hangs", card=5)
    client.fail(reason)
    client.fail(CardLostError("later", card=5))
    assert client.failure is reason
    errors = []
    for _ in range(2):
        with pytest.raises(CardHungError, match="card 5 hangs") as caught:
            await client.request(Describe())
        errors.append(caught.value)
    # Each is a copy: a shared exception would collect the tracebacks of all.
    assert errors[0] is not errors[1] and reason not in errors


async def test_a_request_that_cannot_be_sent_fails_alone(ends: Ends) -> None:
    client, card = ends

    async def answer() -> None:
        request_id, request = await card.receive()
        assert isinstance(request, Describe | Abort)
        await card.send(Ok(), request_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(LocalProtocolError, match="field sizes"):
            await client.request(AllocBuffers((-1,)))
        assert await client.request(Abort(2)) == Ok()


async def test_the_reply_to_a_cancelled_request_is_dropped(ends: Ends) -> None:
    client, card = ends
    with trio.move_on_after(0.01) as scope:
        await client.request(Describe())
    assert scope.cancelled_caught
    request_id, _ = await card.receive()
    await card.send(Failed("CardError", "too late", 5), request_id)

    async def answer() -> None:
        request_id, request = await card.receive()
        assert isinstance(request, Abort)
        await card.send(Ok(), request_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        assert await client.request(Abort(2)) == Ok()
    assert client.failure is None


async def test_requests_are_sent_in_the_order_they_were_posted_in(ends: Ends) -> None:
    """However full the channel: what goes without waiting must not overtake what waits."""
    client, card = ends
    told: list[int] = []
    posted: list[int] = []

    async def post(number: int, nbytes: int) -> None:
        posted.append(number)
        request = WriteBuffers(((number, 0, nbytes),), buffers=(bytes(nbytes),))
        await client.post(request, lambda reply, number=number: told.append(number))

    got = []
    async with trio.open_nursery() as nursery:
        # Large ones fill a socket, many of them a memory channel.
        for number in range(40):
            nursery.start_soon(post, number, (300_000, 10, 0)[number % 3])
            await trio.lowlevel.checkpoint()
        for number in range(40, 80):
            request_id, request = await card.receive()
            assert isinstance(request, WriteBuffers)
            got.append(request.writes[0][0])
            await card.send(Ok(), request_id)
            nursery.start_soon(post, number, 10)
            await trio.lowlevel.checkpoint()
        while len(got) < 80:
            request_id, request = await card.receive()
            assert isinstance(request, WriteBuffers)
            got.append(request.writes[0][0])
            await card.send(Ok(), request_id)
    assert got == posted
    await until(lambda: len(told) == 80)
    assert told == posted


async def test_a_post_that_need_not_wait_is_no_checkpoint() -> None:
    async with connected("memory") as (client, card):
        with trio.testing.assert_no_checkpoints():
            for epoch in range(2, 5):
                await client.post(Abort(epoch), lambda reply: None)
        assert [(await card.receive())[1] for _ in range(3)] == [Abort(n) for n in range(2, 5)]


async def test_a_cancelled_post_has_sent_nothing_and_holds_up_nobody() -> None:
    async with connected("memory") as (client, card):
        for epoch in range(100, 116):
            await client.post(Abort(epoch), lambda reply: None)
        told: list[object] = []
        # One is with the writing task; behind it the others wait with their callers.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.post, Abort(116), told.append)
            await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for epoch in range(200, 205):
                nursery.start_soon(client.post, Abort(epoch), told.append)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for epoch in range(100, 117):
            assert (await card.receive())[1] == Abort(epoch)
        # The way is free again.
        await trio.testing.wait_all_tasks_blocked()
        with trio.testing.assert_no_checkpoints():
            await client.post(Abort(300), told.append)
        request_id, request = await card.receive()
        assert request == Abort(300)
        await card.send(Ok(), request_id)
        await until(lambda: told)
        assert told == [Ok()]


class Runs:
    """What an actor exposes; nobody calls it here."""

    @property
    def device(self) -> CardDevice:
        raise AssertionError

    @property
    def is_free(self) -> bool:
        raise AssertionError

    def enter(self, request_id: int, fence: int) -> None:
        raise AssertionError


RUN = RunLent(4, (7,), buffers=(b"p",))


async def test_an_idle_actor_is_reached_until_the_client_has_failed() -> None:
    async with connected("memory") as (client, card):
        runs, told = Runs(), list[object]()
        card.expose(runs)
        assert client.reach() is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(card.receive)
            await trio.testing.wait_all_tasks_blocked()
            assert client.reach() is runs
            await card.send(StepDone(1, 2), client.expect(RUN, told.append))
            await until(lambda: told)
            assert told == [StepDone(1, 2)]
            # Who expects a reply and hears of the end gets that for one.
            client.expect(RUN, told.append)
            client.fail(CardHungError("stuck", card=5))
            assert isinstance(told[-1], CardHungError)
            assert client.reach() is None
            nursery.cancel_scope.cancel()


async def test_an_actor_is_not_reached_past_requests_that_wait_to_be_written() -> None:
    async with connected("memory") as (client, card):
        card.expose(Runs())
        # One more than there is room for.
        for epoch in range(100, 117):
            await client.post(Abort(epoch), lambda reply: None)
        for _ in range(16):
            await card.receive()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(card.receive)
                assert client.reach() is None
                await trio.testing.wait_all_tasks_blocked()
            assert client.reach() is not None
            nursery.cancel_scope.cancel()


async def test_nobody_is_reached_over_a_stream() -> None:
    async with connected("unix") as (client, card):
        card.expose(Runs())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(card.receive)
            await trio.testing.wait_all_tasks_blocked()
            assert client.reach() is None
            nursery.cancel_scope.cancel()


async def test_a_post_after_the_end_tells_its_callback(ends: Ends) -> None:
    client, card = ends
    await card.aclose()
    told: list[object] = []
    with trio.fail_after(5):
        while not told:
            await client.post(Describe(), told.append)
            await trio.lowlevel.checkpoint()
    assert all(isinstance(error, CardLostError) for error in told)


async def test_a_request_cancelled_while_it_is_written_costs_nobody_the_card() -> None:
    """A large frame fills the socket: who cancels then must not leave half of it behind."""
    async with connected("unix") as (client, card):
        with trio.move_on_after(0.02) as scope:
            await client.request(WriteBuffers(((1, 0, 8 << 20),), buffers=(bytes(8 << 20),)))
        assert scope.cancelled_caught
        seen: list[str] = []

        async def answer() -> None:
            for _ in range(2):
                request_id, request = await card.receive()
                seen.append(type(request).__name__)
                await card.send(Ok(), request_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            assert await client.request(Abort(2)) == Ok()
            if len(seen) < 2:
                nursery.cancel_scope.cancel()
        assert seen in (["WriteBuffers", "Abort"], ["Abort"])
        assert client.failure is None


async def test_request_numbers_start_again_after_32_bits(ends: Ends) -> None:
    client, card = ends
    client._next_id = 0xFFFFFFFF
    ids: list[int] = []

    async def answer() -> None:
        for _ in range(2):
            request_id, _ = await card.receive()
            ids.append(request_id)
            await card.send(Ok(), request_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        for _ in range(2):
            await client.request(Abort(2))
    assert ids == [0xFFFFFFFF, 0]
