# SPDX-License-Identifier: Apache-2.0
"""Deeds: what is done to a fleet at its moment, and by whoever runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import trio

from spanker.errors import SpankerError, again
from spanker.testing.faults import hang, kill
from spanker.testing.misfortune.answers import second_model
from spanker.testing.misfortune.checks import check_deed, check_drained
from spanker.testing.misfortune.models import path_of
from spanker.testing.misfortune.scenario import FAULTS, Deed, What
from spanker.testing.misfortune.world import World

_STRIKE = {What.KILL: kill, What.HANG: hang}


async def perform(world: World, deed: Deed, waiting: trio.CancelScope) -> None:
    """Wait for the moment of a deed, which ends when `waiting` is cancelled, and do it."""
    with waiting:
        await world.reached(deed.at)
    if not waiting.cancelled_caught:
        await _perform(world, deed)


async def _perform(world: World, deed: Deed) -> None:
    on = "" if deed.what is What.LOAD else f" card {deed.card}"
    world.tell(f"{deed.what.value}{on}")
    if deed.what in FAULTS:
        world.struck.setdefault(deed.card, trio.current_time())
        _STRIKE[deed.what](world.fleet, deed.card)
        return
    try:
        await _WISHES[deed.what](world, deed)
    except SpankerError as error:
        world.tell(f"{deed.what.value}{on}: {type(error).__name__}: {error}")
        check_deed(world, deed, error)
    else:
        world.tell(f"{deed.what.value}{on}: done")


async def _drain(world: World, deed: Deed) -> None:
    world.drained.add(deed.card)
    await world.fleet.drain(deed.card)
    check_drained(world, deed.card)


async def _admit(world: World, deed: Deed) -> None:
    await world.fleet.admit(deed.card)


async def _load(world: World, deed: Deed) -> None:
    await load(world, 1, second_model(world.scenario), "auto")


_WISHES: Mapping[What, Callable[[World, Deed], Awaitable[None]]] = {
    What.DRAIN: _drain,
    What.ADMIT: _admit,
    What.LOAD: _load,
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
            prompt_chunk=scenario.prompt_chunk,
        )
    except SpankerError as error:
        world.loaded(number, None, again(error))
        raise
    world.loaded(number, model)
    world.tell(f"{name} is loaded, plan {model.plan.name} on cards {model.plan.cards}")
