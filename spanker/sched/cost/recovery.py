# SPDX-License-Identifier: Apache-2.0
"""What a model stands still for when a card is lost: from the failure to the next token.

It is noticed, what is not kept is freed, weights and programs are brought to the cards that are
left, and with them the KV pages of the sequences; where not all of these are left, the tokens of
every sequence are computed again, as a prompt.  Where another replica takes the sequences, it has
weights and programs already.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.cost import messages
from spanker.sched.cost.loading import load, round_trip_s
from spanker.sched.cost.prefilling import prefill_unlike
from spanker.sched.cost.resharding import frees_s, resharding
from spanker.sched.layout import card_buffers
from spanker.sched.limits import CANDIDATES
from spanker.sched.pages import PageMove, Table, pools, seated
from spanker.sched.plan import Limits, ModelShape, Plan
from spanker.sched.resharding import Holdings, contents
from spanker.sched.topology import Topology
from spanker.values import Value, lazy_frozen

# How often a step in flight is looked at, at most.
WATCH_S = 1.0


class Weights(enum.Enum):
    """Where the weights of the plan afterwards come from: what any card that is left holds from
    that one, and the rest from the host, as a fleet does it; what each card holds itself, and the
    rest from the host, as it does with audits; all of them from the host, as it does where that
    fails; or they are there, with their programs, on a replica that takes the sequences.
    """

    PEERS = "peers"
    OWN = "own"
    HOST = "host"
    HELD = "held"


@lazy_frozen
class RecoveryCost(Value):
    """Seconds of each part, in their order, and what they come to.

    `detection_s`: from the failure to when the card is known to be lost.  `release_s`: asking the
    cards that are left, and freeing what is not to be kept.  `weights_s` with the counting and
    allocating of memory, and KV pages, `programs_s`, and `kv_s`: the tokens computed again, if they
    must be, until the last sequence has its next one.
    """

    detection_s: float
    release_s: float
    weights_s: float
    programs_s: float
    kv_s: float

    @property
    def replan_s(self) -> float:
        """From when the card is known to be lost to when the other plan can run steps; what
        `events.Replanned.seconds` says.  Nothing where another replica holds the weights."""
        return self.release_s + self.weights_s + self.programs_s

    @property
    def seconds(self) -> float:
        """From the failure to the last sequence's next token."""
        return self.detection_s + self.replan_s + self.kv_s


def recovery(
    shape: ModelShape,
    before: Plan,
    lost: Sequence[int],
    after: Plan,
    profile: Profile,
    topology: Topology,
    limits: Limits,
    *,
    positions: Sequence[int],
    weights: Weights = Weights.PEERS,
    others: Sequence[Plan] = (),
    serving: Sequence[int] = (),
    hang_timeout_s: float | None = None,
    candidates: int = CANDIDATES,
) -> RecoveryCost:
    """What is predicted when a replica with plan `before` loses these cards while it decodes, and
    goes on with `after`.

    `positions`: the tokens of each of its sequences by then, prompts included.  `others`: the plans
    of the other replicas, whose cards can bring weights.  `serving`: the positions of sequences
    that decode on `after` already; they make a step or two before they share one.  A card that
    hangs is noticed after `hang_timeout_s` without progress, one that is gone at once (None).

    `topology` is that of the whole fleet.  Raises PlanError for a plan that does not fit the model
    or the cards that are left.
    """
    alive = tuple(card for card in topology.cards if card not in lost)
    left = topology.among(alive)
    gone = sorted(set(after.cards) & set(lost))
    if gone:
        raise PlanError(f"plan {after.name} uses card {gone[0]}, which is lost")
    detection_s = _detection_s(profile, len(before.cards), hang_timeout_s)
    release_s = weights_s = programs_s = 0.0
    kept = False
    if weights is not Weights.HELD:
        held = Holdings.of(before, others, alive)
        loading = load(shape, after, profile, left, limits)
        weights_s, programs_s = loading.seconds - loading.programs_s, loading.programs_s
        counts = [len(card_buffers(shape, before, card, limits)) for card in held.own]
        if weights is not Weights.HOST:
            moved = resharding(
                shape,
                held,
                after,
                profile,
                left,
                limits,
                pages=_page_move(positions, limits),
                from_peers=weights is Weights.PEERS,
            )
            weights_s, kept = moved.seconds, moved.keeps
            for i, card in enumerate(held.own):
                counts[i] -= len(contents(shape, before, card, limits.context))
                counts[i] -= len(pools(shape, before, card, limits)) if kept else 0
        release_s = _release_s(profile, len(topology.cards), counts)
    kv = prefill_unlike(
        shape,
        after,
        profile,
        left,
        lengths=positions,
        computed=[position - 1 for position in positions] if kept else (),
        chunk=limits.prompt_chunk,
        decoding=serving,
        candidates=candidates,
        kv_copies=limits.kv_copies,
    )
    return RecoveryCost(detection_s, release_s, weights_s, programs_s, kv.seconds)


def _detection_s(profile: Profile, cards: int, hang_timeout_s: float | None) -> float:
    """A card that is gone answers so at once; one that hangs is looked at, with all cards of its
    plan, from time to time.  Then an abort goes to each of them and comes back."""
    abort_s = round_trip_s(profile, 2 * cards * messages.SMALL_BYTES)
    if hang_timeout_s is None:
        return abort_s + round_trip_s(profile, messages.SMALL_BYTES) / 2
    asked_s = cards * round_trip_s(profile, messages.SMALL_BYTES + messages.counters_bytes(cards))
    every_s = min(max(WATCH_S, hang_timeout_s / 10), hang_timeout_s / 4) + asked_s
    # The first look is what the others are compared with.
    return every_s * (1 + math.ceil(hang_timeout_s / every_s)) + abort_s


def _page_move(positions: Sequence[int], limits: Limits) -> PageMove | None:
    """The pages of sequences of which all but the newest token has been computed."""
    used = [-(-(position - 1) // limits.page_positions) for position in positions]
    # Each has pages for what is to come, too.
    each = max(limits.kv_pages // max(len(used), 1), *used, 0)
    tables = [Table(tuple(range(i * each, i * each + n)), n) for i, n in enumerate(used)]
    return PageMove.of(tables, seated(tables, limits.kv_pages), limits, limits)


def _release_s(profile: Profile, cards: int, counts: Sequence[int]) -> float:
    """Counters of the cards that are left, of so many, all at the same time; then a message for the
    program and one for every buffer that is freed at once, `counts` on each card."""
    if not counts or not profile.host_link_bytes_per_s:
        return 0.0
    counters = messages.SMALL_BYTES + messages.counters_bytes(cards)
    asked_s = round_trip_s(profile, len(counts) * counters)
    program_s = round_trip_s(profile, 2 * len(counts) * messages.SMALL_BYTES)
    return asked_s + program_s + frees_s(profile, counts)
