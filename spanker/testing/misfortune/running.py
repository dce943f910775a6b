# SPDX-License-Identifier: Apache-2.0
"""Runs a scenario in virtual time, and checks everything."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any

import trio

import spanker
from spanker.actors.virtual_time import run_virtual
from spanker.device.spec import parse_fleet
from spanker.errors import SpankerError
from spanker.events import LOGGER
from spanker.fleet import Fleet
from spanker.testing.injection import Injection, faulty_fleet
from spanker.testing.misfortune import answers, checks
from spanker.testing.misfortune.clients import attend
from spanker.testing.misfortune.deeds import load, perform
from spanker.testing.misfortune.knobs import turned
from spanker.testing.misfortune.outcome import Outcome
from spanker.testing.misfortune.profiles import PROFILES, TOPOLOGIES
from spanker.testing.misfortune.scenario import WISHES, Scenario, What
from spanker.testing.misfortune.watchdog import StuckError, Turns, wall_clock
from spanker.testing.misfortune.world import World

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

# The coordinator gives an abort so long.
_STOP_S = 2.0


def run(
    scenario: Scenario,
    planting: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Outcome:
    """Run a scenario; the same one gives the same outcome, to the byte of its story.

    What `planting` makes is entered around the run, but not where right answers are computed: a
    bug, to see whether it is found.  Nothing is raised for what the run does.
    """
    answers.find(answers.question_of(scenario, client) for client in scenario.clients)
    before = _held()
    turns = Turns()
    run = _Run(scenario, turns)
    # What a collector finds, and when, must not depend on what ran before.
    collecting = gc.isenabled()
    gc.disable()
    logger = logging.getLogger(LOGGER)
    quiet, logger.disabled = logger.disabled, True
    try:
        with planting(), turned(scenario.knobs), wall_clock():
            run_virtual(run.main, seed=scenario.seed, instruments=[turns])
    except StuckError as error:
        run.violations.append(str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        run.violations.append(f"the fleet crashed: {_text_of(error)}")
    finally:
        logger.disabled = quiet
        if collecting:
            gc.enable()
    if turns.stuck:
        run.violations.append("tasks ran for ever while no time passed")
    run.check_nothing_held(before)
    return run.outcome()


@contextlib.asynccontextmanager
async def _fleet(scenario: Scenario) -> AsyncIterator[tuple[Fleet, Injection | None]]:
    """The fleet of a scenario.  What makes channels fail stands around it only where some do."""
    options: dict[str, Any] = {
        "profile": PROFILES[scenario.profile],
        "hang_timeout_s": scenario.hang_timeout_s,
        "recover": scenario.recover,
        "topology": TOPOLOGIES[scenario.links](len(parse_fleet(scenario.cards))),
        "audit_every": scenario.audit_every,
        "rebalance": scenario.rebalance,
    }
    if any(deed.what is What.INJECT for deed in scenario.deeds):
        async with faulty_fleet(scenario.cards, **options) as (fleet, injection):
            yield fleet, injection
    else:
        async with spanker.open_fleet(scenario.cards, **options) as fleet:
            yield fleet, None


class _Run:
    """One run, and what remains of it when it is over."""

    def __init__(self, scenario: Scenario, turns: Turns) -> None:
        self.violations: list[str] = []
        self._scenario = scenario
        self._turns = turns
        self._world: World | None = None
        self._seconds = 0.0

    async def main(self) -> None:
        scenario = self._scenario
        tasks = trio.lowlevel.current_statistics().tasks_living
        limit_s = limit(scenario)
        with trio.move_on_after(limit_s) as scope:
            self._turns.scope = scope
            async with _fleet(scenario) as (fleet, injection):
                self._world = world = World(scenario, fleet, injection)
                world.look = functools.partial(checks.check_always, world)
                await self._live(world)
        self._seconds = trio.current_time()
        if scope.cancelled_caught and not self._turns.stuck:
            self.violations.append(f"it was not over after {limit_s:g} s")
        if self._world is not None:
            checks.check_clients(self._world)
        left = trio.lowlevel.current_statistics().tasks_living - tasks
        if left:
            self.violations.append(f"{left} tasks are left")

    async def _live(self, world: World) -> None:
        scenario = self._scenario
        async with trio.open_nursery() as doing:
            scopes = []
            for deed in scenario.deeds:
                scopes.append(trio.CancelScope())
                doing.start_soon(perform, world, deed, scopes[-1])
            async with trio.open_nursery() as clients:
                for number in range(len(scenario.clients)):
                    clients.start_soon(attend, world, number)
                try:
                    await load(world, 0, scenario.model, scenario.plan)
                except SpankerError as error:
                    world.tell(f"load: {type(error).__name__}: {error}")
                    checks.check_load(world, error, scenario.plan)
            # Those whose moment has not come by now: it never will.
            for scope in scopes:
                scope.cancel()
        await checks.settle(world, 3 * _patience_s(scenario))
        checks.check_idle(world)
        checks.check_counters(world)
        await checks.check_memory(world)

    def check_nothing_held(self, before: tuple[int, int]) -> None:
        """Threads and descriptors are those there were."""
        now = _held()
        if now != before:
            # What is part of a cycle goes with the collector.
            gc.collect()
            now = _held()
        if now != before:
            self.violations.append(f"threads and descriptors: {before} before, {now} after")

    def outcome(self) -> Outcome:
        world = self._world
        violations = [*(world.violations if world else ()), *self.violations]
        return Outcome(
            tuple(violations),
            tuple(world.story) if world else (),
            self._seconds,
            self._turns.turns,
            len(world.done - WISHES) if world else 0,
        )


def _patience_s(scenario: Scenario) -> float:
    """How long it takes at most to find out about a card, and to get over it: a hang is looked for
    at most every second."""
    return 3 * scenario.hang_timeout_s + 2 * _STOP_S


def limit(scenario: Scenario) -> float:
    """By when everybody has been answered: every client takes all its time after each other, and
    so does everything that is done."""
    steps = taking = 0.0
    slowest = 1.0
    for client in scenario.clients:
        wants = checks.wanted(scenario, client)
        taking += client.start.then_s + client.pause_s * wants
        steps += wants + client.prompt_length
    for deed in scenario.deeds:
        taking += deed.at.then_s + (deed.for_s or 0.0) + 2 * _patience_s(scenario)
        if deed.what is What.SLOW:
            slowest = max(slowest, deed.value)
    # Some milliseconds each, and all of them again after every fault.
    steps *= (1 + len(scenario.deeds)) * slowest
    return 5.0 + _patience_s(scenario) + taking + 0.01 * steps


def _held() -> tuple[int, int]:
    """Python threads and open descriptors."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def _text_of(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
