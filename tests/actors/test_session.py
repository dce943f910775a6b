# SPDX-License-Identifier: Apache-2.0
"""Sequences and steps: sharing, waiting, ending, and that nobody's tokens depend on anyone else."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trio
from reference_model import forward
from waiting import until

import spanker
from spanker.actors.session import RUN_AHEAD_MAX
from spanker.actors.steps import StepPipe
from spanker.errors import CardFaultError, ContextLengthError, RequestError
from spanker.fleet import Generation, Model
from spanker.ggml.sampling import SamplingParams, choose_from_logits
from spanker.testing.models import TinyModel, tensor, tiny_llama

TINY = tiny_llama()
PAGE = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


def ids_of(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, count)]


async def idle(model: Model) -> None:
    """Wait until nothing is under way; everything must have been given back."""
    await until(lambda: not model.stats.running and not model.stats.waiting)
    await until(lambda: not model.stats.kv_pages_used)


async def tokens_of(generation: Generation) -> list[int]:
    return [t.id async for t in generation if t.id is not None]


async def with_logits(generation: Generation) -> tuple[list[int], np.ndarray]:
    tokens = [t async for t in generation if t.id is not None]
    rows = [t.logits for t in tokens if t.logits is not None]
    assert len(rows) == len(tokens)
    return [t.id for t in tokens if t.id is not None], np.array(rows).view(np.uint32)


# --- sharing steps ----------------------------------------------------------------------


async def test_concurrent_generations_share_steps(tiny: Path) -> None:
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        await tokens_of(model.generate([1, 2, 3], max_tokens=40, ignore_eos=True))
        alone = model.stats.steps
        assert alone == 40
        async with trio.open_nursery() as nursery:
            for i in range(8):
                prompt = ids_of(3, seed=i)
                generation = model.generate(prompt, max_tokens=40, ignore_eos=True)
                nursery.start_soon(tokens_of, generation)
        # Eight together take hardly more steps than one.
        assert model.stats.steps - alone < 1.2 * alone
        assert model.stats.generated_tokens == 9 * 40
        assert model.stats.prompt_tokens == 9 * 3


@pytest.mark.parametrize("chunk", [1, 5])
async def test_short_prompt_chunks_do_not_keep_generations_from_sharing_steps(
    tiny: Path, chunk: int
) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, prompt_chunk=chunk)
        async with trio.open_nursery() as nursery:
            for i in range(8):
                prompt = ids_of(10, seed=i)
                generation = model.generate(prompt, max_tokens=60, ignore_eos=True)
                nursery.start_soon(tokens_of, generation)
        # The prompts go first, chunk by chunk; then all decode together.
        assert model.stats.steps <= 8 * 10 // chunk + 60 + 8


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
async def test_a_step_has_no_more_prompt_tokens_than_the_chunk(
    tiny: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, prompt_chunk=chunk)
        submit, sizes = StepPipe.submit, []

        async def counted(pipe: StepPipe, sequences: Sequence, **options: bool) -> None:
            sizes.append(sum(len(s.tokens) for s in sequences))
            await submit(pipe, sequences, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(StepPipe, "submit", counted)
        async with trio.open_nursery() as nursery:
            for seed in range(2):
                nursery.start_soon(model.logits, ids_of(20, seed=seed))
        assert sum(sizes) == 40
        assert max(sizes) <= chunk
        assert len(sizes) <= 40 // min(chunk, 20) + 2


async def test_more_sequences_than_fit_into_a_step_take_turns(tiny: Path) -> None:
    """64 outputs at most come out of a step; everyone still gets all their tokens."""
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, kv_tokens=PAGE * 150)
        expected = await tokens_of(model.generate([5], max_tokens=12, ignore_eos=True))
        finished: list[list[int]] = []

        async def one() -> None:
            generation = model.generate([5], max_tokens=12, ignore_eos=True)
            finished.append(await tokens_of(generation))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(150):
                    nursery.start_soon(one)
        assert finished == [expected] * 150
        await idle(model)


# --- nobody's answer depends on the others ----------------------------------------------


PROMPTS = [ids_of(n, seed=n) for n in (1, 2, 15, 33, 63, 64, 65, 130)]
LENGTHS = (30, 7, 25, 32, 5, 12, 39, 18)


@functools.cache
def reference(ids: tuple[int, ...]) -> np.ndarray:
    return forward(TINY, ids)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("cards", [1, 3])
async def test_company_and_chunks_change_no_bit(tiny: Path, chunk: int, cards: int) -> None:
    """Prompts of all lengths, across page borders, joining while others decode."""
    seed = 100 * chunk + cards
    print("seed", seed)
    rng = random.Random(seed)
    checked = 0
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        model = await fleet.load(tiny, prompt_chunk=chunk)

        async def one(number: int) -> None:
            nonlocal checked
            await trio.sleep(rng.uniform(0, 0.02))
            prompt, count = PROMPTS[number], LENGTHS[number]
            params = SamplingParams(1.5 if number % 2 else 0.0, seed=number)
            generation = model.generate(
                prompt,
                max_tokens=count,
                temperature=params.temperature,
                seed=params.seed,
                ignore_eos=True,
                logits=True,
            )
            tokens, bits = await with_logits(generation)
            assert len(tokens) == count
            truth = reference((*prompt, *tokens))[len(prompt) - 1 : -1]
            assert np.array_equal(bits, truth.view(np.uint32)), number
            for i, token in enumerate(tokens):
                assert token == choose_from_logits(params, len(prompt) + i, truth[i]).id
            checked += 1

        async with trio.open_nursery() as nursery:
            for number in range(len(PROMPTS)):
                nursery.start_soon(one, number)
        await idle(model)
    assert checked == len(PROMPTS)


async def test_score_rows_are_the_logits_of_stepwise_generation(tiny: Path) -> None:
    ids = ids_of(70, seed=3)
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny, prompt_chunk=9)
        scored = await model.logits(ids)
        pieces = [(at, rows.shape) async for at, rows in model.score(ids)]
        assert scored.shape == (70, 320) and scored.dtype == np.float32
        assert [at for at, _ in pieces] == list(range(0, 70, 9))
        for i in (0, 1, 8, 9, 31, 62, 63, 64, 69):
            generation = model.generate(ids[: i + 1], max_tokens=1, ignore_eos=True, logits=True)
            _, rows = await with_logits(generation)
            assert np.array_equal(rows[0], scored[i].view(np.uint32))
        await idle(model)
    assert np.array_equal(scored.view(np.uint32), forward(TINY, ids).view(np.uint32))


async def test_a_whole_context_can_be_scored(tiny: Path) -> None:
    ids = ids_of(128)
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, ctx=128)
        assert (await model.logits(ids)).shape == (128, 320)
        with pytest.raises(ContextLengthError, match="129 tokens, but the context holds 128"):
            await model.logits([*ids, 1])


async def test_scores_wait_for_their_consumer(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, prompt_chunk=1)
        pieces = model.score(ids_of(100))
        await anext(pieces)
        await trio.sleep(0.05)
        assert model.stats.steps < 20
        assert len([p async for p in pieces]) == 99
        await idle(model)


async def test_two_models_share_the_cards(tiny: Path, tmp_path: Path) -> None:
    other = tiny_llama(format="q8_0", seed=5, layers=1)
    other.write(tmp_path / "other.gguf")
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        first = await fleet.load(tiny)
        alone = await tokens_of(first.generate([1, 2], max_tokens=50, ignore_eos=True))
        second = await fleet.load(tmp_path / "other.gguf", plan="tp2")
        results: dict[str, list[int]] = {}

        async def one(name: str, model: Model) -> None:
            generation = model.generate([1, 2], max_tokens=50, ignore_eos=True)
            results[name] = await tokens_of(generation)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "first", first)
            nursery.start_soon(one, "second", second)
        assert results["first"] == alone
        truth = forward(other, [1, 2, *results["second"]])
        assert results["second"] == truth[1:-1].argmax(axis=1).tolist()


async def test_a_second_model_gets_the_memory_that_the_first_has_left(tiny: Path) -> None:
    async with spanker.open_fleet("soft:2:1800KiB", plan="tp") as fleet:
        first = await fleet.load(tiny, kv_tokens=256)
        second = await fleet.load(tiny)
        assert 4 <= second.stats.kv_pages_total < 32
        for model in (first, second):
            assert await tokens_of(model.generate([1], max_tokens=3, ignore_eos=True))


# --- admission --------------------------------------------------------------------------


async def test_sequences_wait_for_pages_in_order(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        # Four pages: one whole context.
        model = await fleet.load(tiny, kv_tokens=256)
        order: list[str] = []

        async def one(name: str, generation: Generation) -> None:
            await generation.collect()
            order.append(name)

        first = model.generate([1], max_tokens=255, ignore_eos=True)
        second = model.generate([2], max_tokens=200, ignore_eos=True)
        # A page for it is free only after the second has started: nobody is overtaken.
        third = model.generate([3], max_tokens=10, ignore_eos=True)
        await anext(first)
        assert (model.stats.running, model.stats.waiting) == (1, 2)
        assert (model.stats.kv_pages_used, model.stats.kv_pages_total) == (4, 4)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, "third", third)
                nursery.start_soon(one, "second", second)
                nursery.start_soon(one, "first", first)
        assert order == ["first", "second", "third"]
        await idle(model)


async def test_a_waiting_sequence_can_be_closed(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, kv_tokens=256)
        first = model.generate([1], max_tokens=255, ignore_eos=True)
        second = model.generate([2], max_tokens=255, ignore_eos=True)
        third = model.generate([3], max_tokens=255, ignore_eos=True)
        await anext(first)
        second.close()
        assert (model.stats.running, model.stats.waiting) == (1, 1)
        first.close()
        assert len(await tokens_of(third)) == 255
        assert [t async for t in second] == []
        await idle(model)


async def test_pages_are_reserved_for_the_whole_length(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        for prompt, most, pages in ((1, 63, 1), (1, 64, 2), (64, 1, 2), (200, 9999, 4)):
            # No step ends while this is held.
            async with model._replicas.sessions[0].coordinator.between_steps():
                generation = model.generate(ids_of(prompt), max_tokens=most, ignore_eos=True)
                await until(lambda: model.stats.running == 1)
                assert model.stats.kv_pages_used == pages
            generation.close()
            await idle(model)


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "words"),
    [
        ([], {}, RequestError, "the prompt has no tokens"),
        ([320], {}, RequestError, "token id 320 is not in the vocabulary: expected 0 to 319"),
        ([-1], {}, RequestError, "token id -1"),
        ([1], {"max_tokens": 0}, RequestError, "max_tokens must be at least 1, got 0"),
        ([1], {"temperature": -1.0}, RequestError, "temperature must be 0 to 100"),
        ([1] * 64, {}, ContextLengthError, "the prompt has 64 tokens, but the context holds 64"),
        ([1] * 65, {}, ContextLengthError, "with at least one for the answer"),
    ],
)
async def test_impossible_requests_are_refused_at_once(
    tiny: Path, prompt: list[int], options: dict[str, float], kind: type, words: str
) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, ctx=64)
        with pytest.raises(kind, match=words):
            model.generate(prompt, **options)  # type: ignore[arg-type]
        assert (model.stats.running, model.stats.waiting) == (0, 0)


# --- endings ----------------------------------------------------------------------------


async def test_a_generation_ends_at_its_length_or_with_the_context(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, ctx=64)
        for prompt, most, count, reason in (
            (10, 7, 7, "length"),
            (10, 1, 1, "length"),
            (60, 4, 4, "length"),
            (60, 5, 4, "context"),
            (63, 99, 1, "context"),
        ):
            generation = model.generate(ids_of(prompt), max_tokens=most, ignore_eos=True)
            tokens = [t async for t in generation if t.id is not None]
            assert (len(tokens), generation.finish_reason) == (count, reason)
            assert [t.position for t in tokens] == list(range(prompt, prompt + count))
            assert generation.token_ids == [t.id for t in tokens]
            await idle(model)


async def test_a_generation_ends_at_an_end_token_without_it(tmp_path: Path) -> None:
    made = tiny_llama()
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(made.write(tmp_path / "plain.gguf"))
        tokens = await tokens_of(model.generate([9], max_tokens=30, ignore_eos=True))
    end = next(t for i, t in enumerate(tokens) if i >= 5 and t not in tokens[:i])
    made.metadata["tokenizer.ggml.eos_token_id"] = end
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(made.write(tmp_path / "ending.gguf"))
        generation = model.generate([9], max_tokens=30)
        assert await tokens_of(generation) == tokens[: tokens.index(end)]
        assert generation.finish_reason == "stop"
        generation = model.generate([9], max_tokens=30, ignore_eos=True)
        assert await tokens_of(generation) == tokens
        await idle(model)


async def test_a_stop_string_may_lie_across_tokens(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        generation = model.generate([9], max_tokens=60, ignore_eos=True)
        pieces = [t.text async for t in generation]
        text = "".join(pieces)
        # Four characters that begin inside of one piece and end inside of another.
        border = sum(map(len, pieces[:20]))
        stop = text[border - 2 : border + 2]
        at = text.index(stop)
        stopped = model.generate([9], max_tokens=60, stop=(stop,), ignore_eos=True)
        got = [t.text async for t in stopped]
        assert "".join(got) == stopped.text == text[:at]
        assert stopped.finish_reason == "stop"
        assert len(stopped.token_ids) < len(generation.token_ids)
        await idle(model)
        # One that never comes changes nothing, also if it begins at the very end.
        never = text[-2:] + "\0never"
        other = model.generate([9], max_tokens=60, stop=(never,), ignore_eos=True)
        assert await other.collect() == text
        assert other.finish_reason == "length"


async def test_cancelling_the_consumer_frees_the_pages_at_once(tiny: Path) -> None:
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        generation = model.generate([1], max_tokens=200, ignore_eos=True)
        with trio.CancelScope() as scope:
            async for _ in generation:
                if len(generation.token_ids) == 5:
                    scope.cancel()
        assert scope.cancelled_caught
        steps = model.stats.steps
        await idle(model)
        await trio.sleep(0.02)
        # At most those that were queued.
        assert model.stats.steps <= steps + 2
        assert [t async for t in generation] == []


async def test_dropping_a_generation_frees_its_pages(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        for count in (0, 3):
            generation = model.generate([1], max_tokens=200, ignore_eos=True)
            for _ in range(count):
                await anext(generation)
            del generation
            gc.collect()
            await idle(model)


async def test_leaving_the_block_of_a_generation_frees_its_pages(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        async with model.generate([1], max_tokens=200, ignore_eos=True) as generation:
            await anext(generation)
        await idle(model)


async def test_scoring_can_be_left_early(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, prompt_chunk=2)
        pieces = model.score(ids_of(200))
        await anext(pieces)
        await pieces.aclose()
        await idle(model)


async def test_a_hundred_random_ends_leave_nothing(tiny: Path) -> None:
    seed = 4
    print("seed", seed)
    rng = random.Random(seed)
    async with spanker.open_fleet(3, plan="tp") as fleet:
        model = await fleet.load(tiny, prompt_chunk=7, kv_tokens=PAGE * 12)
        used = [c.ddr_used_bytes for c in (await fleet.stats()).cards]

        async def one() -> None:
            await trio.sleep(rng.uniform(0, 0.1))
            prompt = ids_of(rng.randrange(1, 120), seed=rng.randrange(1000))
            how = rng.choice(("close", "drop", "cancel", "score", "end"))
            if how == "score":
                async with contextlib.aclosing(model.score(prompt)) as pieces:
                    async for _ in pieces:
                        if rng.random() < 0.2:
                            break
                return
            most = rng.randrange(1, 30)
            generation = model.generate(prompt, max_tokens=most, ignore_eos=True)
            if how == "end":
                assert len(await tokens_of(generation)) == most
                return
            with trio.move_on_after(rng.uniform(0, 0.02)):
                await generation.collect()
                return
            if how == "close":
                generation.close()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(one)
        gc.collect()
        await idle(model)
        assert model._replicas.sessions[0].pool.free == model.stats.kv_pages_total == 12
        assert sorted(model._replicas.sessions[0].pool.take(12)) == list(range(12))
        model._replicas.sessions[0].pool.give(list(range(12)))
        assert [c.ddr_used_bytes for c in (await fleet.stats()).cards] == used
        # And the model still answers as ever.
        tokens = await tokens_of(model.generate([1, 2], max_tokens=5, ignore_eos=True))
        assert tokens == forward(TINY, [1, 2, *tokens])[1:-1].argmax(axis=1).tolist()


# --- running ahead ----------------------------------------------------------------------


async def test_a_sequence_pauses_when_its_consumer_is_far_behind(tiny: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        generation = model.generate([1], max_tokens=200, ignore_eos=True)
        await until(lambda: model.stats.generated_tokens == RUN_AHEAD_MAX)
        await trio.sleep(0.03)
        assert model.stats.generated_tokens == RUN_AHEAD_MAX
        # Others go on meanwhile.
        assert len(await tokens_of(model.generate([2], max_tokens=100, ignore_eos=True))) == 100
        assert model.stats.generated_tokens == RUN_AHEAD_MAX + 100
        await anext(generation)
        await until(lambda: model.stats.generated_tokens == RUN_AHEAD_MAX + 101)
        assert len(await tokens_of(generation)) == 199
        await idle(model)


# --- faults -----------------------------------------------------------------------------


def poisoned() -> TinyModel:
    """Every sequence with token 7 in it meets an infinity; the output does not."""
    made = tiny_llama(tied=False, format="f32")
    values = np.frombuffer(made.tensors["token_embd.weight"].data, np.float32).reshape(320, 64)
    values = values.copy()
    values[7, 3] = np.inf
    made.tensors["token_embd.weight"] = tensor("token_embd.weight", values, "f32")
    return made


@pytest.mark.parametrize("plan", ["tp3", "pp2", "tp2xpp2"])
async def test_a_fault_ends_the_sequences_of_its_step_and_no_others(
    tmp_path: Path, plan: str
) -> None:
    made = poisoned()
    cards = {"tp3": 3, "pp2": 2, "tp2xpp2": 4}[plan]
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        model = await fleet.load(made.write(tmp_path / "bad.gguf"), plan=plan)
        for _ in range(3):
            good = model.generate([1, 2], max_tokens=5, ignore_eos=True)
            expected = await tokens_of(good)
            assert expected == forward(made, [1, 2, *expected])[1:-1].argmax(axis=1).tolist()
            with pytest.raises(CardFaultError, match="a NaN or an infinity"):
                await model.generate([1, 7], max_tokens=5).collect()
            with pytest.raises(CardFaultError, match="a NaN or an infinity"):
                await model.logits([7])
            await idle(model)


async def test_tokens_made_before_a_fault_are_still_delivered(tmp_path: Path) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(poisoned().write(tmp_path / "bad.gguf"))
        good = model.generate([1, 2], max_tokens=200, ignore_eos=True)
        await until(lambda: model.stats.generated_tokens >= 3)
        with pytest.raises(CardFaultError):
            await model.logits([7])
        tokens: list[int | None] = []
        with pytest.raises(CardFaultError):
            async for token in good:
                tokens.append(token.id)
        assert len(tokens) >= 3
        await idle(model)
