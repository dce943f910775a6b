# SPDX-License-Identifier: Apache-2.0
"""The public face for asyncio programs: the same fleet, model and generation.

    async with spanker.aio.open_fleet("soft:3") as fleet:
        model = await fleet.load("smollm2")
        async for token in model.generate("The capital of France is", max_tokens=32):
            print(token.text, end="")

The fleet runs under trio in a thread of its own, one per fleet, which has ended when the block is
left.  Cancelling an asyncio task cancels what it waits for in that thread and waits until that is
over; exceptions arrive as they were raised there.  Any number of tasks may call at the same time.
Why a thread, and not trio's guest mode: docs/adr/0003-asyncio-portal.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from spanker import card_arrays
from spanker import fleet as trio_api
from spanker.actors.coordinator import Progress
from spanker.actors.message import CardInfo
from spanker.actors.session import SessionStats
from spanker.actors.steps import F32
from spanker.actors.trace import Trace
from spanker.actors.tracer import Tracer
from spanker.aio_collectives import (
    CardArrays,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    reduce_scatter,
)
from spanker.device.soft import SoftCard
from spanker.device.spec import CardSpec
from spanker.errors import ConfigError, RequestError, SpankerError
from spanker.events import EventLog
from spanker.fleet import DEFAULT_MAX_TOKENS, FleetStats, Health, Token
from spanker.ggml.tokenizer import Tokenizer
from spanker.sched.bandwidth import Profile
from spanker.sched.decision import Decision
from spanker.sched.limits import DEFAULT_PROMPT_CHUNK
from spanker.sched.plan import FleetPlan, Plan
from spanker.sched.topology import Topology

if TYPE_CHECKING:
    from spanker.device.kernel.card import KernelCard
    from spanker.device.remote import RemoteCard

T = TypeVar("T")

# How soon the thread notices that its event loop was closed, or that the loop's thread has ended,
# with the block never left: neither can be waited for.
_ORPHAN_S = 0.25
# Where nothing can be awaited any more; closing a fleet is bounded, and its bounds add up to less.
_JOIN_S = 10.0


# --- the thread ------------------------------------------------------------------------


class _Outcome(Generic[T]):
    """What the trio thread gives to one asyncio task: a value or an error, once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._arrived = False
        self._given = False
        self._value: T | None = None
        self._error: BaseException | None = None

    def give(self, value: T | None, error: BaseException | None = None) -> None:
        """Called in the trio thread; only the first time counts."""
        if self._given:
            return
        self._given = True
        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrive, value, error)

    def _arrive(self, value: T | None, error: BaseException | None) -> None:
        self._value, self._error, self._arrived = value, error, True
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, cancel: Callable[[], object]) -> T:
        """The value, or raise the error.  When the asyncio task is cancelled: `cancel()`, and wait
        all the same, so that nothing goes on behind the caller's back."""
        try:
            await self._future
        except asyncio.CancelledError:
            cancel()
            while not self._arrived:
                self._future = self._loop.create_future()
                # Cancelled once more, there is still nothing to do but to wait.
                with contextlib.suppress(asyncio.CancelledError):
                    await self._future
            raise
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame: a cycle
        return self._value  # type: ignore[return-value]


class _Portal:
    """A trio thread that holds one fleet open, and calls into it."""

    def __init__(
        self, opening: Callable[[], contextlib.AbstractAsyncContextManager[trio_api.Fleet]]
    ) -> None:
        self._opening = opening
        self._opened: _Outcome[trio_api.Fleet] = _Outcome()
        self._ended: _Outcome[None] = _Outcome()
        self._loop = asyncio.get_running_loop()
        self._owner = threading.current_thread()
        self._nursery: trio.Nursery | None = None
        self._calls: set[_Outcome[Any]] = set()
        self._over = False
        self.failure: BaseException | None = None
        # Under the lock, since `stop` may come before the thread has got anywhere.
        self._lock = threading.Lock()
        self._stopped = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._run, name="spanker fleet", daemon=False)
        self._thread.start()

    # --- in the event loop ---

    async def opened(self) -> trio_api.Fleet:
        """Wait until the fleet is open; raises why it does not open."""
        return await self._opened.wait(self.stop)

    def stop(self) -> None:
        """Make the fleet close; never blocks, idempotent."""
        with self._lock:
            self._stopped = True
            if self._token is None:
                return
        self.post(self._scope.cancel)

    async def aclose(self) -> None:
        """Stop, and wait for the end of the thread, even when cancelled."""
        self.stop()
        try:
            await self._ended.wait(self.stop)
        finally:
            self.join()

    def join(self) -> None:
        """Wait for the end of the thread, blocking the event loop: not at all after `aclose`."""
        self._thread.join(_JOIN_S)

    async def call(
        self, function: Callable[..., Awaitable[T]], *args: object, to_the_end: bool = False
    ) -> T:
        """Run an async function in the trio thread; RequestError once the fleet is closed.  With
        `to_the_end` only that cancels it, and whoever calls waits for its end all the same."""
        outcome: _Outcome[T] = _Outcome()
        scope = trio.CancelScope()
        self._calls.add(outcome)
        try:
            if self._over or not self.post(self._begin, outcome, scope, function, args):
                raise self._closed()
            return await outcome.wait(lambda: to_the_end or self.post(scope.cancel))
        finally:
            self._calls.discard(outcome)

    async def obtain(
        self,
        give_back: Callable[[T], Awaitable[object]],
        function: Callable[..., Awaitable[T]],
        *args: object,
    ) -> T:
        """As `call`, for what somebody must give back: cancelled when it has just been made, which
        is when nobody will ever have it, it is given back first, however often it is cancelled."""
        made: list[T] = []

        async def make() -> None:
            made.append(await function(*args))

        try:
            await self.call(make)
        except asyncio.CancelledError:
            for value in made:
                # What cannot be given back is with a card that is lost, or a fleet that is closed.
                with contextlib.suppress(SpankerError):
                    await self.call(give_back, value, to_the_end=True)
            raise
        return made.pop()

    def post(self, function: Callable[..., object], *args: object) -> bool:
        """Have the trio thread call a function that never raises, in order of posting; from any
        thread.  False when that thread has ended."""
        assert self._token is not None
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def _closed(self) -> RequestError:
        error = RequestError(
            "the fleet is closed: call its models only inside of the `async with` block that "
            "opened it"
        )
        error.__cause__ = self.failure
        return error

    # --- in the trio thread ---

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self.failure = error
        self._over = True
        self._opened.give(None, self.failure or self._closed())
        for outcome in tuple(self._calls):
            outcome.give(None, self._closed())
        self._ended.give(None)

    async def _main(self) -> None:
        with self._lock:
            self._token = trio.lowlevel.current_trio_token()
            if self._stopped:
                self._scope.cancel()
        with self._scope:
            async with self._opening() as fleet, trio.open_nursery() as self._nursery:
                self._opened.give(fleet)
                try:
                    await self._orphaned()
                finally:
                    # Calls may come while the fleet closes, and a nursery takes no new task once
                    # its last has ended: not before this one.
                    self._nursery = None
                self._scope.cancel()

    async def _orphaned(self) -> None:
        # Neither of the two sets an event.
        while self._owner.is_alive() and not self._loop.is_closed():  # noqa: ASYNC110
            await trio.sleep(_ORPHAN_S)

    def _begin(
        self,
        outcome: _Outcome[T],
        scope: trio.CancelScope,
        function: Callable[..., Awaitable[T]],
        args: tuple[object, ...],
    ) -> None:
        if self._nursery is None:
            outcome.give(None, self._closed())
        else:
            self._nursery.start_soon(self._serve, outcome, scope, function, args)

    async def _serve(
        self,
        outcome: _Outcome[T],
        scope: trio.CancelScope,
        function: Callable[..., Awaitable[T]],
        args: tuple[object, ...],
    ) -> None:
        value: T | None = None
        # What remains when the fleet's closing cancels the call.
        error: Exception | None = self._closed()
        try:
            with scope:
                try:
                    value = await function(*args)
                    error = None
                except Exception as raised:
                    error = raised
        finally:
            outcome.give(value, error)
            del value, error


# --- the face --------------------------------------------------------------------------


class _Remote:
    """The trio side of a generation; its methods run in the trio thread, in order."""

    def __init__(self, make: Callable[[], trio_api.Generation]) -> None:
        self._make = make
        self._error: Exception | None = None
        self.generation: trio_api.Generation | None = None

    def start(self) -> None:
        try:
            self.generation = self._make()
        except Exception as error:
            self._error = error

    def started(self) -> trio_api.Generation:
        error, self._error = self._error, None
        if error is not None:
            raise error
        assert self.generation is not None
        return self.generation

    async def next(self) -> Token | None:
        return await anext(self.started(), None)

    async def collect(self) -> str:
        return await self.started().collect()

    def close(self) -> None:
        if self.generation is not None:
            self.generation.close()


class Generation:
    """Tokens of one sequence, as they come: an async iterator.

    Ends by itself; `close()` or dropping it ends it early and frees its KV pages, and so does
    cancellation of whoever iterates.  Iterate from one task.  What is wrong with the request is
    raised by the first iteration.
    """

    def __init__(self, portal: _Portal, prompt: Sequence[int], remote: _Remote) -> None:
        self._over = True
        self._portal = portal
        self._remote = remote
        self.prompt_ids: tuple[int, ...] = tuple(prompt)
        if not portal.post(remote.start):
            raise portal._closed()
        self._over = False

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens so far."""
        generation = self._remote.generation
        return [] if generation is None else list(generation.token_ids)

    @property
    def text(self) -> str:
        """The text so far."""
        generation = self._remote.generation
        return "" if generation is None else generation.text

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `context`; None while under way or when closed early."""
        generation = self._remote.generation
        return None if generation is None else generation.finish_reason

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        """The next token.  Raises the failure of the sequence's step or card."""
        if self._over:
            await asyncio.sleep(0)
            raise StopAsyncIteration
        token = await self._call(self._remote.next)
        if token is None:
            self._over = True
            raise StopAsyncIteration
        return token

    async def collect(self) -> str:
        """Run to the end; the whole text."""
        if not self._over:
            await self._call(self._remote.collect)
            self._over = True
        return self.text

    async def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._portal.call(function)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the generation; never blocks, idempotent."""
        if not self._over:
            self._over = True
            self._portal.post(self._remote.close)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Model:
    """A model on the cards of a fleet.  Made by `Fleet.load`; lives as long as its fleet, or until
    it is unloaded."""

    def __init__(self, portal: _Portal, model: trio_api.Model) -> None:
        self._portal = portal
        self._model = model

    @property
    def path(self) -> str:
        return self._model.path

    @property
    def name(self) -> str:
        """The name in the file's metadata, else the file's name."""
        return self._model.name

    @property
    def plan(self) -> FleetPlan:
        return self._model.plan

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What `--plan auto` went by."""
        return self._model.decisions

    @property
    def context(self) -> int:
        """Positions that one sequence can have."""
        return self._model.context

    @property
    def vocabulary(self) -> int:
        return self._model.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads over all cards."""
        return self._model.weight_bytes

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    @property
    def stats(self) -> SessionStats:
        return self._model.stats

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` recognises control tokens such as <|im_start|> in it.

        Use special=False for text from strangers.
        """
        return self._model.tokenize(text, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens add nothing."""
        return self._model.detokenize(ids)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's own template, ready for the answer."""
        return self._model.chat_prompt(messages)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        logits: bool = False,
    ) -> Generation:
        """Start generating from a text or token ids, as `spanker.Model.generate` does; iterate over
        the result.  Generations started together share the steps of the fleet."""
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        make = functools.partial(
            self._model.generate,
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            logits=logits,
        )
        return Generation(self._portal, ids, _Remote(make))

    def chat(self, messages: Sequence[Mapping[str, str]], **options: object) -> Generation:
        """`generate` the assistant's next message; options as for `generate`."""
        return self.generate(self.chat_prompt(messages), **options)  # type: ignore[arg-type]

    async def score(self, ids: Sequence[int]) -> AsyncGenerator[tuple[int, F32], None]:
        """Logits of a forced sequence in pieces (first position, (tokens, vocabulary) float32)."""
        pieces = self._model.score(ids)

        async def following() -> tuple[int, F32] | None:
            return await anext(pieces, None)

        try:
            while (piece := await self._portal.call(following)) is not None:
                yield piece
        finally:
            # A fleet that is closed has ended the pieces itself.
            with contextlib.suppress(RequestError):
                await self._portal.call(pieces.aclose)

    async def logits(self, ids: Sequence[int]) -> F32:
        """float32 (tokens, vocabulary): row i are the logits after ids[:i + 1]."""
        return await self._portal.call(self._model.logits, ids)

    async def unload(self) -> None:
        """Give back what the model has on the cards; as `spanker.fleet.Model.unload`."""
        await self._portal.call(self._model.unload)


class Fleet:
    """An open fleet.  Made by `open_fleet`."""

    def __init__(self, portal: _Portal, fleet: trio_api.Fleet) -> None:
        self._portal = portal
        self._fleet = fleet

    @property
    def profile(self) -> Profile:
        return self._fleet.profile

    @property
    def cards(self) -> tuple[CardInfo, ...]:
        """What each card says of itself, by card number."""
        return self._fleet.cards

    @property
    def plan(self) -> FleetPlan:
        """The plan of the model loaded last; PlanError before there is one."""
        return self._fleet.plan

    @property
    def devices(self) -> tuple[SoftCard | KernelCard | RemoteCard, ...]:
        """The devices behind the cards, for tests that make them fail."""
        return self._fleet.devices

    async def load(
        self,
        model: str | os.PathLike[str],
        *,
        plan: str | Plan | FleetPlan | None = None,
        ctx: int | None = None,
        prompt_chunk: int = DEFAULT_PROMPT_CHUNK,
        kv_tokens: int | None = None,
        kv_copies: int = 0,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> Model:
        """Load a model by name or path onto the cards, as `spanker.Fleet.load` does.

        `progress(done, total)` is called in the event loop.
        """
        loop = asyncio.get_running_loop()

        def report(done: int, total: int) -> None:
            if progress is not None:
                loop.call_soon_threadsafe(progress, done, total)

        loaded = await self._portal.obtain(
            trio_api.Model.unload,
            functools.partial(
                self._fleet.load,
                model,
                plan=plan,
                ctx=ctx,
                prompt_chunk=prompt_chunk,
                kv_tokens=kv_tokens,
                kv_copies=kv_copies,
                batch=batch,
                progress=report,
            ),
        )
        return Model(self._portal, loaded)

    async def arrays(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32
    ) -> CardArrays:
        """An array of zeros on each card, as `spanker.Fleet.arrays`."""
        close = card_arrays.CardArrays.aclose
        made = await self._portal.obtain(close, self._fleet.arrays, shape, dtype)
        return CardArrays(self, made)

    @contextlib.asynccontextmanager
    async def trace(self, path: str | os.PathLike[str]) -> AsyncIterator[Trace]:
        """Record every command of every card within the block into a file, as `spanker.Fleet.trace`
        does."""
        tracer = await self._portal.obtain(Tracer.cut_short, self._fleet._start_trace, path)
        try:
            yield tracer.trace
        except GeneratorExit:
            raise  # the event loop is being torn down: nothing can be awaited any more
        except BaseException:
            with contextlib.suppress(ConfigError, RequestError):
                await self._portal.call(tracer.cut_short)
            raise
        await self._portal.call(tracer.stop)

    async def stats(self) -> FleetStats:
        """Read the counters of every card that is not lost."""
        return await self._portal.call(self._fleet.stats)

    async def drain(self, card: int) -> None:
        """Take a card out of use without losing a token; as `spanker.Fleet.drain`."""
        await self._portal.call(lambda: self._fleet.drain(card))

    async def add(self, card: str | CardSpec) -> int:
        """Take one more card into the running fleet; as `spanker.Fleet.add`."""
        return await self._portal.call(lambda: self._fleet.add(card))

    async def admit(self, card: int) -> None:
        """Use a drained or lost card again; as `spanker.Fleet.admit`."""
        await self._portal.call(lambda: self._fleet.admit(card))

    async def health(self) -> Health:
        """Which cards are in use, and which models can serve, right now; asks no card."""

        async def look() -> Health:
            return self._fleet.health()

        return await self._portal.call(look)

    @property
    def events(self) -> EventLog:
        """What has happened; its listeners are called in the fleet's thread."""
        return self._fleet.events


@contextlib.asynccontextmanager
async def open_fleet(
    cards: str | int | Sequence[CardSpec] = "soft:1",
    *,
    profile: str | Profile = "native",
    throttle: bool = False,
    channel: str = "memory",
    workers: int | None = None,
    hang_timeout_s: float = 10.0,
    plan: str = "auto",
    recover: bool = True,
    audit_every: int | None = None,
    rebalance: bool = False,
    topology: Topology | None = None,
) -> AsyncIterator[Fleet]:
    """Open a fleet of cards; everything it starts, its thread too, ends with the `async with`
    block.  The options are those of `spanker.open_fleet`."""
    portal = _Portal(
        functools.partial(
            trio_api.open_fleet,
            cards,
            profile=profile,
            throttle=throttle,
            channel=channel,
            workers=workers,
            hang_timeout_s=hang_timeout_s,
            plan=plan,
            recover=recover,
            audit_every=audit_every,
            rebalance=rebalance,
            topology=topology,
        )
    )
    try:
        yield Fleet(portal, await portal.opened())
    except GeneratorExit:
        # The event loop is being torn down: nothing can be awaited any more.
        portal.stop()
        portal.join()
        raise
    except BaseException:
        # The first exception wins, also over a cancellation that comes while closing.
        with contextlib.suppress(asyncio.CancelledError):
            await portal.aclose()
        raise
    await portal.aclose()
    if portal.failure is not None:
        raise portal.failure


__all__ = [
    "CardArrays",
    "Fleet",
    "Generation",
    "Model",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "open_fleet",
    "reduce_scatter",
]
