# SPDX-License-Identifier: Apache-2.0
"""Tests that run from a seed: which seeds, what a failure says, and that its command replays it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from spanker.testing import FaultPlan, faulty_fleet
from spanker.testing.plugin import SpankerVirtual

SUITE = """
import pytest, trio
from spanker.testing import faulty_fleet

@pytest.mark.parametrize("kind", ["a-b", "c"])
@pytest.mark.spanker_seeds(5)
def test_some(kind, spanker_virtual):
    plan = spanker_virtual.faults(3)
    assert spanker_virtual.seed != 3, "the unlucky one"

@pytest.mark.spanker_seeds([7, 9])
def test_list(spanker_seed):
    assert spanker_seed in (7, 9, 1234)

def test_default(spanker_seed):
    assert spanker_seed in (0, 1234)

def test_unlucky(spanker_seed):
    assert spanker_seed != 1234

def test_without():
    pass
"""


def pytest_run(folder: Path, *arguments: str) -> str:
    options = ["-p", "no:cacheprovider", "-W", "error", "-v", "--strict-markers"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_mine.py").write_text(SUITE)
    return folder


def test_each_seed_is_a_test_and_a_failure_says_how_to_replay_it(suite: Path) -> None:
    out = pytest_run(suite)
    assert "2 failed, 13 passed" in out
    assert "test_list[seed7] PASSED" in out and "test_list[seed9] PASSED" in out
    assert "test_default PASSED" in out
    plan = SpankerVirtual(3).faults(3)
    assert f"seed 3\nfaults {plan}\nreplay with: pytest " in out
    for command in re.findall("replay with: (.*)", out):
        again = pytest_run(suite, *shlex.split(command)[1:])
        assert "1 failed" in again and "the unlucky one" in again


def test_one_seed_for_all(suite: Path) -> None:
    out = pytest_run(suite, "--spanker-seed=1234")
    assert "1 failed, 5 passed" in out
    (command,) = re.findall("replay with: (.*)", out)
    assert command == "pytest 'test_mine.py::test_unlucky[seed1234]' --spanker-seed=1234"
    assert "1 failed" in pytest_run(suite, *shlex.split(command)[1:])


@pytest.mark.spanker_seeds(3)
def test_a_seed_decides_faults_and_order(spanker_virtual: SpankerVirtual, tiny_model: Path) -> None:
    plan = spanker_virtual.faults(3)
    again = SpankerVirtual(spanker_virtual.seed)
    assert again.faults(3) == plan
    # One after the other they differ, but for both in the same way.
    assert [spanker_virtual.faults(3) for _ in range(4)] == [again.faults(3) for _ in range(4)]
    assert len(set(again.drawn)) > 1 and again.drawn == spanker_virtual.drawn

    async def order() -> list[int]:
        done: list[int] = []

        async def one(number: int) -> None:
            await trio.sleep(1)
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one, number)
        return done

    assert spanker_virtual(order) == again(order)
    assert spanker_virtual(order) != SpankerVirtual(spanker_virtual.seed + 1)(order)


def test_a_fleet_in_virtual_time(spanker_virtual: SpankerVirtual, tiny_model: Path) -> None:
    async def main(plan: FaultPlan) -> tuple[tuple[float, str], ...]:
        async with faulty_fleet("virtual:3", plan, profile="rev-a", plan="tp") as opened:
            fleet, injection = opened
            model = injection.watch(await fleet.load(tiny_model))
            await model.generate("Hello", max_tokens=10, ignore_eos=True).collect()
            return injection.story

    plan = FaultPlan.parse("kill 1@token:3; stall host@time:0.001 for 0.1s")
    first = spanker_virtual(main, plan)
    assert {line for _, line in first} >= {str(fault) for fault in plan.faults}
    assert first == spanker_virtual(main, plan)
