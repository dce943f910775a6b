# SPDX-License-Identifier: Apache-2.0
"""Several prompts at once in one fleet: they share steps, so that weights are read once for all.

Run it with `python examples/several_prompts.py`.
"""

import trio

import spanker

PROMPTS = ("Once upon a time", "The first rule of sailing is", "To bake bread you need", "2 + 2 =")


async def main() -> None:
    async with spanker.open_fleet("soft:2") as fleet:
        model = await fleet.load("smollm2")
        texts: dict[str, str] = {}

        async def write(prompt: str) -> None:
            texts[prompt] = await model.generate(prompt, max_tokens=24, ignore_eos=True).collect()

        async with trio.open_nursery() as nursery:
            for prompt in PROMPTS:
                nursery.start_soon(write, prompt)

        for prompt in PROMPTS:
            print(f"--- {prompt}{texts[prompt]}")
        print(f"{model.stats.generated_tokens} tokens in {model.stats.steps} steps")


trio.run(main)
