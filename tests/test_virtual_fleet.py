# SPDX-License-Identifier: Apache-2.0
"""Fleets of virtual cards: the bits of soft cards, in a time that nothing here decides."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio

import spanker
from spanker.actors import paced as paced_links
from spanker.actors.channel import StreamChannel
from spanker.actors.host_link import HostLink
from spanker.actors.threads import WorkThreads
from spanker.actors.virtual_time import run_virtual
from spanker.errors import (
    CardFaultError,
    CardHungError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    RequestError,
)
from spanker.fleet import Fleet, Model
from spanker.sched.bandwidth import NATIVE, REV_A, Profile
from spanker.sched.shapes import Dimensions, shape_of
from spanker.testing import GGUFTensor, hang, kill, tiny_llama, write_tiny_llama

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SHAPE = shape_of(Dimensions(4, 64, 4, 2, 128, 512, 256))
PROMPT = list(range(20))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("virtual")
    return {
        name: write_tiny_llama(where / f"{name}.gguf", **sizes)
        for name, sizes in {
            "q4_0": {"layers": 4},
            "q6_k": {"hidden": 256, "ffn": 256, "heads": 4, "format": "q6_k", "tied": False},
            "f16": {"format": "f16", "heads": 3, "kv_heads": 3, "hidden": 96},
        }.items()
    }


async def answers(
    cards: str, path: Path, plan: str, profile: str | Profile = "rev-a"
) -> list[tuple[list[int | None], str]]:
    """Tokens and logits of three sequences side by side, greedy and sampled."""
    results: list[tuple[list[int | None], str]] = [([], "")] * 3

    async def one(model: Model, number: int) -> None:
        ids, logits = [], hashlib.sha256()
        async for token in model.generate(
            PROMPT[number:],
            max_tokens=6,
            temperature=0.8 * (number == 2),
            seed=5,
            ignore_eos=True,
            logits=True,
        ):
            if token.logits is not None:
                ids.append(token.id)
                logits.update(token.logits.tobytes())
        results[number] = ids, logits.hexdigest()

    async with spanker.open_fleet(cards, plan="tp", profile=profile) as fleet:
        model = await fleet.load(path, plan=plan, ctx=64, prompt_chunk=7)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(one, model, number)
    return results


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "f16"])
def test_virtual_cards_give_the_bits_of_soft_cards(models: dict[str, Path], name: str) -> None:
    expected = trio.run(answers, "soft:1", models[name], "tp", "native")
    for cards, plan in (("virtual:1", "tp"), ("virtual:3", "tp"), ("virtual:2", "pp")):
        assert run_virtual(answers, cards, models[name], plan) == expected, (cards, plan)


def test_neither_plan_nor_profile_nor_seed_changes_a_bit(models: dict[str, Path]) -> None:
    path = models["q4_0"]
    expected = trio.run(answers, "soft:1", path, "tp", "native")
    busy = attrs.evolve(NATIVE, cores=2, shared_bytes_per_s=20e9)
    for cards, plan, profile, seed in (
        ("virtual:4", "tp2xpp2", "rev-a", 1),
        ("virtual:4", "pp", "rev-b", 2),
        ("virtual:5", "tp", "native", 3),
        ("virtual:3", "tp", busy, 4),
    ):
        assert run_virtual(answers, cards, path, plan, profile, seed=seed) == expected, plan


# --- hollow fleets and shapes -------------------------------------------------------------


async def of_zeros(cards: str) -> list[object]:
    """Tokens, their log probabilities and times, of a shape's greedy and sampled answers."""
    found: list[object] = []
    async with spanker.open_fleet(cards, plan="tp", profile="rev-a") as fleet:
        model = await fleet.load_shape(SHAPE, plan="tp2xpp2", ctx=64)
        found.append((trio.current_time(), model.name, model.plan.name))
        for temperature in (0.0, 0.7):
            async for token in model.generate(PROMPT, max_tokens=8, temperature=temperature):
                found.append((token.id, token.logprob, token.position, trio.current_time()))
        found.append((await fleet.stats()).cards)
        found.append(fleet.usage())
    return found


def test_a_hollow_fleet_answers_as_a_model_of_zeros_would_and_in_the_same_time() -> None:
    full, hollow = run_virtual(of_zeros, "virtual:4"), run_virtual(of_zeros, "hollow:4")
    assert hollow == full
    assert [t[0] for t in hollow[1:9]] == [0] * 8
    assert len({t[0] for t in hollow[9:17]}) > 2  # sampled from a flat distribution


def test_a_shape_has_no_words() -> None:
    async def main() -> None:
        async with spanker.open_fleet("hollow:2", plan="tp") as fleet:
            model = await fleet.load_shape("smollm2-135m", ctx=64)
            assert (model.name, model.vocabulary) == ("smollm2-135m", 49152)
            with pytest.raises(RequestError, match="smollm2-135m is a shape"):
                model.tokenize("Hello")
            with pytest.raises(RequestError, match="give token ids"):
                model.chat([{"role": "user", "content": "Hello"}])
            generation = model.generate([1], max_tokens=3)
            assert await generation.collect() == ""
            assert generation.token_ids == [0, 0, 0]
            with pytest.raises(ConfigError, match="no shape 'llama-1t'"):
                await fleet.load_shape("llama-1t")

    run_virtual(main)


def test_a_shape_runs_on_soft_cards_too() -> None:
    async def main() -> list[int]:
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load_shape(SHAPE, ctx=64)
            generation = model.generate(PROMPT, max_tokens=3)
            await generation.collect()
            return generation.token_ids

    assert trio.run(main) == [0, 0, 0]


def test_what_does_not_fit_is_refused_as_on_real_cards() -> None:
    async def main() -> None:
        async with spanker.open_fleet("hollow:2:64MiB", plan="tp") as fleet:
            with pytest.raises(CardMemoryError, match=r"needs .* bytes on card 0"):
                await fleet.load_shape("tinyllama")

    run_virtual(main)


# --- determinism ----------------------------------------------------------------------------


def traced(path: Path, model: Path, where: str, seed: int) -> bytes:
    async def main() -> None:
        async with spanker.open_fleet(where, plan="tp", profile="rev-a") as fleet:
            loaded = await fleet.load(model, plan="tp", ctx=64)
            async with fleet.trace(path), trio.open_nursery() as nursery:
                for number in range(4):
                    generation = loaded.generate(PROMPT[number:], max_tokens=5, ignore_eos=True)
                    nursery.start_soon(generation.collect)

    run_virtual(main, seed=seed)
    return path.read_bytes()


def test_ten_runs_of_a_seed_leave_the_same_trace(models: dict[str, Path], tmp_path: Path) -> None:
    traces = [traced(tmp_path / "t", models["q4_0"], "virtual:3", 7) for _ in range(10)]
    assert len(set(traces)) == 1
    assert b'"clock": "virtual"' in traces[0] and b'"lost": 0' in traces[0]
    # And the same without arithmetic: times depend on no token.
    assert traced(tmp_path / "t", models["q4_0"], "hollow:3", 7) == traces[0]


# --- time -----------------------------------------------------------------------------------


async def token_times(model: Model, **options: object) -> list[float]:
    times = []
    async for _ in model.generate(PROMPT, max_tokens=6, ignore_eos=True, **options):  # type: ignore[arg-type]
        times.append(trio.current_time())
    return times


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def test_what_the_host_must_choose_waits_for_the_host() -> None:
    """Sampled tokens take the host's time and a round trip each; greedy ones none of it."""

    async def main(profile: Profile, temperature: float) -> list[float]:
        async with spanker.open_fleet("hollow:2", plan="tp", profile=profile) as fleet:
            model = await fleet.load_shape(SHAPE, ctx=64)
            return gaps(await token_times(model, temperature=temperature))

    slow, quick = attrs.evolve(REV_A, host_step_s=10e-3), attrs.evolve(REV_A, host_step_s=0.0)
    assert run_virtual(main, slow, 0.0) == pytest.approx(run_virtual(main, quick, 0.0))
    sampled = run_virtual(main, slow, 1.0)
    expected = [gap + 10e-3 for gap in run_virtual(main, quick, 1.0)]
    assert sampled == pytest.approx(expected, abs=1e-9)


class _RealLink:
    """The host link with all its bytes, in the place of the paced one."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self._link = HostLink(bytes_per_s, latency_s)

    def channel_pair(self, *, name: str) -> tuple[StreamChannel, StreamChannel]:
        host, card = self._link.stream_pair()
        return StreamChannel(host, name=name), StreamChannel(card, name=name)

    async def run(self) -> None:
        await trio.sleep_forever()


@pytest.mark.parametrize("cards", [1, 3])
def test_messages_by_reference_take_the_time_of_their_bytes(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], cards: int
) -> None:
    async def main() -> list[float]:
        async with spanker.open_fleet(f"hollow:{cards}", plan="tp", profile="rev-a") as fleet:
            model = await fleet.load(models["f16"], plan="tp", ctx=64)
            return [trio.current_time(), *await token_times(model)]

    async def at_once(_: WorkThreads, work: Callable[[], None]) -> None:
        await trio.lowlevel.checkpoint()
        work()

    paced = run_virtual(main)
    monkeypatch.setattr(paced_links, "PacedLink", _RealLink)
    # The stream's deferred buffers are made in a thread, which the clock would overtake.
    monkeypatch.setattr(WorkThreads, "run", at_once)
    real = run_virtual(main)
    # Of several cards another one may go first: then the link idles at other moments of a load.
    assert paced[0] == pytest.approx(real[0], rel=1e-6 if cards == 1 else 0.01)
    assert gaps(paced[1:]) == pytest.approx(gaps(real[1:]), rel=0.01)


def test_a_fleet_without_a_host_link_takes_only_the_cards_time() -> None:
    async def main() -> list[float]:
        async with spanker.open_fleet("hollow:2", plan="tp", profile="native") as fleet:
            model = await fleet.load_shape(SHAPE, ctx=64)
            assert trio.current_time() == 0
            used = fleet.usage()
            assert (used.bytes_to_cards, used.bytes_to_host) == (0, 0)
            return gaps(await token_times(model))

    assert all(0 < gap < 1e-3 for gap in run_virtual(main))


# --- failures -------------------------------------------------------------------------------


def in_a_fleet(
    job: Callable[[Fleet, Model], object], models: dict[str, Path], **options: object
) -> None:
    async def main() -> None:
        async with spanker.open_fleet("virtual:3", plan="tp", profile="rev-a", **options) as fleet:  # type: ignore[arg-type]
            await job(fleet, await fleet.load(models["q4_0"], plan="tp", ctx=64))  # type: ignore[misc]

    begin = time.monotonic()
    run_virtual(main)
    assert time.monotonic() - begin < 20


def test_a_card_that_dies_ends_the_sequences_at_once(models: dict[str, Path]) -> None:
    async def job(fleet: Fleet, model: Model) -> None:
        generation = model.generate(PROMPT, max_tokens=30, ignore_eos=True)
        assert (await generation.__anext__()).id is not None
        kill(fleet, 1)
        with pytest.raises(CardLostError, match="card 1"):
            await generation.collect()

    in_a_fleet(job, models, recover=False)


def test_a_hung_card_is_found_after_its_timeout_in_no_time(models: dict[str, Path]) -> None:
    async def job(fleet: Fleet, model: Model) -> None:
        generation = model.generate(PROMPT, max_tokens=30, ignore_eos=True)
        await generation.__anext__()
        hang(fleet, 2)
        begin = trio.current_time()
        with pytest.raises(CardHungError, match="card 2 hangs"):
            await generation.collect()
        assert 100 <= trio.current_time() - begin < 160

    in_a_fleet(job, models, hang_timeout_s=100, recover=False)


def test_a_cancelled_step_is_aborted_and_the_fleet_goes_on(models: dict[str, Path]) -> None:
    async def job(fleet: Fleet, model: Model) -> None:
        expected = model.generate(PROMPT, max_tokens=5, ignore_eos=True)
        await expected.collect()
        for seconds in (0.0, 1e-5, 1e-4, 3e-4):
            with trio.move_on_after(seconds):
                await model.generate(PROMPT, max_tokens=30, ignore_eos=True).collect()
            again = model.generate(PROMPT, max_tokens=5, ignore_eos=True)
            await again.collect()
            assert again.token_ids == expected.token_ids

    in_a_fleet(job, models)


def test_a_fault_in_the_arithmetic_is_one_of_the_fleet(tmp_path: Path) -> None:
    made = tiny_llama()
    name = "blk.1.ffn_down.weight"
    bad = made.tensors[name]
    # A scale of infinity: the first activation that meets it is no number any more.
    made.tensors[name] = GGUFTensor(name, bad.shape, bad.type, b"\x00\x7c" + bad.data[2:])
    path = made.write(tmp_path / "bad.gguf")

    async def main() -> None:
        async with spanker.open_fleet("virtual:2", plan="tp", profile="rev-a") as fleet:
            model = await fleet.load(path, plan="tp", ctx=64)
            for _ in range(2):
                with pytest.raises(CardFaultError, match="NaN or an infinity"):
                    await model.generate(PROMPT, max_tokens=5).collect()

    run_virtual(main)


# --- opening --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "options", "words"),
    [
        ("virtual:2", {"workers": 1}, "no workers"),
        ("virtual:1,1", {}, "virtual and soft cards do not go together"),
        ("hollow:0", {}, "at least one card"),
    ],
)
def test_what_makes_no_sense_is_refused(cards: str, options: dict[str, object], words: str) -> None:
    async def main() -> None:
        async with spanker.open_fleet(cards, plan="tp", **options):  # type: ignore[arg-type]
            raise AssertionError("it was opened")

    with pytest.raises(ConfigError, match=words):
        run_virtual(main)


async def test_soft_cards_keep_no_accounts(spanker_fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="only virtual cards"):
        spanker_fleet.usage()


async def test_a_virtual_fleet_runs_under_trios_own_clocks(
    models: dict[str, Path], autojump_clock: trio.testing.MockClock
) -> None:
    async with spanker.open_fleet("virtual:2", plan="tp") as fleet:
        model = await fleet.load(models["q4_0"], ctx=64)
        await model.generate(PROMPT, max_tokens=3).collect()


async def test_under_the_real_clock_a_virtual_fleet_takes_its_time(
    models: dict[str, Path],
) -> None:
    async with spanker.open_fleet("virtual:2", plan="tp", profile="rev-a") as fleet:
        begin = trio.current_time()
        model = await fleet.load(models["q4_0"], ctx=64)
        await model.generate(PROMPT, max_tokens=3).collect()
        assert trio.current_time() - begin > 0.005
