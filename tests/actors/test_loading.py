# SPDX-License-Identifier: Apache-2.0
"""Loading weights: what goes into one message, what arrives on the cards, and loads that end early.

Weights are filled by threads that know nothing of the load: those of the cards, or of a channel.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing
from reference_model import forward, with_formats
from waiting import until

from spanker.actors import loading
from spanker.actors.channel import Channel, memory_channel_pair
from spanker.actors.client import Callback, CardClient
from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.frame import Deferred
from spanker.actors.message import (
    AllocBuffers,
    FreeBuffer,
    LoadProgram,
    Message,
    Ok,
    Request,
    WriteBuffers,
    failed,
)
from spanker.actors.steps import LoadedModel
from spanker.actors.threads import WorkThreads
from spanker.device.base import Fill
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import CardLostError, LocalProtocolError, ModelError
from spanker.ggml.architectures import llama
from spanker.ggml.architectures.llama import Piece, Upload, read_model
from spanker.ggml.gguf import GGUFFile
from spanker.kernels.program import SequenceStep
from spanker.sched.bandwidth import NATIVE
from spanker.sched.layout import card_buffers
from spanker.sched.plan import Limits
from spanker.sched.planner import make_plan
from spanker.testing.models import TinyModel, tiny_llama

U8 = npt.NDArray[np.uint8]
LIMITS = Limits(
    context=64,
    prompt_chunk=16,
    tokens_max=16,
    outputs_max=4,
    candidates=8,
    kv_pages=2,
    page_positions=32,
)
TINY = with_formats(
    tiny_llama(format="f32", vocabulary=600, hidden=256, ffn=256, head_dim=16),
    {"*": "q4_0", "attn_v": "q6_k", "ffn_up": "q4_k", "ffn_down": "f16"},
)


# --- what goes into one message ------------------------------------------------------------


def no_fill(out: U8) -> None:
    raise AssertionError("nothing is filled to make batches")


def made_up_uploads(rng: random.Random, pieces_max: int, nbytes_max: int) -> list[Upload]:
    out = []
    for number in range(rng.randrange(6)):
        at, pieces = 0, []
        for _ in range(rng.randint(1, pieces_max)):
            nbytes = rng.choice((1, rng.randint(1, nbytes_max), nbytes_max, 3 * nbytes_max))
            pieces.append(Piece(at, nbytes, no_fill))
            at += nbytes
        out.append(Upload(f"buffer {number}", at, tuple(pieces)))
    return out


@pytest.mark.parametrize("seed", range(50))
def test_batches_are_all_pieces_in_order_as_many_together_as_fit(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    limit, most = rng.choice((1, 100, 1000)), rng.choice((1, 2, 5, 64))
    monkeypatch.setattr(llama, "UPLOAD_BYTES", limit)
    monkeypatch.setattr(loading, "BATCH_MAX", most)
    uploads = made_up_uploads(rng, pieces_max=40, nbytes_max=rng.choice((3, limit)))
    batches = list(loading._batches(uploads))
    expected = [(upload.buffer, piece) for upload in uploads for piece in upload.pieces]
    assert [entry for batch in batches for entry in batch] == expected
    for number, batch in enumerate(batches):
        sizes = [piece.nbytes for _, piece in batch]
        assert 1 <= len(sizes) <= most
        # A piece alone may be larger.
        assert sum(sizes) <= limit or len(sizes) == 1
        if number + 1 < len(batches) and len(sizes) < most:
            assert sum(sizes) + batches[number + 1][0][1].nbytes > limit


def test_nothing_to_upload_makes_no_batch() -> None:
    assert list(loading._batches([])) == []
    assert list(loading._batches([Upload("empty", 0, ())])) == []


# --- loads that are watched ------------------------------------------------------------------

Hook = Callable[[CardClient, Request[Message]], Awaitable[None]]


@contextlib.asynccontextmanager
async def opened(cards: int, channel: str = "memory") -> AsyncIterator[tuple[Coordinator, SoftRig]]:
    with SoftRig([SoftCardSpec(ddr_bytes=16 << 20)] * cards) as rig:
        async with open_coordinator(rig.cards, NATIVE, channel=channel) as coordinator:
            yield coordinator, rig


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


async def load(coordinator: Coordinator, path: Path, plan: str = "tp") -> LoadedModel:
    with GGUFFile(path) as gguf:
        model = read_model(gguf)
        made = make_plan(plan, model.shape, len(coordinator.cards))
        (loaded,) = await coordinator.load(model, gguf, made, LIMITS)
        return loaded


async def check_step(coordinator: Coordinator, loaded: LoadedModel, model: TinyModel) -> None:
    ids = [3, 1, 4, 1, 5]
    steps = [SequenceStep(ids, 0, [0], (len(ids) - 1,))]
    result = await coordinator.step(loaded, steps, logits=True)
    assert result.logits is not None
    expected = forward(model, ids)[-1:]
    assert np.array_equal(result.logits.view(np.uint32), expected.view(np.uint32))


def used_bytes(rig: SoftRig) -> list[int]:
    return [card.counters().ddr_used_bytes for card in rig.cards]


def watch_requests(monkeypatch: pytest.MonkeyPatch, before: Hook) -> None:
    """Call `before` ahead of every request to any card."""
    post = CardClient.post

    async def watched(client: CardClient, message: Request[Message], callback: Callback) -> None:
        await before(client, message)
        await post(client, message, callback)

    monkeypatch.setattr(CardClient, "post", watched)


class Fills:
    """Watches all fills of pieces: `before` is called in their threads with the number of the
    fill."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda number: None
    ) -> None:
        self.started = 0
        self.running = 0
        self._lock = threading.Lock()
        self._before = before
        uploads = llama.uploads

        def watched(*arguments: object) -> tuple[Upload, ...]:
            made = uploads(*arguments)  # type: ignore[arg-type]
            return tuple(
                attrs.evolve(u, pieces=tuple(self._piece(p) for p in u.pieces)) for u in made
            )

        monkeypatch.setattr(llama, "uploads", watched)

    def _piece(self, piece: Piece) -> Piece:
        def fill(out: U8) -> None:
            with self._lock:
                number, self.started = self.started, self.started + 1
                self.running += 1
            try:
                self._before(number)
                piece.fill(out)
            finally:
                with self._lock:
                    self.running -= 1

        return attrs.evolve(piece, fill=fill)


# --- what arrives ------------------------------------------------------------------------------


CHANNELS = pytest.mark.parametrize("channel", ["memory", "unix"])


@CHANNELS
@pytest.mark.parametrize("plan", ["tp1", "tp3", "pp2", "tp2xpp2"])
@pytest.mark.parametrize(
    ("upload_bytes", "batch_max"), [(2 << 20, 64), (5000, 64), (20_000, 3), (1, 1)]
)
async def test_every_buffer_holds_its_upload(
    path: Path,
    plan: str,
    upload_bytes: int,
    batch_max: int,
    channel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", max(upload_bytes, 600))
    monkeypatch.setattr(loading, "BATCH_MAX", batch_max)
    cards = {"tp1": 1, "tp3": 3, "pp2": 2, "tp2xpp2": 4}[plan]
    async with opened(cards, channel) as (coordinator, rig):
        loaded = await load(coordinator, path, plan)
        with GGUFFile(path) as gguf:
            for card in loaded.plan.cards:
                expected = {}
                for upload in llama.uploads(loaded.model, gguf, loaded.plan, card, LIMITS):
                    data = np.empty(upload.nbytes, np.uint8)
                    for piece in upload.pieces:
                        piece.fill(data[piece.offset : piece.offset + piece.nbytes])
                    expected[upload.buffer] = data.tobytes()
                specs = card_buffers(loaded.model.shape, loaded.plan, card, LIMITS)
                assert set(expected) <= {spec.name for spec in specs}
                assert set(loaded.handles[card]) == {spec.name for spec in specs}
                for spec in specs:
                    held = rig.cards[card].read(loaded.handles[card][spec.name], 0, spec.nbytes)
                    assert held == expected.get(spec.name, bytes(spec.nbytes)), spec.name
        await check_step(coordinator, loaded, TINY)


async def test_buffers_and_pieces_travel_together(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As few messages as the limits allow, which counts where a link has latency."""
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 40_000)
    monkeypatch.setattr(loading, "BATCH_MAX", 7)
    seen: dict[int, list[Request[Message]]] = {0: [], 1: []}

    async def note(client: CardClient, request: Request[Message]) -> None:
        seen[client.number].append(request)

    watch_requests(monkeypatch, note)
    async with opened(2) as (coordinator, _):
        loaded = await load(coordinator, path)
        with GGUFFile(path) as gguf:
            for card, requests in seen.items():
                specs = card_buffers(loaded.model.shape, loaded.plan, card, LIMITS)
                allocs = [r for r in requests if isinstance(r, AllocBuffers)]
                assert [n for r in allocs for n in r.sizes] == [spec.nbytes for spec in specs]
                assert {len(r.sizes) for r in allocs[:-1]} == {7} and len(allocs[-1].sizes) <= 7
                writes = [r for r in requests if isinstance(r, WriteBuffers)]
                uploads = llama.uploads(loaded.model, gguf, loaded.plan, card, LIMITS)
                assert len(writes) == len(list(loading._batches(uploads)))
                assert all(len(r.writes) <= 7 for r in writes)


@pytest.mark.parametrize(("cores", "at_once"), [(1, 1), (2, 1), (3, 2), (8, 4)])
async def test_all_cards_together_have_a_message_under_way_for_each_core(
    path: Path, cores: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 6000)
    request = CardClient.request
    under_way, most = [0, 0], [0, 0]

    async def watched(client: CardClient, message: Request[Message]) -> Message:
        number = client.number
        if not isinstance(message, WriteBuffers):
            return await request(client, message)
        under_way[number] += 1
        most[number] = max(most[number], under_way[number])
        try:
            await trio.sleep(0.001)
            return await request(client, message)
        finally:
            under_way[number] -= 1

    async with opened(2) as (coordinator, _):
        monkeypatch.setattr(CardClient, "request", watched)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        await check_step(coordinator, await load(coordinator, path), TINY)
    assert most == [at_once, at_once]


# --- one upload, message by message --------------------------------------------------------


@contextlib.asynccontextmanager
async def played_card() -> AsyncIterator[tuple[CardClient, Channel]]:
    """A client, and the end of a channel at which the test plays the card."""
    host, card = memory_channel_pair()
    client = CardClient(0, host)
    with trio.fail_after(10):
        async with card, host, trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            yield client, card
            nursery.cancel_scope.cancel()


class Bytes:
    """An upload of so many pieces, each a message; `filled` lists the pieces that were filled, in
    threads of whoever makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
        monkeypatch.setattr(llama, "UPLOAD_BYTES", 10)
        self.filled: list[int] = []
        self.uploads = [
            Upload("x", 10 * pieces, tuple(Piece(10 * i, 10, self._fill(i)) for i in range(pieces)))
        ]
        self.sent = 0

    def _fill(self, number: int) -> Fill:
        def fill(out: U8) -> None:
            self.filled.append(number)
            self.before(number)
            out[:] = number

        return fill

    def before(self, number: int) -> None:
        """What a test may replace."""

    def count(self, nbytes: int) -> None:
        self.sent += nbytes

    async def upload(self, client: CardClient, at_once: int) -> None:
        await loading.upload(client.request, self.uploads, {"x": 7}, at_once, self.count)


def made(request: Message) -> bytes:
    (buffer,) = request.buffers
    assert isinstance(buffer, Deferred)
    return bytes(buffer.make())


@pytest.mark.parametrize("at_once", [1, 3])
async def test_the_next_message_goes_when_one_is_answered(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Bytes(monkeypatch, 8)
    async with played_card() as (client, card), trio.open_nursery() as nursery:
        nursery.start_soon(pieces.upload, client, at_once)
        waiting = [await card.receive() for _ in range(at_once)]
        for number in range(8):
            with trio.move_on_after(0.01) as scope:
                await card.receive()
            assert scope.cancelled_caught and pieces.sent == 10 * number
            # In any order.
            request_id, request = waiting.pop()
            assert isinstance(request, WriteBuffers)
            ((handle, offset, nbytes),) = request.writes
            assert (handle, nbytes, made(request)) == (7, 10, bytes([offset // 10]) * 10)
            await card.send(Ok(), request_id)
            if number + at_once < 8:
                waiting.append(await card.receive())
    assert pieces.sent == 80 and sorted(pieces.filled) == list(range(8))


async def test_what_is_still_under_way_when_an_upload_has_ended_is_not_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card may come to a message when nobody waits for it, and the file is closed."""
    pieces = Bytes(monkeypatch, 8)
    async with played_card() as (client, card):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pieces.upload, client, 3)
                waiting = [(await card.receive())[1] for _ in range(3)]
                made(waiting[0])
                scope.cancel()
        assert scope.cancelled_caught
        for request in waiting[1:]:
            with pytest.raises(LocalProtocolError, match="upload has ended"):
                made(request)
    assert pieces.filled == [0] and pieces.sent == 0


async def test_an_upload_ends_when_what_is_being_filled_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Bytes(monkeypatch, 4)
    threads = WorkThreads("spanker-test", 2)
    go_on = [threading.Event() for _ in range(4)]
    pieces.before = lambda number: go_on[number].wait(10)  # type: ignore[assignment,method-assign]
    ended = False

    async def upload(scope: trio.CancelScope) -> None:
        nonlocal ended
        with scope:
            await pieces.upload(client, 2)
        ended = True

    async with played_card() as (client, card), trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(upload, scope)
        for _ in range(2):
            _, request = await card.receive()
            nursery.start_soon(threads.run, lambda request=request: made(request))
        await until(lambda: len(pieces.filled) == 2)
        scope.cancel()
        for event in go_on[:2]:
            await trio.sleep(0.02)
            assert not ended
            event.set()
        await until(lambda: ended)
    assert scope.cancelled_caught
    threads.close()


@pytest.mark.parametrize("error", [OSError(5, "disk"), ModelError("went bad")], ids=repr)
async def test_after_an_error_of_a_fill_nothing_more_is_filled_or_sent(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Bytes(monkeypatch, 8)

    def fail(number: int) -> None:
        raise error

    pieces.before = fail  # type: ignore[method-assign]
    async with played_card() as (client, card), trio.open_nursery() as nursery:

        async def upload() -> None:
            with pytest.raises(type(error)) as caught:
                await pieces.upload(client, 3)
            assert caught.value is error

        nursery.start_soon(upload)
        waiting = [await card.receive() for _ in range(3)]
        with pytest.raises(LocalProtocolError) as caught:
            made(waiting[1][1])
        with pytest.raises(LocalProtocolError, match="upload has ended"):
            made(waiting[2][1])
        # Another one is done all the same, before the failure is told: it counts no more.
        await card.send(Ok(), waiting[0][0])
        await card.send(failed(caught.value), waiting[1][0])
        with trio.move_on_after(0.01) as scope:
            await card.receive()
        assert scope.cancelled_caught
    assert pieces.filled == [1] and pieces.sent == 0


# --- loads that end early -------------------------------------------------------------------------


@CHANNELS
@pytest.mark.parametrize("error", [OSError(5, "disk"), ModelError("went bad"), MemoryError()])
@pytest.mark.parametrize("at", [0, 1, 17, "last"])
async def test_a_fill_that_raises_fails_the_load_and_frees_everything(
    path: Path, at: int | str, error: Exception, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 5000)
    async with opened(3, channel) as (coordinator, rig):
        with monkeypatch.context() as patch:
            counted = Fills(patch)
            await coordinator.unload(await load(coordinator, path))
        number = counted.started - 1 if at == "last" else int(at)
        assert counted.started > 50

        def fail(fill: int) -> None:
            if fill == number:
                raise error

        with monkeypatch.context() as patch:
            fills = Fills(patch, fail)
            # Alone and itself, not one of a group.
            with pytest.raises(type(error)) as caught:
                await load(coordinator, path)
            assert caught.value is error
            started = fills.started
        assert used_bytes(rig) == [0, 0, 0]
        await trio.sleep(0.01)
        assert (fills.started, fills.running) == (started, 0)
        await check_step(coordinator, await load(coordinator, path), TINY)


@pytest.mark.parametrize("card", [0, 2])
async def test_a_card_that_dies_while_it_is_loaded_is_named_alone(
    path: Path, card: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 5000)
    async with opened(3) as (coordinator, rig):
        killed = False

        async def kill(client: CardClient, request: Request[Message]) -> None:
            nonlocal killed
            if isinstance(request, WriteBuffers) and client.number == card and not killed:
                killed = True
                rig.cards[card].kill()

        watch_requests(monkeypatch, kill)
        with trio.fail_after(5), pytest.raises(CardLostError, match=f"card {card}") as caught:
            await load(coordinator, path)
        assert caught.value.card == card
        left = [device for device in rig.cards if device.number != card]
        assert [device.counters().ddr_used_bytes for device in left] == [0, 0]
        assert list(coordinator.lost) == [card]


@CHANNELS
async def test_a_load_cancelled_during_a_fill_waits_for_its_thread(
    path: Path, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread reads the file and writes into memory: both must outlive it."""
    go_on = threading.Event()
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 5000)
    fills = Fills(monkeypatch, lambda number: number < 20 or go_on.wait(10) or None)
    ended = False
    async with opened(2, channel) as (coordinator, rig):
        scope = trio.CancelScope()

        async def cancelled() -> None:
            nonlocal ended
            with scope:
                await load(coordinator, path)
            ended = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled)
            await until(lambda: fills.started > 20)
            scope.cancel()
            await trio.sleep(0.05)
            assert not ended and fills.running
            go_on.set()
        assert scope.cancelled_caught and ended
        assert fills.running == 0 and used_bytes(rig) == [0, 0]
        started = fills.started
        await trio.sleep(0.01)
        assert fills.started == started
        await check_step(coordinator, await load(coordinator, path), TINY)


@pytest.mark.parametrize("kind", [AllocBuffers, WriteBuffers, LoadProgram])
@pytest.mark.parametrize("after", [False, True], ids=["before", "behind"])
async def test_a_load_cancelled_at_any_message_frees_everything(
    path: Path, kind: type[Request[Message]], after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled when the n-th message of a kind is about to be sent, and once it is under way."""
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 30_000)
    monkeypatch.setattr(loading, "BATCH_MAX", 11)
    post = CardClient.post
    scope, left = trio.CancelScope(), 0

    async def watched(client: CardClient, message: Request[Message], callback: Callback) -> None:
        nonlocal left
        left -= isinstance(message, kind)
        if isinstance(message, kind) and left == 0:
            if not after:
                scope.cancel()
            else:
                trio.lowlevel.spawn_system_task(cancel_soon)
        await post(client, message, callback)

    async def cancel_soon() -> None:
        scope.cancel()

    monkeypatch.setattr(CardClient, "post", watched)
    fills = Fills(monkeypatch)
    turns = 0
    async with opened(3) as (coordinator, rig):
        while True:
            turns += 1
            scope, left = trio.CancelScope(), turns
            loaded = None
            with scope:
                loaded = await load(coordinator, path)
            assert fills.running == 0
            if loaded is None:
                await coordinator.settled()
                assert used_bytes(rig) == [0, 0, 0]
            elif left > 0:
                break  # there are not so many
            else:
                # Cancelled where nothing would notice any more.
                await coordinator.unload(loaded)
                assert used_bytes(rig) == [0, 0, 0]
        assert loaded is not None
        await check_step(coordinator, loaded, TINY)
        await coordinator.unload(loaded)
        assert used_bytes(rig) == [0, 0, 0]
    assert turns > 3


async def test_what_a_failed_load_gives_back_goes_out_together(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each buffer once, and none before the last write to its card."""
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 5000)

    def fail(fill: int) -> None:
        if fill == 30:
            raise OSError("disk")

    Fills(monkeypatch, fail)
    seen: list[tuple[int, Request[Message]]] = []

    async def note(client: CardClient, request: Request[Message]) -> None:
        seen.append((client.number, request))

    watch_requests(monkeypatch, note)
    async with opened(2) as (coordinator, rig):
        with pytest.raises(OSError, match="disk"):
            await load(coordinator, path)
        assert used_bytes(rig) == [0, 0]
    for card in range(2):
        requests = [request for number, request in seen if number == card]
        freed = [r.handle for r in requests if isinstance(r, FreeBuffer)]
        allocated = sum(len(r.sizes) for r in requests if isinstance(r, AllocBuffers))
        assert len(freed) == len(set(freed)) == allocated > 0
        kinds = [type(r) for r in requests if isinstance(r, FreeBuffer | WriteBuffers)]
        assert kinds == sorted(kinds, key=lambda kind: kind is FreeBuffer)
