# SPDX-License-Identifier: Apache-2.0
"""What it takes to bring a model to its cards, and what it takes there.

Over the host link: allocate, write messages of about two megabytes, one at a time to each card,
load the programs.  Cards take turns on the link; what a message's answer takes is hidden behind the
turns of the others.  Replicas that are alike are filled from card to card where that is faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from spanker.sched.bandwidth import Profile
from spanker.sched.cost import messages
from spanker.sched.cost.decoding import check_fits
from spanker.sched.cost.machine import Machine
from spanker.sched.cost.phases import phases
from spanker.sched.cost.pieces import Pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.layout import card_buffers, card_bytes, weight_buffers
from spanker.sched.limits import CANDIDATES
from spanker.sched.plan import FleetPlan, Limits, ModelShape, Plan, on_cards
from spanker.sched.resharding import Content, contents
from spanker.sched.topology import Topology
from spanker.values import Value, lazy_frozen

# Pieces of an upload, and messages of them, are of about this many bytes.
UPLOAD_BYTES = 2 << 20
# Buffers or pieces that one message is about.
BATCH_MAX = 64
# A card's turn on the host link.
TURN_S = 500e-6
# Of what is handed on from card to card in one program, at least.
RUN_BYTES = 64 << 20


@lazy_frozen
class LoadCost(Value):
    """`seconds` from the request to when all cards can run steps; `startup_s`: finding the cards
    before that.  `programs_s` of `seconds` is for the programs.  `nbytes`: bytes of each card's
    buffers and program, with their messages.

    `from_host_s` is what it would take if replicas that are alike did not get their bytes from each
    other over the links between cards, where these are faster than the host's.
    """

    seconds: float
    startup_s: float
    programs_s: float
    from_host_s: float
    nbytes: dict[int, int]


@lazy_frozen
class Sent(Value):
    """What one card is sent: bytes on the wire, and messages that are waited for one by one."""

    nbytes: int
    messages: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Sent:
        """Pieces of these sizes, in messages that join them while they fit."""
        total, sent, pieces, nbytes = 0, 0, 0, 0
        for size in sizes:
            if pieces and (nbytes + size > UPLOAD_BYTES or pieces == BATCH_MAX):
                total += messages.write_bytes(pieces, nbytes)
                sent, pieces, nbytes = sent + 1, 0, 0
            pieces, nbytes = pieces + 1, nbytes + size
        return cls(total + messages.write_bytes(pieces, nbytes), sent + 1)


@lazy_frozen
class _Upload(Value):
    """What one card is given."""

    card: int
    sent: Sent
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
    uploads = {u.card: u for p in replicas for u in _uploads(shape, p, machine, limits)}
    cards, every = len(topology.cards), list(uploads.values())
    chains = _chains(profile, replicas, straight=topology.fully_meshed)
    programs_s = _programs_s(profile, every)
    from_host_s = _load_s(profile, every, cards, len(every)) + programs_s
    if len(chains) == len(every):
        seconds = from_host_s
    else:
        firsts = [uploads[chain[0][1]] for chain in chains]
        longest = max(map(len, chains))
        programs_s = _programs_s(profile, firsts, len(every), longest)
        seconds = _load_s(profile, firsts, cards, len(every), longest) + programs_s
        seconds += max(_copy_s(shape, machine, chain, limits) for chain in chains)
    return LoadCost(
        seconds=seconds,
        startup_s=cards * round_trip_s(profile, 2 * messages.SMALL_BYTES + 24),
        programs_s=programs_s,
        from_host_s=from_host_s,
        nbytes={u.card: u.sent.nbytes + u.program_bytes for u in every},
    )


def _replicas(plan: Plan | FleetPlan) -> tuple[Plan, ...]:
    return plan.replicas if isinstance(plan, FleetPlan) else (plan,)


# --- seconds ---------------------------------------------------------------------------


def round_trip_s(profile: Profile, nbytes: float) -> float:
    """A request and its answer, of so many bytes together, on an idle link."""
    rate = profile.host_link_bytes_per_s
    return nbytes / rate + 2 * profile.host_link_latency_s if rate else 0.0


def _load_s(
    profile: Profile, uploads: Sequence[_Upload], cards: int, used: int, chain: int = 1
) -> float:
    """All of these uploads at the same time, in a fleet of which so many cards are used; in chains
    of up to so many, one after the other is told to allocate."""
    rate = profile.host_link_bytes_per_s
    if not rate:
        return 0.0
    counters = messages.SMALL_BYTES + messages.counters_bytes(cards)
    # All cards are asked for their counters at the same time, then the used ones one by one, before
    # and after.
    counters_s = round_trip_s(profile, cards * counters)
    counters_s += 2 * used * round_trip_s(profile, counters)
    allocation_s = round_trip_s(profile, 2 * messages.allocation_bytes(BATCH_MAX))
    rounds = max(u.allocations for u in uploads)
    return (
        counters_s + chain * rounds * allocation_s + uploads_s(profile, [u.sent for u in uploads])
    )


def uploads_s(profile: Profile, uploads: Sequence[Sent]) -> float:
    """What cards are sent that begin together: they stay together until one has everything."""
    rate = profile.host_link_bytes_per_s
    if not rate or not uploads:
        return 0.0
    answer_s = round_trip_s(profile, messages.SMALL_BYTES)
    total = idle_s = 0.0
    before = 0
    for number, one in enumerate(sorted(uploads, key=lambda u: u.nbytes)):
        together = len(uploads) - number
        # Between two messages the link is idle for as long as an answer takes that the others' last
        # turns do not hide.
        idle_s = max(answer_s - (together - 1) * TURN_S, 0.0)
        nbytes = one.nbytes - before
        total += together * nbytes / rate + one.messages * nbytes / one.nbytes * idle_s
        before = one.nbytes
    return total + answer_s - idle_s


def _programs_s(
    profile: Profile, uploads: Sequence[_Upload], used: int | None = None, chain: int = 1
) -> float:
    """Loading the programs of all cards at the same time, or, of chains of up to so many among
    `used` cards, of one after the other."""
    rate = profile.host_link_bytes_per_s
    if not rate:
        return 0.0
    of_all = (used or len(uploads)) / len(uploads)
    sent_s = sum(u.program_bytes for u in uploads) / rate * of_all
    return sent_s + chain * round_trip_s(profile, messages.SMALL_BYTES)


# --- from card to card ------------------------------------------------------------------


def _chains(
    profile: Profile, replicas: Sequence[Plan], *, straight: bool
) -> list[list[tuple[Plan, int]]]:
    """Cards that get the same bytes, the first from the host and each other one from the one
    before: of replicas that are alike, where links are faster than the host's, and every card can
    send `straight` to every other."""
    host = profile.host_link_bytes_per_s
    slow = straight and host is not None and host < profile.intercard_bytes_per_s
    alike: dict[object, list[Plan]] = {}
    for number, plan in enumerate(replicas):
        form = on_cards(plan, [0] * (max(plan.cards) + 1)).stages if slow else number
        alike.setdefault(form, []).append(plan)
    return [
        [(plan, plan.cards[place]) for plan in plans]
        for plans in alike.values()
        for place in range(len(plans[0].cards))
    ]


def _copy_s(
    shape: ModelShape, machine: Machine, chain: Sequence[tuple[Plan, int]], limits: Limits
) -> float:
    """Handing buffers on along a chain, in runs: every link at the same time, a buffer behind the
    one that its source receives."""
    profile, plan = machine.profile, chain[0][0]
    if len(chain) == 1:
        return 0.0
    hops = list(itertools.pairwise(card for _, card in chain))
    s_per_byte = max(machine.moves_s([(a, b, 1e9)]) for a, b in hops) / 1e9
    latency_s = max(profile.link(a, b).latency_s for a, b in hops)
    asked_s = round_trip_s(profile, 2 * messages.SMALL_BYTES)
    total, run = 0.0, []
    sizes = [b.nbytes for b in weight_buffers(shape, plan, chain[0][1])]
    sizes.append(limits.context * shape.rope_dim * 4)
    for number, nbytes in enumerate(sizes):
        run.append(nbytes)
        if sum(run) < RUN_BYTES and number < len(sizes) - 1:
            continue
        # Each card is an exchange behind the one before it.
        waves = sum(run) + (len(chain) - 2) * max(run)
        exchanges = len(run) + len(chain) - 2
        total += waves * s_per_byte + exchanges * (latency_s + profile.command_s)
        # The programs are loaded card after card, run, and unloaded all at once.
        total += profile.step_s + (len(chain) + 2) * asked_s
        total += 3 * len(run) * len(chain) * messages.COMMAND_BYTES * machine.host_s_per_byte
        run = []
    return total


# --- bytes -----------------------------------------------------------------------------


def _uploads(shape: ModelShape, plan: Plan, machine: Machine, limits: Limits) -> list[_Upload]:
    pieces = Pieces(shape, machine, StepRows.decode(1, 1), kv_copies=limits.kv_copies)
    found = []
    for number, stage in enumerate(plan.stages):
        commands = _command_counts(pieces, plan, number)
        for share, count in zip(stage.shares, commands, strict=True):
            own = contents(shape, plan, share.card, limits.context)
            buffers = len(card_buffers(shape, plan, share.card, limits))
            found.append(
                _Upload(
                    card=share.card,
                    sent=Sent.of(size for c in own for size in content_pieces(shape, c)),
                    allocations=-(-buffers // BATCH_MAX),
                    program_bytes=messages.program_bytes(count),
                )
            )
    return found


def content_pieces(shape: ModelShape, content: Content) -> Iterator[int]:
    """Bytes of each piece of a buffer's content that a card is sent: whole rows, as many as fit."""
    at_once = UPLOAD_BYTES
    if content.buffer == f"{shape.embedding.name}.columns":
        # Of an embedding token by token.
        width = content.nbytes // shape.embedding.rows
        at_once = max(UPLOAD_BYTES // width, 1) * width
    elif content.tile > 1:
        at_once = max(UPLOAD_BYTES // content.tile_bytes, 1) * content.tile_bytes
    for begin in range(0, content.nbytes, at_once):
        yield min(at_once, content.nbytes - begin)


def _command_counts(pieces: Pieces, plan: Plan, number: int) -> list[int]:
    """Commands of each card's program, transfers included."""
    stage, stages = plan.stages[number], len(plan.stages)
    cards = stage.cards
    counts = [0] * len(cards)
    for phase in phases(pieces, plan, number, CANDIDATES):
        senders = sum(1 for nbytes in phase.sends or () if nbytes)
        for i, run in enumerate(phase.runs):
            counts[i] += phase.count * len(run)
            if phase.moves:
                # Keys and values of each.
                own = sum(2 for source, target, _ in phase.moves if cards[i] in (source, target))
                counts[i] += phase.count * (bool(own) + own)
            elif phase.sends is not None and len(cards) > 1:
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
