# SPDX-License-Identifier: Apache-2.0
"""Traces of real fleets: everything is in them, and nothing is different because of them."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trio
from fake_device import FakeDevice
from waiting import until

import spanker
from spanker.actors import coordinator as coordinators
from spanker.actors import tracer as tracers
from spanker.actors.coordinator import Coordinator, open_coordinator
from spanker.actors.tracer import Tracer
from spanker.device.base import CardDevice, TraceEvent
from spanker.errors import (
    CardCommandError,
    CardFaultError,
    CardLostError,
    ConfigError,
)
from spanker.fleet import Fleet, Generation
from spanker.ggml.architectures.llama import build_program
from spanker.kernels.program import Op
from spanker.sched.bandwidth import NATIVE
from spanker.testing import faulty_fleet, run_virtual
from spanker.testing.models import tensor, tiny_llama

TINY = tiny_llama()
HOST, CARD = 1, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


async def tokens_of(generation: Generation) -> list[int]:
    return [t.id async for t in generation if t.id is not None]


def events_of(path: Path) -> dict[int, list[dict]]:
    """The complete events of each thread, which must not overlap."""
    value = json.loads(path.read_text(encoding="ascii"))
    threads: dict[int, list[dict]] = {}
    for event in value["traceEvents"]:
        assert event["ph"] in ("M", "X") and event["pid"] == 1
        if event["ph"] == "X":
            threads.setdefault(event["tid"], []).append(event)
    for events in threads.values():
        ends = 0
        for event in events:
            begin, duration = round(event["ts"] * 1000), round(event["dur"] * 1000)
            assert begin >= ends and duration >= 0, event
            ends = begin + duration
    return threads


def other_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="ascii"))["otherData"]


PLANS = {"tp1": 1, "tp3": 3, "pp2": 2, "tp2xpp2": 4}


@pytest.mark.parametrize("channel", ["memory", "unix"])
@pytest.mark.parametrize("plan", PLANS)
async def test_every_command_of_every_step_is_there(
    tiny: Path, tmp_path: Path, plan: str, channel: str
) -> None:
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(PLANS[plan], plan="tp", channel=channel) as fleet:
        model = await fleet.load(tiny, plan=plan, prompt_chunk=5)
        expected = await tokens_of(model.generate([1, 2, 3], max_tokens=20, ignore_eos=True))
        before = await fleet.stats()
        async with fleet.trace(path) as trace:
            got = await tokens_of(model.generate([1, 2, 3], max_tokens=20, ignore_eos=True))
            await model.logits(list(range(12)))
        after = await fleet.stats()
        loaded = model._replicas.sessions[0].loaded
    assert got == expected
    steps = after.sessions[0].steps - before.sessions[0].steps
    assert trace.steps == steps == 20 + 3 and trace.lost == 0
    threads = events_of(path)
    assert sorted(threads) == [HOST, *range(CARD, CARD + PLANS[plan])]
    for number in range(PLANS[plan]):
        commands = build_program(loaded.model, loaded.plan, number, loaded.limits).commands
        told = [c.op.name.lower() for c in commands if c.op not in (Op.LINK_SEND, Op.LINK_RECV)]
        events = threads[CARD + number]
        assert [e["args"]["op"] for e in events] == told * steps
        # Steps are numbered through, all of the first before any of the second.
        numbers = [e["args"]["step"] for e in events]
        first = numbers[0]
        assert numbers == [first + i for i in range(steps) for _ in told]
        # What the exchanges say they moved is what the links have counted.
        moved = {
            which: sum(e["args"][f"{which}_bytes"] for e in events if e["cat"] == "link")
            for which in ("sent", "received")
        }
        a, b = before.cards[number], after.cards[number]
        assert moved["sent"] == sum(b.link_tx_bytes) - sum(a.link_tx_bytes)
        assert moved["received"] == sum(b.link_rx_bytes) - sum(a.link_rx_bytes)
        # The summary adds up what the events say.
        ops = other_of(path)["cards"][number]["ops"]
        assert {o: v["count"] for o, v in ops.items()} == Counter(told * steps)
        for name, total in ops.items():
            spent = sum(e["dur"] for e in events if e["args"]["op"] == name)
            assert total["ms"] == pytest.approx(spent / 1000, abs=1e-6)
    host = Counter(e["name"].rpartition(" step ")[0] for e in threads[HOST])
    assert host == {"submit": steps, "wait for": steps, "collect": steps}
    assert {e["args"]["step"] for e in threads[HOST]} == set(range(first, first + steps))


async def test_without_a_trace_nothing_is_recorded(tiny: Path) -> None:
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        await tokens_of(model.generate([1], max_tokens=5, ignore_eos=True))
        assert model._replicas.sessions[0].coordinator.trace is None
        assert [d.trace_events(100) for d in fleet.devices] == [(b"", 0)] * 2


async def test_a_trace_may_begin_and_end_in_the_middle(tiny: Path, tmp_path: Path) -> None:
    """Generations of two models go on, before, during and after."""
    other = tiny_llama(format="q8_0", seed=5, layers=1).write(tmp_path / "other.gguf")
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    async with spanker.open_fleet(2, plan="tp") as fleet:
        models = [await fleet.load(p) for p in (tiny, other)]
        alone = [await tokens_of(m.generate([1], max_tokens=240, ignore_eos=True)) for m in models]
        results: dict[int, list[int]] = {}

        async def one(number: int) -> None:
            generation = models[number].generate([1], max_tokens=240, ignore_eos=True)
            results[number] = await tokens_of(generation)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in (0, 1):
                    nursery.start_soon(one, number)
                for path in paths:
                    async with fleet.trace(path) as trace:
                        made = sum(m.stats.generated_tokens for m in models) + 40
                        await until(
                            lambda made=made: sum(m.stats.generated_tokens for m in models) >= made
                        )
                    assert trace.steps > 20
                assert not results  # they were under way all the time
        assert results == dict(enumerate(alone))
    seen: set[int] = set()
    for path in paths:
        threads = events_of(path)
        steps = [{e["args"]["step"] for e in events} for events in threads.values()]
        assert all(s == steps[0] for s in steps) and not steps[0] & seen
        seen |= steps[0]
        # Of each model what is its own, and whole steps only.
        for number in (0, 1):
            events = threads[CARD + number]
            sizes = Counter(Counter(e["args"]["step"] for e in events).values())
            assert len(sizes) == 2 and len({e["name"] for e in events if "blk.1" in e["name"]}) > 8
            formats = Counter(e["args"].get("format") for e in events)
            assert formats["q4_0"] and formats["q8_0"]


async def test_events_are_fetched_while_steps_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card has room for a few steps only; nothing is lost, for it is emptied again and again."""
    monkeypatch.setattr(tracers, "CARD_EVENTS_MAX", 2000)
    monkeypatch.setattr(tracers, "FETCH_EVENTS_MAX", 128)
    monkeypatch.setattr(tracers, "FETCH_S", 0.001)
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        async with fleet.trace(path) as trace:
            await tokens_of(model.generate([1], max_tokens=200, ignore_eos=True))
            assert trace.commands > 2000
    assert trace.steps == 200 and trace.commands > 200 * 60
    assert trace.lost == 0 or trace.lost == other_of(path)["lost"]
    for thread, events in events_of(path).items():
        numbers = [e["args"]["step"] for e in events]
        assert thread == HOST or numbers == sorted(numbers)


async def test_what_was_lost_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracers, "CARD_EVENTS_MAX", 100)
    monkeypatch.setattr(tracers, "FETCH_S", 1000.0)
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        commands = sum(c.commands for c in (await fleet.stats()).cards)
        async with fleet.trace(path) as trace:
            await tokens_of(model.generate([1], max_tokens=10, ignore_eos=True))
        commands = sum(c.commands for c in (await fleet.stats()).cards) - commands
    assert trace.commands == 200 and trace.lost == commands - 200
    other = other_of(path)
    assert (other["commands"], other["lost"]) == (200, trace.lost)
    assert all(card["commands"] == 100 and card["lost"] > 100 for card in other["cards"])
    events_of(path)


# --- when something fails ---------------------------------------------------------------


async def test_a_fault_is_in_the_trace(tmp_path: Path) -> None:
    made = tiny_llama(format="f32")
    values = np.frombuffer(made.tensors["blk.1.attn_q.weight"].data, np.float32).copy()
    values[-1] = np.inf
    made.tensors["blk.1.attn_q.weight"] = tensor(
        "blk.1.attn_q.weight", values.reshape(made.tensors["blk.1.attn_q.weight"].shape), "f32"
    )
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(made.write(tmp_path / "sick.gguf"))
        async with fleet.trace(path):
            for _ in range(2):
                with pytest.raises(CardFaultError):
                    await model.generate([1], max_tokens=5).collect()
    threads = events_of(path)
    aborts = [e for e in threads[HOST] if e["name"].startswith("abort step ")]
    assert len(aborts) == 2
    # What ran until then is there, on both cards.
    for number in (0, 1):
        names = [e["name"] for e in threads[CARD + number]]
        assert sum("matmul" in name for name in names) >= 10


async def test_a_trace_of_a_dying_fleet_is_written(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp", recover=False) as fleet:
        model = await fleet.load(tiny)
        with trio.fail_after(10), pytest.raises(CardLostError, match="card 1"):
            async with fleet.trace(path):
                async for token in model.generate([1], max_tokens=200, ignore_eos=True):
                    if token.position == 20:
                        await trio.sleep(0.2)  # what was recorded until then is fetched
                        fleet.devices[1].kill()
    assert len(events_of(path)[CARD]) > 15 * 30


async def test_a_hung_card_does_not_keep_a_trace_from_its_end(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracers, "STOP_S", 0.1)
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp", hang_timeout_s=100.0) as fleet:
        model = await fleet.load(tiny)
        with trio.fail_after(5):
            async with fleet.trace(path):
                await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))
                fleet.devices[1].hang()
                generation = model.generate([1], max_tokens=3, ignore_eos=True)
                await until(lambda: fleet.devices[1].counters().queued)
        assert len(events_of(path)[CARD + 1]) > 60
        generation.close()


async def test_a_card_that_is_silent_when_a_trace_begins_is_lost(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else can find out, as nobody else has the cards meanwhile."""
    monkeypatch.setattr(coordinators, "STOP_S", 0.1)
    path = tmp_path / "trace.json"
    async with faulty_fleet("soft:3", "", hang_timeout_s=0.3) as (fleet, injection):
        model = await fleet.load(tiny, plan="tp")
        injection.strike("stall channel:1@time:0 for 1000s")
        with trio.fail_after(10):
            async with fleet.trace(path):
                await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))
        assert [card for card, _ in fleet.health().lost] == [1]
        assert model.plan.cards == (0, 2)
    assert sorted(events_of(path)) == [HOST, CARD, CARD + 2]


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("how", ["drained", "lost"])
async def test_a_card_that_is_admitted_is_traced(
    how: str, when: str, tiny: Path, tmp_path: Path
) -> None:
    """It is out of use when the trace begins, or goes and comes back within it: then its fences,
    and what it counts, begin again."""

    async def use() -> list[int]:
        return await tokens_of(model.generate([1, 2], max_tokens=4, ignore_eos=True))

    async def go() -> None:
        if how == "drained":
            await fleet.drain(2)
        else:
            fleet.devices[2].kill()
            assert await use() == expected
            assert [card for card, _ in fleet.health().lost] == [2]

    path = tmp_path / "trace.json"
    async with spanker.open_fleet(3, plan="tp") as fleet:
        model = await fleet.load(tiny)
        expected = await use()
        if when == "before":
            await go()
        begin = (await fleet.stats()).cards[2].commands if how == "drained" else 0
        async with fleet.trace(path) as trace:
            if when == "within":
                assert await use() == expected
                await trio.sleep(3 * tracers.FETCH_S)  # until that is fetched
                await go()
            await fleet.admit(2)
            assert await use() == expected
            end = (await fleet.stats()).cards[2].commands
        assert trace.lost == 0 and model.plan.cards == (0, 1, 2)
        # And it is switched off like the others.
        assert [d.trace_events(100) for d in fleet.devices] == [(b"", 0)] * 3
    # Of a card that was lost within the trace there is what it did before, too.
    earlier = other_of(path)["cards"][2]["commands"] - (end - begin)
    assert earlier > 60 if (how, when) == ("lost", "within") else earlier == 0
    threads = events_of(path)
    # A model's commands have their weights' names only where their step is known.
    named = [[e for e in threads[CARD + card] if "weight" in e["args"]] for card in (0, 2)]
    numbers = [[e["args"]["step"] for e in events] for events in named]
    assert numbers[1] == sorted(numbers[1]) and numbers[1][-1] == numbers[0][-1]
    assert len(set(numbers[1])) == (4 if when == "before" else 8)


async def test_a_trace_may_begin_and_end_while_a_card_comes_back(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp", channel="unix") as fleet:
        model = await fleet.load(tiny)
        coordinator = fleet._coordinator
        for turns in range(16):
            fleet.devices[1].kill()
            await tokens_of(model.generate([1], max_tokens=2, ignore_eos=True))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fleet.admit, 1)
                for _ in range(2 * (turns % 8)):
                    await trio.lowlevel.checkpoint()
                async with fleet.trace(path) as trace:
                    if turns < 8:
                        await until(lambda: 1 not in coordinator.lost)
                        await tokens_of(model.generate([1], max_tokens=2, ignore_eos=True))
            if turns < 8:
                assert len(events_of(path)[CARD + 1]) > 30 and trace.lost == 0
            await tokens_of(model.generate([1], max_tokens=2, ignore_eos=True))
            assert [d.trace_events(100) for d in fleet.devices] == [(b"", 0)] * 2


@pytest.mark.parametrize("end", ["normal", "after an exception"])
def test_a_card_that_falls_silent_keeps_nothing_of_the_others(
    end: str, tiny: Path, tmp_path: Path
) -> None:
    """In a normal end it is lost by that, after the hang timeout."""
    path = tmp_path / "trace.json"

    async def main() -> float:
        async with faulty_fleet("virtual:2", "", hang_timeout_s=30) as (fleet, injection):
            model = await fleet.load(tiny, plan="tp")
            with contextlib.suppress(KeyError):
                async with fleet.trace(path):
                    await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))
                    injection.strike("stall channel:0@time:0 for 1000s")
                    begin = trio.current_time()
                    if end != "normal":
                        raise KeyError
            took_s = trio.current_time() - begin
            assert fleet._coordinator.trace is None
            assert [card for card, _ in fleet.health().lost] == ([0] if end == "normal" else [])
            assert fleet.devices[1].trace_events(100) == (b"", 0)
        return took_s

    took_s = run_virtual(main)
    assert took_s == pytest.approx(30 if end == "normal" else coordinators.CLOSE_S, abs=0.01)
    assert len(events_of(path)[CARD + 1]) > 60


async def commands_of(fleet: Fleet) -> int:
    return sum(c.commands for c in (await fleet.stats()).cards)


async def test_what_a_card_tells_late_is_not_left_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that are fetched while their card's channel stands still."""
    monkeypatch.setattr(tracers, "STOP_S", 0.05)
    async with faulty_fleet("soft:2", "", plan="tp") as (fleet, injection):
        model = await fleet.load(tiny)
        commands = await commands_of(fleet)
        async with fleet.trace(tmp_path / "trace.json") as trace:
            for stalled_s in (3 * tracers.FETCH_S, 0.1):
                await tokens_of(model.generate([1], max_tokens=5, ignore_eos=True))
                injection.strike(f"stall channel:1@time:0 for {stalled_s}s")
                await trio.sleep(stalled_s / 2)
        assert trace.commands == await commands_of(fleet) - commands and trace.lost == 0
        assert fleet.health().lost == ()


@pytest.mark.parametrize("again", [False, True])
def test_what_a_card_tells_too_late_is_lost(again: bool, tiny: Path, tmp_path: Path) -> None:
    """After an exception the trace is not waited for longer than a fleet takes to close."""
    path = tmp_path / "trace.json"

    async def main() -> None:
        async with faulty_fleet("virtual:2", "", plan="tp") as (fleet, injection):
            model = await fleet.load(tiny)
            commands = await commands_of(fleet)
            with contextlib.suppress(KeyError):
                async with fleet.trace(path) as trace:
                    expected = await tokens_of(model.generate([1], max_tokens=5))
                    injection.strike("stall channel:1@time:0 for 3s")
                    raise KeyError
            if again:
                async with fleet.trace(tmp_path / "next.json") as another:
                    assert await tokens_of(model.generate([1], max_tokens=5)) == expected
            commands = await commands_of(fleet) - commands
            if again:
                assert (another.commands, another.lost) == (commands / 2, 0)
                commands /= 2
            assert trace.commands == other_of(path)["commands"] == commands / 2
            assert trace.lost == commands / 2
            # It lives, and records nothing any more.
            assert await tokens_of(model.generate([1], max_tokens=5)) == expected
            assert fleet.devices[1].trace_events(100) == (b"", 0)
            assert fleet.health().lost == () and not fleet._coordinator._doubted

    run_virtual(main)


async def test_a_cancelled_block_leaves_a_whole_file(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        with trio.CancelScope() as scope:
            async with fleet.trace(path):
                async for token in model.generate([1], max_tokens=200, ignore_eos=True):
                    if token.position == 30:
                        scope.cancel()
        assert scope.cancelled_caught
        assert len({e["args"]["step"] for e in events_of(path)[CARD]}) >= 30
        assert model._replicas.sessions[0].coordinator.trace is None
        # And the next one works.
        async with fleet.trace(path) as trace:
            await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))
        assert trace.steps == 3


async def test_a_fleet_that_is_cancelled_leaves_a_whole_file(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with trio.CancelScope() as scope:
        async with spanker.open_fleet(2, plan="tp") as fleet:
            model = await fleet.load(tiny)
            async with fleet.trace(path):
                async for token in model.generate([1], max_tokens=200, ignore_eos=True):
                    if token.position == 30:
                        scope.cancel()
    assert scope.cancelled_caught
    assert len({e["args"]["step"] for e in events_of(path)[CARD]}) >= 30


@pytest.mark.parametrize("name", ["missing/trace.json", ".", "file/trace.json"])
async def test_a_file_that_cannot_be_written_is_refused_at_once(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("")
    async with spanker.open_fleet(1) as fleet:
        with pytest.raises(ConfigError, match=r"cannot write the trace .*: choose another file"):
            async with fleet.trace(tmp_path / name):
                raise AssertionError("not reached")
        assert fleet._coordinator.trace is None


async def test_a_full_disk_is_told_at_the_end(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        with pytest.raises(ConfigError, match="cannot write the trace /dev/full: No space left"):
            async with fleet.trace("/dev/full"):
                tokens = await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))
        assert len(tokens) == 3
        # An error of the block itself is the one that counts.
        with pytest.raises(KeyError):
            async with fleet.trace("/dev/full"):
                raise KeyError


async def test_a_trace_that_cannot_be_ended_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spanker.open_fleet(1) as fleet:
        tracer = Tracer(fleet._coordinator, tmp_path / "trace.json")
        await tracer.start()
        file = tracer._file
        monkeypatch.setattr(tracer.trace, "chunks", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await tracer.stop()
        assert file is not None and file.closed


async def test_one_trace_at_a_time(tiny: Path, tmp_path: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        async with fleet.trace(tmp_path / "one.json") as trace:
            with pytest.raises(ConfigError, match="recorded already"):
                async with fleet.trace(tmp_path / "two.json"):
                    raise AssertionError("not reached")
            await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))
        assert trace.steps == 3 and trace.commands > 100
        assert len(events_of(tmp_path / "one.json")[CARD]) > 100


async def test_whoever_is_cancelled_while_a_trace_begins_leaves_none(
    tiny: Path, tmp_path: Path
) -> None:
    async with spanker.open_fleet(3, plan="tp") as fleet:
        model = await fleet.load(tiny)
        for turns in range(12):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    tracer = Tracer(fleet._coordinator, tmp_path / "trace.json")
                    nursery.start_soon(tracer.start)
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            await tracer.stop()
            assert fleet._coordinator.trace is None
            await tokens_of(model.generate([1], max_tokens=2, ignore_eos=True))
            assert [d.trace_events(100) for d in fleet.devices] == [(b"", 0)] * 3


# --- other bodies -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def fakes(devices: list[FakeDevice], channel: str) -> AsyncIterator[Coordinator]:
    with trio.fail_after(10):
        async with open_coordinator(devices, NATIVE, channel=channel) as coordinator:
            yield coordinator


@pytest.mark.parametrize("channel", ["memory", "unix"])
async def test_events_travel_as_messages(tmp_path: Path, channel: str) -> None:
    path = tmp_path / "trace.json"
    devices = [FakeDevice(i) for i in range(3)]
    async with fakes(devices, channel) as coordinator, trio.open_nursery() as nursery:
        tracer = Tracer(coordinator, path)
        await tracer.start()
        assert [d.tracing for d in devices] == [tracers.CARD_EVENTS_MAX] * 3
        nursery.start_soon(tracer.run)
        begin = other_begin(tracer)
        for device in devices:
            for n in range(40):
                at = begin + 1000 * n
                device.traced.append(TraceEvent(at, at + 500, n, 0, Op.ADD, 0))
            device.lost = device.number
        await until(lambda: tracer.trace.commands == 120)
        await tracer.stop()
        await tracer.stop()
        assert [d.tracing for d in devices] == [0] * 3
        assert [d.calls.count("trace 0") for d in devices] == [1] * 3
    threads = events_of(path)
    assert [len(threads[CARD + i]) for i in range(3)] == [40] * 3
    assert [c["lost"] for c in other_of(path)["cards"]] == [0, 1, 2]


def other_begin(tracer: Tracer) -> int:
    return tracer.trace._begin_ns


class Untraceable(FakeDevice):
    trace = CardDevice.trace
    trace_events = CardDevice.trace_events


async def test_a_card_that_cannot_trace_ends_it_for_all(tmp_path: Path) -> None:
    devices = [FakeDevice(0), Untraceable(1)]
    async with fakes(devices, "memory") as coordinator:
        tracer = Tracer(coordinator, tmp_path / "trace.json")
        with pytest.raises(CardCommandError, match="card 1 cannot trace its commands"):
            await tracer.start()
        assert devices[0].tracing == 0 and coordinator.trace is None
        await tracer.stop()


async def test_fleets_say_how_to_trace(tiny: Path, tmp_path: Path) -> None:
    fleet: Fleet
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(tiny)
        async with fleet.trace(tmp_path / "trace.json"):
            await model.generate("Hello", max_tokens=3).collect()
    value = json.loads((tmp_path / "trace.json").read_text())
    names = {e["args"]["name"] for e in value["traceEvents"] if e["name"].endswith("_name")}
    assert {"spanker: 2 cards", "host"} < names and len(names) == 4
