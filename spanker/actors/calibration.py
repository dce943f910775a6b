# SPDX-License-Identifier: Apache-2.0
"""Measuring a fleet: small programs made for the purpose, run through its coordinator.

What a command took is read from the cards' own traces, so that neither the host nor its link takes
part in it; cards must share a clock for what their links are measured by, as soft cards do.  What
the times mean for a profile is worked out in sched/fitting.py.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial

import attrs
import numpy as np
import trio

from spanker._version import __version__
from spanker.actors.client import CardClient
from spanker.actors.coordinator import Coordinator
from spanker.actors.loading import Job, run_all
from spanker.actors.message import Describe, ReadTrace, StartTrace, WriteBuffers
from spanker.actors.session import Session
from spanker.actors.steps import LoadedModel
from spanker.actors.trace import Trace
from spanker.device.base import TraceEvent, unpack_events
from spanker.errors import CardError, CardMemoryError, ConfigError
from spanker.ggml.architectures import llama
from spanker.ggml.sampling import SamplingParams
from spanker.kernels import program as op
from spanker.kernels.formats import Format, packed_bytes, row_bytes
from spanker.kernels.program import Command, Op, Program, Ref, SequenceStep, Transfer
from spanker.sched import fitting
from spanker.sched.bandwidth import LinkSpeed, Profile
from spanker.sched.fitting import CardFit, Timed
from spanker.sched.plan import (
    LOGIT_CHUNK,
    CardShare,
    Limits,
    ModelShape,
    Plan,
    Stage,
    WeightShape,
)
from spanker.sched.shares import Share

Progress = Callable[[int, int], None]

# More than any cache holds; a card with less memory to spare is measured with what it has.
STREAM_BYTES = 64 << 20
STREAM_BYTES_MIN = 1 << 20
# One matmul of a stream: as a large matrix of a model.
_STREAM_ROWS, _STREAM_K = 512, 2048
_STREAM_COMMANDS_MAX = 128
_PREFILL_TOKENS = 64
_ELEMENT_TOKENS = 16
_WRITE_BYTES = 2 << 20
# Half floats of 0.0006, blocks of small weights, activations: all of them finite, none denormal.
_PATTERN = b"\x11"
_MESSAGE_BYTES = (64, 64 << 10)
_ROUNDS_SMALL, _ROUNDS_LARGE = 24, 8
# Beyond so many pairs only neighbours are measured.
_PAIRS_MAX = 64
_TRACE_EVENTS = 1 << 14
_SESSION_TOKENS = 24
_CANDIDATES = 64
_REPEATS_MIN, _REPEATS_MAX = 3, 40

_KV = {"kv_heads": 2, "head_dim": 64, "page_positions": 64, "pages": 5}
_SEEN_BEFORE = 256

_NOTHING = Share(0, 0)


@attrs.frozen
class Figure:
    """One measured figure: the median of `count` values and the quartiles beside it."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    count: int


@attrs.frozen
class Calibration:
    """What was measured: the profile, every figure, and who measured when on what."""

    profile: Profile
    figures: tuple[Figure, ...]
    about: dict[str, str | int | float]


def figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Figure(name, unit, float(median), float(low), float(high), len(values))


async def calibrate(
    coordinator: Coordinator,
    *,
    name: str = "measured",
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> Calibration:
    """Measure all cards and links of a fleet; takes about `seconds`, more for very slow fleets.

    Nobody else should be using the fleet.  `progress(done, total)` counts measurements.  What was
    put on the cards is gone afterwards, however this ends.  Raises ConfigError where a trace is
    being recorded, CardMemoryError where a card has no room for a megabyte of weights, and
    CardLostError and CardHungError where one is gone or falls silent, which is lost by that.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"calibrating takes a time above 0 s, got {seconds}")
    if coordinator.trace is not None:
        raise ConfigError("a trace of this fleet is being recorded: end that before calibrating")
    async with _prepared(coordinator, seconds, progress) as bench:
        return await _Calibrator(bench, name).run()


# --- programs -----------------------------------------------------------------------------


@attrs.frozen
class Probe:
    """A program for one card, and the step that it is run with."""

    commands: tuple[Command, ...]
    step: SequenceStep
    positions_max: int = 512

    @property
    def program(self) -> Program:
        tokens, outputs = len(self.step.tokens), len(self.step.outputs)
        return Program(self.commands, tokens, outputs, self.positions_max)

    def timed(self, number: int, took_s: float) -> Timed:
        """The command of that number, with the time it took."""
        nbytes, work, kind = _cost(self.commands[number], self.step)
        return Timed(kind, nbytes, work, took_s)


def _step(tokens: int, position: int = 0, outputs: int = 0) -> SequenceStep:
    pages = range(-(-(position + tokens) // _KV["page_positions"]))
    return SequenceStep([0] * tokens, position, list(pages), tuple(range(outputs)))


def _cost(command: Command, step: SequenceStep) -> tuple[float, float, str]:
    """Bytes, work and its kind, by the table of docs/api/timing-model.md, of what probes are made
    of."""
    t, n = len(step.outputs) if command.outputs else len(step.tokens), command.args[0]
    second = command.args[1] if len(command.args) > 1 else 0
    if command.op == Op.MATMUL:
        fmt = Format(command.format)
        floats = fmt.is_float
        x = 4 * second if floats else row_bytes(Format.Q8_0, second)
        nbytes = packed_bytes(fmt, n, second) + t * x + t * n * 4
        return nbytes, -(-n // 16) * 16 * second * t, "float" if floats else "int8"
    if command.op == Op.ATTENTION:
        heads = command.args[4]
        ends = [step.position + min(i + 8, t) for i in range(0, t, 8)]
        pairs = sum(step.position + i + 1 for i in range(t))
        nbytes = sum(ends) * n * second * 4 + t * 8 * heads * second
        return nbytes, 2 * second * heads * pairs, "float"
    each = {
        Op.RMSNORM: t * n * 8 + 4 * n,
        Op.QUANTIZE: t * (4 * n + n // 32 * 34),
        Op.ROPE: t * n * second * 8,
        Op.SWIGLU: t * n * 12,
        Op.ADD: t * n * 12,
        Op.LOGIT_STATS: t * n * 4 + t * -(-n // LOGIT_CHUNK) * 8,
        Op.TOP_K: t * n * 4 + t * second * 8,
    }
    return each[command.op], t * n * (second if command.op == Op.ROPE else 1), "elements"


def _tiny() -> Probe:
    """Commands of every kind that do next to nothing: what is left is the overhead of each."""
    x, y = Ref("floats", 128), Ref("out", 128)
    commands = (
        op.rmsnorm(x, Ref("floats"), y, n=32, eps=1e-5),
        op.quantize(x, Ref("out", 34), k=32),
        op.matmul(Format.Q4_0, Ref("weights"), Ref("blocks", 34), y, rows=16, k=32),
        op.rope(y, Ref("floats"), heads=1, head_dim=32, rope_dim=32),
        op.swiglu(x, x, y, n=32),
        op.add(y, x, n=32),
    )
    return Probe(commands * 16, _step(1))


def _stream(weight_bytes: int, passes: int = 1) -> Probe:
    """One token's products with different weights, one after the other through all there are."""
    each = packed_bytes(Format.Q4_0, _STREAM_ROWS, _STREAM_K)
    count = min(weight_bytes // each, _STREAM_COMMANDS_MAX)
    x, y = Ref("blocks", row_bytes(Format.Q8_0, _STREAM_K)), Ref("out", 4 * _STREAM_ROWS)
    commands = tuple(
        op.matmul(Format.Q4_0, Ref("weights", 0, i * each), x, y, rows=_STREAM_ROWS, k=_STREAM_K)
        for i in range(count)
    )
    return Probe(commands * passes, _step(1))


def _int8(count: int = 3) -> Probe:
    """A prompt's products with int4 weights."""
    rows, k = _STREAM_ROWS, _STREAM_K
    x, y = Ref("blocks", row_bytes(Format.Q8_0, k)), Ref("out", 4 * rows)
    one = op.matmul(Format.Q4_0, Ref("weights"), x, y, rows=rows, k=k)
    return Probe((one,) * count, _step(_PREFILL_TOKENS))


def _floats() -> Probe:
    """A prompt's product with half-float weights, and its attention, of about as much work."""
    x, y = Ref("floats", 4 * 1024), Ref("out", 4 * 1024)
    product = op.matmul(Format.F16, Ref("weights"), x, y, rows=128, k=1024)
    kv, scale = Ref("cache"), 0.125
    attend = op.attention(x, kv, y, **_KV, heads=4, first_head=0, group=2, scale=scale)
    return Probe((product, attend) * 2, _step(_PREFILL_TOKENS, _SEEN_BEFORE))


def _elements() -> Probe:
    """What a layer does element by element, and the output's statistics."""
    t, wide, logits = _ELEMENT_TOKENS, 1024, 4096
    x, y = Ref("floats", 4 * wide), Ref("out", 4 * wide)
    z = Ref("floats", 4 * logits)
    commands = (
        op.rmsnorm(x, Ref("floats"), y, n=wide, eps=1e-5),
        op.quantize(x, Ref("out", wide // 32 * 34), k=wide),
        op.rope(y, Ref("floats"), heads=16, head_dim=64, rope_dim=64),
        op.swiglu(x, x, y, n=wide),
        op.add(y, x, n=wide),
        op.logit_stats(z, Ref("out", 8 * logits // LOGIT_CHUNK), n=logits),
        op.top_k(z, Ref("out", 8 * 64), n=logits, k=64, first_id=0),
    )
    return Probe(commands * 2, _step(t, outputs=t), positions_max=t)


def _ping_pong(first: bool, peer: int) -> Probe:
    """Small messages there and back, then large ones; `first` begins."""
    # First some work: a throttled card may be early in real time and is not held up by what a
    # message takes in this machine, and a fast one is warm.
    commands = list(_stream(STREAM_BYTES_MIN).commands) * 4
    for nbytes, rounds in zip(_MESSAGE_BYTES, (_ROUNDS_SMALL, _ROUNDS_LARGE), strict=True):
        there = op.exchange([Transfer(first, peer, Ref("out"), nbytes)])
        back = op.exchange([Transfer(not first, peer, Ref("out"), nbytes)])
        commands += (*there, *back) * rounds
    return Probe(tuple(commands), _step(1))


def _fan(card: int, hub: int, cards: int, sends: bool) -> Probe:
    """The hub sends to all others at once, or receives from them, a few times."""
    nbytes = _MESSAGE_BYTES[1]
    peers = [peer for peer in range(cards) if peer != hub] if card == hub else [hub]
    send = sends == (card == hub)
    one = op.exchange([Transfer(send, peer, Ref("out"), nbytes) for peer in peers])
    # Back with a byte each: nobody is a round ahead.
    ready = op.exchange([Transfer(not send, peer, Ref("blocks"), 1) for peer in peers])
    return Probe((*ready, *one) * 6, _step(1))


def _outputs(first_id: int) -> Program:
    """What a session needs of a card with a chunk of the vocabulary."""
    logits, limits = Ref("logits", 4 * LOGIT_CHUNK), _limits(_CANDIDATES)
    top = Ref("top", 8 * _CANDIDATES)
    commands = (
        op.logit_stats(logits, Ref("stats", 8), n=LOGIT_CHUNK),
        op.top_k(logits, top, n=LOGIT_CHUNK, k=_CANDIDATES, first_id=first_id),
    )
    return Program(commands, limits.tokens_max, limits.outputs_max, limits.context)


# --- running them ---------------------------------------------------------------------------


Run = Mapping[int, tuple[TraceEvent, ...]]


def _plan(cards: Sequence[int], vocabulary: int = 0) -> Plan:
    shares = tuple(
        CardShare(
            card,
            _NOTHING,
            _NOTHING,
            _NOTHING,
            Share(i * vocabulary, (i + 1) * vocabulary),
            _NOTHING,
        )
        for i, card in enumerate(cards)
    )
    return Plan("calibration", (Stage(_NOTHING, shares),))


def _model(vocabulary: int) -> llama.LlamaModel:
    """A model of nothing but a vocabulary."""
    none = WeightShape("none", vocabulary, 0, 0, False, 1, 0)
    shape = ModelShape(
        hidden=0,
        heads=1,
        kv_heads=1,
        head_dim=0,
        rope_dim=0,
        ffn=0,
        vocabulary=vocabulary,
        context=256,
        layers=(),
        embedding=none,
        output=none,
    )
    return llama.LlamaModel(shape, 1e-5, 1e4, {}, False)


def _limits(candidates: int) -> Limits:
    return Limits(
        context=256,
        prompt_chunk=64,
        tokens_max=64,
        outputs_max=16,
        candidates=candidates,
        kv_pages=4,
        page_positions=64,
    )


def _writing(handle: int, offset: int, data: bytes) -> WriteBuffers:
    return WriteBuffers(((handle, offset, len(data)),), buffers=(data,))


class _Bench:
    """The cards with buffers for all probes on them."""

    def __init__(self, coordinator: Coordinator, seconds: float, progress: Progress | None) -> None:
        self.coordinator = coordinator
        self.cards = tuple(range(len(coordinator.clients)))
        self.stream_bytes: dict[int, int] = {}
        self.write_s_per_byte: list[float] = []
        self.handles: dict[int, dict[str, int]] = {card: {} for card in self.cards}
        self._seconds = seconds
        self._progress = progress
        # Each card by itself, each pair, and what all do together.
        self._todo = 6 * len(self.cards) + len(self.pairs()) + 7
        self._done = 0

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Those whose links are measured: all, or neighbours where there are too many."""
        n = len(self.cards)
        pairs = tuple((a, b) for a in self.cards for b in self.cards if a < b)
        if len(pairs) <= _PAIRS_MAX:
            return pairs
        return tuple((a, b) for a, b in pairs if b - a in (1, n - 1))

    def advance(self) -> None:
        """One measurement more is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._todo)

    async def fill(self) -> None:
        """Allocate and write what probes work on."""
        floats = (np.arange(1 << 16) % 97 / 97 - 0.5).astype(np.float32).tobytes()
        counters = await self.coordinator.counters()
        for card, c in zip(self.cards, counters, strict=True):
            room = (c.ddr_total_bytes - c.ddr_used_bytes) * 3 // 4 - (2 << 20)
            self.stream_bytes[card] = min(STREAM_BYTES, room) // (1 << 20) * (1 << 20)
            if self.stream_bytes[card] < STREAM_BYTES_MIN:
                raise CardMemoryError(
                    f"card {card}: calibrating needs about 4 MiB of DDR, "
                    f"{c.ddr_total_bytes - c.ddr_used_bytes:,} bytes are free: give it more",
                    card=card,
                )
            sizes = {
                "weights": self.stream_bytes[card],
                "floats": len(floats),
                "blocks": _PREFILL_TOKENS * row_bytes(Format.Q8_0, _STREAM_K),
                "out": 256 << 10,
                "cache": 4 * 2 * 64 * 64 * _KV["pages"],
                "stats": 16 * 8 * 4,
                "top": 16 * 8 * 64,
                "logits": 16 * 4 * LOGIT_CHUNK,
            }
            handles = await self.coordinator.allocate(card, tuple(sizes.values()))
            self.handles[card] = dict(zip(sizes, handles, strict=True))
            await self._write(card, "floats", floats)
            await self._write(card, "blocks", _PATTERN * sizes["blocks"])
            await self._fill_weights(card)
            self.advance()

    async def _write(self, card: int, buffer: str, data: bytes) -> None:
        await self.coordinator.ask(card, _writing(self.handles[card][buffer], 0, data))

    async def _fill_weights(self, card: int) -> None:
        piece, handle = _PATTERN * _WRITE_BYTES, self.handles[card]["weights"]
        places = range(0, self.stream_bytes[card], _WRITE_BYTES)
        sizes = [min(_WRITE_BYTES, self.stream_bytes[card] - at) for at in places]
        took_s = await self.coordinator.ask_each(
            card,
            [_writing(handle, at, piece[:n]) for at, n in zip(places, sizes, strict=True)],
        )
        self.write_s_per_byte += [t / n for t, n in zip(took_s, sizes, strict=True)]

    async def empty(self, card: int) -> None:
        """Free the buffers of a card, which records nothing any more, if it is there."""
        loaded = LoadedModel(_model(0), _plan(self.cards), _limits(0), self.handles, {})
        # Together: each takes its time where the card is silent.
        await run_all([partial(self._freed, loaded, card), partial(self._untraced, card)])

    async def _freed(self, loaded: LoadedModel, card: int) -> None:
        await self.coordinator.free(loaded, {card: tuple(loaded.handles[card])})

    async def _untraced(self, card: int) -> None:
        with contextlib.suppress(CardError):
            await self.coordinator.ask(card, StartTrace(0))

    def each(
        self, cards: Sequence[int], job: Callable[[int], Awaitable[None]]
    ) -> dict[CardClient, Job]:
        """Something to do at each of these cards, as `Coordinator.finishing` has it done."""
        return {self.coordinator.clients[card]: partial(job, card) for card in cards}

    @contextlib.asynccontextmanager
    async def loaded(
        self, programs: Mapping[int, Program], vocabulary: int = 0
    ) -> AsyncIterator[LoadedModel]:
        """Programs on some of the cards, as a model of these cards."""
        cards = tuple(programs)
        # Without handles of its own: those of the buffers stay.
        empty: dict[int, dict[str, int]] = {card: {} for card in cards}
        made = LoadedModel(_model(0), _plan(cards), _limits(0), empty, {})
        freed = partial(self._freed, made)
        async with self.coordinator.finishing(lambda: self.each(cards, freed)):
            for card, program in programs.items():
                data = program.encode(self.handles[card])
                made.programs[card] = await self.coordinator.load_program(card, data)
            if vocabulary:
                yield LoadedModel(
                    _model(vocabulary * len(cards)),
                    _plan(cards, vocabulary),
                    _limits(_CANDIDATES),
                    self.handles,
                    made.programs,
                )
            else:
                yield made

    async def runs(self, probes: Mapping[int, Probe], together: int = 1) -> list[Run]:
        """Run probes on their cards at the same time, again and again for this measurement's part
        of the time: what each card did in each run.

        `together` steps are queued at a time, one behind the other, and told as one run.
        """
        step = next(iter(probes.values())).step
        found: list[Run] = []
        # The cards have some of the time, the rest is the host's.
        share_s = 0.8 * self._seconds / self._todo
        async with (
            self.loaded({card: probe.program for card, probe in probes.items()}) as loaded,
            self.coordinator.steps(loaded) as pipe,
        ):
            begin = trio.current_time()
            while len(found) < _REPEATS_MIN + 1 or (
                len(found) < _REPEATS_MAX and trio.current_time() - begin < share_s
            ):
                for _ in range(together):
                    await pipe.submit([step])
                for _ in range(together):
                    await pipe.result()
                found.append({card: await self.events(card) for card in probes})
        # The first one has found cold caches.
        return found[1:]

    async def events(self, card: int) -> tuple[TraceEvent, ...]:
        """What a card has done since the last time."""
        reply = await self.coordinator.ask(card, ReadTrace(_TRACE_EVENTS))
        return unpack_events(bytes(reply.buffers[0]))


@contextlib.asynccontextmanager
async def _prepared(
    coordinator: Coordinator, seconds: float, progress: Progress | None
) -> AsyncIterator[_Bench]:
    """A bench whose cards record what they do; nothing of it is left afterwards."""
    bench = _Bench(coordinator, seconds, progress)
    # Whoever wants to record a trace meanwhile is told that there is one.
    coordinator.trace = Trace(coordinator.cards, time.monotonic_ns(), card_events=_TRACE_EVENTS)

    def left() -> Mapping[CardClient, Job]:
        coordinator.trace = None
        return bench.each(bench.cards, bench.empty)

    async with coordinator.finishing(left):
        async with coordinator.between_steps():
            for card in bench.cards:
                await coordinator.ask(card, StartTrace(_TRACE_EVENTS))
        await bench.fill()
        yield bench


# --- measuring ------------------------------------------------------------------------------


def _took_s(event: TraceEvent) -> float:
    return (event.end_ns - event.begin_ns) / 1e9


def _span_s(events: Sequence[TraceEvent]) -> float:
    return (events[-1].end_ns - events[0].begin_ns) / 1e9


def _medians(probe: Probe, runs: Sequence[Run], card: int) -> list[Timed]:
    """Each command of a probe with the median of its times."""
    return [
        probe.timed(number, statistics.median(_took_s(run[card][number]) for run in runs))
        for number in range(len(probe.commands))
    ]


class _Calibrator:
    def __init__(self, bench: _Bench, name: str) -> None:
        self._bench = bench
        self._coordinator = bench.coordinator
        self._name = name
        self._figures: list[Figure] = []
        self._int8_s: dict[int, float] = {}

    async def run(self) -> Calibration:
        cards = self._bench.cards
        round_trip_s, host_link = await self._host_link()
        fits = {card: await self._card(card) for card in cards}
        fit = CardFit(
            *(
                fitting.typical([getattr(f, field.name) for f in fits.values()])
                for field in attrs.fields(CardFit)
            )
        )
        step_s = await self._step_overhead()
        links = [link for pair in self._bench.pairs() for link in await self._pair(*pair, fit)]
        bytes_per_s = fitting.typical([x.bytes_per_s for x in links]) if links else math.inf
        latency_s = fitting.typical([x.latency_s for x in links]) if links else 0.0
        usual = LinkSpeed(0, 0, bytes_per_s, latency_s)
        port = await self._port(links, usual, fit.command_s)
        cores, shared = await self._together(fits, fit)
        host_step_s = await self._host_step()
        self._card_figures(fits)
        self._link_figures(links)
        paced = self._coordinator.profile.host_link_bytes_per_s is not None
        return Calibration(
            profile=Profile(
                name=self._name,
                local_ddr_bytes_per_s=fit.memory_bytes_per_s,
                # A single card has no links; any figure will do.
                intercard_bytes_per_s=bytes_per_s if links else fit.memory_bytes_per_s,
                # What has no link of its own must not be slowed down to what was measured.
                host_link_bytes_per_s=host_link if paced else None,
                host_link_latency_s=round_trip_s / 2,
                intercard_latency_s=latency_s,
                port_bytes_per_s=port,
                int8_madds_per_s=fit.int8_madds_per_s,
                float_madds_per_s=fit.float_madds_per_s,
                elements_per_s=fit.elements_per_s,
                command_s=fit.command_s,
                step_s=step_s,
                host_step_s=host_step_s,
                cores=cores,
                shared_bytes_per_s=shared,
                cards=fitting.differing_cards(fits),
                links=fitting.differing_links(links, bytes_per_s, latency_s),
            ),
            figures=tuple(self._figures),
            about=self._about(),
        )

    def _note(self, name: str, unit: str, values: Sequence[float]) -> float:
        made = figure(name, unit, values)
        self._figures.append(made)
        return made.median

    # --- one card ---

    async def _card(self, card: int) -> CardFit:
        tiny = await self._alone(card, _tiny())
        work = {
            "int8": await self._alone(card, _int8()),
            "float": await self._alone(card, _floats()),
            "elements": await self._alone(card, _elements()),
        }
        streams = await self._alone(card, _stream(self._bench.stream_bytes[card]))
        self._int8_s[card] = statistics.median(t.took_s for t in work["int8"])
        return fitting.fit_card(tiny, streams, work)

    async def _alone(self, card: int, probe: Probe) -> list[Timed]:
        runs = await self._bench.runs({card: probe})
        self._bench.advance()
        return _medians(probe, runs, card)

    def _card_figures(self, fits: Mapping[int, CardFit]) -> None:
        units = {
            "memory_bytes_per_s": ("memory of a card", "B/s"),
            "int8_madds_per_s": ("int8 multiply-adds of a card", "/s"),
            "float_madds_per_s": ("float multiply-adds of a card", "/s"),
            "elements_per_s": ("elements of a card", "/s"),
            "command_s": ("taking up a command", "s"),
        }
        for field, (name, unit) in units.items():
            self._note(name, unit, [getattr(fit, field) for fit in fits.values()])

    async def _step_overhead(self) -> float:
        """The gaps between steps that were queued one behind the other."""
        # Long enough for the host to queue the next one meanwhile.
        count = math.ceil(0.004 / self._int8_s[0])
        gaps = [
            (run[0][i].begin_ns - run[0][i - 1].end_ns) / 1e9
            for run in await self._bench.runs({0: _int8(count)}, together=3)
            for i in (count, 2 * count)
        ]
        self._bench.advance()
        return self._note("taking up a step", "s", gaps)

    # --- links ---

    async def _pair(self, a: int, b: int, fit: CardFit) -> tuple[LinkSpeed, LinkSpeed]:
        """Both directions between two cards."""
        runs = await self._bench.runs({a: _ping_pong(True, b), b: _ping_pong(False, a)})
        self._bench.advance()
        hops: dict[tuple[int, int], list[list[float]]] = {(a, b): [[], []], (b, a): [[], []]}
        for run in runs:
            exchanges = {c: [e for e in run[c] if e.op == Op.EXCHANGE] for c in (a, b)}
            for i, (of_a, of_b) in enumerate(zip(exchanges[a], exchanges[b], strict=True)):
                large = i >= 2 * _ROUNDS_SMALL
                source, sent, arrived = (a, of_a, of_b) if i % 2 == 0 else (b, of_b, of_a)
                target = b if source == a else a
                hop_s = (arrived.end_ns - sent.begin_ns) / 1e9
                hops[source, target][large].append(hop_s)
        small, large_bytes = _MESSAGE_BYTES
        return tuple(  # type: ignore[return-value]
            fitting.link_speed(
                *ends,
                (small, statistics.median(times[0])),
                (large_bytes, statistics.median(times[1])),
                fit.command_s,
            )
            for ends, times in hops.items()
        )

    def _link_figures(self, links: Sequence[LinkSpeed]) -> None:
        if links:
            self._note("bandwidth of a link", "B/s", [x.bytes_per_s for x in links])
            self._note("latency of a link", "s", [x.latency_s for x in links])

    async def _port(
        self, links: Sequence[LinkSpeed], usual: LinkSpeed, command_s: float
    ) -> float | None:
        """What the first card sends to all others at once, or receives from them, where that is
        less than its links could carry."""
        cards, nbytes = self._bench.cards, _MESSAGE_BYTES[1]
        others = len(cards) - 1
        speeds = {(x.source, x.target): x.bytes_per_s for x in links}
        limits: list[float] = []
        for sends in (True, False):
            if others < 2:
                self._bench.advance()
                continue
            runs = await self._bench.runs({c: _fan(c, 0, len(cards), sends) for c in cards})
            self._bench.advance()
            # Before the others send they must hear that the hub is ready.
            ahead_s = command_s + (0 if sends else 2 * usual.latency_s)
            took_s = [
                max(_took_s(e) - ahead_s, 1e-9)
                for run in runs
                for e in [e for e in run[0] if e.op == Op.EXCHANGE][1::2]
            ]
            what = f"what a card {'sends to' if sends else 'receives from'} {others} at once"
            self._note(what, "B/s", [others * nbytes / each for each in took_s])
            ends = [(0, c) if sends else (c, 0) for c in cards[1:]]
            of_links = [speeds.get(end, usual.bytes_per_s) for end in ends]
            limit = fitting.port_limit(nbytes, statistics.median(took_s), of_links)
            if limit is not None:
                limits.append(limit)
        return min(limits, default=None)

    # --- all together ---

    async def _together(
        self, fits: Mapping[int, CardFit], fit: CardFit
    ) -> tuple[int | None, float | None]:
        """How cards slow each other down: the cores and the memory bandwidth that they share."""
        cards = self._bench.cards
        if len(cards) < 2:
            self._bench.advance()
            self._bench.advance()
            return None, None
        # Milliseconds of work each, or a card that begins later would not be noticed.
        count = min(max(math.ceil(0.02 / min(self._int8_s.values())), 2), 64)
        slowdowns = [
            statistics.mean(_span_s(run[c]) / (count * self._int8_s[c]) for c in cards)
            for run in await self._bench.runs({c: _int8(count) for c in cards})
        ]
        self._bench.advance()
        slowdown = self._note(f"{len(cards)} cards at once take, times", "", slowdowns)
        cores = fitting.shared_cores(slowdown, len(cards))
        one = _stream(self._bench.stream_bytes[0])
        pass_s = len(one.commands) * _cost(one.commands[0], one.step)[0] / fit.memory_bytes_per_s
        passes = min(max(math.ceil(0.02 / pass_s), 1), 16)
        probes = {c: _stream(self._bench.stream_bytes[c], passes) for c in cards}
        rates = []
        for run in await self._bench.runs(probes):
            nbytes = {c: sum(_cost(x, p.step)[0] for x in p.commands) for c, p in probes.items()}
            overhead_s = {c: len(p.commands) * fit.command_s for c, p in probes.items()}
            rates.append(sum(nbytes[c] / (_span_s(run[c]) - overhead_s[c]) for c in cards))
        self._bench.advance()
        together = self._note(f"memory of {len(cards)} cards at once", "B/s", rates)
        alone = [fits[c].memory_bytes_per_s for c in cards]
        return cores, fitting.shared_bandwidth(together, alone, cores)

    # --- the host ---

    async def _host_link(self) -> tuple[float, float]:
        """The round trip of a small message, and the bytes per second of large ones."""
        trips = await self._coordinator.ask_each(0, [Describe()] * 40)
        self._bench.advance()
        round_trip_s = self._note("round trip of a message", "s", trips)
        writes = [
            _WRITE_BYTES / max(each * _WRITE_BYTES - round_trip_s, 1e-9)
            for each in self._bench.write_s_per_byte
        ]
        return round_trip_s, self._note("bandwidth of messages", "B/s", writes)

    async def _host_step(self) -> float:
        """The processor time of the host for a step that it must see the last one for: in a session
        that samples.  Its waits are those of messages and cards."""
        cards = self._bench.cards
        programs = {card: _outputs(i * LOGIT_CHUNK) for i, card in enumerate(cards)}
        sampled = SamplingParams(temperature=1.0, top_k=8)
        per_step: list[float] = []
        in_use = trio.CancelScope()
        async with self._bench.loaded(programs, LOGIT_CHUNK) as loaded:
            session = Session(self._coordinator, loaded)

            async def serve() -> None:
                with in_use:
                    await session.run()

            async def sample() -> None:
                for _ in range(2 * _REPEATS_MIN):
                    begin = time.thread_time()
                    sequence = session.add([1], _SESSION_TOKENS, sampled)
                    try:
                        while await sequence.next() is not None:
                            pass
                    finally:
                        session.release(sequence)
                    per_step.append((time.thread_time() - begin) / _SESSION_TOKENS)
                in_use.cancel()

            await run_all([serve, sample])
        self._bench.advance()
        return self._note("host's work for a step", "s", per_step)

    def _about(self) -> dict[str, str | int | float]:
        now = datetime.datetime.now(datetime.timezone.utc)
        isas = sorted({card.isa for card in self._coordinator.cards})
        return {
            "measured_by": f"spanker {__version__} calibrate",
            "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "cards": len(self._bench.cards),
            "isa": ",".join(isas),
        }
