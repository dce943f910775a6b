# SPDX-License-Identifier: Apache-2.0
"""What it takes to bring a model to its cards, and what it takes there.

Over the host link: allocate, write messages of about two megabytes, one at a time to each card,
load the programs.  Cards take turns on the link; what a message's answer takes is hidden behind the
turns of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import attrs

from spanker.sched.bandwidth import Profile
from spanker.sched.cost import messages
from spanker.sched.cost.decoding import CANDIDATES, check_fits
from spanker.sched.cost.machine import Machine
from spanker.sched.cost.phases import phases
from spanker.sched.cost.pieces import Pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.layout import card_buffers, card_bytes, embeds_from_output, layer_rows
from spanker.sched.plan import TILE_ROWS, CardShare, FleetPlan, Limits, ModelShape, Plan, Stage
from spanker.sched.topology import Topology

# Pieces of an upload, and messages of them, are of about this many bytes.
UPLOAD_BYTES = 2 << 20
# Buffers or pieces that one message is about.
BATCH_MAX = 64
# Times that every card is asked for its counters: one by one, twice before and once after.
COUNTERS_READ = 3


@attrs.frozen
class LoadCost:
    """`seconds` from the request to when all cards can run steps; `startup_s`: finding the cards
    before that.  `nbytes`: bytes over the host link by card.

    `broadcast_s`: where one replica comes from the host and the others' cards get theirs from it
    over the links between cards, meanwhile; `seconds` where there is one replica, or the links are
    no help.
    """

    seconds: float
    startup_s: float
    broadcast_s: float
    nbytes: dict[int, int]


@attrs.frozen
class _Upload:
    """What one card is sent: bytes on the wire, and messages that are waited for one by one."""

    card: int
    nbytes: int
    messages: int
    allocations: int
    program_bytes: int


def memory(shape: ModelShape, plan: Plan | FleetPlan, limits: Limits) -> dict[int, int]:
    """Bytes of DDR that a plan takes, by card; as `sched.layout` has it."""
    return {card: card_bytes(shape, p, card, limits) for p in _replicas(plan) for card in p.cards}


def load(
    shape: ModelShape,
    plan: Plan | FleetPlan,
    profile: Profile,
    topology: Topology,
    limits: Limits,
) -> LoadCost:
    """Loading a model; raises PlanError for a plan that does not fit it or the topology.

    Without a modelled host link it takes no time.
    """
    machine, replicas = Machine(profile, topology), _replicas(plan)
    for p in replicas:
        check_fits(shape, p, machine)
    uploads = [_uploads(shape, p, machine, limits) for p in replicas]
    every = [u for of_replica in uploads for u in of_replica]
    cards = len(topology.cards)
    startup_s = cards * _round_trip_s(profile, 2 * messages.SMALL_BYTES + 24)
    seconds = _load_s(profile, every, cards)
    return LoadCost(
        seconds=seconds,
        startup_s=startup_s,
        broadcast_s=min(seconds, _broadcast_s(machine, uploads, cards)),
        nbytes={u.card: u.nbytes + u.program_bytes for u in every},
    )


def _replicas(plan: Plan | FleetPlan) -> tuple[Plan, ...]:
    return plan.replicas if isinstance(plan, FleetPlan) else (plan,)


# --- seconds ---------------------------------------------------------------------------


def _round_trip_s(profile: Profile, nbytes: float) -> float:
    """A request and its answer, of so many bytes together, on an idle link."""
    rate = profile.host_link_bytes_per_s
    return nbytes / rate + 2 * profile.host_link_latency_s if rate else 0.0


def _load_s(profile: Profile, uploads: Sequence[_Upload], cards: int) -> float:
    rate = profile.host_link_bytes_per_s
    if not rate:
        return 0.0
    n = len(uploads)
    counters = messages.SMALL_BYTES + messages.counters_bytes(cards)
    counters_s = ((COUNTERS_READ - 2) * cards + 2 * n) * _round_trip_s(profile, counters)
    # Cards allocate one by one, and begin to be sent their bytes after the last round of that: each
    # a round trip after the one before, which keeps them apart to the end.
    allocation_s = _round_trip_s(profile, 2 * messages.allocation_bytes(BATCH_MAX))
    rounds = max(u.allocations for u in uploads)
    answer_s = _round_trip_s(profile, messages.SMALL_BYTES)
    alone_s = max(u.nbytes / rate + u.messages * answer_s for u in uploads)
    apart_s = alone_s + (n - 1) * allocation_s
    shared_s = sum(u.nbytes for u in uploads) / rate + answer_s
    programs_s = sum(u.program_bytes for u in uploads) / rate + answer_s
    before_s = counters_s + ((rounds - 1) * n + 1) * allocation_s
    return before_s + max(apart_s, shared_s) + programs_s


def _broadcast_s(machine: Machine, uploads: Sequence[Sequence[_Upload]], cards: int) -> float:
    """The largest replica from the host; the others, each behind the one before, as fast as their
    cards take it, and a message later."""
    profile, topology = machine.profile, machine.topology
    ordered = sorted(uploads, key=lambda u: sum(part.nbytes for part in u), reverse=True)
    host_s, copy_s, behind_s = _load_s(profile, ordered[0], cards), 0.0, 0.0
    port = profile.port_bytes_per_s or float("inf")
    for before, replica in itertools.pairwise(ordered):
        rates = []
        for upload in replica:
            from_cards = [u.card for u in before if topology.is_up(u.card, upload.card)]
            if not from_cards:
                return float("inf")
            rate = max(profile.link(card, upload.card).bytes_per_s for card in from_cards)
            rates.append(min(rate, port))
        copy_s = max(copy_s, *(u.nbytes / r for u, r in zip(replica, rates, strict=True)))
        behind_s += UPLOAD_BYTES / min(rates) + profile.intercard_latency_s
    return max(host_s, copy_s) + behind_s


# --- bytes -----------------------------------------------------------------------------


def _uploads(shape: ModelShape, plan: Plan, machine: Machine, limits: Limits) -> list[_Upload]:
    pieces = Pieces(shape, machine, StepRows.decode(1, 1))
    found = []
    for number, stage in enumerate(plan.stages):
        commands = _command_counts(pieces, plan, number)
        for share, count in zip(stage.shares, commands, strict=True):
            sizes = _pieces(shape, plan, stage, share, limits)
            nbytes, sent = _messages(sizes)
            buffers = len(card_buffers(shape, plan, share.card, limits))
            found.append(
                _Upload(
                    card=share.card,
                    nbytes=nbytes,
                    messages=sent,
                    allocations=-(-buffers // BATCH_MAX),
                    program_bytes=messages.program_bytes(count),
                )
            )
    return found


def _pieces(
    shape: ModelShape, plan: Plan, stage: Stage, share: CardShare, limits: Limits
) -> Iterator[int]:
    """Bytes of each piece that a card is sent, in order: whole rows, as many as fit."""

    def pieces(nbytes: int, at_once: int) -> Iterator[int]:
        for begin in range(0, nbytes, at_once):
            yield min(at_once, nbytes - begin)

    def tiles(row_bytes: int) -> int:
        return max(UPLOAD_BYTES // row_bytes // TILE_ROWS, 1) * TILE_ROWS * row_bytes

    norm = shape.hidden * 4
    yield from pieces(limits.context * shape.rope_dim * 4, UPLOAD_BYTES)
    table = shape.embedding
    if not share.columns.empty and not embeds_from_output(shape, share):
        width = share.columns.size // table.columns_unit * table.unit_bytes
        yield from pieces(table.rows * width, max(UPLOAD_BYTES // width, 1) * width)
    for layer in shape.layers[stage.layers.start : stage.layers.stop]:
        yield from (norm, norm)
        for matrix, _, rows in layer_rows(layer, shape, share):
            yield from pieces(matrix.packed_bytes(rows), tiles(matrix.row_bytes))
    if not share.vocabulary.empty:
        yield norm
        rows_bytes = shape.output.packed_bytes(share.vocabulary.size)
        yield from pieces(rows_bytes, tiles(shape.output.row_bytes))


def _messages(sizes: Iterator[int]) -> tuple[int, int]:
    """Bytes on the wire, and the messages, of pieces that are joined while they fit."""
    total, sent, pieces, nbytes = 0, 0, 0, 0
    for size in sizes:
        if pieces and (nbytes + size > UPLOAD_BYTES or pieces == BATCH_MAX):
            total += messages.write_bytes(pieces, nbytes)
            sent, pieces, nbytes = sent + 1, 0, 0
        pieces, nbytes = pieces + 1, nbytes + size
    return total + messages.write_bytes(pieces, nbytes), sent + 1


def _command_counts(pieces: Pieces, plan: Plan, number: int) -> list[int]:
    """Commands of each card's program, transfers included."""
    stage, stages = plan.stages[number], len(plan.stages)
    cards = stage.cards
    counts = [0] * len(cards)
    for phase in phases(pieces, plan, number, CANDIDATES):
        senders = sum(1 for nbytes in phase.sends or () if nbytes)
        for i, run in enumerate(phase.runs):
            counts[i] += phase.count * len(run)
            if phase.sends is not None and len(cards) > 1:
                sends = phase.sends[i] > 0
                transfers = (len(cards) - 1 if sends else 0) + senders - sends
                counts[i] += phase.count * (1 + transfers)
    # A handover on either side, and the choice among all that take part.
    handovers = (number > 0) + (number < stages - 1)
    for i, card in enumerate(cards):
        counts[i] += 2 * handovers
        if plan.chooses(card):
            counts[i] += 2 + len(plan.voters) + len(plan.embedders)
    return counts
