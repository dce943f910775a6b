# SPDX-License-Identifier: Apache-2.0
"""Fault plans drawn from a seed; `FaultPlan.random` says from what distribution.

Only draws that mean the same in every version of Python: of whole numbers, and choices.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs

from spanker.testing.fault_plan import (
    AT_COMMANDS,
    KINDS,
    MOMENTS,
    AtByte,
    AtCommand,
    AtStep,
    AtTime,
    AtToken,
    Card,
    Cards,
    Channel,
    Client,
    Fault,
    HostLink,
    Link,
    Option,
    What,
    When,
    Where,
)
from spanker.values import Value

# How often a fault that would cost too many cards is drawn again.
DRAWS_MAX = 100
COMMANDS = 16
BYTES = 64 << 10


@attrs.frozen(eq=False, repr=False)
class Chances(Value):
    """What is drawn from, as the arguments of `FaultPlan.random`."""

    cards: int
    clients: int
    kinds: tuple[What, ...]
    tokens: int
    steps: int
    seconds: float
    survivors: int


def draw_faults(seed: int | str, count: int | None, chances: Chances) -> tuple[Fault, ...]:
    """So many faults, or 1 to 3."""
    draw = random.Random(f"spanker faults {seed}")
    made: list[Fault] = []
    struck: set[int] = set()
    for _ in range(draw.choice([1, 2, 3]) if count is None else count):
        for _ in range(DRAWS_MAX):
            fault = _drawn(draw, chances)
            risk = struck.union(_at_risk(fault, chances.cards)) if fault else struck
            if fault and len(risk) <= max(chances.cards - chances.survivors, 0):
                struck = risk
                made.append(fault)
                break
    return tuple(made)


def _drawn(draw: random.Random, chances: Chances) -> Fault | None:
    """A fault, or None where the kind that was drawn has no place in such a fleet."""
    what = draw.choice(chances.kinds)
    kind, cards, clients = KINDS[what], chances.cards, chances.clients
    there = {Card: cards, Cards: cards, Link: cards - 1, HostLink: 1, Channel: cards}
    possible = [place for place in kind.where if there.get(place, clients) > 0]
    if not possible:
        return None
    where = _drawn_place(draw, draw.choice(possible), cards, clients)
    moments = MOMENTS[type(where)]
    moment = draw.choice([m for m in moments if m is not AtCommand or what in AT_COMMANDS])
    when = _drawn_moment(draw, moment, chances)
    factor = None if kind.factor is Option.NO else float(draw.choice([2, 4, 8, 16]))
    lasts = kind.duration is Option.MUST or (
        kind.duration is Option.MAY and draw.choice([True, False])
    )
    duration_s = _milliseconds(draw, 1, chances.seconds / 4) if lasts else None
    return Fault(what, where, when, factor, duration_s, draw.randint(1, 3) if kind.counted else 1)


def _drawn_place(draw: random.Random, kind: type[Where], cards: int, clients: int) -> Where:
    if kind is Link:
        a, b = draw.sample(range(cards), 2)
        return Link(a, b)
    if kind is Cards:
        return Cards(tuple(draw.sample(range(cards), draw.randint(1, max(cards // 2, 1)))))
    if kind is HostLink:
        return HostLink()
    if kind is Client:
        return Client(draw.randrange(clients))
    number = draw.randrange(cards)
    return Card(number) if kind is Card else Channel(number)


def _drawn_moment(draw: random.Random, kind: type[When], chances: Chances) -> When:
    if kind is AtTime:
        return AtTime(_milliseconds(draw, 0, chances.seconds))
    if kind is AtCommand:
        return AtCommand(draw.randint(1, chances.steps), draw.randrange(COMMANDS))
    if kind is AtStep:
        return AtStep(draw.randint(1, chances.steps))
    if kind is AtToken:
        return AtToken(draw.randint(1, chances.tokens))
    return AtByte(draw.randint(1, BYTES))


def _milliseconds(draw: random.Random, least: int, most_s: float) -> float:
    """Seconds in whole milliseconds."""
    return draw.randint(least, max(round(most_s * 1000), least)) / 1000


def _at_risk(fault: Fault, cards: int) -> Sequence[int]:
    """The cards that a fault may cost the fleet: of a link its first, for it can be but one."""
    if not KINDS[fault.what].loses:
        return ()
    if isinstance(fault.where, HostLink):
        return range(cards)
    return fault.cards[:1] if isinstance(fault.where, Link) else fault.cards
