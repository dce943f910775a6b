# SPDX-License-Identifier: Apache-2.0
"""The asyncio face: the same answers as under trio, and nothing left however it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trio

import spanker
from spanker import aio
from spanker.errors import (
    CardHungError,
    CardLostError,
    ConfigError,
    ContextLengthError,
    ModelNotFoundError,
    PlanError,
    RequestError,
)
from spanker.testing import hang, kill

T = TypeVar("T")
PROMPT = "Hello, wörld"
SOON_S = 1.0

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """asyncio.run with a limit; also checks that no task but the caller's is left."""

    async def bounded() -> T:
        result = await asyncio.wait_for(main(), 10)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110, the counters of a session set no event
        await asyncio.sleep(0.001)


# --- the same as under trio ------------------------------------------------------------


def facts(model: spanker.Model | aio.Model) -> tuple[object, ...]:
    """What a model says of itself without waiting."""
    return (
        model.name,
        model.path,
        model.context,
        model.vocabulary,
        model.weight_bytes,
        model.plan,
        model.decisions,
        model.tokenizer.vocab_size,
        model.tokenize("<|im_end|>x", special=False),
        model.detokenize(model.tokenize(PROMPT)),
        model.chat_prompt([{"role": "user", "content": "hi"}]),
    )


async def answers(model: Any) -> tuple[object, ...]:
    """Everything that a model answers; the same calls under trio and asyncio."""
    greedy = model.generate(PROMPT, max_tokens=30, ignore_eos=True)
    tokens = [token async for token in greedy]
    sampled = model.generate(PROMPT, max_tokens=20, temperature=0.9, top_p=0.9, seed=7)
    text = await sampled.collect()
    chat = model.chat([{"role": "user", "content": "hi"}], max_tokens=5)
    await chat.collect()
    with_logits = model.generate([1, 2, 3], max_tokens=2, logits=True)
    rows = [token.logits.tobytes() async for token in with_logits]
    stopped = model.generate(PROMPT, max_tokens=30, stop=[greedy.text[3:5]])
    await stopped.collect()
    return (
        tokens,
        [(g.prompt_ids, g.token_ids, g.text, g.finish_reason) for g in (greedy, sampled, chat)],
        text,
        rows,
        (stopped.text, stopped.finish_reason),
        (await model.logits(list(range(100)))).tobytes(),
        [(at, rows.tobytes()) async for at, rows in model.score(list(range(100)))],
        # How far steps run ahead of who ends a generation early is a matter of time.
        attrs.evolve(model.stats, steps=0, generated_tokens=0),
    )


def test_every_answer_equals_that_of_the_trio_api(tiny_model: Path):
    async def under_trio() -> tuple[object, ...]:
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model, plan="tp", prompt_chunk=64)
            return (fleet.cards, fleet.plan, fleet.profile, facts(model), await answers(model))

    async def under_asyncio() -> tuple[object, ...]:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model, plan="tp", prompt_chunk=64)
            return (fleet.cards, fleet.plan, fleet.profile, facts(model), await answers(model))

    assert run(under_asyncio) == trio.run(under_trio)


def test_a_trace_is_that_of_the_trio_api(tiny_model: Path, tmp_path: Path):
    path = tmp_path / "trace.json"

    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            expected = await model.generate(PROMPT, max_tokens=9, ignore_eos=True).collect()
            async with fleet.trace(path) as trace:
                with pytest.raises(ConfigError, match="recorded already"):
                    async with fleet.trace(tmp_path / "other.json"):
                        raise AssertionError("not reached")
                got = await model.generate(PROMPT, max_tokens=9, ignore_eos=True).collect()
            assert got == expected
            assert (trace.steps, trace.lost) == (9, 0)
            events = json.loads(path.read_text())["traceEvents"]
            threads = {e["tid"] for e in events if e["ph"] == "X"}
            assert threads == {1, 2, 3}
            # However the block ends, there is a file.
            path.unlink()
            with pytest.raises(KeyError):
                async with fleet.trace(path):
                    raise KeyError
            assert json.loads(path.read_text())["otherData"]["steps"] == 0
            task = asyncio.create_task(traced_for_ever(fleet, model, path))
            await until(lambda: model.stats.steps > 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert json.loads(path.read_text())["otherData"]["steps"] > 5
            with pytest.raises(ConfigError, match="cannot write the trace"):
                async with fleet.trace(tmp_path / "missing" / "trace.json"):
                    raise AssertionError("not reached")

    run(main)


async def traced_for_ever(fleet: aio.Fleet, model: aio.Model, path: Path) -> None:
    async with fleet.trace(path):
        while True:
            await model.generate(PROMPT, max_tokens=50, ignore_eos=True).collect()


def test_stats_and_progress_arrive_in_the_event_loop(tiny_model: Path):
    async def main() -> None:
        calls: list[tuple[int, int, object]] = []
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(
                tiny_model, progress=lambda *sent: calls.append((*sent, asyncio.current_task()))
            )
            await model.generate(PROMPT, max_tokens=3, ignore_eos=True).collect()
            stats = await fleet.stats()
            assert [card.steps for card in stats.cards] == [3, 3]
            assert stats.sessions == (model.stats,)
        assert calls[0][0] == 0
        assert calls[-1][0] == calls[-1][1] > 0
        assert all(task is None for *_, task in calls)

    run(main)


def test_concurrent_generations_share_steps(tiny_model: Path):
    prompts = [[seed, 5, seed * 7 % 256] for seed in range(6)]

    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)

            async def one(prompt: list[int]) -> list[int]:
                generation = model.generate(prompt, max_tokens=40, ignore_eos=True)
                return [token.id async for token in generation]

            alone = [await one(prompt) for prompt in prompts]
            before = model.stats.steps
            assert await asyncio.gather(*map(one, prompts)) == alone
            # One at a time they take 240.
            assert model.stats.steps - before < 150

    run(main)


def test_the_event_loop_goes_on_while_the_fleet_works(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            generation = asyncio.ensure_future(
                model.generate(PROMPT, max_tokens=200, ignore_eos=True).collect()
            )
            turns = 0
            while not generation.done():
                await asyncio.sleep(0)
                turns += 1
            assert turns > 50

    run(main)


# --- cancelling and leaving ------------------------------------------------------------


def test_a_cancelled_generation_is_over_and_the_others_go_on(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            expected = await model.generate([9], max_tokens=100, ignore_eos=True).collect()
            other = asyncio.ensure_future(
                model.generate([9], max_tokens=100, ignore_eos=True).collect()
            )
            generation = model.generate(PROMPT, max_tokens=200, ignore_eos=True)
            await anext(generation)
            task = asyncio.ensure_future(generation.collect())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [token async for token in generation] == []
            assert await other == expected
            await until(lambda: not model.stats.running)
            assert model.stats.kv_pages_used == 0

    run(main)


def test_wait_for_stops_a_generation(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            hang(fleet, 1)
            start = time.monotonic()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(model.generate(PROMPT).collect(), 0.05)
            assert time.monotonic() - start < SOON_S

    run(main)


def test_a_cancelled_load_has_freed_its_memory_when_it_returns(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:3", plan="tp") as fleet:
            empty = await fleet.stats()
            task = asyncio.ensure_future(
                fleet.load(tiny_model, progress=lambda done, _: done and task.cancel())
            )
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [c.ddr_used_bytes for c in (await fleet.stats()).cards] == [0, 0, 0]
            assert [c.ddr_used_bytes for c in empty.cards] == [0, 0, 0]
            await fleet.load(tiny_model)

    run(main)


@pytest.mark.parametrize("often", [False, True], ids=["once", "often"])
@pytest.mark.parametrize("what", ["load", "arrays", "trace"])
def test_what_is_cancelled_when_it_has_just_been_made_is_given_back(
    what: str, often: bool, tiny_model: Path, tmp_path: Path
):
    """The fleet's thread has done it, and the event loop has yet to hear of it; also where it is
    cancelled again and again while that is given back."""

    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp", channel="unix") as fleet:

            async def traced() -> None:
                async with fleet.trace(tmp_path / "trace.json"):
                    raise AssertionError("not reached")

            calls = {
                "load": lambda: fleet.load(tiny_model),
                "arrays": lambda: fleet.arrays(1000),
                "trace": traced,
            }
            made = {
                "load": lambda: fleet._fleet._models,
                "arrays": lambda: all(d.counters().ddr_used_bytes for d in fleet.devices),
                "trace": lambda: fleet._fleet._coordinator.trace,
            }[what]
            task = asyncio.ensure_future(calls[what]())
            await asyncio.sleep(0)
            limit = time.monotonic() + 20
            while not made():
                assert time.monotonic() < limit
                time.sleep(0.001)  # noqa: ASYNC251 - the event loop is busy with something else
            time.sleep(0.1)  # noqa: ASYNC251
            task.cancel()
            while often and not task.done():
                await asyncio.sleep(0)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not made()
            assert [d.counters().ddr_used_bytes for d in fleet.devices] == [0, 0]

    run(main)


def test_impatient_cancelling_still_waits_for_the_end(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            cancelled = 0
            for turn in range(20):
                task = asyncio.ensure_future(model.logits(list(range(200))))
                await asyncio.sleep(0.0001 * turn)
                if not task.done():
                    while not task.done():
                        task.cancel()
                        await asyncio.sleep(0)
                    assert task.cancelled()
                    cancelled += 1
            assert cancelled
            await until(lambda: not model.stats.running)
            assert model.stats.kv_pages_used == 0

    run(main)


def test_opening_can_be_cancelled_at_any_moment():
    async def open_and_stay() -> None:
        async with aio.open_fleet("soft:3", plan="tp"):
            await asyncio.sleep(3600)

    async def main() -> None:
        for turns in range(12):
            task = asyncio.ensure_future(open_and_stay())
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert threading.active_count() == 1

    run(main)


def test_leaving_the_block_ends_what_other_tasks_wait_for(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            hang(fleet, 0)
            waiting = model.generate(PROMPT)
            idle = model.generate(PROMPT)
            task = asyncio.ensure_future(waiting.collect())
            await asyncio.sleep(0.01)
            start = time.monotonic()
        assert time.monotonic() - start < SOON_S
        with pytest.raises(RequestError, match="the fleet is closed"):
            await task
        for attempt in (idle.collect, waiting.collect, fleet.stats, lambda: model.logits([1])):
            if attempt == waiting.collect:
                assert await attempt() == ""  # over already
                continue
            with pytest.raises(RequestError, match="the fleet is closed"):
                await attempt()
        with pytest.raises(RequestError, match="the fleet is closed"):
            model.generate(PROMPT)
        waiting.close()

    run(main)


def test_calls_that_come_while_the_fleet_closes_end_too(tiny_model: Path):
    async def main() -> None:
        async def ask(fleet: aio.Fleet) -> int:
            count = 0
            with pytest.raises(RequestError, match="the fleet is closed"):
                while True:
                    await fleet.stats()
                    count += 1
            return count

        for _ in range(5):
            async with aio.open_fleet("soft:2", plan="tp") as fleet:
                tasks = [asyncio.ensure_future(ask(fleet)) for _ in range(5)]
                await asyncio.sleep(0.01)
            assert sum(await asyncio.gather(*tasks)) > 0

    run(main)


def test_a_dropped_generation_is_released(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            async for _ in model.generate(PROMPT, max_tokens=200, ignore_eos=True):
                break
            model.generate(PROMPT, max_tokens=200, ignore_eos=True)
            async with model.generate(PROMPT, max_tokens=200, ignore_eos=True) as closed:
                await anext(closed)
            gc.collect()
            await until(lambda: not (model.stats.running or model.stats.waiting))
            assert model.stats.kv_pages_used == 0
            assert model.stats.generated_tokens < 300

    run(main)


def test_a_score_that_is_not_read_to_its_end_is_released(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model, prompt_chunk=64)
            pieces = model.score(list(range(200)))
            await anext(pieces)
            await pieces.aclose()
            await until(lambda: not model.stats.running)
            assert model.stats.kv_pages_used == 0
            left_open = model.score(list(range(200)))
            await anext(left_open)
        await left_open.aclose()

    run(main)


def test_a_loop_that_is_closed_under_way_ends_the_thread(tiny_model: Path):
    """Nobody leaves the block: the loop is gone."""
    loop = asyncio.new_event_loop()
    manager = aio.open_fleet("soft:2", plan="tp")
    fleet = loop.run_until_complete(manager.__aenter__())
    model = loop.run_until_complete(fleet.load(tiny_model))
    model.generate(PROMPT, max_tokens=200, ignore_eos=True)
    assert threading.active_count() >= 2
    loop.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == 1


def test_a_coroutine_that_is_closed_under_way_ends_the_thread(tiny_model: Path):
    """Its block is left by GeneratorExit, where nothing can be awaited."""
    loop = asyncio.new_event_loop()
    entered = asyncio.Event()

    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            await fleet.load(tiny_model)
            entered.set()
            await asyncio.sleep(3600)

    coroutine = main()
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.wait_for(entered.wait(), 10))
    assert threading.active_count() >= 2
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    coroutine.close()
    assert threading.active_count() == 1


def test_keyboard_interrupt_ends_everything(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            async for _ in model.generate(PROMPT, max_tokens=200, ignore_eos=True):
                signal.raise_signal(signal.SIGINT)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert time.monotonic() - start < 2 * SOON_S
    assert threading.active_count() == 1


# --- errors -----------------------------------------------------------------------------


async def fails_to_load(fleet: aio.Fleet) -> None:
    await fleet.load("/no/such/model.gguf")


async def fails_to_plan(fleet: aio.Fleet) -> None:
    assert fleet.plan


async def fails_by_itself(fleet: aio.Fleet) -> None:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("attempt", "kind"),
    [(fails_to_load, ModelNotFoundError), (fails_to_plan, PlanError), (fails_by_itself, KeyError)],
)
def test_errors_come_out_as_they_are(
    attempt: Callable[[aio.Fleet], Awaitable[None]], kind: type[Exception]
):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            await attempt(fleet)

    with pytest.raises(kind):
        run(main)


@pytest.mark.parametrize(
    "options", [{"cards": "hard:3"}, {"channel": "pigeon"}, {"cards": 300}], ids=str
)
def test_a_fleet_that_cannot_be_opened_says_why(options: dict[str, Any]):
    async def main() -> None:
        async with aio.open_fleet(**options):
            raise AssertionError("not reached")

    with pytest.raises(ConfigError):
        run(main)


def test_a_request_that_is_not_possible_fails_when_it_is_iterated(tiny_model: Path):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            with pytest.raises(ContextLengthError, match="the prompt has 300 tokens"):
                await model.generate([1] * 300).collect()
            generation = model.generate([])
            with pytest.raises(RequestError, match="no tokens"):
                await anext(generation)
            assert [token async for token in generation] == []
            assert (generation.text, generation.token_ids, generation.finish_reason) == (
                "",
                [],
                None,
            )

    run(main)


@pytest.mark.parametrize(("fault", "kind"), [(kill, CardLostError), (hang, CardHungError)])
def test_a_failing_card_is_named_to_every_task(
    fault: Callable[[aio.Fleet, int], None], kind: type[CardLostError], tiny_model: Path
):
    async def main() -> None:
        async with aio.open_fleet("soft:2", plan="tp", hang_timeout_s=0.3, recover=False) as fleet:
            model = await fleet.load(tiny_model)
            generations = [
                model.generate(PROMPT, max_tokens=200, ignore_eos=True) for _ in range(3)
            ]
            await anext(generations[0])
            fault(fleet, 1)
            results = await asyncio.gather(
                *(g.collect() for g in generations), return_exceptions=True
            )
            assert [(type(r), r.card) for r in results] == [(kind, 1)] * 3
            with pytest.raises(kind):
                await model.generate(PROMPT).collect()

    run(main)


def test_a_bug_in_the_fleet_is_the_cause_of_what_callers_get(tiny_model: Path):
    def boom() -> None:
        raise RuntimeError("a bug")

    async def main(wait: bool) -> None:
        async with aio.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(tiny_model)
            model._model._replicas.sessions[0]._plan_batch = boom  # type: ignore[method-assign,assignment]
            with pytest.raises(RequestError, match="the fleet is closed"):
                await model.generate(PROMPT).collect()
            await until(lambda: threading.active_count() == 1)
            with pytest.raises(RequestError) as caught:
                await fleet.stats()
            assert repr(caught.value.__cause__) == "RuntimeError('a bug')"
            if not wait:
                raise KeyError("mine")

    # Whoever leaves the block without an error of their own gets the bug.
    with pytest.raises(RuntimeError, match="a bug"):
        run(lambda: main(True))
    with pytest.raises(KeyError, match="mine"):
        run(lambda: main(False))


def test_the_first_exception_wins_over_a_cancellation_while_closing():
    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        async with aio.open_fleet("soft:2", plan="tp"):
            asyncio.get_running_loop().call_soon(task.cancel)
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        asyncio.run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout")
def test_asyncio_timeout_around_a_fleet(tiny_model: Path):
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                async with aio.open_fleet("soft:2", plan="tp") as fleet:
                    model = await fleet.load(tiny_model)
                    while True:
                        await model.generate(PROMPT, max_tokens=50).collect()

    run(main)
