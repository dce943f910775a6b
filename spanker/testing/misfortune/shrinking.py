# SPDX-License-Identifier: Apache-2.0
"""Makes a scenario that fails as short as it can be: whatever can be left out or made plainer and
still leaves it failing is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs

from spanker.testing.misfortune.outcome import Outcome
from spanker.testing.misfortune.running import run
from spanker.testing.misfortune.scenario import Client, Deed, Knobs, Moment, Scenario

ValueT = TypeVar("ValueT", Client, Knobs)

# How often a scenario is run at most.
RUNS_MAX = 600


def shrink(
    scenario: Scenario, run: Callable[[Scenario], Outcome] = run, runs_max: int = RUNS_MAX
) -> Scenario:
    """The simplest scenario found that fails in the same way, `run` being what runs one: whose
    first violation is of the same kind."""
    kind = _kind(run(scenario))
    assert kind is not None, "this scenario does not fail"
    runs = 0
    found = True
    while found:
        found = False
        for simpler in _simpler(scenario):
            runs += 1
            if runs > runs_max:
                return scenario
            if _kind(run(simpler)) == kind:
                scenario, found = simpler, True
                break
    return scenario


def _kind(outcome: Outcome) -> str | None:
    """A violation without what differs from run to run."""
    if outcome.good:
        return None
    return re.sub(r"\d[\d,.]*", "#", outcome.violations[0])[:40]


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios a little simpler than this one, the boldest first."""
    clients, deeds = scenario.clients, scenario.deeds
    for i in range(len(clients)):
        if len(clients) > 1:
            yield attrs.evolve(scenario, clients=clients[:i] + clients[i + 1 :])
    for i in range(len(deeds)):
        yield attrs.evolve(scenario, deeds=deeds[:i] + deeds[i + 1 :])
    yield from _fleets(scenario)
    for name, field in attrs.fields_dict(Scenario).items():
        if name not in ("seed", "cards", "ctx") and field.default is not attrs.NOTHING:
            if name not in ("clients", "deeds") and getattr(scenario, name) != field.default:
                plain: dict[str, Any] = {name: field.default}
                yield attrs.evolve(scenario, **plain)
    for knobs in _plainer(scenario.knobs, Knobs()):
        yield attrs.evolve(scenario, knobs=knobs)
    for i, client in enumerate(clients):
        for plainer in _clients(client):
            yield attrs.evolve(scenario, clients=(*clients[:i], plainer, *clients[i + 1 :]))
    for i, deed in enumerate(deeds):
        for sooner in _deeds(deed):
            yield attrs.evolve(scenario, deeds=(*deeds[:i], sooner, *deeds[i + 1 :]))
    if scenario.seed:
        yield attrs.evolve(scenario, seed=0)


def _fleets(scenario: Scenario) -> Iterator[Scenario]:
    match = re.fullmatch(r"virtual:(\d+):(\w+)", scenario.cards)
    if match and int(match[1]) > 1 and not re.search(r"\d", scenario.plan):
        fewer = int(match[1]) - 1
        deeds = tuple(attrs.evolve(deed, card=min(deed.card, fewer - 1)) for deed in scenario.deeds)
        yield attrs.evolve(scenario, cards=f"virtual:{fewer}:{match[2]}", deeds=deeds)


def _clients(client: Client) -> Iterator[Client]:
    if client.tokens_max > 1:
        yield attrs.evolve(client, tokens_max=client.tokens_max // 2)
        yield attrs.evolve(client, tokens_max=client.tokens_max - 1)
    if client.prompt_length > 1:
        yield attrs.evolve(client, prompt_length=client.prompt_length // 2)
        yield attrs.evolve(client, prompt_length=client.prompt_length - 1)
    if not client.score:
        yield from _plainer(client, Client(), "tokens_max", "prompt_length", "start")
    if client.start != Moment():
        yield attrs.evolve(client, start=Moment())


def _deeds(deed: Deed) -> Iterator[Deed]:
    if deed.at.items:
        yield attrs.evolve(deed, at=attrs.evolve(deed.at, items=deed.at.items // 2))
        yield attrs.evolve(deed, at=attrs.evolve(deed.at, items=deed.at.items - 1))
    if deed.at.then_s:
        yield attrs.evolve(deed, at=attrs.evolve(deed.at, then_s=0.0))
        yield attrs.evolve(deed, at=attrs.evolve(deed.at, then_s=round(deed.at.then_s, 3)))
    if deed.card:
        yield attrs.evolve(deed, card=0)


def _plainer(value: ValueT, plain: ValueT, *but: str) -> Iterator[ValueT]:
    for name in attrs.fields_dict(type(value)):
        if name not in but and getattr(value, name) != getattr(plain, name):
            changed: dict[str, Any] = {name: getattr(plain, name)}
            yield attrs.evolve(value, **changed)
