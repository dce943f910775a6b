# SPDX-License-Identifier: Apache-2.0
"""docs/api/timing-model.md in slow, obvious Python: what throttled cards are compared with.

It shares nothing with the model in C but the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs

from spanker.kernels.elements import Element
from spanker.kernels.formats import Format, packed_bytes, row_bytes
from spanker.kernels.program import Command, Op, Program, SequenceStep
from spanker.sched.bandwidth import Profile

# Once per step, whatever its tokens and outputs; bytes for each byte of an element.
BULK = {Op.REDUCE: 3, Op.COPY: 2, Op.DIVIDE: 2}


@attrs.frozen
class Step:
    """Of a step, what its time depends on."""

    sequences: tuple[SequenceStep, ...]

    @property
    def tokens(self) -> int:
        return sum(len(s.tokens) for s in self.sequences)

    @property
    def outputs(self) -> int:
        return sum(len(s.outputs) for s in self.sequences)

    def rows(self, command: Command) -> int:
        if command.bulk or command.op in BULK:
            return 1
        return self.outputs if command.outputs or command.op == Op.SELECT else self.tokens

    @property
    def pairs(self) -> int:
        """Pairs of a token and a position that it sees."""
        return sum(s.position + i + 1 for s in self.sequences for i in range(len(s.tokens)))

    @property
    def group_positions(self) -> int:
        """Positions that groups of up to 8 neighbours read."""
        return sum(
            s.position + min(first + 8, len(s.tokens))
            for s in self.sequences
            for first in range(0, len(s.tokens), 8)
        )


def q8(k: int) -> float:
    return k / 32 * 34


def cost(command: Command, step: Step) -> tuple[float, float, str]:
    """Bytes, work and the rate of that work: the table."""
    t, a = step.rows(command), (*command.args, 0)
    n = a[0]
    match command.op:
        case Op.EMBED:
            return t * (row_bytes(command.format, n) + 4 * n), t * n, "elements"
        case Op.RMSNORM:
            return t * n * 8 + 4 * n, t * n, "elements"
        case Op.QUANTIZE:
            return t * (4 * n + q8(n)), t * n, "elements"
        case Op.MATMUL:
            floats = command.format in (Format.F32, Format.F16, Format.BF16)
            x = 4 * a[1] if floats else q8(a[1])
            work = -(-n // 16) * 16 * a[1] * t
            nbytes = packed_bytes(command.format, n, a[1]) + t * x + t * n * 4
            return nbytes, work, "float" if floats else "int8"
        case Op.ROPE:
            return t * n * a[1] * 8, t * n * a[1], "elements"
        case Op.KV_APPEND:
            return t * n * a[1] * 12, t * n * a[1] * 2, "elements"
        case Op.ATTENTION:
            read = step.group_positions * n * a[1] * 4
            return read + t * 8 * a[4] * a[1], 2 * a[1] * a[4] * step.pairs, "float"
        case Op.SWIGLU | Op.ADD:
            return t * n * 12, t * n, "elements"
        case Op.SELECT:
            return t * n * 8, t * n, "elements"
        case Op.LOGIT_STATS:
            return t * n * 4 + t * math.ceil(n / 256) * 8, t * n, "elements"
        case Op.TOP_K:
            return t * n * 4 + t * a[1] * 8, t * n, "elements"
        case Op.BEST:
            return t * 16, t, "elements"
        case Op.CHOOSE:
            return t * (8 * n + 4), t * n, "elements"
        case Op.REDUCE | Op.COPY | Op.DIVIDE:
            count = a[0] + (a[1] << 32)
            nbytes = BULK[command.op] * Element(command.format).nbytes * count
            return nbytes, 0 if command.op is Op.COPY else count, "elements"
    raise AssertionError(command)


def command_s(profile: Profile, card: int, command: Command, step: Step) -> float:
    """How long a command takes that is no exchange."""
    if not step.rows(command):
        return profile.command_s
    nbytes, work, kind = cost(command, step)
    speed = profile.card(card)
    rates = {
        "int8": profile.int8_madds_per_s,
        "float": profile.float_madds_per_s,
        "elements": profile.elements_per_s,
    }
    moving = nbytes / (profile.local_ddr_bytes_per_s * speed.memory)
    return profile.command_s + max(moving, work / (rates[kind] * speed.compute))


def fair_rates(profile: Profile, flows: Sequence[tuple[int, int]]) -> list[float]:
    """Max-min fair rates of flows (source, target): all grow together, and whoever meets a limit
    stays there."""
    port = profile.port_bytes_per_s or math.inf
    limits: list[tuple[float, list[int]]] = []
    for i, (source, target) in enumerate(flows):
        limits.append((profile.link(source, target).bytes_per_s, [i]))
    for card in {c for flow in flows for c in flow}:
        limits.append((port, [i for i, (source, _) in enumerate(flows) if source == card]))
        limits.append((port, [i for i, (_, target) in enumerate(flows) if target == card]))
    limits = [(limit, members) for limit, members in limits if members]
    rates: dict[int, float] = {}
    while len(rates) < len(flows):

        def room(limit: float, members: list[int]) -> float:
            free = [i for i in members if i not in rates]
            taken = sum(rates[i] for i in members if i in rates)
            return (limit - taken) / len(free) if free else math.inf

        level = min(room(*limit) for limit in limits)
        met = [limit for limit in limits if room(*limit) <= level * (1 + 1e-12)]
        for _, members in met:
            for i in members:
                rates.setdefault(i, level)
    return [rates[i] for i in range(len(flows))]


@attrs.define
class _Flow:
    source: int
    target: int
    left: float


@attrs.define
class _Card:
    number: int
    program: Program
    step: Step
    time: float
    pc: int = 0
    sends: list[_Flow] = attrs.Factory(list)
    receives: dict[int, int] = attrs.Factory(dict)
    in_exchange: bool = False
    done: bool = False


def step_ends(
    profile: Profile, programs: Mapping[int, Program], step: Step, starts: Mapping[int, float]
) -> dict[int, float]:
    """When one step ends on each card that could begin it at `starts`."""
    cards = {c: _Card(c, p, step, starts[c] + profile.step_s) for c, p in programs.items()}
    arrived: dict[tuple[int, int], list[tuple[float, int]]] = {}
    sizes: dict[int, int] = {}
    now = -math.inf
    for card in cards.values():
        _compute(profile, card)
    while not all(card.done for card in cards.values()):
        flows: list[_Flow] = []
        for card in cards.values():
            if card.in_exchange:
                targets = dict.fromkeys(f.target for f in card.sends)
                flows += [next(f for f in card.sends if f.target == t) for t in targets]
        rates = fair_rates(profile, [(f.source, f.target) for f in flows])
        leaves = [now + f.left / rate for f, rate in zip(flows, rates, strict=True)]
        begins = [c.time for c in cards.values() if not c.in_exchange and not c.done]
        then = min(leaves + begins)
        for flow, rate in zip(flows, rates, strict=True):
            flow.left -= rate * (then - now)
        for flow, leave in zip(flows, leaves, strict=True):
            if leave == then:
                card = cards[flow.source]
                card.sends.remove(flow)
                card.time = max(card.time, then)
                link = flow.source, flow.target
                arrival = then + profile.link(*link).latency_s
                arrived.setdefault(link, []).append((arrival, sizes.pop(id(flow))))
        now = then
        for card in cards.values():
            if not card.in_exchange and not card.done and card.time <= now:
                _enter(card, sizes)
        for card in cards.values():
            _leave(profile, card, arrived)
    return {c: card.time for c, card in cards.items()}


def _compute(profile: Profile, card: _Card) -> None:
    """Up to where the sends of the next exchange begin, or to the end."""
    commands = card.program.commands
    while card.pc < len(commands) and commands[card.pc].op != Op.EXCHANGE:
        card.time += command_s(profile, card.number, commands[card.pc], card.step)
        card.pc += 1
    if card.pc < len(commands):
        card.time += profile.command_s
    else:
        card.done = True


def _enter(card: _Card, sizes: dict[int, int]) -> None:
    count = card.program.commands[card.pc].args[0]
    card.in_exchange = True
    for command in card.program.commands[card.pc + 1 : card.pc + 1 + count]:
        peer, nbytes = command.args[0], command.args[1] * card.step.rows(command)
        if command.bulk:
            nbytes += command.args[2] << 32
        if nbytes and command.op == Op.LINK_SEND:
            card.sends.append(_Flow(card.number, peer, nbytes))
            sizes[id(card.sends[-1])] = nbytes
        elif nbytes:
            card.receives[peer] = card.receives.get(peer, 0) + nbytes
    card.pc += 1 + count


def _leave(
    profile: Profile, card: _Card, arrived: dict[tuple[int, int], list[tuple[float, int]]]
) -> None:
    """Go on with what comes behind an exchange, if everything of it is there or known to come."""
    if not card.in_exchange:
        return
    for peer in list(card.receives):
        queue = arrived.get((peer, card.number), [])
        while queue and card.receives.get(peer):
            time, nbytes = queue.pop(0)
            card.time = max(card.time, time)
            card.receives[peer] -= nbytes
        if not card.receives[peer]:
            del card.receives[peer]
    if not card.sends and not card.receives:
        card.in_exchange = False
        _compute(profile, card)
