# SPDX-License-Identifier: Apache-2.0
"""A fleet in virtual time: seconds are the boards', and a hung card is found and left at once.

python virtual_fleet.py
"""

import tempfile
from pathlib import Path

import trio

import spanker
from spanker.testing import hang, run_virtual, write_tiny_llama


async def main(path: Path) -> None:
    async with spanker.open_fleet("virtual:3", profile="rev-a", hang_timeout_s=3600) as fleet:
        model = await fleet.load(path, plan="tp")
        print(f"loaded after {trio.current_time() * 1e3:.2f} ms")
        generation = model.generate("The wind was fair", max_tokens=100)
        async for token in generation:
            if token.position == 20:
                print(f"token {token.id} after {trio.current_time() * 1e3:.2f} ms")
                break
        hang(fleet, 1)
        fleet.events.listen(lambda event: print(f"at {event.time_s / 3600:.0f} h: {event}"))
        await generation.collect()


with tempfile.TemporaryDirectory() as folder:
    run_virtual(main, write_tiny_llama(Path(folder) / "tiny.gguf"), seed=1)

eight = spanker.Scenario(shape="llama-3-8b", cards=8, plan="tp", prompt_tokens=16, tokens=4)
print(f"an 8B model on 8 boards: {spanker.simulate(eight).decode_tokens_per_second:.2f} tokens/s")
