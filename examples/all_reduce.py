# SPDX-License-Identifier: Apache-2.0
"""Average numpy arrays over the cards of a fleet, without a model.

Run it with `python examples/all_reduce.py`.
"""

import numpy as np
import trio

import spanker


async def main() -> None:
    async with spanker.open_fleet("soft:4") as fleet:
        rng = np.random.default_rng(7)
        gradients = [rng.standard_normal(100_000, np.float32) for _ in fleet.cards]
        expected = gradients[0]
        for gradient in gradients[1:]:
            expected = expected + gradient
        expected = expected / np.float32(len(gradients))

        # In place, folded in the order of the cards: the very bits that numpy gets that way.
        await spanker.all_reduce(fleet, gradients, "avg")
        print("the same bits on every card:", all((g == expected).all() for g in gradients))

        parts = await spanker.reduce_scatter(fleet, gradients, "max")
        print("each card has a share of the maximum:", [part.size for part in parts])

        # Arrays that belong to the fleet, for what is done again and again.
        async with await fleet.arrays(8, np.int32) as counters:
            for card in range(len(counters)):
                await counters.write(card, card)
            for _ in range(3):
                await spanker.all_reduce(fleet, counters)
            print("after three sums of 0, 1, 2, 3:", await counters.read(0))


trio.run(main)
