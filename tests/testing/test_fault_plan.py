# SPDX-License-Identifier: Apache-2.0
"""Fault plans: what goes together, their text and JSON forms, and plans drawn from a seed."""

from __future__ import annotations

import json

import pytest

from spanker.errors import ConfigError
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
    FaultPlan,
    HostLink,
    Link,
    Option,
    What,
)

PLACES = (Card(2), Cards((0, 1)), Link(0, 2), HostLink(), Channel(1), Client(3))
MOMENT_VALUES = (AtTime(0.5), AtStep(5), AtCommand(5, 17), AtToken(20), AtByte(70_000))

LINES = {
    "kill 2@token:20": Fault(What.DIE, Card(2), AtToken(20)),
    "hang 1@step:5": Fault(What.HANG, Card(1), AtStep(5)),
    "reset 1@command:5:17": Fault(What.RESET, Card(1), AtCommand(5, 17)),
    "slow 3@time:0.5 x4": Fault(What.SLOW, Card(3), AtTime(0.5), factor=4),
    "slow 3@time:1e-06 x1.5 for 2s": Fault(
        What.SLOW, Card(3), AtTime(1e-6), factor=1.5, duration_s=2
    ),
    "cut 0-2@token:10 for 0.5s": Fault(What.CUT, Link(0, 2), AtToken(10), duration_s=0.5),
    "corrupt 0-1@step:3": Fault(What.CORRUPT, Link(0, 1), AtStep(3)),
    "corrupt channel:1@byte:4096 3 times": Fault(What.CORRUPT, Channel(1), AtByte(4096), count=3),
    "partition 1@time:2 for 0.25s": Fault(What.PARTITION, Cards((1,)), AtTime(2), duration_s=0.25),
    "partition 0,2@time:2": Fault(What.PARTITION, Cards((2, 0)), AtTime(2)),
    "stall host@time:1 for 0.2s": Fault(What.STALL, HostLink(), AtTime(1), duration_s=0.2),
    "flap 1@step:9 for 0.1s 3 times": Fault(What.FLAP, Card(1), AtStep(9), duration_s=0.1, count=3),
    "out-of-memory 0@time:0 2 times": Fault(What.OUT_OF_MEMORY, Card(0), AtTime(0), count=2),
    "cancel client:4@token:7": Fault(What.CANCEL, Client(4), AtToken(7)),
}


@pytest.mark.parametrize("line", LINES)
def test_a_fault_is_a_line(line: str):
    plan = FaultPlan.parse(line)
    assert plan == FaultPlan((LINES[line],))
    assert hash(plan) == hash(FaultPlan((LINES[line],)))
    assert str(plan) == line


def test_lines_may_be_written_in_other_ways():
    assert FaultPlan.parse("die 2 @ token:20") == FaultPlan.parse("kill 2@token:20")
    assert FaultPlan.parse("out_of_memory 0@step:1") == FaultPlan.parse("out-of-memory 0@step:1")
    assert FaultPlan.parse("cut 0-1@step:1 for 500 ms") == FaultPlan.parse(
        "cut 0-1@step:1 for 0.5s"
    )
    assert FaultPlan.parse("partition 2,0,0@time:1").faults[0].cards == (0, 2)


@pytest.mark.parametrize("between", ["; ", ";", ", ", "\n", " ;\n"])
def test_a_plan_is_its_lines(between: str):
    plan = FaultPlan(tuple(LINES.values()))
    assert FaultPlan.parse(between.join(LINES)) == plan
    assert FaultPlan.parse(str(plan)) == plan
    assert FaultPlan.from_json(plan.to_json()) == plan
    assert FaultPlan.from_json(json.dumps(plan.to_json())) == plan
    assert plan.to_json()["version"] == 1


@pytest.mark.parametrize("text", ["", "  ", ";\n;"])
def test_nothing_is_a_plan_without_faults(text: str):
    assert FaultPlan.parse(text) == FaultPlan()
    assert str(FaultPlan()) == ""


def test_the_table_decides_what_goes_together():
    made = 0
    for what in What:
        kind = KINDS[what]
        options = {
            "factor": 2.0 if kind.factor is Option.MUST else None,
            "duration_s": 0.5 if kind.duration is Option.MUST else None,
        }
        for where in PLACES:
            for when in MOMENT_VALUES:
                fits = type(where) in kind.where and type(when) in MOMENTS[type(where)]
                if type(when) is AtCommand and what not in AT_COMMANDS:
                    fits = False
                if fits:
                    fault = Fault(what, where, when, **options)
                    assert FaultPlan.parse(str(fault)) == FaultPlan((fault,))
                    made += 1
                else:
                    with pytest.raises(ConfigError, match=f"fault {what.value}: "):
                        Fault(what, where, when, **options)
    assert made > 2 * len(What)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kill", "expected WHAT WHERE@WHEN"),
        ("kill 2", "expected WHAT WHERE@WHEN"),
        ("kill 2@token", "expected WHAT WHERE@WHEN"),
        ("explode 2@token:1", "no kind of fault 'explode': expected kill, hang"),
        ("kill everywhere@token:1", "no place 'everywhere'"),
        ("kill 2@moon:1", "no moment moon:1"),
        ("kill 2@token:1.5", "no moment token:1.5"),
        ("kill 2@token:0", "needs a token from 1 on, got 0"),
        ("kill 2@command:3", "no moment command:3"),
        ("kill 2@command:0:1", "needs a step from 1 on, got 0"),
        ("kill 0-1@token:1", "strikes a card, got a link"),
        ("kill 1@byte:1", "of a card is at time, token, step, command, got byte"),
        ("slow 1@time:1", "needs a factor, got none"),
        ("slow 1@time:1 x1", "needs a factor above 1, got 1"),
        ("slow 1@command:1:1 x2", "is at time, token, step, got command"),
        ("kill 1@time:1 x2", "has no use for a factor, got 2"),
        ("kill 1@time:1 for 1s", "has no use for a duration"),
        ("stall host@time:1", "needs a duration, got none"),
        ("stall host@time:1 for 0s", "needs a duration above 0"),
        ("kill 1@time:1 2 times", "happens once, got 2 times"),
        ("drop channel:1@time:1 0 times", "needs a count from 1 on, got 0"),
        ("cut 1-1@time:1", "needs a link between two cards"),
        ("kill 1@time:1e999", "is at a time from 0 on"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, says: str):
    with pytest.raises(ConfigError) as caught:
        FaultPlan.parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    ["{", "[]", "{}", '{"version": 2, "faults": []}', '{"version": true, "faults": []}'],
)
def test_json_that_is_no_plan_is_refused(document: str):
    with pytest.raises(ConfigError, match="fault plan: expected"):
        FaultPlan.from_json(document)


def test_limits_are_kept():
    with pytest.raises(ConfigError, match="at most 65,536 characters"):
        FaultPlan.parse(" " * 65_537)
    with pytest.raises(ConfigError, match="at most 1024 faults"):
        FaultPlan.parse("kill 1@step:1;" * 1025)
    with pytest.raises(ConfigError, match="expected a list of texts"):
        FaultPlan.from_json({"version": 1, "faults": [1]})


def test_a_plan_is_checked_against_a_fleet():
    plan = FaultPlan.parse("cut 0-2@step:1; stall client:9@time:1 for 1s")
    plan.check(3)
    with pytest.raises(ConfigError, match="no card 2: the fleet has cards 0 to 1"):
        plan.check(2)


def test_a_seed_decides_a_plan():
    plans = [FaultPlan.random(seed, 4, clients=2) for seed in range(300)]
    assert plans == [FaultPlan.random(seed, 4, clients=2) for seed in range(300)]
    assert len(set(plans)) > 250
    # Every kind comes, and every plan has a text that gives it back.
    assert {fault.what for plan in plans for fault in plan.faults} == set(What)
    for plan in plans:
        assert FaultPlan.parse(str(plan)) == plan
        assert 1 <= len(plan.faults) <= 3
        plan.check(4)


def test_a_seed_means_the_same_everywhere():
    assert str(FaultPlan.random(0, 4)) == RANDOM_0


RANDOM_0 = "reset 3@command:60:12; corrupt channel:1@byte:46979 2 times"


def test_drawn_plans_leave_survivors():
    for seed in range(200):
        plan = FaultPlan.random(seed, 3, faults=6, kinds=[What.DIE, What.HANG], survivors=2)
        assert len({card for fault in plan.faults for card in fault.cards}) == 1
        assert len(plan.faults) == 6
    assert FaultPlan.random(1, 1, kinds=[What.DIE]) == FaultPlan()
    assert FaultPlan.random(1, 1, kinds=[What.DIE], survivors=0, faults=2).faults[1].cards == (0,)


def test_drawn_plans_have_what_was_asked_for():
    plan = FaultPlan.random(3, 3, faults=20, kinds=[What.SLOW, What.CUT], tokens=5, steps=7)
    assert {fault.what for fault in plan.faults} == {What.SLOW, What.CUT}
    for fault in plan.faults:
        if isinstance(fault.when, AtToken):
            assert fault.when.n <= 5
        if isinstance(fault.when, AtStep):
            assert fault.when.n <= 7
    # One card has no links, and without clients there are none to strike.
    assert FaultPlan.random(3, 1, kinds=[What.CUT, What.CANCEL]) == FaultPlan()
