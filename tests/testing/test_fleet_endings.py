# SPDX-License-Identifier: Apache-2.0
"""How a fleet ends: crashes, errors of the user's code, cancellation from outside, leaving early.

Whatever happens, the one error there was comes out as it was raised, soon, and nothing stays
behind (the fixture `nothing_left_behind` looks at threads and descriptors after each test).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import spanker
from spanker.actors.coordinator import CLOSE_S
from spanker.actors.steps import StepPipe, StepResult
from spanker.errors import CardLostError, ConfigError, ModelNotFoundError, RequestError
from spanker.testing import faulty_fleet, run_virtual

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

PROMPT = [token % 256 for token in range(1500)]
# Soon, on a busy machine.
SOON_S = 1.0
CHANNELS = pytest.mark.parametrize(
    "options", [{}, {"channel": "unix"}, {"profile": "rev-a"}], ids=str
)


# --- an actor crashes ----------------------------------------------------------------


def boom(*args: object) -> object:
    raise RuntimeError("a bug")


@CHANNELS
@pytest.mark.parametrize("method", ["submit", "completions", "counters"])
async def test_a_crash_of_a_card_actor_names_card_and_cause(
    method: str, options: dict[str, str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    with trio.fail_after(5):
        async with spanker.open_fleet("soft:2", plan="tp", recover=False, **options) as fleet:
            model = await fleet.load(tiny_model)
            monkeypatch.setattr(fleet.devices[1], method, boom)
            with pytest.raises(CardLostError) as caught:
                if method == "counters":
                    await fleet.stats()
                await model.generate("Hello").collect()
            error = caught.value
            assert error.card == 1
            assert "card 1 is lost: its actor crashed with RuntimeError: a bug" in str(error)
            assert isinstance(error.__cause__, RuntimeError)
            with pytest.raises(CardLostError, match="card 1"):
                await model.generate("Hello").collect()


async def test_a_crash_of_a_card_actor_fails_a_load(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    with trio.fail_after(5):
        async with spanker.open_fleet("soft:3", plan="tp", recover=False) as fleet:
            monkeypatch.setattr(fleet.devices[2], "fill", boom)
            with pytest.raises(CardLostError, match=r"card 2 is lost: .* RuntimeError: a bug"):
                await fleet.load(tiny_model)
            assert [d.counters().ddr_used_bytes for d in fleet.devices[:2]] == [0, 0]


async def test_a_failed_load_leaves_no_file_open(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even until the next garbage collection: the error must not hold on to its frames."""
    gc.collect()
    gc.disable()
    try:
        async with spanker.open_fleet("soft:2", plan="tp", recover=False) as fleet:
            monkeypatch.setattr(fleet.devices[1], "fill", boom)
            before = os.listdir("/proc/self/fd")
            try:
                await fleet.load(tiny_model)
            except CardLostError:
                pass
            assert os.listdir("/proc/self/fd") == before
    finally:
        gc.enable()


# --- the user's code raises -----------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        ExceptionGroup("mine", [ValueError("one")]),
        ExceptionGroup("mine", [ValueError("one"), KeyError("two")]),
        SystemExit(3),
    ],
    ids=repr,
)
async def test_an_error_in_the_block_comes_out_unchanged(error: BaseException, tiny_model: Path):
    caught: BaseException | None = None
    try:
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            await anext(model.generate("Hello"))
            raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    assert caught.__context__ is None


async def test_an_error_of_a_model_comes_out_of_the_block_as_it_is():
    with pytest.raises(ModelNotFoundError):
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            await fleet.load("/no/such/model.gguf")


async def test_a_fleet_that_cannot_be_opened_says_so():
    with pytest.raises(ConfigError, match="no channel 'pigeon'"):
        async with spanker.open_fleet("soft:2", plan="tp", channel="pigeon"):
            raise AssertionError("not reached")


async def test_a_progress_callback_that_raises_ends_the_load(tiny_model: Path):
    def progress(done: int, total: int) -> None:
        if done:
            raise KeyError("mine")

    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        with pytest.raises(KeyError, match="mine"):
            await fleet.load(tiny_model, progress=progress)
        await fleet.load(tiny_model)


async def test_a_bug_in_the_fleet_itself_reaches_whoever_opened_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    with trio.fail_after(5), pytest.raises(RuntimeError, match="a bug"):
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            monkeypatch.setattr(model._replicas.sessions[0], "_plan_batch", boom)
            model.generate("Hello")
            await trio.sleep_forever()


# --- leaving and cancelling -----------------------------------------------------------


async def reach(phase: str, fleet: spanker.Fleet, path: Path, then: Callable[[], None]) -> None:
    """Call `then` in the middle of a phase, and go on."""

    def progress(done: int, total: int) -> None:
        if phase == "load" and done > total // 2:
            then()

    model = await fleet.load(path, prompt_chunk=16, progress=progress)
    generation = model.generate(PROMPT, max_tokens=500, ignore_eos=True)
    if phase == "prefill":
        while model.stats.prompt_tokens < 64:
            await trio.lowlevel.checkpoint()
        then()
    for _ in range(5):
        await anext(generation)
    then()
    await generation.collect()


@CHANNELS
@pytest.mark.parametrize("phase", ["open", "load", "prefill", "decode"])
async def test_the_fleet_can_be_cancelled_from_outside(
    phase: str, options: dict[str, str], long_model: Path
):
    cancelled_at = trio.current_time()
    with trio.CancelScope() as scope:

        def cancel() -> None:
            nonlocal cancelled_at
            if not scope.cancel_called:
                cancelled_at = trio.current_time()
                scope.cancel()

        if phase == "open":
            cancel()
        async with spanker.open_fleet("soft:3", plan="tp", **options) as fleet:
            await reach(phase, fleet, long_model, cancel)
            raise AssertionError("not reached")
    assert scope.cancelled_caught
    assert trio.current_time() - cancelled_at < SOON_S


@pytest.mark.parametrize("phase", ["load", "prefill", "decode"])
async def test_cancelling_a_fleet_with_a_hung_card_does_not_wait_for_the_card(
    phase: str, long_model: Path
):
    with trio.CancelScope() as scope:
        async with spanker.open_fleet("soft:2", plan="tp", hang_timeout_s=60) as fleet:

            def strike() -> None:
                spanker.testing.hang(fleet, 1)
                scope.deadline = trio.current_time() + 0.1

            await reach(phase, fleet, long_model, strike)
    assert scope.cancelled_caught
    assert trio.current_time() - scope.deadline < SOON_S


@pytest.mark.parametrize(
    ("work", "how"),
    [
        ("decode", "left"),
        ("decode", "cancelled"),
        ("load", "cancelled"),
        ("trace", "cancelled"),
        ("trace", "interrupted"),
    ],
)
def test_a_silent_card_cannot_hold_up_the_end(
    work: str, how: str, tiny_model: Path, tmp_path: Path
):
    """Aborting what is under way and stopping the cards take CLOSE_S together, in virtual time."""

    async def main() -> float:
        with trio.CancelScope() as scope, contextlib.suppress(KeyboardInterrupt):
            async with (
                faulty_fleet("virtual:3", "", hang_timeout_s=30) as (fleet, injection),
                trio.open_nursery() as nursery,
            ):
                model = await fleet.load(tiny_model, plan="tp")
                generation = model.generate([1, 2, 3], max_tokens=200, ignore_eos=True)
                await anext(generation)
                tracing = fleet.trace(tmp_path / "trace.json")
                async with tracing if work == "trace" else contextlib.nullcontext():
                    injection.strike("stall channel:2@time:0 for 1000s")
                    if work == "load":
                        nursery.start_soon(functools.partial(fleet.load, tiny_model, plan="tp"))
                    await trio.sleep(0.5)
                    begin = trio.current_time()
                    if how == "interrupted":
                        raise KeyboardInterrupt
                    if how == "cancelled":
                        scope.cancel()
                        await trio.lowlevel.checkpoint()
        return trio.current_time() - begin

    assert 0 < run_virtual(main) <= CLOSE_S + 1e-6


@pytest.mark.parametrize("where", ["load", "calibration", "step of a calibration"])
def test_a_silent_card_cannot_hold_up_what_an_exception_ends(
    where: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Aborting a step, unloading its programs, freeing everything and closing the fleet take
    CLOSE_S together."""

    # The card of the step, and one that has not been given everything.
    card = 1 if where == "load" else 0

    async def main() -> float:
        begin = math.nan

        def strike(done: int = 6, total: int = 0) -> None:
            nonlocal begin
            if done >= 6 and math.isnan(begin):
                injection.strike(f"stall channel:{card}@time:0 for 1000s")
                begin = trio.current_time()
                # Of tasks an Exception comes alone.
                raise KeyError if where == "load" else KeyboardInterrupt

        async def result(pipe: StepPipe) -> StepResult:
            strike()
            raise AssertionError

        if where == "step of a calibration":
            monkeypatch.setattr(StepPipe, "result", result)
        with pytest.raises((KeyError, KeyboardInterrupt)):
            async with faulty_fleet("virtual:3", "", hang_timeout_s=30) as (fleet, injection):
                if where == "load":
                    await fleet.load(tiny_model, plan="tp", progress=strike)
                else:
                    await fleet.calibrate(progress=strike if where == "calibration" else None)
        return trio.current_time() - begin

    assert 0 < run_virtual(main) <= CLOSE_S + 1e-6


def test_what_is_opened_again_while_the_fleet_closes_ends_with_it(tiny_model: Path):
    """By who shields himself from the cancellation that closes it."""

    async def main() -> None:
        with trio.fail_after(10), trio.CancelScope() as scope:
            async with spanker.open_fleet("virtual:2", plan="tp") as fleet:
                model = await fleet.load(tiny_model)
                spanker.testing.kill(fleet, 1)
                await model.generate("Hello", max_tokens=2).collect()
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.sleep(CLOSE_S + 0.1)
                    await fleet.admit(1)
        assert scope.cancelled_caught

    run_virtual(main)


async def test_leaving_the_block_ends_generations_that_run_outside_of_it(tiny_model: Path):
    errors: list[RequestError] = []

    async def outsider(generation: spanker.Generation) -> None:
        with pytest.raises(RequestError, match="the fleet is closed") as caught:
            await generation.collect()
        errors.append(caught.value)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            async with spanker.open_fleet("soft:2", plan="tp") as fleet:
                model = await fleet.load(tiny_model, kv_tokens=256)
                # The second waits for the pages of the first.
                for _ in range(2):
                    generation = model.generate([1], max_tokens=255, ignore_eos=True)
                    nursery.start_soon(outsider, generation)
                while not model.stats.generated_tokens:
                    await trio.lowlevel.checkpoint()
        assert len(errors) == 2
        with pytest.raises(RequestError, match="the fleet is closed"):
            model.generate("Hello")


@CHANNELS
async def test_a_cancelled_load_leaves_the_fleet_as_it_was(
    options: dict[str, str], long_model: Path, tiny_model: Path
):
    """Also while another model is at work on the same cards."""
    seed = 20
    print("seed", seed)
    rng = random.Random(seed)
    async with spanker.open_fleet("soft:3", plan="tp", **options) as fleet:
        other = await fleet.load(tiny_model)
        empty = [card.ddr_used_bytes for card in (await fleet.stats()).cards]
        expected = other.generate("Hello", max_tokens=50, ignore_eos=True)
        await expected.collect()
        for _ in range(3):
            running = other.generate("Hello", max_tokens=50, ignore_eos=True)
            with trio.CancelScope() as scope:
                stop_at = rng.random()

                def progress(
                    done: int, total: int, scope: trio.CancelScope = scope, at: float = stop_at
                ) -> None:
                    if done >= at * total:
                        scope.cancel()

                await fleet.load(long_model, progress=progress)
            assert scope.cancelled_caught
            assert [card.ddr_used_bytes for card in (await fleet.stats()).cards] == empty
            await running.collect()
            assert running.token_ids == expected.token_ids
        model = await fleet.load(long_model)
        await model.generate("Hello", max_tokens=3).collect()


async def test_generations_that_are_cancelled_at_any_time_leave_no_trace(tiny_model: Path):
    seed = 21
    print("seed", seed)
    rng = random.Random(seed)
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(tiny_model, prompt_chunk=16)
        expected = model.generate([1, 2], max_tokens=20, ignore_eos=True)
        await expected.collect()

        async def cancelled(after_s: float) -> None:
            prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 100))]
            with trio.move_on_after(after_s):
                await model.generate(prompt, max_tokens=150, ignore_eos=True).collect()

        start = trio.current_time()
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(cancelled, rng.uniform(0, 0.03))
        # An abort that is not answered at once would cost seconds.
        assert trio.current_time() - start < 3
        while model.stats.running:
            await trio.lowlevel.checkpoint()
        assert (model.stats.waiting, model.stats.kv_pages_used) == (0, 0)
        again = model.generate([1, 2], max_tokens=20, ignore_eos=True)
        await again.collect()
        assert again.token_ids == expected.token_ids


async def test_closing_a_fleet_with_dropped_generations_is_quick(tiny_model: Path):
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(tiny_model)
        for _ in range(20):
            model.generate("Hello", max_tokens=200)
        start = trio.current_time()
    assert trio.current_time() - start < SOON_S
