# SPDX-License-Identifier: Apache-2.0
"""The simulator of misfortune: a few hundred seeds, and that it would find bugs.

A seed that fails is replayed by `python -m spanker.testing.replay SEED --shrink`; `make soak` runs
ten thousand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import pytest
import trio
from click.testing import CliRunner
from mutations import BY_NAME, MUTATIONS

from spanker.actors.session import Session
from spanker.testing import replay
from spanker.testing.misfortune import (
    Client,
    Deed,
    Knobs,
    Moment,
    Outcome,
    Scenario,
    Way,
    What,
    draw,
    literal,
    run,
)
from spanker.testing.misfortune.__main__ import main as run_many
from spanker.testing.misfortune.shrinking import shrink
from spanker.testing.misfortune.story import story

# So many seeds take some ten seconds.
SEEDS = 150
NAMES = {value.__name__: value for value in (Client, Deed, Knobs, Moment, Scenario, Way, What)}


@pytest.mark.parametrize("first", range(0, SEEDS, 25))
def test_whatever_happens_answers_are_right_and_nothing_is_left(first: int) -> None:
    for seed in range(first, first + 25):
        outcome = run(draw(seed))
        assert outcome.good, f"seed {seed}:\n{story(draw(seed), outcome)}"


def test_a_seed_tells_the_same_story_every_time() -> None:
    told = 0
    for seed in (1, 8, 24, 64):
        scenario = draw(seed)
        first, second = (story(scenario, run(scenario)) for _ in range(2))
        assert first == second
        told += len(first.splitlines())
    assert told > 60


def test_a_scenario_is_its_text() -> None:
    for seed in range(300):
        scenario = draw(seed)
        assert draw(seed) == scenario
        assert eval(literal(scenario), NAMES) == scenario


def test_seeds_draw_everything_there_is() -> None:
    scenarios = [draw(seed) for seed in range(400)]
    assert {deed.what for s in scenarios for deed in s.deeds} == set(What)
    clients = [client for s in scenarios for client in s.clients]
    assert {client.leave_by for client in clients if client.leave_after is not None} == set(Way)
    for field in attrs.fields(Client):
        assert any(getattr(client, field.name) != field.default for client in clients), field.name
    assert {len(s.faults) for s in scenarios} >= set(range(5))


# --- what it finds ----------------------------------------------------------------------------


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutations_fit_the_code(mutation: object) -> None:
    with BY_NAME[mutation.name].planted():  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize("name", ["kv-off-by-one", "caller-left-waiting"])
def test_planted_bugs_are_found(name: str) -> None:
    assert any(not run(draw(seed), BY_NAME[name].planted).good for seed in range(30))


@contextmanager
def spinning() -> Iterator[None]:
    """Sessions that look for work for ever, and let everybody else look, too."""

    async def spin(self: Session) -> None:
        while True:
            await trio.lowlevel.checkpoint()

    before = Session._run
    Session._run = spin  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session._run = before  # type: ignore[method-assign]


def test_a_livelock_is_an_error_and_not_the_end_of_the_tests() -> None:
    outcome = run(Scenario(0, "virtual:1", clients=(Client(),)), spinning)
    assert "tasks ran for ever while no time passed" in outcome.violations


@contextmanager
def crashing() -> Iterator[None]:
    async def crash(self: Session) -> None:
        raise ZeroDivisionError("planted")

    before = Session._run
    Session._run = crash  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session._run = before  # type: ignore[method-assign]


def test_a_crash_is_a_violation() -> None:
    outcome = run(Scenario(0, "virtual:1", clients=(Client(),)), crashing)
    assert any("ZeroDivisionError: planted" in violation for violation in outcome.violations)


# --- defects that it has found ------------------------------------------------------------------


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(
            Scenario(
                seed=3,
                cards="virtual:1:16MiB",
                clients=(Client(prompt_length=14, tokens_max=4), Client(tokens_max=2)),
                deeds=(
                    Deed(at=Moment(then_s=0.005), what=What.HANG),
                    Deed(at=Moment(), what=What.DRAIN),
                    Deed(at=Moment(items=5, then_s=0.001), what=What.ADMIT),
                ),
            ),
            id="moved while it is given up",
        ),
        pytest.param(
            Scenario(
                seed=0,
                cards="virtual:2:16MiB",
                ctx=32,
                clients=(Client(),),
                deeds=(
                    Deed(at=Moment(items=1), what=What.DRAIN),
                    Deed(at=Moment(), what=What.LOAD),
                ),
            ),
            id="drained while a model is loaded",
        ),
        pytest.param(
            Scenario(
                seed=0,
                cards="virtual:2:16MiB",
                ctx=32,
                clients=(Client(),),
                deeds=(
                    Deed(
                        at=Moment(then_s=0.000185),
                        what=What.INJECT,
                        card=1,
                        text="drop channel:1@token:1",
                    ),
                ),
            ),
            id="a message that gets lost is the fault of nobody else",
        ),
        pytest.param(
            Scenario(
                seed=0,
                cards="virtual:1:16MiB",
                ctx=32,
                clients=(Client(prompt_first=100, tokens_max=0, score=True),),
                deeds=(
                    Deed(at=Moment(), what=What.HANG),
                    Deed(at=Moment(), what=What.JOIN),
                    Deed(
                        at=Moment(then_s=0.005),
                        what=What.INJECT,
                        text="stall host@token:1 for 9s",
                    ),
                ),
            ),
            id="the host link stalls under a card that joins",
        ),
        pytest.param(draw(84), id="a file that a kept error holds open"),
    ],
)
def test_stays_mended(scenario: Scenario) -> None:
    outcome = run(scenario)
    assert outcome.good, story(scenario, outcome)


# --- shrinking ----------------------------------------------------------------------------------


def fails_if(condition: Callable[[Scenario], bool]) -> Callable[[Scenario], Outcome]:
    def judge(scenario: Scenario) -> Outcome:
        return Outcome(("wrong",) if condition(scenario) else (), (), 0.0, 0, 0)

    return judge


def test_what_does_not_matter_is_left_out() -> None:
    scenario = next(s for s in map(draw, range(1000)) if len(s.clients) > 2 and len(s.deeds) > 2)

    def condition(s: Scenario) -> bool:
        return any(c.tokens_max > 3 for c in s.clients) and bool(s.deeds)

    assert condition(scenario)
    shrunk = shrink(scenario, fails_if(condition))
    assert shrunk.clients == (Client(tokens_max=4),)
    assert len(shrunk.deeds) == 1
    assert (shrunk.seed, shrunk.plan, shrunk.profile, shrunk.knobs) == (0, "tp", "instant", Knobs())


# --- from the command line ----------------------------------------------------------------------


def test_seeds_from_the_command_line() -> None:
    result = CliRunner().invoke(run_many, ["--seeds", "0:3", "--jobs", "1", "--json"])
    *lines, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [line["seed"] for line in lines] == [0, 1, 2]
    assert (last["seeds"], last["bad"]) == (3, [])


def test_a_story_from_the_command_line() -> None:
    told = [CliRunner().invoke(replay.main, ["1"]) for _ in range(2)]
    assert told[0].exit_code == 0
    assert told[0].stdout == told[1].stdout
    assert "all well" in told[0].stdout


def test_a_planted_bug_is_replayed_and_shrunk() -> None:
    args = ["1", "--mutation", "kv-off-by-one", "--shrink"]
    result = CliRunner().invoke(replay.main, args)
    assert result.exit_code == 1
    text = result.stdout.partition("\n\n")[0]
    shrunk = eval(text, NAMES)
    assert not run(shrunk, BY_NAME["kv-off-by-one"].planted).good
    assert run(shrunk).good
    assert len(shrunk.clients) == len(shrunk.deeds) == 1
