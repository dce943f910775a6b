# SPDX-License-Identifier: Apache-2.0
"""Copies of KV: which card keeps whose keys and values a second time.

Each card's are kept by the next one of its stage, the last one's by the first: the stage works on
the same layer at the same time, so that nobody waits for another stage because of them.
"""

from __future__ import annotations

from spanker.errors import PlanError
from spanker.sched.detours import Down
from spanker.sched.plan import CardShare, FleetPlan, ModelShape, Plan
from spanker.sched.shares import Share


def keeper(plan: Plan, card: int) -> int | None:
    """The card that keeps a copy of a card's keys and values; None where it is alone in its stage,
    or has none."""
    number, share = plan.place(card)
    cards = plan.stages[number].cards
    if len(cards) < 2 or share.heads.empty:
        return None
    return cards[(cards.index(card) + 1) % len(cards)]


def ward(plan: Plan, card: int) -> CardShare | None:
    """The share of the card whose keys and values a card keeps a copy of."""
    number, _ = plan.place(card)
    shares = plan.stages[number].shares
    before = shares[plan.stages[number].cards.index(card) - 1]
    return before if keeper(plan, before.card) == card else None


def ward_heads(shape: ModelShape, plan: Plan, card: int) -> Share:
    """The KV heads of that card."""
    kept = ward(plan, card)
    return Share(0, 0) if kept is None else kept.kv_heads(shape.group)


def keeps_all(plan: Plan | FleetPlan) -> bool:
    """Whether every card's keys and values have somebody to keep a copy of them."""
    replicas = plan.replicas if isinstance(plan, FleetPlan) else (plan,)
    return all(len(stage.cards) > 1 for replica in replicas for stage in replica.stages)


def copies_over_host(plan: Plan, down: Down) -> tuple[tuple[int, int], ...]:
    """From which card to which copies go over the host: no other card hands them on."""
    return tuple(
        (card, to)
        for card in plan.cards
        if (to := keeper(plan, card)) is not None and (card, to) in down
    )


def check_copy_ways(plan: Plan, down: Down) -> None:
    """PlanError where a link to who keeps a copy is down: no other card leads there."""
    for card, to in copies_over_host(plan, down):
        raise PlanError(
            f"card {to} keeps a copy of the keys and values of card {card}, and the link "
            f"between them is down"
        )


def check_copies(plan: FleetPlan) -> None:
    """PlanError, saying where, for a plan with a card alone in its stage."""
    for replica in plan.replicas:
        for number, stage in enumerate(replica.stages):
            if len(stage.cards) < 2:
                raise PlanError(
                    f"plan {replica.name}: card {stage.cards[0]} alone has the keys and values of "
                    f"stage {number}, and a copy on the same card would be lost with it: use a "
                    f"plan with two cards or more in each stage, such as tp, or no kv_copies"
                )
