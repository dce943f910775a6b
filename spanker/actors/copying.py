# SPDX-License-Identifier: Apache-2.0
"""From a replica to those like it: what one card has got from the host its counterparts get from
each other, where the links between cards are faster than the one to the host.

A chain of cards hands on one buffer after the other, all its links at the same time.  How long that
takes is said in docs/api/timing-model.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import trio

from spanker.actors.message import RunStep
from spanker.actors.steps import Flight, settled
from spanker.kernels import program as op
from spanker.kernels.program import Command, Program, Ref, Transfer, encode_step
from spanker.sched.bandwidth import Profile
from spanker.sched.detours import ALL_UP, Down
from spanker.sched.layout import BufferSpec
from spanker.sched.plan import FleetPlan, Plan

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator

# After so many bytes others get their turn with the cards.
RUN_BYTES = 64 << 20

Chain = tuple[tuple[int, int], ...]
"""Cards that get the same bytes, each from the one before, the first from the host: as (number of
the replica, card)."""


def chains(plan: FleetPlan, profile: Profile, *, straight: bool = True) -> tuple[Chain, ...]:
    """Every card of a plan once, in order of the first cards' replicas.  Unless every card can send
    `straight` to every other, each has a chain of its own."""
    host = profile.host_link_bytes_per_s
    slow = straight and host is not None and host < profile.intercard_bytes_per_s
    alike: dict[object, list[int]] = {}
    for number, replica in enumerate(plan.replicas):
        alike.setdefault(_form(replica) if slow else number, []).append(number)
    return tuple(
        tuple((number, plan.replicas[number].cards[i]) for number in numbers)
        for numbers in alike.values()
        for i in range(len(plan.replicas[numbers[0]].cards))
    )


def _form(plan: Plan) -> object:
    """What plans have in common that differ in their cards alone."""
    return tuple(
        (stage.layers, tuple(attrs.evolve(share, card=0) for share in stage.shares))
        for stage in plan.stages
    )


async def copy(
    coordinator: Coordinator,
    handles: Mapping[int, Mapping[str, int]],
    buffers: Sequence[BufferSpec],
) -> None:
    """Copy buffers along a chain of cards: `handles` are those of each, in order of the chain.

    Waits while others have the cards, and lets them in between.  Raises what the cards report.
    """
    for batch in _runs(buffers):
        made = zip(handles, build(tuple(handles), batch), strict=True)
        data = {card: program.encode(handles[card]) for card, program in made}
        async with loaded(coordinator, data) as programs:
            await run(coordinator, programs)


def _runs(buffers: Sequence[BufferSpec]) -> Iterator[Sequence[BufferSpec]]:
    """The buffers in order, as many at a time as make RUN_BYTES."""
    batch: list[BufferSpec] = []
    for buffer in buffers:
        batch.append(buffer)
        if sum(b.nbytes for b in batch) >= RUN_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def build(cards: Sequence[int], buffers: Sequence[BufferSpec]) -> tuple[Program, ...]:
    """The program of each card of a chain: it receives a buffer while it sends the one before."""
    return tuple(
        Program(tuple(_commands(cards, place, buffers)), 1, 1, 1) for place in range(len(cards))
    )


def _commands(cards: Sequence[int], place: int, buffers: Sequence[BufferSpec]) -> Iterator[Command]:
    for arrives, leaves in zip((*buffers, None), (None, *buffers), strict=True):
        transfers = []
        if arrives is not None and place > 0:
            transfers.append(_transfer(False, cards[place - 1], arrives))
        if leaves is not None and place < len(cards) - 1:
            transfers.append(_transfer(True, cards[place + 1], leaves))
        yield from op.exchange(transfers)


def _transfer(send: bool, peer: int, buffer: BufferSpec) -> Transfer:
    return Transfer(send, peer, Ref(buffer.name), buffer.nbytes, bulk=True)


@contextlib.asynccontextmanager
async def loaded(
    coordinator: Coordinator, data: Mapping[int, bytes]
) -> AsyncIterator[dict[int, int]]:
    """Encoded programs on their cards within the block: their numbers, by card."""
    programs, births = dict[int, int](), tuple(coordinator.births)
    try:
        for card, program in data.items():
            programs[card] = await coordinator.load_program(card, program)
        yield programs
    finally:
        await coordinator.give_programs_back(programs, births)


async def run(
    coordinator: Coordinator, programs: Mapping[int, int], avoided: Down = ALL_UP
) -> None:
    """Run these programs, by card, together, which need none of the links that are `avoided`."""
    cards = tuple(programs)
    await coordinator.take_cards(cards)
    try:
        flight = Flight(coordinator.count_step(), 0, len(cards), coordinator.trace)
        posted = 0
        try:
            for card in cards:
                request = RunStep(programs[card], buffers=(encode_step([]),))
                await coordinator.post(card, request, flight.callback(card))
                posted += 1
            await settled(coordinator, flight, cards, avoided=avoided)
        finally:
            flight.forget(len(cards) - posted)
            if not flight.settled.is_set() or flight.errors:
                with trio.CancelScope(shield=True):
                    await coordinator.abort(flight.all_back.wait, cards)
        if flight.errors:
            raise flight.cause()
    finally:
        coordinator.give_cards_back(cards)
