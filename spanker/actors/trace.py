# SPDX-License-Identifier: Apache-2.0
"""What a fleet did, moment by moment, as a trace that chrome://tracing and ui.perfetto.dev show.

Here events are gathered and put into words: no I/O, and the clock is the coordinator's.
tracer.py fetches the events from the cards and writes the file.  The format is Chrome's Trace Event
Format, a JSON object: one process for the fleet, one thread for each card and one for the host, or
several where it works for several replicas at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from spanker._version import __version__
from spanker.actors.message import CardInfo, Message, StepDone
from spanker.device.base import TRACE_EVENT
from spanker.errors import CardAbortedError, CardFaultError, CardLostError, SpankerError
from spanker.kernels.formats import Format, packed_bytes
from spanker.kernels.program import Command, Op, SequenceStep

if TYPE_CHECKING:
    from spanker.actors.steps import LoadedModel

# What the host keeps of all cards together, 32 bytes each; what comes after is counted as lost.
EVENTS_MAX = 1 << 23
# Events of one piece of text.
_CHUNK = 4096

PROCESS = 1
HOST_THREAD = 1
CARD_THREAD = 2

# What to call the arguments of an operation, as far as they say how much work it is.
_ARGS = {
    Op.EMBED: ("columns", "vocabulary"),
    Op.RMSNORM: ("n",),
    Op.QUANTIZE: ("k",),
    Op.MATMUL: ("rows", "k"),
    Op.ROPE: ("heads", "head_dim"),
    Op.KV_APPEND: ("kv_heads", "head_dim"),
    Op.ATTENTION: ("kv_heads", "head_dim", "", "", "heads"),
    Op.SWIGLU: ("n",),
    Op.ADD: ("n",),
    Op.SELECT: ("n",),
    Op.LOGIT_STATS: ("n",),
    Op.TOP_K: ("n", "k"),
    Op.BEST: ("k",),
    Op.CHOOSE: ("lists",),
}
_WEIGHTS = {Op.EMBED: 0, Op.RMSNORM: 1, Op.MATMUL: 0}
_TRANSFERS = (Op.LINK_SEND, Op.LINK_RECV)


# --- what commands are called ------------------------------------------------------------


@attrs.frozen
class Label:
    """What there is to say of a command whenever it is executed.

    `kind` is the operation, under which its time is added up; `sent` and `received` are what its
    transfers move, as bytes of a row of tokens and of a row of outputs.
    """

    name: str
    kind: str
    args: dict[str, object]
    category: str = "compute"
    sent: tuple[int, int] = (0, 0)
    received: tuple[int, int] = (0, 0)


def labels(commands: Sequence[Command]) -> tuple[Label | None, ...]:
    """A label for each command of a program; None for transfers, which are told with their
    exchange."""
    return tuple(_label(commands, number) for number in range(len(commands)))


def _label(commands: Sequence[Command], number: int) -> Label | None:
    command = commands[number]
    if command.op in _TRANSFERS:
        return None
    if command.op == Op.EXCHANGE:
        transfers = commands[number + 1 : number + 1 + command.args[0]]
        return _exchange_label(command.part, transfers)
    op, refs = command.op.name.lower(), dict(command.refs)
    args: dict[str, object] = {"op": op}
    if command.part:
        args["part"] = command.part
    if command.op in _WEIGHTS:
        weight = refs[_WEIGHTS[command.op]].buffer
        args["weight"] = weight
        subject = weight.replace(".weight", "")
    else:
        # What it writes; in place that is its first operand.
        subject = f"{command.part} {refs[3 if 3 in refs else 0].buffer}".strip()
    name = f"{op} {subject}"
    if command.op in (Op.EMBED, Op.MATMUL):
        args["format"] = command.format.name.lower()
        name = f"{name} {args['format']}"
    args |= {n: v for n, v in zip(_ARGS[command.op], command.args, strict=False) if n}
    if command.op == Op.MATMUL:
        args["bytes"] = packed_bytes(Format(command.format), *command.args[:2])
    return Label(name, op, args)


def _exchange_label(part: str, transfers: Sequence[Command]) -> Label:
    sides: dict[Op, list[Command]] = {Op.LINK_SEND: [], Op.LINK_RECV: []}
    for transfer in transfers:
        sides[transfer.op].append(transfer)

    def peers(op: Op) -> list[int]:
        return list(dict.fromkeys(transfer.args[0] for transfer in sides[op]))

    def row_bytes(op: Op) -> tuple[int, int]:
        of = [(t.outputs, t.args[1]) for t in sides[op]]
        return sum(n for outputs, n in of if not outputs), sum(n for outputs, n in of if outputs)

    sources, targets = peers(Op.LINK_RECV), peers(Op.LINK_SEND)
    what = f"wait for {_cards(sources)}" if sources else f"send to {_cards(targets)}"
    where = dict.fromkeys(f"{part} {t.refs[0][1].buffer}".strip() for t in transfers)
    args: dict[str, object] = {"op": "exchange", "from": sources, "to": targets}
    return Label(
        f"{what} {', '.join(where)}",
        "exchange",
        args,
        "link",
        sent=row_bytes(Op.LINK_SEND),
        received=row_bytes(Op.LINK_RECV),
    )


def _cards(numbers: Sequence[int]) -> str:
    return f"card{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


# --- events ------------------------------------------------------------------------------


@attrs.frozen
class _Step:
    loaded: LoadedModel
    sequences: int
    tokens: int
    outputs: int


@attrs.frozen
class _Span:
    what: str
    step: int
    begin_ns: int
    end_ns: int


@attrs.define
class _Total:
    count: int = 0
    ns: int = 0


@attrs.define
class _Card:
    """One card's events, packed as they came, beside which step each of their fences belongs to;
    `steps` and `lost_there` are of the card as it is now, `lost_here` of all time."""

    info: CardInfo
    data: list[tuple[dict[int, int], bytes]] = attrs.Factory(list)
    events: int = 0
    lost_there: int = 0
    lost_here: int = 0
    steps: dict[int, int] = attrs.Factory(dict)
    last_fence: int | None = None
    totals: dict[str, _Total] = attrs.Factory(lambda: defaultdict(_Total))

    @property
    def lost(self) -> int:
        return self.lost_there + self.lost_here


class Trace:
    """Events of a fleet from `begin_ns` on, and their text.  `now_ns` is the time by which its
    cards tell theirs, `clock` the name of that, and `card_events` how many a card keeps until they
    are fetched."""

    def __init__(
        self,
        cards: Sequence[CardInfo],
        begin_ns: int,
        now_ns: Callable[[], int] = time.monotonic_ns,
        clock: str = "CLOCK_MONOTONIC",
        card_events: int = 0,
    ) -> None:
        self.card_events = card_events
        self._begin_ns = begin_ns
        self._now_ns = now_ns
        self._clock = clock
        self._cards = [_Card(info) for info in cards]
        self._spans: list[_Span] = []
        self._steps: dict[int, _Step] = {}
        self._labels: dict[tuple[int, int], tuple[Label | None, ...]] = {}

    # --- what is told -------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps that were submitted."""
        return len(self._steps)

    @property
    def commands(self) -> int:
        """Commands that were recorded, of all cards; the transfers of an exchange count."""
        return sum(card.events for card in self._cards)

    @property
    def lost(self) -> int:
        """Commands that were executed and are not in the trace, for want of room, or because their
        card had not told them by the end, of which it is known only once it has."""
        return sum(card.lost for card in self._cards)

    # --- what is recorded -----------------------------------------------------------------

    def step(self, number: int, loaded: LoadedModel, sequences: Sequence[SequenceStep]) -> None:
        """A step is about to be submitted to the cards of its model's plan."""
        tokens = sum(len(s.tokens) for s in sequences)
        outputs = sum(len(s.outputs) for s in sequences)
        self._steps[number] = _Step(loaded, len(sequences), tokens, outputs)

    @contextlib.contextmanager
    def span(self, what: str, step: int) -> Iterator[None]:
        """The host does something for a step; no two spans at the same time for the same cards."""
        begin_ns = self._now_ns()
        try:
            yield
        finally:
            self._spans.append(_Span(what, step, begin_ns, self._now_ns()))

    def answered(self, card: int, step: int, reply: Message | SpankerError) -> None:
        """A card has answered a step, in order: now it is known which fence is whose."""
        told = self._cards[card]
        if isinstance(reply, StepDone):
            told.last_fence = reply.fence
        elif told.last_fence is not None and isinstance(
            reply, CardFaultError | CardAbortedError | CardLostError
        ):
            # It says no fence, but it was queued, not refused: it had the next one.
            told.last_fence += 1
        else:
            return
        told.steps[told.last_fence] = step

    def returned(self, card: int) -> None:
        """A card begins anew: its fences are counted from the first again, and so is what finds no
        room on it."""
        told = self._cards[card]
        told.steps, told.last_fence = {}, None
        told.lost_here += told.lost_there
        told.lost_there = 0

    def add(self, card: int, data: bytes, lost: int) -> None:
        """Events of a card as `CardDevice.trace_events` gave them; `lost` is its count so far."""
        told = self._cards[card]
        told.lost_there = lost
        count = len(data) // TRACE_EVENT.size
        room = min(count, EVENTS_MAX - self.commands)
        told.lost_here += count - room
        if room:
            told.data.append((told.steps, data[: room * TRACE_EVENT.size]))
            told.events += room

    def missed(self, card: int, data: bytes, lost: int) -> None:
        """As `add`, for what is no part of the trace any more: it is lost."""
        told = self._cards[card]
        told.lost_there = lost
        told.lost_here += len(data) // TRACE_EVENT.size

    # --- the text ---------------------------------------------------------------------------

    def chunks(self) -> Iterator[str]:
        """The JSON object in pieces."""
        yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
        yield ",\n".join(self._names())
        yield from self._joined(self._host_events())
        for number in range(len(self._cards)):
            yield from self._joined(self._card_events(number))
        yield f'\n], "otherData": {json.dumps(self._summary())}}}\n'

    def _joined(self, events: Iterator[str]) -> Iterator[str]:
        held: list[str] = []
        for event in events:
            held.append(event)
            if len(held) == _CHUNK:
                yield ",\n" + ",\n".join(held)
                held.clear()
        if held:
            yield ",\n" + ",\n".join(held)

    def _names(self) -> Iterator[str]:
        cards = len(self._cards)
        threads = {HOST_THREAD: "host"} | {
            CARD_THREAD + number: f"card {number} ({card.info.name}, {card.info.isa})"
            for number, card in enumerate(self._cards)
        }
        for first, thread in self._host_threads().items():
            if thread != HOST_THREAD:
                threads[thread] = f"host, from card {first} on"
        yield _metadata("process_name", HOST_THREAD, name=f"spanker: {cards} cards")
        for order, (thread, name) in enumerate(threads.items()):
            yield _metadata("thread_name", thread, name=name)
            yield _metadata("thread_sort_index", thread, sort_index=order)

    def _host_threads(self) -> dict[int, int]:
        """The thread of the host's work for a step, by the first card of that step: what is done at
        the same time is done for different cards."""
        steps = (self._steps.get(span.step) for span in self._spans)
        cards = sorted({_first_card(step) for step in steps})
        behind = CARD_THREAD + len(self._cards)
        return {card: HOST_THREAD if not i else behind + i - 1 for i, card in enumerate(cards)}

    def _host_events(self) -> Iterator[str]:
        threads = self._host_threads()
        for span in self._spans:
            thread = threads[_first_card(self._steps.get(span.step))]
            args: dict[str, object] = {"step": span.step}
            if span.step in self._steps:
                step = self._steps[span.step]
                args |= {"sequences": step.sequences, "tokens": step.tokens}
                args["outputs"] = step.outputs
            fixed = _fixed(f"{span.what} step {span.step}", "host", thread)
            yield self._event(fixed, span.begin_ns, span.end_ns, json.dumps(args))

    def _card_events(self, number: int) -> Iterator[str]:
        card, thread = self._cards[number], CARD_THREAD + number
        card.totals.clear()
        # Of each label, what does not change from event to event.
        texts: dict[int, tuple[str, str]] = {}
        for steps, data in card.data:
            for begin_ns, end_ns, fence, command, op, fmt in TRACE_EVENT.iter_unpack(data):
                step_number = steps.get(fence)
                step = None if step_number is None else self._steps.get(step_number)
                label = self._label(number, step, command, op, fmt)
                if label is None:
                    continue
                if id(label) not in texts:
                    # Waiting is no work: where colours go by name it has none.
                    colour = ', "cname": "grey"' if label.category == "link" else ""
                    fixed = _fixed(label.name, label.category, thread) + colour
                    texts[id(label)] = fixed, json.dumps(label.args)[1:-1]
                fixed, args = texts[id(label)]
                total = card.totals[label.kind]
                total.count += 1
                total.ns += end_ns - begin_ns
                known = "" if step_number is None else f'"step": {step_number}, '
                if step is not None and label.category == "link":
                    args += (
                        f', "sent_bytes": {_moved(label.sent, step)}, '
                        f'"received_bytes": {_moved(label.received, step)}'
                    )
                text = f'{{{known}"fence": {fence}, {args}}}'
                yield self._event(fixed, begin_ns, end_ns, text)

    def _label(
        self, card: int, step: _Step | None, command: int, op: int, fmt: int
    ) -> Label | None:
        """The label of an executed command; of a step that nobody knows only what was recorded."""
        if step is not None:
            key = id(step.loaded), card
            if key not in self._labels:
                self._labels[key] = labels(step.loaded.program(card).commands)
            if command < len(self._labels[key]):
                return self._labels[key][command]
        return _bare_label(op, fmt)

    def _event(self, fixed: str, begin_ns: int, end_ns: int, args: str) -> str:
        begin = _microseconds(begin_ns - self._begin_ns)
        return (
            f'{{{fixed}, "ts": {begin}, "dur": {_microseconds(end_ns - begin_ns)}, "args": {args}}}'
        )

    def _summary(self) -> dict[str, object]:
        """Counts, and the time that each card spent with each operation."""
        return {
            "version": f"spanker {__version__}",
            "clock": self._clock,
            "begin_ns": self._begin_ns,
            "steps": self.steps,
            "commands": self.commands,
            "lost": self.lost,
            "cards": [
                {
                    "card": number,
                    "name": card.info.name,
                    "isa": card.info.isa,
                    "commands": card.events,
                    "lost": card.lost,
                    "ops": {
                        op: {"count": total.count, "ms": total.ns / 1e6}
                        for op, total in sorted(card.totals.items(), key=lambda item: -item[1].ns)
                    },
                }
                for number, card in enumerate(self._cards)
            ],
        }


def _first_card(step: _Step | None) -> int:
    """The first card of a step's plan; 0 for a step that nobody knows."""
    return step.loaded.plan.cards[0] if step else 0


@functools.cache
def _bare_label(op: int, fmt: int) -> Label | None:
    if op in _TRANSFERS:
        return None
    # Numbers that nobody here knows are a newer card's; they are shown all the same.
    kind = Op(op).name.lower() if op in set(Op) else f"operation {op}"
    name = kind
    if op in (Op.EMBED, Op.MATMUL) and fmt in set(Format):
        name = f"{kind} {Format(fmt).name.lower()}"
    return Label(name, kind, {"op": kind}, "link" if op == Op.EXCHANGE else "compute")


def _moved(row_bytes: tuple[int, int], step: _Step) -> int:
    return row_bytes[0] * step.tokens + row_bytes[1] * step.outputs


def _metadata(kind: str, thread: int, **args: object) -> str:
    fields = {"name": kind, "ph": "M", "pid": PROCESS, "tid": thread, "args": args}
    return json.dumps(fields)


def _fixed(name: str, category: str, thread: int) -> str:
    fields = {"name": name, "cat": category, "ph": "X", "pid": PROCESS, "tid": thread}
    return json.dumps(fields)[1:-1]


def _microseconds(ns: int) -> str:
    """Exactly, as JSON."""
    return f"{ns // 1000}.{ns % 1000:03d}"
