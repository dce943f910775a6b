# SPDX-License-Identifier: Apache-2.0
"""What clients must get: the answers of one card to which nothing happens, computed once each.

By "one answer" they depend on nothing else: not on cards, plan, chunks, knobs, or company.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

import spanker
from spanker.actors.virtual_time import run_virtual
from spanker.testing.misfortune.models import CONTEXT, path_of
from spanker.testing.misfortune.profiles import INSTANT
from spanker.testing.misfortune.scenario import Client, Scenario, What

# The most that a client may ask for.
TOKENS_MAX = 24


@attrs.frozen
class Question:
    """What an answer depends on."""

    model: str
    prompt: tuple[int, ...]
    temperature: float
    top_p: float
    sampling_seed: int
    score: bool


@attrs.frozen(eq=False, repr=False)
class Answer:
    """The ids of as many tokens as anybody asks for, and the logits behind each, and what each adds
    to the text; of a prompt that is scored, no ids, and the logits of each of its tokens."""

    ids: tuple[int, ...]
    logits: tuple[bytes, ...]
    texts: tuple[str, ...] = ()


_known: dict[Question, Answer] = {}


def prompt_of(client: Client) -> list[int]:
    """The token ids of a client's prompt."""
    first = client.prompt_first
    return [(first + 11 * i + i * i // 3) % 256 for i in range(client.prompt_length)]


def question_of(scenario: Scenario, client: Client) -> Question:
    """What a client asks."""
    model = second_model(scenario) if number_of_model(scenario, client) else scenario.model
    prompt = tuple(prompt_of(client))
    if client.score:
        return Question(model, prompt, 0.0, 1.0, 0, True)
    greedy = client.temperature == 0
    return Question(
        model,
        prompt,
        client.temperature,
        1.0 if greedy else client.top_p,
        0 if greedy else client.sampling_seed,
        False,
    )


def stop_of(scenario: Scenario, client: Client) -> str:
    """The stop string of a client, or nothing."""
    if client.stop_at is None or client.score:
        return ""
    return answer_to(question_of(scenario, client)).texts[client.stop_at]


def stopped_after(scenario: Scenario, client: Client) -> int | None:
    """The tokens that end with the stop string of a client, None where it does not come."""
    stop, text = stop_of(scenario, client), ""
    if not stop:
        return None
    for count, piece in enumerate(answer_to(question_of(scenario, client)).texts, 1):
        text += piece
        if stop in text:
            return count
    return None


def number_of_model(scenario: Scenario, client: Client) -> int:
    """The model that a client asks, the first one where nobody loads a second."""
    return client.model if any(deed.what is What.LOAD for deed in scenario.deeds) else 0


def second_model(scenario: Scenario) -> str:
    """The model that is loaded beside that of a scenario."""
    return "float" if scenario.model == "small" else "small"


def answer_to(question: Question) -> Answer:
    """The answer; `find` must have found it."""
    return _known[question]


def find(questions: Iterable[Question]) -> None:
    """Compute the answers that are not known yet; not within a run of trio."""
    missing: dict[str, list[Question]] = {}
    for question in dict.fromkeys(questions):
        if question not in _known:
            missing.setdefault(question.model, []).append(question)
    for model, asked in missing.items():
        run_virtual(_ask, model, asked)


async def _ask(name: str, questions: list[Question]) -> None:
    async with spanker.open_fleet("virtual:1", profile=INSTANT) as fleet:
        model = await fleet.load(path_of(name), ctx=CONTEXT)
        for question in questions:
            if question.score:
                rows = await model.logits(question.prompt)
                _known[question] = Answer((), tuple(row.tobytes() for row in rows))
                continue
            generation = model.generate(
                question.prompt,
                max_tokens=TOKENS_MAX,
                temperature=question.temperature,
                top_p=question.top_p,
                seed=question.sampling_seed,
                ignore_eos=True,
                logits=True,
            )
            tokens = [token async for token in generation]
            logits = [t.logits.tobytes() for t in tokens if t.logits is not None]
            texts = tuple(t.text for t in tokens if t.id is not None)
            _known[question] = Answer(tuple(generation.token_ids), tuple(logits), texts)
