# SPDX-License-Identifier: Apache-2.0
"""The phases of a stage: what each card does up to an exchange, and what it sends in that.

The cards of a stage wait for each other in every exchange, so a phase takes what the slowest of
them computes, and then the exchange; or several, where links are missing and others hand on.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import attrs

from spanker.sched.copies import keeper, ward_heads
from spanker.sched.cost import commands
from spanker.sched.cost.machine import Machine, Pace
from spanker.sched.cost.pieces import Commands, Pieces, gathers_q8
from spanker.sched.cost.rows import StepRows
from spanker.sched.plan import LayerShape, ModelShape, Plan, Stage, WeightShape
from spanker.sched.shares import Share
from spanker.values import Value


class Bound(enum.Enum):
    """What time is spent on: what would have to be faster for it to be less."""

    MEMORY = "memory"
    ARITHMETIC = "arithmetic"
    ELEMENTS = "elements"
    COMMANDS = "commands"
    LINKS = "links"
    HOST_LINK = "host link"
    HOST_WORK = "host work"


_WORK = {
    commands.ELEMENTS: Bound.ELEMENTS,
    commands.INT8: Bound.ARITHMETIC,
    commands.FLOAT: Bound.ARITHMETIC,
}


@attrs.frozen(eq=False, repr=False)
class Phase(Value):
    """`runs` and `sends` are by card of the stage: commands, and bytes to each other card; `sends`
    is None where no exchange follows.  With `moves` the exchange is of these instead, as (source,
    target, bytes).  A stage has `count` such phases."""

    runs: tuple[Commands, ...]
    sends: tuple[float, ...] | None
    count: int = 1
    moves: tuple[tuple[int, int, float], ...] = ()


def phases(pieces: Pieces, plan: Plan, number: int, candidates: int) -> Iterator[Phase]:
    """The phases of stage `number` of a plan, from the embedding, or from when the row is there,
    to the best tokens, or to the handover."""
    stage = plan.stages[number]
    shares = stage.shares
    if number == 0:
        yield Phase(
            tuple(pieces.embed_commands(s.columns) for s in shares),
            tuple(pieces.embed_gather(s.columns) for s in shares),
        )
    kinds, layers = pieces.shape.kinds
    own = kinds[stage.layers.start : stage.layers.stop]
    for kind, count in Counter(own).items():
        yield from _layers(pieces, plan, stage, layers[kind], count, first=kind == own[0])
    add = pieces.add_commands()
    if number == len(plan.stages) - 1:
        runs = _by_size(
            [s.vocabulary for s in shares],
            lambda part: add + pieces.output_commands(part, candidates),
        )
    else:
        runs = (add,) * len(shares)
    yield Phase(runs, None)


def _by_size(
    parts: Sequence[Share], make: Callable[[Share], Commands], group: int = 1
) -> tuple[Commands, ...]:
    """What each of these shares takes, made once for those that are equally large and begin at the
    same place of a `group`."""
    made: dict[tuple[int, int], Commands] = {}
    out = []
    for part in parts:
        key = part.start % group, part.size
        if key not in made:
            made[key] = make(part)
        out.append(made[key])
    return tuple(out)


def _layers(
    pieces: Pieces, plan: Plan, stage: Stage, layer: LayerShape, count: int, first: bool
) -> Iterator[Phase]:
    """`count` layers alike, the `first` of the stage perhaps among them: nothing is added there."""
    shares, add = stage.shares, pieces.add_commands()
    q8 = attention_q8(pieces.shape, stage, layer)
    heads, group = [s.heads for s in shares], pieces.shape.group
    sends = tuple(pieces.attention_gather(part, q8) for part in heads)

    def attention(before: Commands) -> tuple[Commands, ...]:
        return _by_size(
            heads, lambda part: before + pieces.attention_commands(layer, part, q8), group
        )

    if first:
        yield Phase(attention(()), sends)
    if count > first:
        yield Phase(attention(add), sends, count - first)
    projected = _projected(pieces, stage, layer.attn_output, q8, count)
    if pieces.kv_copies and len(stage.cards) > 1:
        yield from _copied(pieces, plan, stage, projected)
    else:
        yield projected

    q8 = ffn_q8(stage, layer)
    yield Phase(
        _by_size([s.ffn for s in shares], lambda part: add + pieces.ffn_commands(layer, part, q8)),
        tuple(pieces.ffn_gather(s.ffn, q8) for s in shares),
        count,
    )
    yield _projected(pieces, stage, layer.ffn_down, q8, count)


def _copied(pieces: Pieces, plan: Plan, stage: Stage, then: Phase) -> Iterator[Phase]:
    """Each card's new keys and values to who keeps a copy of them, and their keeping there before
    what comes then."""
    moves, runs = [], []
    for share, run in zip(stage.shares, then.runs, strict=True):
        to = keeper(plan, share.card)
        if to is not None:
            heads = share.kv_heads(pieces.shape.group).size
            moves.append((share.card, to, pieces.copy_bytes(heads)))
        kept = ward_heads(pieces.shape, plan, share.card).size
        # One and the same where it is, so that it is priced once.
        runs.append(pieces.copy_commands(kept) + run if kept else run)
    yield Phase(((),) * len(runs), (0.0,) * len(runs), then.count, tuple(moves))
    yield attrs.evolve(then, runs=tuple(runs))


def attention_q8(shape: ModelShape, stage: Stage, layer: LayerShape) -> bool:
    """Whether the cards of a stage gather their heads as Q8 blocks."""
    return gathers_q8(layer.attn_output, [s.heads for s in stage.shares], shape.head_dim)


def ffn_q8(stage: Stage, layer: LayerShape) -> bool:
    """Whether the cards of a stage gather their rows of the FFN as Q8 blocks."""
    return gathers_q8(layer.ffn_down, [s.ffn for s in stage.shares])


def _projected(pieces: Pieces, stage: Stage, matrix: WeightShape, q8: bool, count: int) -> Phase:
    requantise = matrix.quantized and not q8
    rows = [s.hidden for s in stage.shares]
    return Phase(
        _by_size(rows, lambda part: pieces.project_commands(matrix, part.size, requantise)),
        tuple(pieces.project_gather(part.size) for part in rows),
        count,
    )


# --- prices ----------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class StagePrice(Value):
    """What a stage takes, and what for: `spent` adds up to `seconds`, of which `computing` not in
    exchanges."""

    seconds: float
    computing: float
    spent: dict[Bound, float]

    def plus(self, other: StagePrice, factor: float) -> StagePrice:
        """This price and `factor` times another."""
        return StagePrice(
            self.seconds + factor * other.seconds,
            self.computing + factor * other.computing,
            {bound: s + factor * other.spent[bound] for bound, s in self.spent.items()},
        )


def price_stage(pieces: Pieces, plan: Plan, number: int, candidates: int) -> StagePrice:
    """The sum of a stage's phases."""
    cards = plan.stages[number].cards
    total = computing = 0.0
    spent = dict.fromkeys(Bound, 0.0)
    exchange_s = pieces.exchange_s(len(cards))
    for phase in phases(pieces, plan, number, candidates):
        run_s, slowest = phase_s(pieces, cards, phase.runs)
        parts = spent_on(pieces, cards[slowest], phase.runs[slowest])
        # Where cards are in each other's way, but not to the end, as much of each part.
        less = run_s / (sum(parts.values()) or 1.0)
        for bound, seconds in parts.items():
            spent[bound] += phase.count * seconds * less
        computing += phase.count * run_s
        if phase.sends is not None and len(cards) > 1:
            if phase.moves:
                exchanges = pieces.machine.in_phases([phase.moves], exchange_s)
            else:
                exchanges = pieces.machine.gather(cards, phase.sends, exchange_s)
            total += phase.count * exchanges.seconds
            spent[Bound.COMMANDS] += phase.count * exchanges.commands_s
            spent[Bound.LINKS] += phase.count * exchanges.links_s
    return StagePrice(total + computing, computing, spent)


def phase_s(pieces: Pieces, cards: Sequence[int], runs: Sequence[Commands]) -> tuple[float, int]:
    """What a phase's commands take, from when all cards begin to when all have ended, and the place
    of the card that is last.

    Of cards that share cores or memory, each that ends leaves the others a larger part.
    """
    times = _times(pieces, cards, runs)
    longest = max(times)
    last = times.index(longest)
    if not pieces.machine.contended or min(times) == longest:
        return longest, last
    others = [card for card in pieces.together if card not in cards]
    left = {i: 1.0 for i, run in enumerate(runs) if run}
    elapsed = 0.0
    while left:
        together = [*others, *(cards[i] for i in left)]
        for i in left:
            pace = pieces.machine.pace(cards[i], together)
            times[i] = left[i] * pieces.seconds(cards[i], runs[i], pace)
        last = max(left, key=times.__getitem__)
        spent = min(times[i] for i in left)
        elapsed += spent
        left = {i: part * (1 - spent / times[i]) for i, part in left.items() if times[i] > spent}
    return elapsed, last


def _times(pieces: Pieces, cards: Sequence[int], runs: Sequence[Commands]) -> list[float]:
    """What each card takes; what is the same run at the same pace is counted once."""
    known: dict[tuple[int, Pace], float] = {}
    times = []
    for card, run in zip(cards, runs, strict=True):
        pace = pieces.pace(card)
        key = id(run), pace
        if key not in known:
            known[key] = pieces.seconds(card, run, pace)
        times.append(known[key])
    return times


def spent_on(pieces: Pieces, card: int, run: Commands) -> dict[Bound, float]:
    """What a card's commands spend their time on; of each one the longer of its bytes and work."""
    pace = pieces.pace(card)
    spent = {Bound.COMMANDS: len(run) * pace.command_s}
    for nbytes, work, rate in run:
        memory_s, work_s = nbytes * pace.s_per_byte, work * pace.s_per_work[rate]
        bound = Bound.MEMORY if memory_s > work_s else _WORK[rate]
        spent[bound] = spent.get(bound, 0.0) + max(memory_s, work_s)
    return spent


def stage_pieces(
    shape: ModelShape,
    plan: Plan,
    machine: Machine,
    rows: StepRows,
    beside: Sequence[int] = (),
    kv_copies: int = 0,
) -> tuple[Pieces, ...]:
    """The pieces of each stage while its own cards compute, and those `beside`; one and the same
    where cards are never in each other's way."""
    if not machine.contended:
        return (Pieces(shape, machine, rows, kv_copies=kv_copies),) * len(plan.stages)
    return tuple(
        Pieces(shape, machine, rows, (*stage.cards, *beside), kv_copies) for stage in plan.stages
    )
