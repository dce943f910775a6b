# SPDX-License-Identifier: Apache-2.0
"""The public face: a fleet of cards, a model on it, a generation.

    async with spanker.open_fleet("soft:3") as fleet:
        model = await fleet.load("smollm2")
        async for token in model.generate("The capital of France is", max_tokens=32):
            print(token.text, end="")

It runs under trio; `spanker.aio` is the same for asyncio.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import TYPE_CHECKING

import attrs
import numpy as np
import numpy.typing as npt
import trio

from spanker.actors import session as sessions
from spanker.actors.coordinator import STOP_S, Coordinator, Progress, open_coordinator
from spanker.actors.message import CardInfo
from spanker.actors.placement import ModelFile, Placement, Wanted
from spanker.actors.replicas import Replicas
from spanker.actors.session import Sampled, Scored, Session, SessionStats
from spanker.actors.steps import F32, LoadedModel
from spanker.actors.threads import WorkThreads
from spanker.device.kernel.spec import KernelCardSpec
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.soft import SoftCard, SoftCardSpec, SoftRig
from spanker.device.spec import CardSpec, parse_fleet
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.errors import (
    CardHungError,
    CardLostError,
    ConfigError,
    PlanError,
    RequestError,
    SpankerError,
    UnsupportedModelError,
)
from spanker.events import EventLog
from spanker.ggml import catalog
from spanker.ggml.architectures import llama
from spanker.ggml.chat import ChatTemplate
from spanker.ggml.detokenizer import StopMatcher, StreamDecoder
from spanker.ggml.sampling import SamplingParams
from spanker.ggml.tokenizer import Tokenizer
from spanker.sched import profiles
from spanker.sched.bandwidth import Profile
from spanker.sched.limits import (
    DEFAULT_PROMPT_CHUNK,
    step_limits,
)
from spanker.sched.plan import (
    FleetPlan,
    Limits,
    ModelShape,
    Plan,
)
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Link, LinkState, Topology
from spanker.values import Value, lazy_frozen

if TYPE_CHECKING:
    # What not every fleet needs is imported where it is used: a first token should not wait for it.
    from spanker.actors import calibration
    from spanker.actors.around import Around
    from spanker.actors.audit import Auditor
    from spanker.actors.collectives import Collectives
    from spanker.actors.trace import Trace
    from spanker.actors.tracer import Tracer
    from spanker.card_arrays import CardArrays
    from spanker.device.base import CardDevice
    from spanker.device.kernel.card import KernelCard
    from spanker.device.kernel.rig import KernelRig
    from spanker.device.remote import RemoteCard
    from spanker.device.virtual.card import VirtualRig
    from spanker.device.virtual.engine import Usage as FleetUsage
    from spanker.sched.decision import Decision

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

DEFAULT_MAX_TOKENS = 256
_Put = tuple[Placement, FleetPlan, tuple[LoadedModel, ...]]
_Joining = tuple[
    "SoftCard | RemoteCard | KernelCard",
    # What waits in a thread until it has started, where that takes its time.
    "RemoteCard | None",
    Callable[[], "Sequence[Link] | None"],
    Callable[[], None],
]


@lazy_frozen
class Token(Value):
    """One generated token.

    `text` is what it adds to the output: possibly nothing yet (half a character, the start of a
    stop string).  `logprob` is natural, at the temperature; `position` counts from the start of the
    prompt; `logits` (vocabulary,) float32 if asked for.  A last token with id None carries text
    that was held back for a stop string that never came.
    """

    id: int | None
    text: str
    logprob: float
    position: int
    logits: F32 | None = attrs.field(default=None, repr=False, eq=False)


@lazy_frozen
class CardStats(Value):
    """What one card has done and holds.  `share` and `replica`, `-` and None where it has none, are
    those of the model loaded last; `busy_s` is time spent computing since it was opened."""

    number: int
    name: str
    isa: str
    share: str
    replica: int | None
    ddr_used_bytes: int
    ddr_total_bytes: int
    commands: int
    steps: int
    busy_s: float
    ddr_read_bytes: int
    ddr_written_bytes: int
    link_tx_bytes: tuple[int, ...]
    link_rx_bytes: tuple[int, ...]


@lazy_frozen
class FleetStats(Value):
    """Counters of every card, and of every model's session in order of loading."""

    cards: tuple[CardStats, ...]
    sessions: tuple[SessionStats, ...]


@lazy_frozen
class ModelHealth(Value):
    """How many replicas of a model can serve, of how many, and the name of its plan of now: empty
    where no replica is left."""

    name: str
    plan: str
    replicas_alive: int
    replicas: int


@lazy_frozen
class Health(Value):
    """What a fleet can do: the cards it uses, those that are drained, those it has lost and why,
    and its models in order of loading."""

    cards: tuple[int, ...]
    drained: tuple[int, ...]
    lost: tuple[tuple[int, str], ...]
    models: tuple[ModelHealth, ...]

    @property
    def serving(self) -> bool:
        """Whether every model can take a sequence."""
        return all(model.replicas_alive for model in self.models)


@lazy_frozen
class Usage(Value):
    """How a virtual fleet has spent its time so far, and bytes over the host link (0 where it is
    not modelled)."""

    fleet: FleetUsage
    bytes_to_cards: int
    bytes_to_host: int


class Generation:
    """Tokens of one sequence, as they come: an async iterator.

    Ends by itself; `close()` or dropping it ends it early and frees its KV pages, and so does
    cancellation of whoever iterates.  Iterate from one task.
    """

    def __init__(
        self,
        sequence: sessions.Sequence,
        tokenizer: Tokenizer | None,
        stops: StopMatcher,
    ) -> None:
        self._sequence = sequence
        # Without a tokenizer tokens have no text.
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stops = stops
        self._over = False
        self.prompt_ids: tuple[int, ...] = tuple(sequence.tokens)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Token:
        """The next token.  A checkpoint.  Raises the failure of the sequence's step or card."""
        if self._over:
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        try:
            item = await self._sequence.next()
            token = self._token(item) if isinstance(item, Sampled) else self._last()
        except BaseException:
            self.close()
            raise
        if token is None:
            raise StopAsyncIteration
        self.text += token.text
        return token

    def _token(self, item: Sampled) -> Token:
        piece = "" if self._decoder is None else self._decoder.push(item.id)
        text, stopped = self._stops.push(piece)
        self.token_ids.append(item.id)
        if stopped:
            self._finish("stop")
        return Token(item.id, text, item.logprob, item.position, item.logits)

    def _last(self) -> Token | None:
        text, stopped = self._stops.push("" if self._decoder is None else self._decoder.finish())
        if not stopped:
            text += self._stops.finish()
        self._finish("stop" if stopped else self._sequence.finish)
        if not text:
            return None
        return Token(None, text, 0.0, len(self.prompt_ids) + len(self.token_ids))

    def _finish(self, reason: str | None) -> None:
        self.finish_reason = reason
        self.close()

    def close(self) -> None:
        """End the generation; never blocks, idempotent."""
        self._over = True
        self._sequence.session.release(self._sequence)

    async def collect(self) -> str:
        """Run to the end; the whole text."""
        async for _ in self:
            pass
        return self.text

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
        if not getattr(self, "_over", True):
            self._over = True
            self._sequence.session.release_from_anywhere(self._sequence)


class Model:
    """A model on the cards of a fleet.  Made by `Fleet.load`; lives as long as its fleet, or until
    it is unloaded."""

    def __init__(
        self,
        path: str,
        metadata: Mapping[str, object],
        tokenizer: Tokenizer | None,
        model: llama.LlamaModel,
        plan: FleetPlan,
        limits: Limits,
        replicas: Replicas,
        cards: int,
        profile: Profile,
        unload: Callable[[Model], Awaitable[None]],
    ) -> None:
        self.path = path
        self._asked = cards, profile
        self._first_plan = plan
        self._model = model
        self._limits = limits
        self._replicas = replicas
        self._unload = unload
        self._metadata = metadata
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    @property
    def name(self) -> str:
        """The name in the file's metadata, else the file's name."""
        return _name(self.path, self._metadata)

    @property
    def plan(self) -> FleetPlan:
        """The plan it has now: another one than it was loaded with once cards have been lost.  With
        no replica left it has none: this is the one it was loaded with."""
        return self._replicas.plan(self._first_plan)

    @functools.cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """For each kind of matrix product, how the fleet's bandwidths would have it spread."""
        from spanker.sched.decision import decide

        return decide(self._model.shape, *self._asked)

    @property
    def context(self) -> int:
        """Positions that one sequence can have."""
        return self._limits.context

    @property
    def vocabulary(self) -> int:
        return self._model.shape.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads over all cards of a replica."""
        return self._model.weight_bytes

    @property
    def tokenizer(self) -> Tokenizer:
        """RequestError where the model is only a shape."""
        if self._tokenizer is None:
            raise RequestError(
                f"{self.name} is a shape without a vocabulary of words: give token ids, not text"
            )
        return self._tokenizer

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` recognises control tokens such as <|im_start|> in it.

        Use special=False for text from strangers.
        """
        return self.tokenizer.encode(text, special=special)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens add nothing."""
        return self.tokenizer.decode(ids)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's own template, ready for the answer.

        A model that wants a BOS gets it once, whether its template writes one or not.
        """
        tokenizer = self.tokenizer
        if self._template is None:
            self._template = ChatTemplate.from_metadata(self._metadata, tokenizer)
        ids = tokenizer.encode(self._template.render(messages), add_bos=False)
        bos = tokenizer.bos_id
        return [bos, *ids] if tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

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
        """Start generating from a text or token ids; iterate over the result.

        Greedy unless a temperature is given; sampling depends on (seed, position) alone.  Ends at
        an end-of-text token (unless ignored), a stop string, max_tokens, or a full context.  With
        `logits` every token carries its logits.  It starts at once, holds KV pages from its start
        to its end, and pauses while nobody takes its tokens: iterate, close or drop it, or others
        may wait for its pages.  Raises RequestError, ContextLengthError.
        """
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        matcher = StopMatcher(stops)
        sequence = self._replicas.add(
            ids,
            max_tokens,
            SamplingParams(temperature, top_k, top_p, min_p, seed),
            stop_ids=frozenset() if ignore_eos else self._stop_ids,
            want_logits=logits,
        )
        return Generation(sequence, self._tokenizer, matcher)

    @property
    def _stop_ids(self) -> frozenset[int]:
        return frozenset() if self._tokenizer is None else self._tokenizer.stop_ids

    def chat(self, messages: Sequence[Mapping[str, str]], **options: object) -> Generation:
        """`generate` the assistant's next message; options as for `generate`."""
        return self.generate(self.chat_prompt(messages), **options)  # type: ignore[arg-type]

    async def score(self, ids: Sequence[int]) -> AsyncGenerator[tuple[int, F32], None]:
        """Logits of a forced sequence in pieces (first position, (tokens, vocabulary) float32)."""
        sequence = self._replicas.add(ids, 0, SamplingParams(), score=True)
        try:
            while (item := await sequence.next()) is not None:
                assert isinstance(item, Scored)
                yield item.position, item.logits
        finally:
            sequence.session.release(sequence)

    async def logits(self, ids: Sequence[int]) -> F32:
        """float32 (tokens, vocabulary): row i are the logits after ids[:i + 1]."""
        parts: list[F32] = []
        async with contextlib.aclosing(self.score(ids)) as pieces:
            async for _, rows in pieces:
                parts.append(rows)
        return np.concatenate(parts)

    async def unload(self) -> None:
        """Give back what the model has on the cards; it is of no use any more.  Its sequences end
        with RequestError.  Returns when the cards' memory is free.  Idempotent."""
        await self._unload(self)

    @property
    def stats(self) -> SessionStats:
        """Counts since it was loaded, of all replicas together."""
        return self._replicas.stats


class Fleet:
    """An open fleet.  Made by `open_fleet`."""

    def __init__(
        self,
        coordinator: Coordinator,
        rig: SoftRig | VirtualRig | KernelRig,
        profile: Profile,
        nursery: trio.Nursery,
        default_plan: str,
        recover: bool,
        audit_every: int | None,
        rebalance: bool,
        around: Around | None = None,
        devices: Sequence[CardDevice] | None = None,
    ) -> None:
        """`devices` stand in the place of the rig's cards, where that is not what they are, and
        `around` says what does so in the place of one that joins."""
        self.profile = profile
        self._around = around
        self._devices = list(rig.cards if devices is None else devices)
        self._audit_every = audit_every
        self._rebalance = rebalance
        self._recover = recover
        self._default_plan = default_plan
        self._coordinator = coordinator
        self._rig = rig
        self._nursery = nursery
        self._models: list[Model] = []
        self._load_lock = trio.Lock()
        # One change of what is drained at a time: what one undoes another must not have relied on.
        self._draining = trio.Lock()

    @functools.cached_property
    def _collectives(self) -> Collectives:
        from spanker.actors.collectives import Collectives

        return Collectives(self._coordinator)

    @property
    def topology(self) -> Topology:
        """The cards and the links between them."""
        return self._coordinator.topology

    @property
    def cards(self) -> tuple[CardInfo, ...]:
        """What each card says of itself, by card number."""
        return self._coordinator.cards

    @property
    def plan(self) -> FleetPlan:
        """The plan of the model loaded last; PlanError before there is one."""
        if not self._models:
            raise PlanError("no model has been loaded, so there is no plan yet: await fleet.load()")
        return self._models[-1].plan

    @property
    def devices(self) -> tuple[SoftCard | KernelCard | RemoteCard, ...]:
        """The devices behind the cards, for tests that make them fail."""
        return tuple(self._devices)  # type: ignore[arg-type]

    @property
    def behind(self) -> float | None:
        """How much later than in the model steps of throttled cards have ended so far, as a part of
        what they take, on the card not lost that is worst; None where cards are not throttled.

        Beyond a tenth or so this machine is too slow for the profile, and times are its own.
        """
        used = [self.devices[card] for card in self._coordinator.alive]
        paces = [pace for device in used if (pace := device.pace) is not None]
        return max((pace.behind for pace in paces), default=None)

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
        """Load a model by name (see `spanker pull`) or path onto the cards.

        `plan` is auto, the one that decodes `batch` sequences side by side fastest by the cost
        model and the fleet's profile (it may leave cards idle); or tp, pp, tpAxppB or, for D
        replicas side by side, dpDxtpAxppB, each of which takes all cards; or the FILE.json of a
        plan, or a plan as a value; by default that of the fleet.  `ctx` is the positions
        per sequence (default: the model's, at most 4096); `prompt_chunk` the most prompt tokens per
        step; `kv_tokens` the positions of all sequences of a replica together (default: 8 contexts,
        or what fits).  With `kv_copies` 1 another card keeps each card's keys and values as well,
        so that sequences go on without being computed again when any one card is lost; the plan
        must have two cards or more in each stage.  `progress(done, total)` counts bytes.  Raises
        ModelError, PlanError, CardMemoryError.
        """
        path = str(catalog.resolve(os.fspath(model)))
        file = ModelFile(path)
        try:
            gguf = file.gguf
            parsed = llama.read_model(gguf)
            tokenizer = Tokenizer.from_metadata(gguf.metadata)
            if tokenizer.vocab_size != parsed.shape.vocabulary:
                raise UnsupportedModelError(
                    f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model "
                    f"{parsed.shape.vocabulary:,}: use a file whose tokenizer fits its weights"
                )
            put = await self._put(
                parsed, file, plan, ctx, prompt_chunk, kv_tokens, kv_copies, batch, progress
            )
        finally:
            file.close()
        return self._start(path, gguf.metadata, tokenizer, put)

    async def load_shape(
        self,
        shape: str | ModelShape,
        *,
        plan: str | Plan | FleetPlan | None = None,
        ctx: int | None = None,
        prompt_chunk: int = DEFAULT_PROMPT_CHUNK,
        kv_tokens: int | None = None,
        kv_copies: int = 0,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> Model:
        """Load a model that is only a shape, by its name in `sched.shapes` or as a value: all its
        weights are zero, its prompts token ids, and its every answer token 0.  The rest as `load`;
        raises ConfigError for an unknown name.
        """
        name = shape if isinstance(shape, str) else "shape"
        parsed = llama.outline(named_shape(shape) if isinstance(shape, str) else shape)
        put = await self._put(
            parsed, None, plan, ctx, prompt_chunk, kv_tokens, kv_copies, batch, progress
        )
        return self._start("", {"general.name": name}, None, put)

    async def _put(
        self,
        parsed: llama.LlamaModel,
        file: ModelFile | None,
        plan: str | Plan | FleetPlan | None,
        ctx: int | None,
        prompt_chunk: int,
        kv_tokens: int | None,
        kv_copies: int,
        batch: int,
        progress: Progress | None,
    ) -> _Put:
        """Put a model on the cards of each replica."""
        if kv_copies not in (0, 1):
            raise ConfigError(f"kv_copies must be 0 or 1, got {kv_copies}")
        limits = step_limits(parsed.shape, ctx, prompt_chunk)
        limits = attrs.evolve(limits, kv_copies=kv_copies)
        if kv_tokens is not None and kv_tokens < limits.context:
            raise ConfigError(
                f"kv_tokens must hold at least one context of {limits.context}, got {kv_tokens}"
            )
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        asked = self._default_plan if plan is None else plan
        wanted = Wanted(
            FleetPlan.of(asked) if isinstance(asked, Plan) else asked, limits, kv_tokens, batch
        )
        placement = Placement(
            self._coordinator,
            self._load_lock,
            self._make_room,
            parsed,
            file,
            wanted,
            self._recover,
        )
        made, loaded = await placement.place(progress)
        return placement, made, loaded

    async def _make_room(self) -> None:
        """What collectives hold for next time, a model may need."""
        if "_collectives" in self.__dict__:
            await self._collectives.trim()

    def _start(
        self,
        path: str,
        metadata: Mapping[str, object],
        tokenizer: Tokenizer | None,
        put: _Put,
    ) -> Model:
        placement, plan, loaded = put
        model, limits = loaded[0].model, loaded[0].limits
        replicas = Replicas(
            [
                Session(
                    self._coordinator,
                    replica,
                    placement=placement,
                    recover=self._recover,
                    number=number,
                    name=_name(path, metadata),
                    auditor=self._auditor(placement, number),
                    rebalance=self._rebalance,
                )
                for number, replica in enumerate(loaded)
            ]
        )
        out = Model(
            path,
            metadata,
            tokenizer,
            model,
            plan,
            limits,
            replicas,
            len(self.cards),
            self.profile,
            self._unload,
        )
        self._nursery.start_soon(replicas.run)
        self._models.append(out)
        for session, replica in zip(replicas.sessions, loaded, strict=True):
            if not self._coordinator.drained.isdisjoint(replica.plan.cards):
                # Drained while the model was being loaded.
                self._nursery.start_soon(_moved, session)
        return out

    async def _unload(self, model: Model) -> None:
        await model._replicas.unload()
        if model in self._models:
            self._models.remove(model)

    def _auditor(self, placement: Placement, number: int) -> Auditor | None:
        file = placement.file
        if self._audit_every is None or file is None or self._coordinator.hollow:
            return None
        from spanker.actors.audit import Auditor

        return Auditor(self._coordinator, file, self._audit_every, seed=number)

    async def arrays(
        self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32
    ) -> CardArrays:
        """An array of zeros on each card, for collectives that are called again and again.

        Where card and host share memory they are numpy arrays that both work on, and nothing is
        copied; elsewhere they stay on the cards, and are read and written.  `async with` or
        `aclose` gives them back.  Raises CollectiveError, CardMemoryError.
        """
        from spanker.card_arrays import CardArrays

        return await CardArrays.allocate(self._collectives, shape, dtype)

    @contextlib.asynccontextmanager
    async def trace(self, path: str | os.PathLike[str]) -> AsyncIterator[Trace]:
        """Record every command of every card, drained or not, and what the host does, within the
        block; of one that is lost what was fetched before, and all again once it is admitted.

        At its end, however it ends, `path` holds a trace for ui.perfetto.dev or chrome://tracing,
        and the value tells how many `steps` and `commands` are in it and how many were `lost`.
        One at a time; a card that is silent when it begins or ends is lost.  After an exception
        nobody waits for such a card: what it has not told by then is `lost`.  Raises ConfigError,
        at once, where the file cannot be written, and CardCommandError where a card cannot trace.
        """
        tracer = await self._start_trace(path)
        try:
            yield tracer.trace
        except BaseException:
            # What ends the block is what counts, not what may come of writing the file.
            with contextlib.suppress(ConfigError):
                await tracer.cut_short()
            raise
        await tracer.stop()

    async def _start_trace(self, path: str | os.PathLike[str]) -> Tracer:
        from spanker.actors.tracer import Tracer

        tracer = Tracer(self._coordinator, path)
        await tracer.start()
        self._nursery.start_soon(tracer.run)
        return tracer

    async def calibrate(
        self,
        *,
        name: str = "measured",
        seconds: float = 10.0,
        progress: Progress | None = None,
    ) -> calibration.Calibration:
        """Measure what this fleet's cards, links and host can do, as a profile called `name`.

        Takes about `seconds`, during which nobody else should use the fleet; `progress(done,
        total)` counts measurements.  `spanker.sched.profiles.save` writes the profile into a file
        that `open_fleet` takes.  Raises ConfigError and CardError.
        """
        async with self._load_lock:
            from spanker.actors import calibration

            return await calibration.calibrate(
                self._coordinator, name=name, seconds=seconds, progress=progress
            )

    async def drain(self, card: int) -> None:
        """Take a card out of use without losing a token: models move to the other cards, each
        between two of its steps.  Returns when no model is on it; then it may fail or be removed,
        and `admit` brings it back.

        Collectives go on using every card.  Raises ConfigError where there is no such card, and
        what stands in the way, CardMemoryError where the others are too small, CardLostError where
        they are lost: then models that have not moved stay, and so does the card.
        """
        if not 0 <= card < len(self.cards):
            raise ConfigError(f"no card {card}: the fleet has cards 0 to {len(self.cards) - 1}")
        async with self._draining:
            await self._drain(card)

    async def _drain(self, card: int) -> None:
        coordinator = self._coordinator
        if card in coordinator.drained:
            return
        coordinator.drained.add(card)
        coordinator.draining.add(card)
        try:
            # What is being loaded may have been planned with this card.
            async with self._load_lock:
                pass
            for session in self._sessions():
                if card in session.loaded.plan.cards:
                    await session.move()
            for session in self._sessions():
                if card in session.loaded.plan.cards and card not in coordinator.lost:
                    raise CardLostError(
                        f"card {card} stays in use: another card was lost meanwhile, and without "
                        f"this one {session.name} could not go on; add a card, or unload the model"
                    )
        except BaseException:
            coordinator.drained.discard(card)
            raise
        finally:
            coordinator.draining.discard(card)

    async def admit(self, card: int) -> None:
        """Use a drained card again, or, as a new one, a card that was lost: models are planned anew
        with it, each between two of its steps, and go back to the plan that was asked for where
        they can.

        Raises ConfigError where the card is neither, and of one that is lost, or has failed while
        drained, what still stands in its way: CardLostError where it is gone, CardCommandError
        where its kind cannot be opened again.  Models that had no card left have ended, and can be
        loaded again; so have replicas, which come back when their model is loaded again.
        """
        coordinator = self._coordinator
        if card not in coordinator.lost and card not in coordinator.drained:
            raise ConfigError(f"card {card} is neither drained nor lost")
        async with self._draining:
            if card not in coordinator.lost:
                # It may have died while no model was on it.
                with contextlib.suppress(CardLostError, CardHungError):
                    await coordinator.look_for(card)
            await coordinator.revive(card)
            coordinator.drained.discard(card)
            await self._place_anew()

    async def add(self, card: str | CardSpec) -> int:
        """Take one more card into the running fleet; its number.  It is given like those of
        `open_fleet`, as `soft:1` or `virtual:1:64MiB`, is of a kind that goes with theirs, and is
        linked with all.
        `kernel:1` is the first card behind the kernel module that no fleet has: it is reset, and
        has the links that are there.

        Models are planned anew with it, each between two of its steps, and use it where that is
        better; generations go on, with the same bits.  Collectives are of all cards from then on;
        those that wait for the cards meanwhile raise TopologyMismatchError.  Raises ConfigError
        where no such card can join, or while the fleet is traced, FirmwareError and CardLostError
        where it does not start, and DriverError; then, or cancelled before it has joined, nothing
        of it is left.
        """
        specs = parse_fleet(card) if isinstance(card, str) else (card,)
        if len(specs) != 1:
            raise ConfigError(f"cards join one by one: expected one, got {len(specs)}")
        async with self._draining:
            number = await self._join(specs[0], chosen=not isinstance(card, str))
            await self._place_anew()
        return number

    async def _join(self, spec: CardSpec, *, chosen: bool) -> int:
        coordinator = self._coordinator
        card, starting, link, discard = self._create(spec, chosen=chosen)
        try:
            if starting is not None:
                await _started(starting)
            device = card if self._around is None else self._around.device(card)

            def linked() -> Sequence[Link] | None:
                links = link()
                self._devices.append(device)
                return links

            # Nobody who measures or loads is to find another fleet half way.
            async with self._load_lock:
                await coordinator.join(device, linked)
        except BaseException:
            if card not in self._rig.cards:
                discard()
            raise
        return card.number

    def _create(self, spec: CardSpec, *, chosen: bool) -> _Joining:
        """A new card of the rig, that again where it is a process that has yet to start, what links
        it with the others, and what lets it go; `chosen` where that very card of the kernel module
        is asked for."""
        rig, coordinator = self._rig, self._coordinator
        if isinstance(rig, SoftRig):
            if isinstance(spec, SoftCardSpec | RiscvCardSpec):
                here = rig.create(spec)
                starting = None if isinstance(here, SoftCard) else here
                return here, starting, lambda: rig.join(here), lambda: rig.discard(here)
        elif isinstance(spec, VirtualCardSpec) and coordinator.modelled:
            from spanker.device.virtual.card import VirtualRig

            if isinstance(rig, VirtualRig) and spec.hollow == coordinator.hollow:
                virtual = rig.create(spec)
                return virtual, None, lambda: rig.join(virtual), virtual.release
        elif isinstance(spec, KernelCardSpec) and not coordinator.modelled:
            from spanker.device.kernel.rig import KernelRig

            assert isinstance(rig, KernelRig)
            kernel = rig.create(spec if chosen else None)
            return kernel, None, lambda: rig.join(kernel), kernel.release
        kind = "soft" if isinstance(rig, SoftRig) else "kernel"
        if coordinator.modelled:
            kind = "hollow" if coordinator.hollow else "virtual"
        raise ConfigError(f"a card that joins must be of the fleet's kind: open e.g. {kind}:1")

    async def _place_anew(self) -> None:
        """Have models placed on the cards there are by now; what has no better place, or cannot be
        moved, stays, and a session that ends tells its sequences."""
        for session in self._sessions():
            with contextlib.suppress(SpankerError):
                await session.move()

    def _sessions(self) -> list[Session]:
        """Those that are not over, of all models."""
        return [session for model in self._models for session in model._replicas.alive]

    @property
    def events(self) -> EventLog:
        """What has happened to the cards, and what became of the models on them."""
        return self._coordinator.events

    def health(self) -> Health:
        """Which cards are in use, and which models can serve, right now; asks no card."""
        coordinator = self._coordinator
        models = tuple(
            ModelHealth(
                m.name,
                m.plan.name if m._replicas.alive else "",
                len(m._replicas.alive),
                len(m._replicas.sessions),
            )
            for m in self._models
        )
        lost = tuple(sorted((card, str(error)) for card, error in coordinator.lost.items()))
        drained = tuple(sorted(coordinator.drained.difference(coordinator.lost)))
        return Health(coordinator.alive, drained, lost, models)

    def usage(self) -> Usage:
        """What the cards of a virtual fleet, their links and the host link have been used by now.

        The difference of two is what happened in between.  Raises ConfigError where cards are not
        virtual, as nobody keeps such accounts of them.
        """
        usage = getattr(self._rig, "usage", None)
        if usage is None:
            raise ConfigError("only virtual cards account for their time: open e.g. virtual:3")
        link = self._coordinator.host_link
        return Usage(
            usage(),
            link.bytes_to_cards if link else 0,
            link.bytes_to_host if link else 0,
        )

    async def stats(self) -> FleetStats:
        """Read the counters of every card that is not lost, in order of their numbers.

        All are asked at the same time; one that does not answer within the hang timeout, 2 s at
        least, is lost.
        """
        counters = await self._coordinator.counters_of(range(len(self.cards)))
        # A model without a replica has nothing on any card.
        plan = self.plan if self._models and self._models[-1]._replicas.alive else None
        cards = tuple(
            CardStats(
                number=number,
                name=self.cards[number].name,
                isa=self.cards[number].isa,
                share=describe_share(plan, number) if plan else "-",
                replica=plan.replica_of(number) if plan else None,
                ddr_used_bytes=c.ddr_used_bytes,
                ddr_total_bytes=c.ddr_total_bytes,
                commands=c.commands,
                steps=c.steps,
                busy_s=c.busy_ns / 1e9,
                ddr_read_bytes=c.ddr_read_bytes,
                ddr_written_bytes=c.ddr_written_bytes,
                link_tx_bytes=c.link_tx_bytes,
                link_rx_bytes=c.link_rx_bytes,
            )
            for number, c in counters.items()
        )
        return FleetStats(cards, tuple(m.stats for m in self._models))


async def _started(card: RemoteCard) -> None:
    """Wait until the process of a card has started, while everybody else goes on; cancelled, it is
    killed.  Not one of trio's threads, which stay for a while."""
    threads = WorkThreads("spanker-starter", 1)
    try:
        await threads.run(card.greet, card.cut_short)
    finally:
        threads.close()


async def _moved(session: Session) -> None:
    with contextlib.suppress(SpankerError):
        await session.move()


def _name(path: str, metadata: Mapping[str, object]) -> str:
    name = metadata.get("general.name")
    return name if isinstance(name, str) and name else os.path.basename(path)


def describe_share(plan: FleetPlan, card: int) -> str:
    """In words, what a plan gives a card."""
    number = plan.replica_of(card)
    if number is None:
        return "nothing"
    replica = plan.replicas[number]
    place, share = replica.place(card)
    stage = replica.stages[place]
    parts = [f"layers {stage.layers.start}-{stage.layers.stop - 1}"]
    if len(stage.shares) > 1:
        heads = "head" if share.heads.size == 1 else "heads"
        parts.append(f"{share.heads.size} {heads}, {share.ffn.size} ffn")
    if not share.vocabulary.empty and len(replica.cards) > 1:
        parts.append(f"{share.vocabulary.size} vocab")
    return ", ".join(parts)


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
    _around: Around | None = None,
) -> AsyncIterator[Fleet]:
    """Open a fleet of cards; everything it starts ends with the `async with` block, within 0.8 s of
    its being left, or cancelled from outside, also where cards answer no more.

    `cards` is a number or a specification such as `soft:3`, `soft:2@avx2,soft:1@scalar` or
    `soft:4:64MiB`, or `kernel:2` or `kernel` for cards behind the kernel module; `profile` names
    the speeds to plan by, or a TOML file of them that `spanker calibrate` has written; the host
    link keeps them where the profile has one, and with `throttle` the cards and the links between
    them do, as far as the machine is faster (`pace` of a device tells); `channel` is memory or
    unix; `workers` native threads step the cards (default: one per card, at most one per core); a
    card that holds work without progress for `hang_timeout_s` is taken for hung; `plan` is that of
    models that are loaded without one.  When a card is lost or hangs, models go on with the cards
    that are left, every generation with the very tokens it would have had; without `recover` they
    fail.  After every `audit_every` steps of a replica one tile of a matrix, drawn at random, is
    computed again on the host, and a card that has it wrong is lost (spanker/actors/audit.py has
    the odds); then no card gets weights from another one, but from the file, which over a slow
    host link takes longer.  With `rebalance` a card that becomes twice as slow as it was, beside
    the others, gets a smaller share; emulated cards, which share the cores of a machine, may only
    seem so.  `topology` says which emulated cards have links, by default all with all; those
    without exchange over others, or over the host.  Raises ConfigError and CardError, CardHungError
    where a card says nothing for the hang timeout, 2 s at least.

    The cards of `virtual:3` do the same arithmetic, but each step takes the time that the profile
    says, by trio's clock: under a virtual one (`spanker.testing.run_virtual`, or trio's MockClock)
    no longer than it takes to compute.  Those of `hollow:3` skip the arithmetic: their answers are
    those of a model of zeros.
    """
    if audit_every is not None and audit_every < 1:
        raise ConfigError(f"audit_every must be at least 1 step, got {audit_every}")
    specs = parse_fleet(cards) if isinstance(cards, str | int) else tuple(cards)
    chosen = profiles.find(profile) if isinstance(profile, str) else profile
    first: list[Exception] = []
    answer_s = max(hang_timeout_s, STOP_S)
    with _one_error(first), _rig(specs, chosen, workers, throttle, topology, answer_s) as rig:
        rig.held = True  # the last card of a fleet may come back
        devices: Sequence[CardDevice] = rig.cards
        if _around is not None:
            devices = [_around.device(card) for card in rig.cards]
        async with (
            _passing_time(rig),
            open_coordinator(
                devices,
                chosen,
                channel=channel,
                hang_timeout_s=hang_timeout_s,
                topology=_topology(rig, topology),
                around=_around,
                hands_on=audit_every is None,
            ) as coordinator,
            trio.open_nursery() as nursery,
        ):
            try:
                yield Fleet(
                    coordinator,
                    rig,
                    chosen,
                    nursery,
                    plan,
                    recover,
                    audit_every,
                    rebalance,
                    _around,
                    devices,
                )
            except Exception as error:
                if not nursery.cancel_scope.cancel_called:
                    first.append(error)
                raise
            finally:
                coordinator.closing()
                nursery.cancel_scope.cancel()


def _rig(
    specs: Sequence[CardSpec],
    profile: Profile,
    workers: int | None,
    throttle: bool,
    topology: Topology | None,
    answer_s: float,
) -> SoftRig | VirtualRig | KernelRig:
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    virtual = [spec for spec in specs if isinstance(spec, VirtualCardSpec)]
    kernel = [spec for spec in specs if isinstance(spec, KernelCardSpec)]
    here = [spec for spec in specs if isinstance(spec, SoftCardSpec | RiscvCardSpec)]
    apart = any(isinstance(spec, RiscvCardSpec) for spec in here)
    named = {"soft": here, "virtual": virtual, "kernel": kernel}
    kinds = [kind for kind, found in named.items() if found]
    if len(kinds) > 1:
        raise ConfigError(f"{' and '.join(kinds)} cards do not go together: choose one kind")
    if kernel:
        if workers is not None:
            raise ConfigError("kernel cards work by themselves: leave workers out")
        if throttle:
            raise ConfigError("kernel cards have their own speed: leave throttle out")
        if topology is not None:
            raise ConfigError("kernel cards know their links: leave the topology out")
        from spanker.device.kernel.rig import KernelRig

        return KernelRig(kernel)
    if apart and throttle:
        raise ConfigError("RISC-V cards have their own speed: leave throttle out")
    if apart and topology is not None:
        raise ConfigError("RISC-V cards are linked all with all: leave the topology out")
    if not virtual:
        pace = profile if throttle else None
        return SoftRig(here, workers, pace, topology, answer_s=answer_s, greeted=False)
    if workers is not None:
        raise ConfigError("virtual cards have no workers: leave them out")
    if throttle:
        raise ConfigError("virtual cards keep the profile's speeds anyway: leave throttle out")
    from spanker.actors.virtual_time import now_ps
    from spanker.device.virtual.card import VirtualRig

    return VirtualRig(virtual, profile, now_ps, topology)


@contextlib.asynccontextmanager
async def _passing_time(rig: SoftRig | VirtualRig | KernelRig) -> AsyncIterator[None]:
    """The time of virtual cards passes within the block."""
    if not rig.cards[0].modelled:
        yield
        return
    from spanker.actors.virtual_time import alongside, drive
    from spanker.device.virtual.card import VirtualRig

    assert isinstance(rig, VirtualRig)
    async with alongside(lambda: drive(rig)):
        yield


def _topology(rig: SoftRig | VirtualRig | KernelRig, asked: Topology | None) -> Topology | None:
    """Which cards are linked, where not all of them need be."""
    states = getattr(rig, "links", None)
    if states is None:
        if asked is None:
            return None
        up = tuple(link for link in asked.links if link.state is LinkState.UP)
        return Topology(asked.cards, up)
    links = tuple(Link(a, b, LinkState(state)) for (a, b), state in sorted(states().items()))
    return Topology(tuple(range(len(rig.cards))), links)


@contextlib.contextmanager
def _one_error(first: list[Exception]) -> Iterator[None]:
    """Nurseries wrap errors in groups; whoever opened the fleet gets the one error there was.

    `first` may come to hold an error of the block itself: it wins, and leaves as it was raised.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = first[0] if first else group
        while not first and isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        context = error.__context__
        try:
            raise error
        finally:
            # Not the group, which holds the error: that would be a cycle.
            error.__context__ = context
            del error, context
    finally:
        first.clear()


__all__ = [
    "CardStats",
    "Fleet",
    "FleetStats",
    "Generation",
    "Health",
    "Model",
    "ModelHealth",
    "Token",
    "describe_share",
    "open_fleet",
]
