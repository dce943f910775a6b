# SPDX-License-Identifier: Apache-2.0
"""Virtual time: a clock that jumps, an order that a seed decides, and a rig driven by both."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from spanker.actors.card import KernelQueue
from spanker.actors.virtual_time import alongside, drive, now_ps, run_virtual
from spanker.device.virtual.card import VirtualRig
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.kernels import program as op
from spanker.kernels.program import Program, Ref, SequenceStep, encode_step
from spanker.sched.bandwidth import REV_A


def test_waiting_takes_no_time_and_arguments_and_results_pass() -> None:
    async def main(hours: int) -> float:
        begin = trio.current_time()
        await trio.sleep(3600 * hours)
        return trio.current_time() - begin

    begin = time.monotonic()
    assert run_virtual(main, 5) == 18_000
    assert time.monotonic() - begin < 5


async def _order(tasks: int) -> list[int]:
    found: list[int] = []

    async def task(number: int) -> None:
        for _ in range(3):
            await trio.sleep(1)
            found.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(task, number)
    return found


def test_the_seed_decides_who_goes_first() -> None:
    orders = [run_virtual(_order, 6, seed=seed) for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_errors_pass_and_the_scheduler_is_as_before() -> None:
    run = trio._core._run

    async def fail() -> None:
        raise ValueError("as it is")

    before = run._r.getstate(), run._ALLOW_DETERMINISTIC_SCHEDULING
    with pytest.raises(ValueError, match="as it is"):
        run_virtual(fail)
    assert (run._r.getstate(), run._ALLOW_DETERMINISTIC_SCHEDULING) == before


# --- a rig under a clock ------------------------------------------------------------------


def adding(rig: VirtualRig, card: int) -> int:
    device = rig.cards[card]
    made = Program((op.add(Ref("x"), Ref("x"), n=1000),), 1, 1, 1)
    return device.load_program(made.encode({"x": device.alloc(4000)}))


STEP = encode_step([SequenceStep([0], 0, [])])
# Taken up in 20 us; a command of 5 us and 1,000 elements at 10 a us.
STEP_S = 125e-6


async def test_completions_come_when_they_are_due(autojump_clock: trio.testing.MockClock) -> None:
    with VirtualRig([VirtualCardSpec(hollow=True)] * 2, REV_A, now_ps) as rig:
        async with alongside(lambda: drive(rig)):
            programs = [adding(rig, card) for card in range(2)]
            queues = [KernelQueue(card) for card in rig.cards]
            await trio.sleep(5)
            await queues[0].submit(programs[0], STEP)
            await trio.sleep(10e-6)
            await queues[1].submit(programs[1], STEP)
            await queues[0].completed()
            assert trio.current_time() == pytest.approx(5 + STEP_S, abs=1e-12)
            await queues[1].completed()
            assert trio.current_time() == pytest.approx(5 + 10e-6 + STEP_S, abs=1e-12)
        assert rig.on_change is None


async def test_a_submission_brings_the_next_event_forward(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The task that lets time pass sleeps until the long step ends; the short one does not wait."""
    with VirtualRig([VirtualCardSpec(hollow=True)] * 2, REV_A, now_ps) as rig:
        async with alongside(lambda: drive(rig)):
            long = op.add(Ref("x"), Ref("x"), n=1_000_000)
            handle = rig.cards[0].alloc(4_000_000)
            made = Program((long,) * 100, 1, 1, 1)
            rig.cards[0].submit(rig.cards[0].load_program(made.encode({"x": handle})), STEP)
            await trio.sleep(0.1)
            queue = KernelQueue(rig.cards[1])
            await queue.submit(adding(rig, 1), STEP)
            await queue.completed()
            assert trio.current_time() == pytest.approx(0.1 + STEP_S, abs=1e-12)
            # Nor does time end with an abort.
            rig.cards[0].abort(2)
            assert len(await KernelQueue(rig.cards[0]).completed()) == 1
            assert rig.next_event() is None


async def test_time_passes_until_the_block_is_over_whatever_cancels_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with VirtualRig([VirtualCardSpec(hollow=True)], REV_A, now_ps) as rig:
        with trio.CancelScope() as scope:
            async with alongside(lambda: drive(rig)):
                try:
                    scope.cancel()
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        queue = KernelQueue(rig.cards[0])
                        await queue.submit(adding(rig, 0), STEP)
                        (done,) = await queue.completed()
                        assert done.error is None
        assert scope.cancelled_caught


async def test_under_the_real_clock_a_step_takes_its_time() -> None:
    with VirtualRig([VirtualCardSpec(hollow=True)], REV_A, now_ps) as rig:
        async with alongside(lambda: drive(rig)):
            handle = rig.cards[0].alloc(4_000_000)
            made = Program((op.add(Ref("x"), Ref("x"), n=1_000_000),) * 4, 1, 1, 1)
            program = rig.cards[0].load_program(made.encode({"x": handle}))
            begin = time.monotonic()
            queue = KernelQueue(rig.cards[0])
            await queue.submit(program, STEP)
            await queue.completed()
            assert 0.024 < time.monotonic() - begin
