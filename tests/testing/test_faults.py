# SPDX-License-Identifier: Apache-2.0
"""kill and hang: in every phase, on fleets of one to three cards, everyone hears of it soon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import spanker
from spanker.errors import CardError, CardHungError, CardLostError
from spanker.testing import hang, kill, write_tiny_llama

HANG_TIMEOUT_S = 0.5
# How much later than the hang timeout an error may come: a look at the cards, and a busy machine.
SLACK_S = 1.5
FLEETS = ((1, 0), (2, 1), (3, 0), (3, 2))
PROMPT = [token % 256 for token in range(1500)]

Fault = Callable[[spanker.Fleet, int], None]


class Blow:
    """A fault that strikes one card, and when it did."""

    def __init__(self, fleet: spanker.Fleet, fault: Fault, card: int) -> None:
        self.fleet, self.fault, self.card = fleet, fault, card
        self.at: float | None = None

    def strike(self) -> None:
        if self.at is None:
            self.at = trio.current_time()
            self.fault(self.fleet, self.card)

    def check(self, error: CardError, kind: type[CardError]) -> None:
        """`error` names the card, and did not come late."""
        assert self.at is not None
        assert (type(error), error.card) == (kind, self.card)
        assert f"card {self.card}" in str(error)
        assert "\n" not in str(error)
        limit_s = SLACK_S + (HANG_TIMEOUT_S if kind is CardHungError else 0)
        assert trio.current_time() - self.at < limit_s


async def expect(blow: Blow, kind: type[CardError], generation: spanker.Generation) -> CardError:
    """Iterate until the generation fails as it must."""
    with pytest.raises(kind) as caught:
        await generation.collect()
    blow.check(caught.value, kind)
    return caught.value


async def check_afterwards(model: spanker.Model, blow: Blow, kind: type[CardError]) -> None:
    """Later requests fail at once, and do not wait for a timeout again."""
    for _ in range(2):
        start = trio.current_time()
        with pytest.raises(kind) as caught:
            model.generate([1])
        assert caught.value.card == blow.card
        with pytest.raises(kind):
            await model.logits([1, 2])
        assert trio.current_time() - start < HANG_TIMEOUT_S


async def on_each_fleet(scenario: Callable[[int, int], object]) -> None:
    """All sizes of fleet at the same time: a hang costs its timeout only once."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for cards, card in FLEETS:
                nursery.start_soon(scenario, cards, card, name=f"{cards} cards, {card} fails")


@pytest.mark.parametrize(("fault", "kind"), [(kill, CardLostError), (hang, CardHungError)])
@pytest.mark.parametrize("phase", ["idle", "prefill", "decode"])
async def test_every_generation_hears_of_it(
    phase: str, fault: Fault, kind: type[CardError], long_model: Path
):
    async def scenario(cards: int, card: int) -> None:
        async with spanker.open_fleet(
            f"soft:{cards}", hang_timeout_s=HANG_TIMEOUT_S, plan="tp", recover=False
        ) as fleet:
            model = await fleet.load(long_model, plan="tp", prompt_chunk=16)
            blow = Blow(fleet, fault, card)
            if phase == "idle":
                await model.generate([1, 2], max_tokens=2).collect()
                blow.strike()
            prompts = [PROMPT, PROMPT[3:]] if phase == "prefill" else [[1, 2], [3, 4, 5]]
            generations = [model.generate(p, max_tokens=500, ignore_eos=True) for p in prompts]
            if phase == "prefill":
                while model.stats.prompt_tokens < 64:
                    await trio.lowlevel.checkpoint()
                assert model.stats.generated_tokens == 0
                blow.strike()
            if phase == "decode":
                for generation in generations:
                    for _ in range(3):
                        await anext(generation)
                blow.strike()
            errors = []
            async with trio.open_nursery() as nursery:
                for generation in generations:

                    async def one(generation: spanker.Generation = generation) -> None:
                        errors.append(await expect(blow, kind, generation))

                    nursery.start_soon(one)
            # One object would collect the tracebacks of both.
            assert errors[0] is not errors[1]
            await check_afterwards(model, blow, kind)
            assert (model.stats.running, model.stats.waiting) == (0, 0)
            assert model.stats.kv_pages_used == 0
            closing = trio.current_time()
        assert trio.current_time() - closing < 1

    await on_each_fleet(scenario)


async def test_a_card_killed_during_a_load_fails_the_load_and_frees_the_others(long_model: Path):
    async def scenario(cards: int, card: int) -> None:
        async with spanker.open_fleet(
            f"soft:{cards}", hang_timeout_s=HANG_TIMEOUT_S, plan="tp", recover=False
        ) as fleet:
            blow = Blow(fleet, kill, card)

            def progress(done: int, total: int) -> None:
                if done:  # before any card has got its whole share
                    blow.strike()

            with pytest.raises(CardLostError) as caught:
                await fleet.load(long_model, plan="tp", progress=progress)
            assert blow.at is not None
            assert caught.value.card == card
            assert [card for card, _ in fleet.health().lost] == [card]
            others = [device for device in fleet.devices if device.number != card]
            assert not any(device.counters().ddr_used_bytes for device in others)
            closing = trio.current_time()
        assert trio.current_time() - closing < 1

    await on_each_fleet(scenario)


async def test_a_card_that_hangs_during_a_load_fails_the_first_generation(long_model: Path):
    async def scenario(cards: int, card: int) -> None:
        async with spanker.open_fleet(
            f"soft:{cards}", hang_timeout_s=HANG_TIMEOUT_S, plan="tp", recover=False
        ) as fleet:
            # A hung card still answers, so that the load itself can go on.
            hang(fleet, card)
            model = await fleet.load(long_model, plan="tp")
            blow = Blow(fleet, hang, card)
            blow.strike()
            await expect(blow, CardHungError, model.generate([1]))

    await on_each_fleet(scenario)


@pytest.mark.parametrize("options", [{"channel": "unix"}, {"profile": "rev-a"}], ids=str)
@pytest.mark.parametrize(("fault", "kind"), [(kill, CardLostError), (hang, CardHungError)])
async def test_it_makes_no_difference_how_messages_travel(
    options: dict[str, str], fault: Fault, kind: type[CardError], long_model: Path
):
    async with spanker.open_fleet(
        "soft:2", hang_timeout_s=HANG_TIMEOUT_S, plan="tp", recover=False, **options
    ) as fleet:
        model = await fleet.load(long_model)
        generation = model.generate([1, 2], max_tokens=500, ignore_eos=True)
        await anext(generation)
        blow = Blow(fleet, fault, 1)
        blow.strike()
        await expect(blow, kind, generation)


async def test_a_slow_card_is_not_taken_for_hung(tmp_path: Path):
    """Progress counts, not how long a step takes."""
    timeout_s = 0.25
    path = write_tiny_llama(tmp_path / "wide.gguf", layers=4, hidden=256, ffn=1024, context=2048)
    async with spanker.open_fleet("soft:1@scalar", plan="tp", hang_timeout_s=timeout_s) as fleet:
        model = await fleet.load(path, prompt_chunk=2048)
        start = trio.current_time()
        await model.generate([*PROMPT, *PROMPT[:500]], max_tokens=1).collect()
        assert model.stats.steps == 1
        assert trio.current_time() - start > 2 * timeout_s


async def test_faults_refuse_a_card_that_is_not_there():
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        for fault in (kill, hang):
            with pytest.raises(ValueError, match="no card 2: the fleet has cards 0 to 1"):
                fault(fleet, 2)
            with pytest.raises(ValueError, match="no card -1"):
                fault(fleet, -1)
