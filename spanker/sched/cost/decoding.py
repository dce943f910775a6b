# SPDX-License-Identifier: Apache-2.0
"""What decoding takes, step after step: the cards' loop, and the host's around two of them.

The cards' loop: a step is taken up, the row goes through the stages, the voters' best tokens go
back to the embedders.  The host's: the answers of a step come in, the second next one is submitted
(timing model, "The host").  A step takes the longer of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.cost.host import HostMessages, step_messages
from spanker.sched.cost.machine import Exchanges, Machine
from spanker.sched.cost.phases import Bound, StagePrice, price_stage, spent_on, stage_pieces
from spanker.sched.cost.pieces import Pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.limits import CANDIDATES
from spanker.sched.plan import FleetPlan, ModelShape, Plan, check_plan
from spanker.sched.shares import split
from spanker.sched.topology import Topology
from spanker.values import Value

# Steps that the host has submitted and not collected.
STEPS_AHEAD = 2


@attrs.frozen(eq=False, repr=False)
class StepCost(Value):
    """What a step of `batch` sequences takes, in seconds.

    `cards_s`: the cards' loop; `host_s`: the host's, per step.  `stages`: what each stage takes of
    the cards' loop; handovers and the choice of the token are the rest.  `spent` adds up to
    `seconds`; host link and host work count as far as the cards wait for them.
    """

    seconds: float
    batch: int
    cards_s: float
    host_s: float
    stages: tuple[float, ...]
    spent: dict[Bound, float]
    bytes_to_cards: float
    bytes_to_host: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def bound(self) -> Bound:
        """What takes the largest part of the time."""
        return max(self.spent, key=self.spent.__getitem__)

    @property
    def shares(self) -> dict[Bound, float]:
        """The part of the time that each of them takes."""
        return {bound: seconds / self.seconds for bound, seconds in self.spent.items()}


@attrs.frozen(eq=False, repr=False)
class FleetCost(Value):
    """Replicas side by side, each with its part of the batch; one without a part is None."""

    replicas: tuple[StepCost | None, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(cost.tokens_per_second for cost in self.replicas if cost is not None)

    @property
    def bound(self) -> Bound:
        """What bounds the slowest replica."""
        return max((c for c in self.replicas if c is not None), key=lambda c: c.seconds).bound


def decode(
    shape: ModelShape,
    plan: Plan,
    profile: Profile,
    topology: Topology,
    *,
    batch: int = 1,
    context: int,
    candidates: int = CANDIDATES,
    sampling: bool = False,
    beside: Sequence[int] = (),
    kv_copies: int = 0,
) -> StepCost:
    """The steady state of decoding `batch` sequences at `context` positions each.

    With `sampling` the host chooses the tokens, and steps are made one by one.  `beside`: cards
    that compute all the while for others; they matter where cards share cores or memory.  With
    `kv_copies` another card keeps each one's keys and values, too.  Raises PlanError for a plan
    that does not fit the model or the topology.
    """
    machine = Machine(profile, topology)
    check_fits(shape, plan, machine)
    candidates = min(candidates, shape.vocabulary)
    rows = StepRows.decode(batch, context)
    by_stage = stage_pieces(shape, plan, machine, rows, beside, kv_copies)
    stages = [price_stage(p, plan, n, candidates) for n, p in enumerate(by_stage)]
    handed = handovers(by_stage, plan)
    handover_s = [exchanges.seconds for exchanges in handed]
    choose_s = by_stage[-1].choose(plan.voters, plan.embedders)
    stage_s = sum(stage.seconds for stage in stages)
    cards_s = profile.step_s + stage_s + sum(handover_s) + choose_s

    host = step_messages(plan, profile, rows, batch, context, candidates)
    round_s = _round_s(profile, host, stages, handover_s) + choose_s + host.end_s
    if sampling:
        host_s = round_s + profile.host_step_s
    else:
        rate = profile.host_link_bytes_per_s
        busy_s = max(host.bytes_to_cards, host.bytes_to_host) / rate if rate else 0.0
        host_s = max(round_s / STEPS_AHEAD, busy_s)
    seconds = host_s if sampling else max(cards_s, host_s)

    spent = dict.fromkeys(Bound, 0.0)
    for stage in stages:
        for bound, part_s in stage.spent.items():
            spent[bound] += part_s
    for exchanges in (*handed, by_stage[-1].votes(plan.voters, plan.embedders)):
        spent[Bound.COMMANDS] += exchanges.commands_s
        spent[Bound.LINKS] += exchanges.links_s
    choosing = by_stage[-1].choose_commands(len(plan.voters))
    for bound, part_s in spent_on(by_stage[-1], plan.embedders[0], choosing).items():
        spent[bound] += part_s
    spent[Bound.COMMANDS] += profile.step_s
    spent[Bound.HOST_WORK] = profile.host_step_s if sampling else 0.0
    spent[Bound.HOST_LINK] = max(seconds - cards_s - spent[Bound.HOST_WORK], 0.0)
    return StepCost(
        seconds=seconds,
        batch=batch,
        cards_s=cards_s,
        host_s=host_s,
        stages=tuple(stage.seconds for stage in stages),
        spent=spent,
        bytes_to_cards=host.bytes_to_cards,
        bytes_to_host=host.bytes_to_host,
    )


def decode_fleet(
    shape: ModelShape,
    plan: FleetPlan,
    profile: Profile,
    topology: Topology,
    *,
    batch: int = 1,
    context: int,
    candidates: int = CANDIDATES,
) -> FleetCost:
    """Decoding on all replicas at the same time, the batch cut among them as evenly as it goes.

    They share the host link: where it cannot carry the messages of all, each is slowed down alike.
    Where cards share cores or memory, one stage of every replica computes at a time.
    """
    parts = split(batch, len(plan.replicas))
    at_work = [
        max(replica.stages, key=lambda stage: len(stage.cards)).cards if part.size else ()
        for replica, part in zip(plan.replicas, parts, strict=True)
    ]
    costs = [
        decode(
            shape,
            replica,
            profile,
            topology,
            batch=part.size,
            context=context,
            candidates=candidates,
            beside=[card for i, cards in enumerate(at_work) if i != number for card in cards],
        )
        if part.size
        else None
        for number, (replica, part) in enumerate(zip(plan.replicas, parts, strict=True))
    ]
    rate = profile.host_link_bytes_per_s
    wanted = (
        max(
            sum(c.bytes_to_cards / c.seconds for c in costs if c is not None),
            sum(c.bytes_to_host / c.seconds for c in costs if c is not None),
        )
        / rate
        if rate
        else 0.0
    )
    return FleetCost(tuple(_slowed(cost, wanted) if cost else None for cost in costs))


def _slowed(cost: StepCost, factor: float) -> StepCost:
    if factor <= 1:
        return cost
    extra_s = cost.seconds * (factor - 1)
    spent = cost.spent | {Bound.HOST_LINK: cost.spent[Bound.HOST_LINK] + extra_s}
    return attrs.evolve(cost, seconds=cost.seconds + extra_s, spent=spent)


def check_fits(shape: ModelShape, plan: Plan, machine: Machine) -> None:
    """Raise PlanError unless a plan computes the model, on cards that there are."""
    check_plan(shape, plan)
    missing = sorted(set(plan.cards) - set(machine.cards))
    if missing:
        raise PlanError(
            f"plan {plan.name} uses card {missing[0]}, the topology has {len(machine.cards)} cards"
        )


def handovers(by_stage: tuple[Pieces, ...], plan: Plan) -> list[Exchanges]:
    """Each handover from a stage to the next one."""
    return [
        pieces.handover(plan.stages[n].cards, plan.stages[n + 1].cards)
        for n, pieces in enumerate(by_stage[:-1])
    ]


def _round_s(
    profile: Profile, host: HostMessages, stages: list[StagePrice], handover_s: list[float]
) -> float:
    """From when the host submits a step that idle cards wait for to when the voters have their
    best tokens."""
    at = host.begin_s[0] + profile.step_s + stages[0].seconds
    for stage, handed_s, begin_s in zip(stages[1:], handover_s, host.begin_s[1:], strict=True):
        # A card of a later stage has long waited for the row, or else has yet to take up the step.
        ready = begin_s + profile.step_s + profile.command_s
        at = max(at + handed_s, ready) + stage.seconds
    return at
