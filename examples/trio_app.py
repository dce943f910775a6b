# SPDX-License-Identifier: Apache-2.0
"""One fleet in a trio app.

Fetch the model once with `spanker pull smollm2`.
Run it with `python examples/trio_app.py`.
"""

import trio

import spanker


async def main() -> None:
    # Everything that the fleet starts ends with this block.
    async with spanker.open_fleet("soft:3") as fleet:
        model = await fleet.load("smollm2")
        print(f"{model.name} on {len(fleet.cards)} cards, plan {fleet.plan.name}")
        async for token in model.generate("The capital of France is", max_tokens=16):
            print(token.text, end="", flush=True)
        print()
        for card in (await fleet.stats()).cards:
            print(f"card {card.number}: {card.share}; {card.ddr_used_bytes:,} bytes of DDR")


trio.run(main)
