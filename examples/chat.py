# SPDX-License-Identifier: Apache-2.0
"""A chat of several turns; the model's own template makes the prompt.

Run it with `python examples/chat.py "My name is Ana." "What is my name?"`.
"""

import sys

import trio

import spanker

TURNS = sys.argv[1:] or ["My name is Ana. Please greet me.", "What is my name?"]


async def main() -> None:
    async with spanker.open_fleet("soft:2") as fleet:
        model = await fleet.load("smollm2")
        messages = []
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            print(f"you:   {turn}\nmodel: ", end="")
            answer = model.chat(messages, max_tokens=48)
            async for token in answer:
                print(token.text, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer.text})


trio.run(main)
