# SPDX-License-Identifier: Apache-2.0
"""Several replicas of a model side by side: the same answers as from one card, each for itself."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import trio
from waiting import until

import spanker
from spanker.actors.session import Session
from spanker.actors.virtual_time import run_virtual
from spanker.errors import (
    CardFaultError,
    CardHungError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    PlanError,
)
from spanker.ggml.architectures.llama import read_model
from spanker.ggml.gguf import GGUFFile
from spanker.sched.bandwidth import NATIVE, REV_A, Profile
from spanker.sched.plan import FleetPlan, ModelShape, on_cards, tensor_pipeline
from spanker.simulation import Scenario, simulate
from spanker.testing import hang, kill, tensor, tiny_llama

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

# The embedding of this token is infinite: whoever has it in a prompt gets a fault.  It is never the
# likeliest.
BAD = 77
PLANS = {"dp2": 2, "dp3": 3, "dp2xtp2": 4, "dp2xpp2": 4, "dp2xtp3": 6, "dp2xtp2xpp2": 8}
Answer = tuple[tuple[int | None, ...], bytes]


@attrs.frozen
class Ask:
    prompt: tuple[int, ...]
    temperature: float = 0.0
    most: int = 12


ASKS = (
    Ask((1, 2, 3)),
    Ask(tuple(i % 64 for i in range(100)), most=5),
    Ask((9,), temperature=1.0),
    Ask((200, 100), most=30),
    Ask((1, 2, 3), temperature=0.7),
    Ask((5,) * 20),
    Ask((8, 7)),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_llama(tied=False, format="f32")
    for name, value in (("token_embd.weight", np.inf), ("output.weight", 0)):
        t = made.tensors[name]
        values = np.frombuffer(t.data, np.float32).reshape(t.shape).copy()
        values[BAD] = value
        made.tensors[name] = tensor(name, values, "f32")
    return made.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def shape(tiny: Path) -> ModelShape:
    with GGUFFile(tiny) as gguf:
        return read_model(gguf).shape


def generate(model: spanker.Model, ask: Ask) -> spanker.Generation:
    return model.generate(
        ask.prompt,
        max_tokens=ask.most,
        temperature=ask.temperature,
        seed=len(ask.prompt),
        ignore_eos=True,
        logits=True,
    )


async def answer(generation: spanker.Generation) -> Answer:
    tokens = [t async for t in generation if t.id is not None]
    logits = b"".join(t.logits.tobytes() for t in tokens if t.logits is not None)
    return tuple(t.id for t in tokens), logits


async def append_answer(generation: spanker.Generation, found: list[Answer]) -> None:
    found.append(await answer(generation))


async def answers(model: spanker.Model, asks: Sequence[Ask] = ASKS) -> list[Answer]:
    """Of all at the same time."""
    found: list[Answer] = [((), b"")] * len(asks)

    async def one(number: int, generation: spanker.Generation) -> None:
        found[number] = await answer(generation)

    async with trio.open_nursery() as nursery:
        for number, ask in enumerate(asks):
            nursery.start_soon(one, number, generate(model, ask))
    return found


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[Answer]:
    """What one card answers."""

    async def main() -> list[Answer]:
        async with spanker.open_fleet(1) as fleet:
            return await answers(await fleet.load(tiny, plan="tp1"))

    return trio.run(main)


def sessions(model: spanker.Model) -> tuple[Session, ...]:
    return model._replicas.sessions


def replica_of(model: spanker.Model, generation: spanker.Generation) -> int:
    return sessions(model).index(generation._sequence.session)


async def reduced(fleet: spanker.Fleet) -> None:
    """A collective over all cards gives what it must."""
    n = len(fleet.cards)
    arrays = [np.full(5000, i + 1, np.float32) for i in range(n)]
    await spanker.all_reduce(fleet, arrays)
    assert all((a == n * (n + 1) / 2).all() for a in arrays)


# --- one answer -------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
async def test_tokens_and_logits_do_not_depend_on_the_replica(
    plan: str, tiny: Path, expected: list[Answer]
) -> None:
    async with spanker.open_fleet(PLANS[plan]) as fleet:
        model = await fleet.load(tiny, plan=plan, prompt_chunk=37)
        assert fleet.plan is model.plan and model.plan.name == plan
        assert len(model.plan.replicas) == len(sessions(model)) == int(plan[2])
        assert await answers(model) == expected
        # Each had some of them, so that another order brings each to another one.
        assert all(session.stats.steps for session in sessions(model))
        assert await answers(model, ASKS[::-1]) == expected[::-1]
        assert model.stats.generated_tokens == 2 * sum(ask.most for ask in ASKS)
        assert model.stats.steps == sum(session.stats.steps for session in sessions(model))
        assert model.stats.kv_pages_used == 0


@pytest.mark.parametrize("plan", ["dp2", "dp2xtp2"])
async def test_over_sockets_too(plan: str, tiny: Path, expected: list[Answer]) -> None:
    async with spanker.open_fleet(PLANS[plan], channel="unix") as fleet:
        assert await answers(await fleet.load(tiny, plan=plan)) == expected


@pytest.mark.parametrize("profile", ["native", "rev-a"])
@pytest.mark.parametrize("plan", ["dp2", "dp3", "dp2xtp2"])
def test_virtual_cards_give_the_same(
    plan: str, profile: str, tiny: Path, expected: list[Answer]
) -> None:
    async def main() -> list[Answer]:
        async with spanker.open_fleet(f"virtual:{PLANS[plan]}", profile=profile) as fleet:
            model = await fleet.load(tiny, plan=plan)
            found = await answers(model)
            await reduced(fleet)
            return found

    assert run_virtual(main) == expected


async def test_scores_too(tiny: Path) -> None:
    ids = [(7 * i) % 64 for i in range(150)]
    async with spanker.open_fleet(3) as fleet:
        one = await fleet.load(tiny, plan="tp")
        three = await fleet.load(tiny, plan="dp3")
        logits = await one.logits(ids)
        for _ in range(2):
            held = three.generate([1], max_tokens=100, ignore_eos=True)
            assert (await three.logits(ids)).tobytes() == logits.tobytes()
            assert held.finish_reason is None


# --- which replica ------------------------------------------------------------------------


async def test_a_sequence_goes_where_there_are_the_fewest(tiny: Path) -> None:
    async with spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="dp3")
        made = [model.generate([i], max_tokens=100, ignore_eos=True) for i in range(5)]
        assert [replica_of(model, g) for g in made] == [0, 1, 2, 0, 1]
        assert model.stats.running + model.stats.waiting == 5
        made[1].close()
        made[4].close()
        made[2].close()
        more = [model.generate([i], max_tokens=100, ignore_eos=True) for i in range(5)]
        # Two were left on the first; nothing of what is closed was under way.
        assert [replica_of(model, g) for g in more] == [1, 2, 1, 2, 0]
        for generation in (*made, *more):
            generation.close()
        await until(lambda: not model.stats.running and not model.stats.kv_pages_used)


async def test_each_replica_has_pages_of_its_own(tiny: Path) -> None:
    async with spanker.open_fleet(2) as fleet:
        one = await fleet.load(tiny, plan="tp", ctx=128, kv_tokens=128)
        two = await fleet.load(tiny, plan="dp2", ctx=128, kv_tokens=128)
        assert (one.stats.kv_pages_total, two.stats.kv_pages_total) == (2, 4)
        made = [two.generate([i], max_tokens=127, ignore_eos=True) for i in range(3)]
        await until(lambda: two.stats.kv_pages_used == 4)
        assert (two.stats.running, two.stats.waiting) == (2, 1)
        for generation in made:
            await generation.collect()


# --- plans as values ----------------------------------------------------------------------


async def test_plans_of_different_kinds_side_by_side_and_idle_cards(
    tiny: Path, shape: ModelShape, expected: list[Answer]
) -> None:
    plan = FleetPlan(
        "mixed",
        (
            on_cards(tensor_pipeline(shape, 3, 1), [5, 1, 3]),
            on_cards(tensor_pipeline(shape, 1, 1), [2]),
            on_cards(tensor_pipeline(shape, 1, 2), [7, 6]),
        ),
        "by hand",
    )
    async with spanker.open_fleet(8) as fleet:
        model = await fleet.load(tiny, plan=plan)
        assert model.plan is plan
        assert await answers(model) == expected
        cards = (await fleet.stats()).cards
        assert [card.replica for card in cards] == [None, 0, 1, 0, None, 0, 1 + 1, 2]
        for number in (0, 4):
            assert cards[number].share == "nothing"
            assert cards[number].ddr_used_bytes == cards[number].steps == 0
        assert cards[2].share == "layers 0-1" and "heads" in cards[5].share
        assert all(card.steps for card in cards if card.replica is not None)
        await reduced(fleet)
        # A single plan is a value too.
        other = await fleet.load(tiny, plan=plan.replicas[2])
        assert other.plan.cards == (7, 6) and not other.plan.parallel
        assert await answers(other) == expected


async def test_plans_that_do_not_fit_are_refused(tiny: Path, shape: ModelShape) -> None:
    one = tensor_pipeline(shape, 1, 1)
    async with spanker.open_fleet(2) as fleet:
        for plan, message in (
            ("dp3", "uses 3 cards, the fleet has 2"),
            ("dp2xtp2", "uses 4 cards"),
            (on_cards(one, [2]), "card 2, the fleet has cards 0 to 1"),
            (FleetPlan("twice", (one, one)), "share cards"),
            (attrs.evolve(one, stages=()), "no stages"),
        ):
            with pytest.raises(PlanError, match=message):
                await fleet.load(tiny, plan=plan)
        assert all(card.ddr_used_bytes == 0 for card in (await fleet.stats()).cards)


async def test_the_smallest_card_says_how_much_all_replicas_hold(
    tiny: Path, shape: ModelShape
) -> None:
    async with spanker.open_fleet("soft:1:64MiB,soft:1:3MiB") as fleet:
        model = await fleet.load(tiny, plan="dp2", kv_tokens=None)
        assert len({session.pool.total for session in sessions(model)}) == 1
    async with spanker.open_fleet("soft:1:64MiB,soft:1:64KiB") as fleet:
        with pytest.raises(CardMemoryError, match="on card 1"):
            await fleet.load(tiny, plan="dp2")
        assert all(card.ddr_used_bytes == 0 for card in (await fleet.stats()).cards)
        with pytest.raises(ConfigError, match="does not fit: the cards have room"):
            await fleet.load(
                tiny, plan=on_cards(tensor_pipeline(shape, 1, 1), [0]), kv_tokens=10**9
            )


# --- each for itself ------------------------------------------------------------------------


def epochs(fleet: spanker.Fleet) -> list[int | None]:
    return list(fleet._coordinator._epochs)


async def test_a_cancelled_step_of_one_replica_leaves_the_other_alone(
    tiny: Path, expected: list[Answer]
) -> None:
    async with spanker.open_fleet(4) as fleet:
        model = await fleet.load(tiny, plan="dp2xtp2")
        for turn in range(12):
            victim = model.generate([1] * 150, max_tokens=50, ignore_eos=True)
            other = generate(model, ASKS[3])
            assert [replica_of(model, g) for g in (victim, other)] == [0, 1]
            found: list[Answer] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(append_answer, other, found)
                for _ in range(turn % 5):
                    await trio.lowlevel.checkpoint()
                with trio.move_on_after(0.002):
                    await victim.collect()
                victim.close()
            assert found == [expected[3]]
            await until(lambda: not model.stats.running)
        # Whole epochs have passed, on the cards of the first alone.
        first, second, *rest = epochs(fleet)
        assert first == second and first is not None and first > 1 and rest == [1, 1]
        assert await answers(model) == expected


async def test_cards_of_different_epochs_meet_in_one(tiny: Path, expected: list[Answer]) -> None:
    await _meet_in_one("soft:4", NATIVE, tiny, expected)


async def test_throttled_cards_of_different_epochs_meet(tiny: Path, expected: list[Answer]) -> None:
    fast = attrs.evolve(REV_A, int8_madds_per_s=1e9, float_madds_per_s=1e9, elements_per_s=1e9)
    await _meet_in_one("soft:4", fast, tiny, expected)


def test_virtual_cards_of_different_epochs_meet(tiny: Path, expected: list[Answer]) -> None:
    run_virtual(functools.partial(_meet_in_one, "virtual:4", NATIVE, tiny, expected))


async def _meet_in_one(cards: str, profile: Profile, tiny: Path, expected: list[Answer]) -> None:
    throttle = profile is not NATIVE
    async with spanker.open_fleet(cards, profile=profile, throttle=throttle) as fleet:
        model = await fleet.load(tiny, plan="dp2xtp2")
        across = await fleet.load(tiny, plan="tp4")
        await reduced(fleet)

        async def abort_one(replica: int) -> None:
            before = epochs(fleet)
            while epochs(fleet) == before:
                held = [model.generate([i] * 200, max_tokens=2, ignore_eos=True) for i in range(2)]
                await until(lambda: bool(sessions(model)[replica]._flights))
                held[replica].close()
                await held[1 - replica].collect()
                await until(lambda: not model.stats.running)

        for replica, meet in itertools.product((0, 1), ("collective", "model", "replicas")):
            await abort_one(replica)
            assert len(set(epochs(fleet))) == 2
            if meet == "collective":
                await reduced(fleet)
            elif meet == "model":
                assert await answers(across, ASKS[:3]) == expected[:3]
            else:
                assert await answers(model, ASKS[:3]) == expected[:3]
            assert len(set(epochs(fleet))) == (2 if meet == "replicas" else 1)
        await reduced(fleet)
        assert await answers(model) == expected and await answers(across) == expected


async def test_a_fault_in_one_replica_leaves_the_other_alone(
    tiny: Path, expected: list[Answer]
) -> None:
    async with spanker.open_fleet(4) as fleet:
        model = await fleet.load(tiny, plan="dp2xtp2")
        for turn in range(6):
            other = generate(model, ASKS[3])
            if turn % 2:
                # So that the sick one comes first.
                other.close()
                await until(lambda: not model.stats.running)
            sick = model.generate([1, BAD], max_tokens=5, ignore_eos=True)
            if turn % 2:
                other = generate(model, ASKS[3])
            assert replica_of(model, sick) != replica_of(model, other)
            with pytest.raises(CardFaultError):
                await sick.collect()
            assert await answer(other) == expected[3]
        await reduced(fleet)
        assert await answers(model) == expected


@pytest.mark.parametrize("card", [0, 3])
@pytest.mark.parametrize(("fault", "kind"), [(kill, CardLostError), (hang, CardHungError)])
async def test_a_failing_card_takes_its_replica_alone(
    card: int, fault: type, kind: type, tiny: Path, expected: list[Answer]
) -> None:
    dead, alive = (0, 1) if card == 0 else (1, 0)
    async with spanker.open_fleet(4, hang_timeout_s=0.5, recover=False) as fleet:
        model = await fleet.load(tiny, plan="dp2xtp2")
        ask = Ask((4, 5, 6), most=150)
        made = [generate(model, ask) for _ in range(4)]
        for generation in made:
            await anext(generation)
        assert [replica_of(model, g) for g in made] == [0, 1, 0, 1]
        fault(fleet, card)
        with trio.fail_after(5):
            for generation in made[dead::2]:
                with pytest.raises(kind) as caught:
                    await generation.collect()
                assert caught.value.card == card
            for generation in made[alive::2]:
                await generation.collect()
        assert made[alive].token_ids == made[alive + 2].token_ids
        assert len(made[alive].token_ids) == 150
        # Those that come later all go where there is somebody.
        with trio.fail_after(5):
            assert await answers(model) == expected
        assert sessions(model)[dead].stats.running == sessions(model)[dead].stats.waiting == 0
        # Nobody is left when the other one goes too.
        kill(fleet, 3 - card)
        with pytest.raises(CardLostError):
            await model.generate([1], max_tokens=50, ignore_eos=True).collect()
        with pytest.raises(kind if dead == 0 else CardLostError):
            model.generate([1])


async def test_collectives_and_loads_come_between_the_steps_of_all_replicas(
    tiny: Path, expected: list[Answer]
) -> None:
    async with spanker.open_fleet(3) as fleet:
        model = await fleet.load(tiny, plan="dp3")
        over = False

        async def collectives() -> None:
            while not over:
                await reduced(fleet)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(collectives)
                assert await answers(model) == expected
                second = await fleet.load(tiny, plan="tp")
                async with trio.open_nursery() as both:
                    for each in (model, second):

                        async def check(each: spanker.Model = each) -> None:
                            assert await answers(each) == expected

                        both.start_soon(check)
                over = True


# --- at the same time -----------------------------------------------------------------------


def test_two_replicas_make_twice_the_tokens_of_one() -> None:
    one = Scenario(shape="smollm2-135m", plan="tp", prompt_tokens=8, tokens=20)
    alone = simulate(one)
    two = simulate(attrs.evolve(one, cards=2, plan="dp2", batch=2))
    assert alone.decode_tokens_per_second and two.decode_tokens_per_second
    rate = two.decode_tokens_per_second / alone.decode_tokens_per_second
    assert rate == pytest.approx(2, rel=0.02)
    assert [card.busy for card in two.cards] == pytest.approx([alone.cards[0].busy] * 2, rel=0.02)
    assert [card.replica for card in two.cards] == [0, 1]
    assert two.plan.name == "dp2" and all(not link.nbytes for link in two.links)
    # Four cards in two pairs, three sequences: the first pair has two of them.
    pairs = simulate(attrs.evolve(one, cards=4, plan="dp2xtp2", batch=3))
    assert all(card.busy > 0 for card in pairs.cards)
    assert {(ln.source, ln.target) for ln in pairs.links if ln.nbytes} == {
        (0, 1),
        (1, 0),
        (2, 3),
        (3, 2),
    }


def test_replicas_load_from_each_other_over_a_slow_host_link() -> None:
    alone = Scenario(shape="smollm2-135m", plan="tp", prompt_tokens=4, tokens=1)
    four = attrs.evolve(alone, cards=4, plan="dp4")
    one_s, four_s = simulate(alone).load_s, simulate(four).load_s
    # Behind the load of the first the weights go through a chain of links, five times as fast, and
    # the last of each run twice more.
    assert 1.2 * one_s < four_s < 1.35 * one_s
    slow = attrs.evolve(REV_A, intercard_bytes_per_s=REV_A.host_link_bytes_per_s)
    assert simulate(attrs.evolve(four, profile=slow)).load_s == pytest.approx(4 * one_s, rel=0.02)


def test_a_batch_fits_where_its_part_does() -> None:
    """KV memory for the sequences that a replica gets, and no more."""
    base = Scenario(shape="smollm2-135m", cards=3, plan="dp3", prompt_tokens=60, tokens=8, batch=7)
    result = simulate(attrs.evolve(base, ctx=68))
    used = result.cards[0].ddr_used_bytes
    alone = simulate(attrs.evolve(base, ctx=68, cards=1, plan="tp", batch=3))
    assert [card.ddr_used_bytes for card in result.cards] == [used] * 3
    assert used == alone.cards[0].ddr_used_bytes


async def test_a_trace_keeps_the_hosts_work_for_replicas_apart(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    async with spanker.open_fleet(4) as fleet:
        model = await fleet.load(tiny, plan="dp2xtp2")
        async with fleet.trace(path):
            await answers(model)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(name for name in names.values() if "host" in name) == [
        "host",
        "host, from card 2 on",
    ]
    for thread, name in names.items():
        spans = sorted((e["ts"], e["dur"]) for e in events if e["tid"] == thread and "ts" in e)
        assert spans
        if "host" in name:
            end = -math.inf
            for begin, duration in spans:
                assert begin >= end - 0.001
                end = begin + duration
