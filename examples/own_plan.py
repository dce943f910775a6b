# SPDX-License-Identifier: Apache-2.0
"""A plan of your own: compared with the planner's by the cost model, then run; the same answer.

Three cards, of which the first has to do twice as much as each of the others: as one would plan
for a fleet of unequal boards.  Run it with `python examples/own_plan.py`.
"""

import trio

import spanker
from spanker.sched.bandwidth import REV_A
from spanker.sched.cost import decode
from spanker.sched.plan import CardShare, ModelShape, Plan, Stage, check_plan, dimensions
from spanker.sched.shapes import named_shape
from spanker.sched.shares import Share, split
from spanker.sched.topology import Topology

PROMPT = "The capital of France is"


def weighted(shape: ModelShape, weights: list[float]) -> Plan:
    """One stage; each card's part of every dimension goes by its weight."""
    parts = {
        name: split(total, len(weights), unit=unit, weights=weights)
        for name, unit, total in dimensions(shape, first=True, last=True)
    }
    shares = tuple(
        CardShare(card, **{name: parts[name][card] for name in parts})
        for card in range(len(weights))
    )
    return Plan("two to one", (Stage(Share(0, len(shape.layers)), shares),), "as I like it")


async def main() -> None:
    shape = named_shape("smollm2-135m", "q4_1")
    own = weighted(shape, [2, 1, 1])
    check_plan(shape, own)
    cost = decode(shape, own, REV_A, Topology.with_mock(3), context=64)
    print(
        f"{own.name}: {cost.tokens_per_second:.1f} tokens/s predicted, bound by {cost.bound.value}"
    )

    texts = []
    for plan in ("auto", own):
        async with spanker.open_fleet("soft:3", profile="rev-a") as fleet:
            model = await fleet.load("smollm2", plan=plan, ctx=256)
            texts.append(await model.generate(PROMPT, max_tokens=16).collect())
            print(f"{model.plan.name}: {model.plan.reason}")
            for card in (await fleet.stats()).cards:
                print(f"  card {card.number}: {card.share}")
    print(f"{PROMPT}{texts[1]}")
    print(f"the same answer: {texts[0] == texts[1]}")


trio.run(main)
