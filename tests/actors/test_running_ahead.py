# SPDX-License-Identifier: Apache-2.0
"""Two steps on the cards at once: nobody's tokens, endings or pages depend on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import trio
from reference_model import forward
from waiting import until

import spanker
from spanker.actors import session as sessions
from spanker.actors.session import Sampled
from spanker.actors.steps import StepPipe
from spanker.errors import CardFaultError
from spanker.fleet import Fleet, Generation, Model
from spanker.ggml.detokenizer import StopMatcher
from spanker.ggml.sampling import SamplingParams
from spanker.testing.models import TinyModel, tensor, tiny_llama

TINY = tiny_llama()
PAGE = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_llama(format="q8_0", seed=5, layers=1)
    return made.write(tmp_path_factory.mktemp("models") / "other.gguf")


@attrs.frozen
class Flown:
    """A step as it was submitted: steps in flight with it, and what it does."""

    in_flight: int
    sequences: tuple[object, ...]
    wanted: bool
    earlier: int


@pytest.fixture
def flown(monkeypatch: pytest.MonkeyPatch) -> list[Flown]:
    """Every step that is submitted, in order."""
    submit, seen = StepPipe.submit, []
    of_pipe: dict[int, int] = {}

    async def noted(pipe: StepPipe, sequences: Sequence, **options: bool) -> None:
        wanted = pipe._coordinator.wanted(pipe._loaded.plan.cards)
        await submit(pipe, sequences, **options)  # type: ignore[arg-type]
        earlier = of_pipe.setdefault(id(pipe), 0)
        of_pipe[id(pipe)] += 1
        pipes.append(pipe)
        seen.append(Flown(pipe.in_flight, tuple(sequences), wanted, earlier))

    pipes: list[StepPipe] = []  # alive, so that no two have the same id
    monkeypatch.setattr(StepPipe, "submit", noted)
    return seen


def ids_of(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, count)]


async def tokens_of(generation: Generation) -> list[int]:
    return [t.id async for t in generation if t.id is not None]


async def idle(model: Model) -> None:
    await until(lambda: not model.stats.running and not model.stats.waiting)
    await until(lambda: not model.stats.kv_pages_used)
    pool = model._replicas.sessions[0].pool
    taken = pool.take(pool.total)
    assert sorted(taken) == list(range(pool.total))
    pool.give(taken)


# --- what is in flight ------------------------------------------------------------------


async def test_greedy_steps_are_queued_ahead_and_none_too_many(
    tiny: Path, flown: list[Flown]
) -> None:
    async with spanker.open_fleet(2, plan="tp") as fleet:
        model = await fleet.load(tiny)
        await tokens_of(model.generate([1, 2, 3], max_tokens=20, ignore_eos=True))
        # Each step but the first is queued behind another; the last token needs none after it.
        assert [f.in_flight for f in flown] == [1, *[2] * 19]
        assert model.stats.steps == 20
        flown.clear()
        await tokens_of(model.generate([1, 2, 3], max_tokens=1, ignore_eos=True))
        assert [f.in_flight for f in flown] == [1]
        await idle(model)


async def test_a_sampled_token_is_waited_for(tiny: Path, flown: list[Flown]) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny, prompt_chunk=4)
        generation = model.generate(ids_of(10), max_tokens=10, temperature=1.0, ignore_eos=True)
        await tokens_of(generation)
        # The prompt's three pieces go ahead of each other, the tokens do not.
        assert [f.in_flight for f in flown] == [1, 2, 2, *[1] * 9]


async def test_company_that_samples_makes_everyone_wait(tiny: Path, flown: list[Flown]) -> None:
    async with spanker.open_fleet(1) as fleet:
        model = await fleet.load(tiny)
        async with trio.open_nursery() as nursery:
            for temperature in (0.0, 1.0):
                generation = model.generate(
                    [1, 2], max_tokens=30, temperature=temperature, ignore_eos=True
                )
                nursery.start_soon(tokens_of, generation)
        together = [f for f in flown if len(f.sequences) == 2]
        assert len(together) >= 29 and {f.in_flight for f in together} == {1}


# --- the same answers -------------------------------------------------------------------


@attrs.frozen
class Request:
    """One of many at the same time: what is asked, when it starts, how many tokens are taken."""

    model: int
    prompt: tuple[int, ...]
    most: int
    params: SamplingParams
    stop_ids: frozenset[int]
    stops: tuple[str, ...]
    logits: bool
    score: bool
    delay_s: float
    taken: int | None
    drops: bool

    @classmethod
    def random(cls, rng: random.Random, models: int) -> Request:
        how = rng.random()
        params = SamplingParams()
        if how < 0.3:
            params = SamplingParams(rng.choice((0.7, 1.5, 20.0)), 0, 0.97, 0.0, rng.randrange(9))
        return cls(
            model=rng.randrange(models),
            prompt=tuple(rng.randrange(256) for _ in range(rng.choice((1, 2, 9, 33, 63, 100)))),
            most=rng.choice((1, 2, 3, 10, 40, 128)),
            params=params,
            stop_ids=frozenset(rng.sample(range(320), rng.choice((0, 0, 10, 60)))),
            stops=tuple(rng.choice("etaoin shrdlu") for _ in range(rng.choice((0, 0, 0, 1, 2)))),
            logits=rng.random() < 0.15,
            score=rng.random() < 0.1,
            delay_s=rng.choice((0.0, rng.uniform(0, 0.03))),
            taken=rng.choice((None, None, rng.randrange(12))),
            drops=rng.random() < 0.5,
        )

    async def run(self, model: Model) -> tuple[object, ...]:
        """What came: of a request left early, as many tokens as were taken."""
        await trio.sleep(self.delay_s)
        if self.score:
            # How the rows are cut into pieces is a matter of company.
            rows: list[bytes] = []
            async with contextlib.aclosing(model.score(self.prompt)) as pieces:
                async for at, piece in pieces:
                    assert at == len(rows)
                    rows.extend(row.tobytes() for row in piece)
                    if self.taken is not None and len(rows) >= self.taken:
                        break
            return (tuple(rows[: self.taken]),)
        sequence = model._replicas.add(
            self.prompt,
            self.most,
            self.params,
            stop_ids=self.stop_ids,
            want_logits=self.logits,
        )
        generation = Generation(sequence, model.tokenizer, StopMatcher(self.stops))
        got: list[object] = []
        async for token in generation:
            logits = None if token.logits is None else token.logits.tobytes()
            got.append((token.id, token.text, token.logprob, token.position, logits))
            if len(got) == self.taken:
                if not self.drops:
                    generation.close()
                return (tuple(got), "left")
        return (tuple(got), generation.finish_reason)


async def answers(
    fleet: Fleet, models: Sequence[Model], requests: Sequence[Request]
) -> list[tuple[object, ...]]:
    results: list[tuple[object, ...]] = [()] * len(requests)

    async def one(number: int) -> None:
        results[number] = await requests[number].run(models[requests[number].model])

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(len(requests)):
                nursery.start_soon(one, number)
    for model in models:
        await idle(model)
    return results


@contextlib.asynccontextmanager
async def opened(cards: int, *paths: Path, **options: object) -> AsyncIterator[tuple[Fleet, list]]:
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        yield fleet, [await fleet.load(path, **options) for path in paths]  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
async def test_any_schedule_gives_the_answers_of_one_step_at_a_time(
    seed: int, tiny: Path, other: Path, monkeypatch: pytest.MonkeyPatch, flown: list[Flown]
) -> None:
    """Greedy and sampled, stopped by ids, texts, lengths, a full context or their callers, on one
    or two models, with more requests than there are pages for."""
    print("seed", seed)
    rng = random.Random(seed)
    cards = rng.choice((1, 2, 3))
    paths = (tiny, other)[: 1 + seed % 2]
    limits = {
        "ctx": 128,
        "prompt_chunk": rng.choice((1, 7, 64)),
        "kv_tokens": rng.choice((128, 400, 4096)),
    }
    requests = [Request.random(rng, len(paths)) for _ in range(30)]
    async with opened(cards, *paths, **limits) as (fleet, models):
        ahead = await answers(fleet, models, requests)
        # Two models that both want the cards take turns, with one step each.
        assert max(f.in_flight for f in flown) == 2 or len(models) == 2
        flown.clear()
        monkeypatch.setattr(sessions, "STEPS_AHEAD", 1)
        single = await answers(fleet, models, requests)
        assert max(f.in_flight for f in flown) == 1
    for request, a, b in zip(requests, ahead, single, strict=True):
        assert a == b, request


async def test_greedy_tokens_are_those_of_the_reference(tiny: Path) -> None:
    """Up to a full context, in company that comes and goes."""
    async with opened(3, tiny, ctx=64, prompt_chunk=5) as (_, [model]):
        results: dict[int, list[int]] = {}

        async def one(prompt: int, most: int) -> None:
            generation = model.generate(ids_of(prompt), max_tokens=most, ignore_eos=True)
            results[prompt] = await tokens_of(generation)

        async with trio.open_nursery() as nursery:
            for prompt, most in ((1, 999), (12, 20), (40, 999), (63, 999)):
                nursery.start_soon(one, prompt, most)
        assert {p: len(tokens) for p, tokens in results.items()} == {1: 63, 12: 20, 40: 24, 63: 1}
        for prompt, tokens in results.items():
            truth = forward(TINY, ids_of(prompt) + tokens)[prompt - 1 : -1]
            assert tokens == truth.argmax(axis=1).tolist()
        await idle(model)


@pytest.mark.parametrize("at", range(6))
async def test_a_stop_token_in_the_middle_ends_it_there(tiny: Path, at: int) -> None:
    """The step behind has begun with the stop token already; nothing of it is told."""
    async with opened(2, tiny) as (_, [model]):
        plain = await tokens_of(model.generate([9], max_tokens=30, ignore_eos=True))
        stop = plain[at]
        expected = plain[: plain.index(stop)]
        sequence = model._replicas.add([9], 30, SamplingParams(), stop_ids=frozenset([stop]))
        got: list[int] = []
        while (item := await sequence.next()) is not None:
            assert isinstance(item, Sampled)
            got.append(item.id)
        assert (got, sequence.finish, sequence.tokens) == (expected, "stop", [9, *expected])
        model._replicas.sessions[0].release(sequence)
        await idle(model)


@pytest.mark.parametrize("turns", range(0, 60, 7))
async def test_a_cancellation_at_any_moment_leaves_nothing(tiny: Path, turns: int) -> None:
    async with opened(2, tiny) as (_, [model]):
        expected = await tokens_of(model.generate([4, 2], max_tokens=40, ignore_eos=True))
        for _ in range(5):
            generation = model.generate([1, 2], max_tokens=40, ignore_eos=True)
            kept = model.generate([4, 2], max_tokens=40, ignore_eos=True)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(tokens_of, generation)
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            assert await tokens_of(kept) == expected
            await idle(model)


# --- faults -----------------------------------------------------------------------------


def poisoned(word: int) -> TinyModel:
    """Every sequence that has embedded the word meets an infinity; the output does not."""
    made = tiny_llama(tied=False, format="f32")
    values = np.frombuffer(made.tensors["token_embd.weight"].data, np.float32).reshape(320, 64)
    values = values.copy()
    values[word, 3] = np.inf
    made.tensors["token_embd.weight"] = tensor("token_embd.weight", values, "f32")
    return made


@pytest.mark.parametrize("plan", ["tp1", "tp3", "pp2"])
async def test_a_fault_in_the_first_of_two_steps_ends_only_the_sequences_of_that_step(
    tmp_path: Path, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = poisoned(7)
    cards = {"tp1": 1, "tp3": 3, "pp2": 2}[plan]
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        model = await fleet.load(made.write(tmp_path / "m.gguf"), plan=plan, prompt_chunk=4)
        submit = StepPipe.submit
        late: list[Generation] = []
        steps: list[tuple[int, int]] = []

        async def joined(pipe: StepPipe, sequences: Sequence, **options: bool) -> None:
            await submit(pipe, sequences, **options)  # type: ignore[arg-type]
            steps.append((pipe.in_flight, len(sequences)))
            if not late:
                late.append(model.generate([1, 2], max_tokens=9, ignore_eos=True))

        monkeypatch.setattr(StepPipe, "submit", joined)
        # Its bad word is in the first piece; the second goes with the other's prompt.
        with trio.fail_after(20):
            with pytest.raises(CardFaultError, match="a NaN or an infinity"):
                await model.generate([1, 7, 3, 4, 5, 6], max_tokens=9, ignore_eos=True).collect()
            tokens = await tokens_of(late[0])
        assert steps[:3] == [(1, 1), (2, 2), (1, 1)]
        assert tokens == forward(made, [1, 2, *tokens])[1:-1].argmax(axis=1).tolist()
        await idle(model)


@pytest.mark.parametrize("cards", [1, 3])
async def test_what_a_step_does_for_those_that_have_ended_harms_nobody(
    tmp_path: Path, cards: int
) -> None:
    """A sequence stops at a word that no card can embed; the next step has begun with it."""
    made = poisoned(0)
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        model = await fleet.load(made.write(tmp_path / "plain.gguf"))
        stopping = await tokens_of(model.generate([9], max_tokens=12, ignore_eos=True))
        living = await tokens_of(model.generate([5], max_tokens=60, ignore_eos=True))
    word = next(t for t in reversed(stopping) if t not in living and t not in (0, 5, 9))
    bad = poisoned(word)
    async with spanker.open_fleet(cards, plan="tp") as fleet:
        model = await fleet.load(bad.write(tmp_path / "bad.gguf"))
        epoch = model._replicas.sessions[0].coordinator._epoch
        for company in (False, True):
            got: list[int] = []

            async def live(generation: Generation, got: list[int] = got) -> None:
                got.extend(await tokens_of(generation))

            async with trio.open_nursery() as nursery:
                if company:
                    nursery.start_soon(live, model.generate([5], max_tokens=60, ignore_eos=True))
                sequence = model._replicas.add([9], 30, SamplingParams(), stop_ids={word})
                while await sequence.next() is not None:
                    pass
                assert sequence.finish == "stop"
                assert sequence.tokens == [9, *stopping[: stopping.index(word)]]
                model._replicas.sessions[0].release(sequence)
            assert got == (living if company else [])
            await idle(model)
        assert model._replicas.sessions[0].coordinator._epoch > epoch
        # Who embeds it for good gets the fault as ever.
        with pytest.raises(CardFaultError):
            await model.generate([word], max_tokens=2).collect()
        await idle(model)


# --- taking turns -----------------------------------------------------------------------


async def test_two_models_take_turns_step_by_step(
    tiny: Path, other: Path, flown: list[Flown]
) -> None:
    async with opened(2, tiny, other) as (_, models):
        order: list[int] = []

        async def one(number: int) -> None:
            async for _ in models[number].generate([1, 2], max_tokens=50, ignore_eos=True):
                order.append(number)

        async with trio.open_nursery() as nursery:
            for number in (0, 1):
                nursery.start_soon(one, number)
        # Nobody is ever far behind.
        for end in range(len(order)):
            assert abs(order[:end].count(0) - order[:end].count(1)) <= 4
        # Whoever was waited for has submitted nothing more.
        assert not [f for f in flown if f.wanted and f.earlier]
        for model in models:
            await idle(model)


async def test_a_model_is_loaded_while_another_generates(
    tiny: Path, other: Path, flown: list[Flown]
) -> None:
    async with opened(2, tiny) as (fleet, [model]):
        expected = await tokens_of(model.generate([1, 2], max_tokens=250, ignore_eos=True))
        flown.clear()
        generation = model.generate([1, 2], max_tokens=250, ignore_eos=True)
        await anext(generation)
        async with trio.open_nursery() as nursery:
            got: list[int] = []

            async def go_on() -> None:
                got.extend(await tokens_of(generation))

            nursery.start_soon(go_on)
            second = await fleet.load(other)
        assert got == expected[1:]
        assert not [f for f in flown if f.wanted and f.earlier]
        assert await tokens_of(second.generate([1], max_tokens=3, ignore_eos=True))
