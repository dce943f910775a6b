# SPDX-License-Identifier: Apache-2.0
"""A model that tells of each token that is taken from it, and keeps what it gave."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from spanker.actors.steps import F32
    from spanker.fleet import Generation, Model, Token


class WatchedModel:
    """Stands in for a model.  `answers` has what each generation and scoring gave, in the order in
    which they were started: token ids and the bytes of their logits, as far as they were taken."""

    def __init__(self, model: Model, token: Callable[[], None] = lambda: None) -> None:
        self._model = model
        self._token = token
        self.answers: list[list[tuple[int | None, bytes]]] = []

    @property
    def face(self) -> Model:
        """This, as the type that it stands in for."""
        return cast("Model", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Any:
        """As Model.generate."""
        return self._watched(self._model.generate(prompt, **options))

    def chat(self, messages: Any, **options: Any) -> Any:
        """As Model.chat."""
        return self._watched(self._model.chat(messages, **options))

    async def score(self, ids: Sequence[int]) -> AsyncGenerator[tuple[int, F32], None]:
        """As Model.score; its rows are no tokens."""
        answer = self._answer()
        async for position, logits in self._model.score(ids):
            answer.append((None, logits.tobytes()))
            yield position, logits

    def _watched(self, generation: Generation) -> WatchedGeneration:
        return WatchedGeneration(generation, self._answer(), self._token)

    def _answer(self) -> list[tuple[int | None, bytes]]:
        self.answers.append([])
        return self.answers[-1]


class WatchedGeneration:
    """Stands in for a generation."""

    def __init__(
        self,
        generation: Generation,
        answer: list[tuple[int | None, bytes]],
        token: Callable[[], None],
    ) -> None:
        self._generation = generation
        self._answer = answer
        self._told = token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def __aiter__(self) -> WatchedGeneration:
        return self

    async def __anext__(self) -> Token:
        token = await self._generation.__anext__()
        if token.id is not None:
            logits = b"" if token.logits is None else token.logits.tobytes()
            self._answer.append((token.id, logits))
            self._told()
        return token

    async def collect(self) -> str:
        """As Generation.collect."""
        async for _ in self:
            pass
        return self._generation.text

    async def __aenter__(self) -> WatchedGeneration:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._generation.close()
