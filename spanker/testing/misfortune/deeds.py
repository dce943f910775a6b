# SPDX-License-Identifier: Apache-2.0
"""Deeds: what is done to a fleet at its moment, and by whoever runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from spanker.errors import SpankerError, again
from spanker.testing.fault_plan import FaultPlan, HostLink, Link
from spanker.testing.misfortune.answers import second_model
from spanker.testing.misfortune.checks import check_deed, check_drained
from spanker.testing.misfortune.models import path_of
from spanker.testing.misfortune.scenario import FATAL, WISHES, Deed, What
from spanker.testing.misfortune.world import World


async def perform(world: World, deed: Deed, waiting: trio.CancelScope) -> None:
    """Wait for the moment of a deed, which ends when `waiting` is cancelled, and do it."""
    with waiting:
        await world.reached(deed.at)
    if not waiting.cancelled_caught:
        await _perform(world, deed)


async def _perform(world: World, deed: Deed) -> None:
    words = in_words(deed)
    world.tell(words)
    world.done.add(deed.what)
    if deed.what not in WISHES:
        await _strike(world, deed)
        return
    try:
        await _WISHES[deed.what](world, deed)
    except SpankerError as error:
        world.tell(f"{words}: {type(error).__name__}: {error}")
        check_deed(world, deed, error)
    else:
        world.tell(f"{words}: done")


async def _strike(world: World, deed: Deed) -> None:
    if max(deed.card, deed.peer) >= len(world.fleet.devices):
        world.tell(f"{in_words(deed)}: no such card yet")
        return
    card: Any = world.fleet.devices[deed.card]
    if deed.what in FATAL:
        world.strike(deed.card)
    if deed.what is What.INJECT:
        assert world.injection is not None
        (fault,) = FaultPlan.parse(deed.text).faults
        if isinstance(fault.where, Link):
            world.done.add(What.CUT)
        else:
            everyone = isinstance(fault.where, HostLink)
            for number in range(len(world.fleet.devices)) if everyone else fault.cards:
                world.strike(number)
        world.injection.strike(deed.text)
    elif deed.what in FATAL:
        getattr(card, _KNOBS[deed.what])()
    elif deed.what is What.SLOW:
        card.slow(deed.value)
    elif deed.what is What.STARVE:
        card.starve(int(deed.value))
    elif deed.what is What.CORRUPT:
        card.corrupt(deed.peer, int(deed.value))
    elif deed.what is What.CUT:
        card.cut(deed.peer)
        if deed.for_s is not None:
            await trio.sleep(deed.for_s)
            card.mend(deed.peer)
            world.tell(f"link {deed.card}-{deed.peer} is mended")


_KNOBS = {
    What.KILL: "kill",
    What.HANG: "hang",
    What.RESET: "reset",
    What.ECC: "fail_memory",
}


def in_words(deed: Deed) -> str:
    """A deed for people."""
    word = deed.what.value
    if deed.what is What.LOAD:
        return "load the second model"
    if deed.what is What.JOIN:
        return "a card joins"
    if deed.what is What.INJECT:
        return deed.text
    if deed.what is What.CUT:
        lasts = "" if deed.for_s is None else f" for {deed.for_s:g} s"
        return f"cut {deed.card}-{deed.peer}{lasts}"
    if deed.what is What.CORRUPT:
        return f"corrupt {deed.value:g} messages {deed.card}-{deed.peer}"
    more = f" x{deed.value:g}" if deed.what in (What.SLOW, What.STARVE) else ""
    return f"{word} card {deed.card}{more}"


async def _drain(world: World, deed: Deed) -> None:
    world.drained.add(deed.card)
    await world.fleet.drain(deed.card)
    check_drained(world, deed.card)


async def _admit(world: World, deed: Deed) -> None:
    world.admitted[deed.card] = trio.current_time()
    await world.fleet.admit(deed.card)


async def _load(world: World, deed: Deed) -> None:
    await load(world, 1, second_model(world.scenario), "auto")


async def _join(world: World, deed: Deed) -> None:
    await world.fleet.add("virtual:1:16MiB")


_WISHES: Mapping[What, Callable[[World, Deed], Awaitable[None]]] = {
    What.DRAIN: _drain,
    What.ADMIT: _admit,
    What.LOAD: _load,
    What.JOIN: _join,
}


async def load(world: World, number: int, name: str, plan: str) -> None:
    """Load one of the models of a scenario.  Raises what stands in the way, as whoever asks for the
    model does."""
    scenario = world.scenario
    try:
        model = await world.fleet.load(
            path_of(name),
            plan=plan,
            ctx=scenario.ctx,
            kv_tokens=None if number else scenario.kv_tokens,
            kv_copies=0 if number else scenario.kv_copies,
            prompt_chunk=scenario.prompt_chunk,
        )
    except SpankerError as error:
        world.loaded(number, None, again(error))
        raise
    world.loaded(number, model)
    world.tell(f"{name} is loaded, plan {model.plan.name} on cards {model.plan.cards}")
