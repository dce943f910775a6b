# SPDX-License-Identifier: Apache-2.0
"""Collectives on live cards: programs are prepared once, then run on the caller's arrays.

Three ways for an array to get to its card:

- lent: the card works on the host's memory itself.  Where messages hand over memory and the card
  has windows.
- staged: written to a buffer of the card before, read back after.  Everywhere else.
- resident: in a buffer of the card all the time (`Resident`).

What is prepared stays on the cards until it has not been used for long or memory is wanted for
something else.  Who may call what with which arrays is said in spanker/collectives.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import numpy.typing as npt
import trio

from spanker.actors.channel import DirectRuns
from spanker.actors.client import CardClient
from spanker.actors.collective_programs import CardWork, Work, build
from spanker.actors.frame import DEFAULT_LIMITS
from spanker.actors.message import (
    AllocBuffers,
    FreeBuffer,
    LoadProgram,
    Message,
    Ok,
    OpenWindows,
    ReadBuffer,
    Request,
    RunLent,
    RunStep,
    UnloadProgram,
    WriteBuffers,
)
from spanker.actors.steps import Flight, settled
from spanker.device.base import Completion, Part, Together
from spanker.errors import (
    CardLinkDownError,
    CardLostError,
    CardMemoryError,
    SpankerError,
    TopologyMismatchError,
)
from spanker.kernels.program import encode_step

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator

STEP = encode_step([])

# Prepared works that stay, and the bytes of each card's memory that they may hold together.
PREPARED_MAX = 32
PREPARED_BYTES_MAX = 64 << 20
# What one message carries at most of an array: frames do not overtake each other.
PIECE_BYTES = 8 << 20
READ_BACK_BYTES_MAX = DEFAULT_LIMITS.raw_bytes_max // 2
# A message that lends more is refused like any other; beyond that arrays are staged.
LENT_BYTES_MAX = DEFAULT_LIMITS.raw_bytes_max - len(STEP)
# How long giving memory back may take where nobody can be told that it failed.
RELEASE_S = 2.0


@attrs.frozen
class Resident:
    """An array's buffers, one a card, by handle; equal ones are the same memory.  `births` are
    those of the cards (`Coordinator.births`) when it was made: on a newer one it is no more."""

    handles: tuple[int, ...]
    nbytes: int
    births: tuple[int, ...]


Memory = npt.NDArray[Any] | memoryview | None
"""A contiguous writable array; None where it is resident, or empty."""


class _Key(NamedTuple):
    """A tuple, because it is looked up with every call.  `resident` is empty, or has an item for
    each of the work's arrays; `changes` counts what has become of links and cards."""

    work: Work
    resident: tuple[Resident | None, ...]
    changes: int


@attrs.define(eq=False)
class _Card:
    """What a prepared work holds on one card: buffers by name, and those that are its own."""

    program: int | None = None
    handles: dict[str, int] = attrs.Factory(dict)
    own: list[int] = attrs.Factory(list)
    # Where arrays are lent: its run but for their memory, and its windows with their sizes.
    run: RunLent | None = None
    windows: tuple[tuple[int, int], ...] = ()


@attrs.define(eq=False)
class _Prepared:
    lent: bool
    # As they were when it was made.
    births: tuple[int, ...]
    cards: list[_Card] = attrs.Factory(list)
    # Where arrays are lent: the cards that have something to do, and whose memory, by card and by
    # place among the work's arrays, their windows take, in this order; all runs as one, once that
    # is known to be possible.
    working: tuple[int, ...] = ()
    takes: tuple[tuple[int, int], ...] = ()
    together: Together | None = None
    card_bytes: int = 0
    users: int = 0
    last_used: int = 0


class Collectives:
    """The collectives of one fleet, and what they hold on its cards."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._prepared: dict[_Key, _Prepared] = {}
        self._calls = 0
        self._doomed: list[Resident] = []
        # By card, what it has yet to be told to give back, in order.
        self._owed: dict[CardClient, deque[Request[Ok]]] = {}

    @property
    def cards(self) -> int:
        """How many there are; one that joins takes part in what is called from then on."""
        return len(self._clients)

    @property
    def lends(self) -> bool:
        """Whether cards work on the host's memory."""
        return all(client.shares_memory for client in self._clients) and all(
            info.max_windows > 1 for info in self._coordinator.cards
        )

    @property
    def _clients(self) -> Sequence[CardClient]:
        return self._coordinator.clients

    def _check_cards(self, cards: int) -> None:
        """That those of a call are still all."""
        if cards != self.cards:
            raise TopologyMismatchError(
                f"a card has joined: the fleet has {self.cards} cards, and these are arrays of "
                f"{cards}; call again with an array for each",
                expected=self.cards,
                actual=cards,
            )

    # --- running ----------------------------------------------------------------------

    async def run(
        self,
        work: Work,
        memory: Sequence[Sequence[Memory]] = (),
        resident: Sequence[Resident | None] = (),
    ) -> None:
        """Do a work on `memory[i][card]`, or the buffers of `resident[i]`, for array i of
        `work.arrays`.  A checkpoint, and waits while others have the cards.

        Raises what the cards report, CardHungError, CardMemoryError.  Cancelled or failed, what the
        outputs hold is undefined; nobody writes to them any more, unless a card hangs.
        """
        cards = self.cards
        while not await self._run_once(cards, work, memory, resident):
            pass

    async def _run_once(
        self,
        cards: int,
        work: Work,
        memory: Sequence[Sequence[Memory]],
        resident: Sequence[Resident | None],
    ) -> bool:
        """False where nothing has been done: while the cards were waited for, one has come back as
        a new one, or a link has changed."""
        coordinator = self._coordinator
        key = _Key(work, tuple(resident), coordinator.links.changes)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = await self._get(cards, key)
        self._calls += 1
        prepared.last_used = self._calls
        prepared.users += 1
        try:
            await coordinator.take_cards(range(cards))
            try:
                self._check_cards(cards)
                # On a new card its numbers may be those of somebody else's buffers.
                if key.changes != coordinator.links.changes:
                    return False
                await self._run(work, prepared, memory)
                return True
            finally:
                coordinator.give_cards_back(range(cards))
        finally:
            prepared.users -= 1

    # Interrupted halfway, it would leave runs that nobody has entered.
    @trio.lowlevel.enable_ki_protection
    async def _run(
        self, work: Work, prepared: _Prepared, memory: Sequence[Sequence[Memory]]
    ) -> None:
        coordinator = self._coordinator
        begun = self._run_directly(prepared, memory)
        if begun is None:
            await trio.lowlevel.checkpoint()
            return
        flight, untold = begun
        try:
            try:
                while untold:
                    number = untold[0]
                    card = prepared.cards[number]
                    if card.program is None:
                        flight.absent(number)
                    elif card.run is not None:
                        request = _lending(card.run, prepared, number, memory)
                        await coordinator.post(number, request, flight.callback(number))
                    else:
                        await self._post_staged(number, card, card.program, work, memory, flight)
                    del untold[0]
            except BaseException:
                flight.forget(len(untold))
                raise
            await settled(coordinator, flight, range(self.cards))
        except CardLinkDownError as error:
            # The next call goes around it.
            if error.card is not None and error.peer is not None:
                coordinator.links.lose(error.card, error.peer)
            raise
        finally:
            if not flight.settled.is_set() or flight.errors:
                with trio.CancelScope(shield=True):
                    await coordinator.abort(flight.all_back.wait, range(self.cards))
        if flight.errors:
            raise flight.cause()
        if not prepared.lent:
            await self._read_back(work, prepared, memory, flight)

    def _run_directly(
        self, prepared: _Prepared, memory: Sequence[Sequence[Memory]]
    ) -> tuple[Flight, list[int]] | None:
        """Run on cards whose actors are free and in this process: no message, and nobody woken
        where this thread does all of the work.  None where that was all; otherwise what is under
        way, and the cards that are yet to be told of it, by messages."""
        coordinator = self._coordinator
        number, trace = coordinator.count_step(), coordinator.trace
        outcomes: list[Completion | int] = []
        actors = self._free_actors(prepared)
        together = actors and self._together(prepared, actors)
        if together:
            taken = [memory[place][card] for card, place in prepared.takes]
            if together.run(taken) and trace is None:
                return None
            outcomes = together.outcomes()
        flight = Flight(number, 0, self.cards, trace)
        untold = list(range(self.cards))
        for card, actor, outcome in zip(prepared.working, actors, outcomes, strict=False):
            untold.remove(card)
            if isinstance(outcome, Completion):
                flight.completed(card, outcome)
                if isinstance(outcome.error, SpankerError):
                    self._clients[card].reported(outcome.error)
                continue
            run = prepared.cards[card].run
            assert run is not None
            actor.enter(self._clients[card].expect(run, flight.callback(card)), outcome)
        return flight, untold

    def _free_actors(self, prepared: _Prepared) -> list[DirectRuns]:
        """Those of the cards that work, or none."""
        actors: list[DirectRuns] = []
        for card in prepared.working:
            actor = self._clients[card].reach()
            if actor is None or not actor.is_free:
                return []
            actors.append(actor)
        return actors

    def _together(self, prepared: _Prepared, actors: Sequence[DirectRuns]) -> Together | None:
        if prepared.together is None:
            parts = [
                Part(actor.device, run.program, prepared.cards[card].windows)
                for card, actor in zip(prepared.working, actors, strict=True)
                if (run := prepared.cards[card].run) is not None
            ]
            prepared.together = parts[0].device.together(parts, STEP)
        return prepared.together

    async def _post_staged(
        self,
        number: int,
        card: _Card,
        program: int,
        work: Work,
        memory: Sequence[Sequence[Memory]],
        flight: Flight,
    ) -> None:
        """Write the inputs, and run behind that."""
        arrays = {
            name: _flat(data)
            for name, rows in zip(work.arrays, memory, strict=False)
            if (data := rows[number]) is not None
        }
        client = self._clients[number]
        for name in work.inputs:
            if name in arrays and name in card.handles:
                await self._write(client, card.handles[name], arrays[name], flight)
        request = _reading_back(card, program, work, arrays)
        await self._coordinator.post(number, request, flight.callback(number))

    async def _write(
        self, client: CardClient, handle: int, data: memoryview, flight: Flight
    ) -> None:
        """Post an array in pieces; what goes wrong is an error of the run."""

        def written(reply: Message | SpankerError) -> None:
            if isinstance(reply, SpankerError):
                flight.errors.append(reply)
                flight.settled.set()

        for at in range(0, data.nbytes, PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            request = WriteBuffers(((handle, at, piece.nbytes),), buffers=(piece,))
            await self._coordinator.post(client.number, request, written)

    async def _read_back(
        self,
        work: Work,
        prepared: _Prepared,
        memory: Sequence[Sequence[Memory]],
        flight: Flight,
    ) -> None:
        """Bring the outputs of staged arrays into the caller's memory."""
        for name, rows in zip(work.arrays, memory, strict=False):
            if name not in work.outputs:
                continue
            for number, own in enumerate(rows):
                card = prepared.cards[number]
                if own is None or name not in card.handles:
                    continue
                data = _flat(own)
                if flight.replies[number].buffers:
                    data[:] = flight.replies[number].buffers[0]
                    continue
                await self._read(self._clients[number], card.handles[name], data)

    async def _read(self, client: CardClient, handle: int, data: memoryview) -> None:
        """Bring a buffer of a card, in pieces."""
        for at in range(0, data.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, data.nbytes - at)
            reply = await self._coordinator.ask_client(client, ReadBuffer(handle, at, nbytes))
            data[at : at + nbytes] = reply.buffers[0]

    # --- what is on the cards ---------------------------------------------------------

    async def _get(self, cards: int, key: _Key) -> _Prepared:
        async with self._coordinator.changing_memory():
            self._check_cards(cards)
            # Someone may have prepared it while this task waited.
            prepared = self._prepared.get(key)
            return await self._prepare(key) if prepared is None else prepared

    async def _prepare(self, key: _Key) -> _Prepared:
        for array in key.resident:
            if array is not None:
                for card in range(self.cards):
                    self._check(array, card)
        lent = self.lends and not any(key.resident) and self._lendable(key.work)
        coordinator = self._coordinator
        # To meet is something of a link: around one that is down there is a plan, in its order.
        meet = not coordinator.links.down and all(info.meets for info in coordinator.cards)
        works = build(key.work, coordinator.topology, meet=meet)
        resident = {
            name: buffers
            for name, buffers in zip(key.work.arrays, key.resident, strict=False)
            if buffers is not None
        }
        need = max(
            sum(work.own_bytes.values())
            + (0 if lent else sum(b for n, b in work.array_bytes.items() if n not in resident))
            for work in works
        )
        await self._make_room(PREPARED_MAX - 1, PREPARED_BYTES_MAX - need)
        try:
            prepared = await self._load(key, lent, resident, works)
        except CardMemoryError:
            # Not before it is needed: what others have prepared may be wanted again.
            await self._make_room(0, 0)
            prepared = await self._load(key, lent, resident, works)
        prepared.card_bytes = need
        self._prepared[key] = prepared
        return prepared

    def _lendable(self, work: Work) -> bool:
        """Whether one message can lend all of a card's arrays."""
        elements = sum(work.array_elements(name, 0, self.cards) for name in work.arrays)
        return elements * work.element.nbytes <= LENT_BYTES_MAX

    async def _load(
        self, key: _Key, lent: bool, resident: Mapping[str, Resident], works: Sequence[CardWork]
    ) -> _Prepared:
        prepared = _Prepared(lent, tuple(self._coordinator.births))
        try:
            for client, work in zip(self._clients, works, strict=True):
                prepared.cards.append(_Card())
                if work.program.commands:
                    await self._load_card(client, prepared.cards[-1], key, lent, resident, work)
        except BaseException:
            self._release(prepared)
            await self._give_back()
            raise
        prepared.working = tuple([n for n, card in enumerate(prepared.cards) if card.run])
        prepared.takes = tuple(
            [
                (number, place)
                for number in prepared.working
                for place, name in enumerate(key.work.arrays)
                if name in prepared.cards[number].handles
            ]
        )
        return prepared

    async def _load_card(
        self,
        client: CardClient,
        card: _Card,
        key: _Key,
        lent: bool,
        resident: Mapping[str, Resident],
        work: CardWork,
    ) -> None:
        arrays = {name: b for name, b in work.array_bytes.items() if name not in resident}
        buffers = work.own_bytes if lent else work.own_bytes | arrays
        for names, request in (
            (tuple(buffers), AllocBuffers(tuple(buffers.values()))),
            (tuple(arrays) if lent else (), OpenWindows(tuple(arrays.values()))),
        ):
            if names:
                reply = await self._coordinator.owning(client, request)
                card.own += reply.handles
                card.handles.update(zip(names, reply.handles, strict=True))
        for name, array in resident.items():
            card.handles[name] = array.handles[client.number]
        program = work.program.encode(card.handles)
        loaded = await self._coordinator.owning(client, LoadProgram(buffers=(program,)))
        card.program = loaded.program
        if lent:
            shown = [name for name in key.work.arrays if name in card.handles]
            card.windows = tuple([(card.handles[name], arrays[name]) for name in shown])
            windows = tuple([window for window, _ in card.windows])
            card.run = RunLent(loaded.program, windows, buffers=(STEP,))

    async def trim(self) -> None:
        """Give back all memory that is not in use, so that others may have it."""
        if self._prepared or self._doomed or self._owed:
            async with self._coordinator.changing_memory():
                await self._make_room(0, 0)

    async def forget(self, resident: Resident) -> None:
        """Free these buffers, and unload what was prepared for them: now, or later where somebody
        keeps the cards to himself for long."""
        self._doomed.append(resident)
        with trio.move_on_after(RELEASE_S, shield=True):
            async with self._coordinator.changing_memory():
                self._free_doomed()
                await self._give_back()

    def _free_doomed(self) -> None:
        while self._doomed:
            resident = self._doomed.pop()
            for key in [key for key in self._prepared if resident in key.resident]:
                self._release(self._prepared.pop(key))
            self._free(resident.handles, resident.births)

    async def allocate(self, nbytes: int) -> Resident:
        """A buffer of so many bytes on every card."""
        handles: list[int] = []
        async with self._coordinator.changing_memory():
            births = tuple(self._coordinator.births)
            try:
                for client in self._clients:
                    reply = await self._coordinator.owning(client, AllocBuffers((nbytes,)))
                    handles += reply.handles
            except BaseException:
                self._free(handles, births)
                await self._give_back()
                raise
        return Resident(tuple(handles), nbytes, births)

    def _free(self, handles: Sequence[int], births: Sequence[int]) -> None:
        """One buffer a card, from the first card on."""
        for card, handle in enumerate(handles):
            self._owe(card, births, FreeBuffer(handle))

    def _check(self, resident: Resident, card: int) -> None:
        if resident.births[card] != self._coordinator.births[card]:
            raise CardLostError(
                f"card {card} has been lost and is a new one now: the values that an array had on "
                f"it are gone; make a new array with `fleet.arrays`",
                card=card,
            )

    async def write(self, resident: Resident, card: int, data: memoryview) -> None:
        """Fill the buffer of a card."""
        self._check(resident, card)
        client = self._clients[card]  # no newer one
        for at in range(0, data.nbytes, PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            writes = ((resident.handles[card], at, piece.nbytes),)
            request = WriteBuffers(writes, buffers=(piece,))
            await self._coordinator.ask_client(client, request)

    async def read(self, resident: Resident, card: int, data: memoryview) -> None:
        """Bring the buffer of a card."""
        self._check(resident, card)
        await self._read(self._clients[card], resident.handles[card], data)

    async def _make_room(self, count: int, nbytes: int) -> None:
        """Release what was not used for longest until so many works and bytes are left."""
        self._free_doomed()
        held = sum(prepared.card_bytes for prepared in self._prepared.values())
        oldest_first = sorted(self._prepared.items(), key=lambda item: item[1].last_used)
        for key, prepared in oldest_first:
            if len(self._prepared) <= count and held <= nbytes:
                break
            if not prepared.users:
                held -= prepared.card_bytes
                self._release(self._prepared.pop(key))
        await self._give_back()

    def _release(self, prepared: _Prepared) -> None:
        for number, card in enumerate(prepared.cards):
            if card.program is not None:
                self._owe(number, prepared.births, UnloadProgram(card.program))
            for handle in card.own:
                self._owe(number, prepared.births, FreeBuffer(handle))

    def _owe(self, card: int, births: Sequence[int], request: Request[Ok]) -> None:
        """Something is to be given back, where it is still there."""
        if births[card] == self._coordinator.births[card]:
            self._owed.setdefault(self._clients[card], deque()).append(request)

    async def _give_back(self) -> None:
        """Have the cards give back what is owed, whatever is being cancelled, as nobody else knows
        of it; what cannot be sent in time goes with the next that is."""
        with trio.move_on_after(RELEASE_S, shield=True):
            async with trio.open_nursery() as nursery:
                for client, requests in self._owed.items():
                    nursery.start_soon(self._send, client, requests)
        self._owed = {client: requests for client, requests in self._owed.items() if requests}

    async def _send(self, client: CardClient, requests: deque[Request[Ok]]) -> None:
        """Send these, taking off what has been sent, and wait until the card has done all.  A card
        that is lost has nothing to give back."""
        await self._coordinator.caught_up(client)
        missing, done = len(requests), trio.Event()

        def answered(reply: Message | SpankerError) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                done.set()

        while requests:
            await client.post(requests[0], answered)
            requests.popleft()
        await done.wait()


def _lending(
    run: RunLent, prepared: _Prepared, card: int, memory: Sequence[Sequence[Memory]]
) -> RunLent:
    """A card's run with its memory, as a message."""
    lent = [_flat(memory[place][card]) for owner, place in prepared.takes if owner == card]
    return attrs.evolve(run, buffers=(*run.buffers, *lent))


def _flat(memory: Memory) -> memoryview:
    """As bytes."""
    assert memory is not None
    return (memory if isinstance(memory, memoryview) else memory.data).cast("B")


def _reading_back(
    card: _Card, program: int, work: Work, arrays: Mapping[str, memoryview]
) -> RunStep:
    """Run on the card's buffers, and bring the outputs at once where one message can."""
    reads = [
        (card.handles[name], 0, arrays[name].nbytes)
        for name in work.outputs
        if name in arrays and name in card.handles
    ]
    if sum(nbytes for _, _, nbytes in reads) > READ_BACK_BYTES_MAX:
        reads = []
    return RunStep(program, tuple(reads), buffers=(STEP,))
