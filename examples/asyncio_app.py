# SPDX-License-Identifier: Apache-2.0
"""One fleet in an asyncio app: the same calls, from `spanker.aio`.

Run it with `python examples/asyncio_app.py`.
"""

import asyncio

import spanker.aio


async def main() -> None:
    async with spanker.aio.open_fleet("soft:2") as fleet:
        model = await fleet.load("smollm2")

        async def answer(prompt: str) -> str:
            return await model.generate(prompt, max_tokens=12).collect()

        # Two tasks, one fleet: their tokens come out of shared steps.
        prompts = ("Water boils at", "The largest planet is")
        for prompt, text in zip(prompts, await asyncio.gather(*map(answer, prompts)), strict=True):
            print(f"{prompt}{text}")


asyncio.run(main())
