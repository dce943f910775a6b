# SPDX-License-Identifier: Apache-2.0
"""The story of a run, for people: who was there, what happened when, and the verdict."""

from __future__ import annotations

from spanker.testing.misfortune.clients import describe
from spanker.testing.misfortune.deeds import in_words
from spanker.testing.misfortune.models import MODELS
from spanker.testing.misfortune.outcome import Outcome
from spanker.testing.misfortune.scenario import Knobs, Moment, Scenario


def story(scenario: Scenario, outcome: Outcome) -> str:
    """A scenario and what came of it, line by line; the same for the same run."""
    lines = [
        f"seed {scenario.seed}",
        f"fleet   {scenario.cards}, profile {scenario.profile}, hang timeout "
        f"{scenario.hang_timeout_s:g} s{'' if scenario.recover else ', does not recover'}",
        f"model   {scenario.model}: {_model(scenario.model)}; plan {scenario.plan}, context "
        f"{scenario.ctx}, chunks of {scenario.prompt_chunk}, KV "
        f"{scenario.kv_tokens or 'as it fits'}{', and copies of it' * scenario.kv_copies}",
    ]
    if scenario.knobs != Knobs():
        lines.append(f"knobs   {_fields(scenario.knobs)}")
    for number, client in enumerate(scenario.clients):
        lines.append(f"client {number}, {_moment(client.start)}: {describe(client)}")
    lines += [f"{_moment(deed.at)}: {in_words(deed)}" for deed in scenario.deeds]
    lines.append("")
    lines += [f"{time_s * 1e3:12.3f} ms  {line}" for time_s, line in outcome.story]
    lines.append("")
    lines.append(
        f"over after {outcome.seconds:.6f} s: {'all well' if outcome.good else 'NOT well'}"
    )
    lines += [f"  - {violation}" for violation in outcome.violations]
    return "\n".join(lines)


def _model(name: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in MODELS[name].items())


def _fields(knobs: Knobs) -> str:
    import attrs

    return ", ".join(
        f"{field.name} {getattr(knobs, field.name)}"
        for field in attrs.fields(Knobs)
        if getattr(knobs, field.name) != field.default
    )


def _moment(moment: Moment) -> str:
    parts = []
    if moment.items:
        parts.append(f"item {moment.items}")
    if moment.events:
        parts.append(f"event {moment.events}")
    if moment.then_s or not parts:
        parts.append(f"{moment.then_s * 1e3:g} ms" if moment.then_s else "at once")
    return " + ".join(parts)
