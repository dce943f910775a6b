# SPDX-License-Identifier: Apache-2.0
"""What it takes to bring weights, and KV pages, from where they are to where another plan wants
them: round by round, as `sched.resharding` says it and actors/resharding.py does it.

In a round cards copy within their memory, then exchange, while the host writes what no card has:
the longer of the two, between the messages that allocate before and free after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import attrs

from spanker.sched.bandwidth import Profile
from spanker.sched.cost import messages
from spanker.sched.cost.loading import BATCH_MAX, Sent, content_pieces, round_trip_s, uploads_s
from spanker.sched.cost.machine import Machine
from spanker.sched.layout import card_buffers
from spanker.sched.pages import PageMove
from spanker.sched.plan import Limits, ModelShape, Plan
from spanker.sched.resharding import (
    EXCHANGE_MAX,
    Buffers,
    Content,
    Fill,
    Holdings,
    Reshard,
    Round,
    contents,
    reshard,
)
from spanker.sched.topology import Topology
from spanker.values import Value, lazy_frozen

# Messages that are under way to a card at a time.
WINDOW = 16


@lazy_frozen
class ReshardCost(Value):
    """`seconds` from when what is not kept is freed to when all weights are there, and memory for
    keys, values and activations; bytes that come `from_host`, that go over `links` from card to
    card and that are `copied` within their memory.  `keeps`: whether pages go along."""

    seconds: float
    from_host: int
    links: int
    copied: int
    keeps: bool


def resharding(
    shape: ModelShape,
    held: Holdings,
    after: Plan,
    profile: Profile,
    topology: Topology,
    limits: Limits,
    *,
    room: Mapping[int, int] | None = None,
    pages: PageMove | None = None,
    from_peers: bool = True,
) -> ReshardCost:
    """What the cards of `after` take for what `sched.resharding.reshard` says; `room`: bytes free
    on each card, without end where it is None.  `pages` go along where links lead, and so do
    weights with `from_peers`.  Without a modelled host link what the cards do themselves."""
    machine, context = Machine(profile, topology), limits.context
    room = dict.fromkeys(after.cards, 1 << 62) if room is None else room
    pages = None if pages is None else attrs.evolve(pages, relayed=False)
    made = reshard(
        shape,
        held,
        after,
        topology,
        context=context,
        room=room,
        pages=pages,
        from_peers=from_peers,
    )
    new = {
        card: {c.buffer: c for c in contents(shape, after, card, context)} for card in after.cards
    }
    seconds = sum(_round_s(machine, shape, new, round_) for round_ in made.rounds)
    seconds += _end_s(machine, shape, after, limits, new, made)

    def total(kind: str) -> int:
        return sum(fill.nbytes for round_ in made.rounds for fill in getattr(round_, kind))

    rest = sum(new[card][buffer].nbytes for card, buffer in made.rest)
    return ReshardCost(
        seconds,
        from_host=total("from_host") + rest,
        links=total("moves"),
        copied=total("copies"),
        keeps=made.pages is not None,
    )


_New = Mapping[int, Mapping[str, Content]]


def _round_s(machine: Machine, shape: ModelShape, new: _New, round_: Round) -> float:
    profile = machine.profile
    commands = _commands(round_)
    asked_s = round_trip_s(profile, 2 * messages.SMALL_BYTES)
    loaded_s = sum(
        round_trip_s(profile, messages.SMALL_BYTES + messages.program_bytes(count))
        for count in commands.values()
    )
    return (
        _allocate_s(profile, _counts(round_.made))
        + loaded_s
        + max(_run_s(machine, round_, commands), _host_s(profile, shape, new, round_.from_host))
        + (asked_s if commands else 0.0)
        + frees_s(profile, _counts(round_.freed))
    )


def _end_s(
    machine: Machine,
    shape: ModelShape,
    after: Plan,
    limits: Limits,
    new: _New,
    made: Reshard,
) -> float:
    """What is left to do after the rounds, with the counters before and after all of it."""
    profile = machine.profile
    there = Counter(card for card, _ in made.kept)
    there.update(card for round_ in made.rounds for card, _ in round_.made)
    missing = [len(card_buffers(shape, after, c, limits)) - there[c] for c in after.cards]
    rest = [Fill(card, buffer, 0, new[card][buffer].nbytes) for card, buffer in made.rest]
    counters = messages.SMALL_BYTES + messages.counters_bytes(len(machine.cards))
    counters_s = 2 * len(after.cards) * round_trip_s(profile, counters)
    return counters_s + _allocate_s(profile, missing) + _host_s(profile, shape, new, rest)


def _allocate_s(profile: Profile, counts: Sequence[int]) -> float:
    """So many buffers on each card, all cards at the same time."""
    total, left = 0.0, list(counts)
    while left:
        sizes = [min(count, BATCH_MAX) for count in left]
        total += round_trip_s(profile, 2 * sum(map(messages.allocation_bytes, sizes)))
        left = [count - BATCH_MAX for count in left if count > BATCH_MAX]
    return total


def frees_s(profile: Profile, counts: Sequence[int]) -> float:
    """A message for every buffer, so many at a time to each card."""
    if not counts or not profile.host_link_bytes_per_s:
        return 0.0
    # A window goes out while the answers to the one before come in.
    windows = math.ceil(max(counts) / WINDOW) + 1
    latency_s = windows * profile.host_link_latency_s
    bytes_s = sum(counts) * messages.SMALL_BYTES / profile.host_link_bytes_per_s
    return max(latency_s, bytes_s + 2 * profile.host_link_latency_s)


def _counts(buffers: Buffers) -> list[int]:
    return list(Counter(card for card, _ in buffers).values())


def _host_s(profile: Profile, shape: ModelShape, new: _New, fills: Sequence[Fill]) -> float:
    """Everything that the host writes, each card's part beside the others'."""
    by_card: dict[int, list[Content]] = {}
    for fill in fills:
        content = new[fill.card][fill.buffer]
        if fill.nbytes < content.nbytes:
            content = content.part(fill.offset, fill.nbytes)
        by_card.setdefault(fill.card, []).append(content)
    sent = [
        Sent.of(size for content in own for size in content_pieces(shape, content))
        for own in by_card.values()
    ]
    return uploads_s(profile, sent)


# --- what the cards do -------------------------------------------------------------------


def _commands(round_: Round) -> Counter[int]:
    """Commands of each card's program, where it has one."""
    counts = Counter(fill.card for fill in round_.copies)
    for begin in range(0, len(round_.moves), EXCHANGE_MAX):
        moves = round_.moves[begin : begin + EXCHANGE_MAX]
        ends = [card for fill in moves for card in (fill.source, fill.card) if card is not None]
        counts.update(ends)
        counts.update(set(ends))
    return counts


def _run_s(machine: Machine, round_: Round, commands: Counter[int]) -> float:
    """The programs of a round, from the first message to the last answer."""
    if not commands:
        return 0.0
    profile = machine.profile
    # When each card is done with what it has done so far.
    at = dict.fromkeys(commands, profile.step_s)
    for fill in round_.copies:
        pace = machine.pace(fill.card, tuple(commands))
        at[fill.card] += pace.command_s + 2 * fill.nbytes * pace.s_per_byte
    for begin in range(0, len(round_.moves), EXCHANGE_MAX):
        _exchange(profile, round_.moves[begin : begin + EXCHANGE_MAX], at)
    asked = len(commands) * (messages.SMALL_BYTES + messages.STEP_HEADER_BYTES)
    return round_trip_s(profile, asked + messages.SMALL_BYTES) + max(at.values())


def _exchange(profile: Profile, moves: Sequence[Fill], at: dict[int, float]) -> None:
    """An exchange to which cards come one by one: each begins to send when it gets there, and is
    done when its sends have left and its receives have arrived, whichever link or port is last."""
    links, out, into = Counter[tuple[int, int]](), Counter[int](), Counter[int]()
    for fill in moves:
        assert fill.source is not None
        links[fill.source, fill.card] += fill.nbytes
        out[fill.source] += fill.nbytes
        into[fill.card] += fill.nbytes
    port_s = 1 / profile.port_bytes_per_s if profile.port_bytes_per_s else 0.0
    begin = {card: at[card] + profile.command_s for card in {*out, *into}}
    first = dict.fromkeys(into, math.inf)
    for source, target in links:
        first[target] = min(first[target], begin[source])
    done = dict(begin)
    for (source, target), nbytes in links.items():
        speed = profile.link(source, target)
        over_link_s = nbytes / speed.bytes_per_s
        left = begin[source] + max(over_link_s, out[source] * port_s)
        done[source] = max(done[source], left)
        arrived = max(begin[source] + over_link_s, first[target] + into[target] * port_s)
        done[target] = max(done[target], arrived + speed.latency_s)
    at.update(done)
