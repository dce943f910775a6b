# SPDX-License-Identifier: Apache-2.0
"""Why a plan was chosen, in words for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spanker.sched.bandwidth import Profile
from spanker.sched.cost import StepCost
from spanker.sched.planning.request import Candidate

if TYPE_CHECKING:
    from spanker.sched.decision import Decision


def reason(profile: Profile, cards: int, candidates: Sequence[Candidate], gap: float) -> str:
    """One sentence about the first of the candidates: what it does, what bounds it, what comes
    next, how sure that is."""
    chosen = candidates[0]
    idle = cards - len(chosen.plan.cards)
    parts = [
        f"{chosen.tokens_per_second:.3g} tokens/s predicted with the {profile.name} figures, "
        f"{spent(slowest(chosen))}"
    ]
    if idle:
        parts.append(f"{idle} card{'s stay' if idle > 1 else ' stays'} idle")
    other = _next(candidates)
    if other is not None:
        slower = chosen.tokens_per_second / other.tokens_per_second - 1
        parts.append(f"{other.plan.name} is {_percent(slower)} slower")
    parts.append(certainty(gap))
    return "; ".join(parts)


def beside_the_rule(
    answers: Sequence[Decision], cards: int, candidates: Sequence[Candidate]
) -> str:
    """What `pick_strategy` says, and where the plan chosen is another, why."""
    from spanker.sched.decision import Strategy  # a plan is made without asking the rule

    total = sum(answer.weight_bytes for answer in answers)
    by_tensor = sum(a.weight_bytes for a in answers if a.strategy is Strategy.TENSOR_PARALLEL)
    tensor = 2 * by_tensor >= total
    part = (by_tensor if tensor else total - by_tensor) / total
    name = f"tp{cards}" if tensor else f"pp{cards}"
    said = f"pick_strategy says {'tensor' if tensor else 'model'} parallel for {_percent(part)}"
    said += f" of the weights: {name}"
    chosen = candidates[0]
    if cards == 1 or chosen.plan.name == name:
        return f"{said}, as chosen"
    other = next((c for c in candidates if c.plan.name == name), None)
    if other is None:
        return f"{said}, which does not fit the model or the cards' memory"
    slower = chosen.tokens_per_second / other.tokens_per_second - 1
    return (
        f"{said}, {_percent(slower)} slower than {chosen.plan.name}: the rule weighs one matrix's "
        f"bytes against one activation, not what a whole step takes, which with {name} is "
        f"{spent(slowest(other))}"
    )


def slowest(candidate: Candidate) -> StepCost:
    """The step of the slowest replica."""
    return max(
        (cost for cost in candidate.cost.replicas if cost is not None), key=lambda c: c.seconds
    )


def spent(cost: StepCost) -> str:
    """What a step spends its time on, the largest parts first."""
    shares = sorted(cost.shares.items(), key=lambda item: -item[1])
    named = [f"{_percent(part)} {bound.value}" for bound, part in shares if part >= 0.05]
    return ", ".join(named)


def certainty(gap: float) -> str:
    """How good a plan is beside the best there is."""
    if gap == 0:
        return "no plan is faster by the cost model"
    return f"no plan can be faster by more than {_percent(gap)}"


def _next(candidates: Sequence[Candidate]) -> Candidate | None:
    """The best one of another form."""
    name = candidates[0].plan.name
    return next((c for c in candidates[1:] if c.plan.name != name), None)


def _percent(part: float) -> str:
    percent = 100 * part
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
