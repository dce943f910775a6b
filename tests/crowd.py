# SPDX-License-Identifier: Apache-2.0
"""Sequences of all kinds at once, on a small model, and faults at moments of them: what tests of
failures have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trio
from waiting import until

import spanker
from spanker.actors import copying
from spanker.events import CardLost, Event
from spanker.testing import hang, kill

HANG_TIMEOUT_S = 0.5
TOKENS = 40
FAULTS = {"kill": kill, "hang": hang}
Fault = Callable[[spanker.Fleet, int], None]
# What each sequence gave, in order of position: the ids, and all bytes of the logits.
Answers = list[tuple[tuple[int, ...], bytes]]


class At:
    """Calls at moments of a crowd."""

    def __init__(self, calls: dict[int, Callable[[], None]]) -> None:
        self._calls = dict(calls)

    def __call__(self, items: int) -> None:
        for moment in [m for m in self._calls if m <= items]:
            self._calls.pop(moment)()


class Crowd:
    """Sequences of all kinds at the same time; `moment(n)` is called when n items have come."""

    def __init__(
        self, model: spanker.Model, moment: Callable[[int], None] = lambda items: None
    ) -> None:
        self._model = model
        self._moment = moment
        self._items = 0

    async def run(self) -> Answers:
        made: dict[int, tuple[tuple[int, ...], bytes]] = {}

        async def generate(number: int, prompt: Sequence[int], temperature: float) -> None:
            ids, logits = [], []
            generation = self._model.generate(
                prompt,
                max_tokens=TOKENS,
                temperature=temperature,
                seed=number,
                ignore_eos=True,
                logits=number != 2,
            )
            async for token in generation:
                ids.append(token.id)
                logits.append(b"" if token.logits is None else token.logits.tobytes())
                self._come()
            made[number] = tuple(ids), b"".join(logits)  # type: ignore[arg-type]

        async def score(number: int, prompt: Sequence[int]) -> None:
            rows, at = [], 0
            async for position, logits in self._model.score(prompt):
                assert position == at
                at += len(logits)
                rows.append(logits)
                self._come()
            made[number] = (), np.concatenate(rows).tobytes()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, 0, [5, 6, 7], 0.0)
            nursery.start_soon(generate, 1, range(100, 180), 0.8)
            nursery.start_soon(generate, 2, [9], 0.0)
            nursery.start_soon(score, 3, range(150))
        return [made[number] for number in sorted(made)]

    def _come(self) -> None:
        self._items += 1
        self._moment(self._items)


ITEMS = 3 * TOKENS + 4  # about as many as come, 64 rows of logits being one


class Schedule:
    """Faults at moments of a crowd."""

    def __init__(self, fleet: spanker.Fleet, faults: Sequence[tuple[int, Fault, int]]) -> None:
        self._fleet = fleet
        self._faults = list(faults)

    def __call__(self, items: int) -> None:
        for fault in [f for f in self._faults if f[0] <= items]:
            self._faults.remove(fault)
            fault[1](self._fleet, fault[2])


class FailingMove:
    """Stands for `copying.run`: the link of cards 0 and 1 is cut, or a fault strikes card 3, when
    programs that move a model run for the time `run`; `runs` counts them."""

    def __init__(self, fleet: spanker.Fleet, run: int, fault: str) -> None:
        self.runs = 0
        self._fleet, self._run, self._fault = fleet, run, fault
        self._original = copying.run

    async def __call__(self, *args: Any) -> None:
        self.runs += 1
        if self.runs == self._run and self._fault == "cut":
            self._fleet.devices[0].cut(1)  # type: ignore[union-attr]
        elif self.runs == self._run:
            FAULTS[self._fault](self._fleet, 3)
        await self._original(*args)


def lost_cards(fleet: spanker.Fleet) -> list[int]:
    return sorted(e.card for e in fleet.events.history if isinstance(e, CardLost))


def kinds(fleet: spanker.Fleet) -> list[type[Event]]:
    return [type(event) for event in fleet.events.history]


async def check_as_alone(path: Path, made: Sequence[spanker.Generation]) -> None:
    """Generation n of these, of the prompt [n] and 250 tokens, has those of a fleet of one card."""
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(path, ctx=256)
        for number, generation in enumerate(made):
            again = model.generate([number], max_tokens=250, ignore_eos=True)
            await again.collect()
            assert again.token_ids == generation.token_ids


async def check_nothing_held(model: spanker.Model) -> None:
    await until(
        lambda: not (model.stats.running or model.stats.waiting or model.stats.kv_pages_used)
    )
