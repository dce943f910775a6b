# SPDX-License-Identifier: Apache-2.0
"""One answer, whatever dies: a real model loses cards in the middle of a generation.

A failing case is replayed by its name; `bench/recovery.py` measures the time of it.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

import spanker
from spanker.testing import hang, kill

PROMPT = "Once upon a time"
TOKENS = 48

Answer = tuple[tuple[int | None, ...], str]


async def answer(path: Path, cards: int, faults: list[tuple[int, str, int]]) -> Answer:
    """Tokens and the hash of their logits; `faults` are (after tokens, what, card)."""
    async with spanker.open_fleet(cards, plan="tp", hang_timeout_s=0.5) as fleet:
        model = await fleet.load(path, ctx=256, kv_tokens=256)
        digest, ids = hashlib.sha256(), []
        generation = model.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, logits=True)
        async for token in generation:
            if token.logits is None:
                continue
            ids.append(token.id)
            digest.update(token.logits.tobytes())
            for after, what, card in faults:
                if after == len(ids):
                    (kill if what == "kill" else hang)(fleet, card)
        assert sorted(card for card, _ in fleet.health().lost) == sorted({f[2] for f in faults})
        return tuple(ids), digest.hexdigest()


async def survives(seed: int, path: Path) -> None:
    draw = random.Random(seed)
    cards = draw.choice([2, 3, 4, 5])
    dying = draw.sample(range(cards), draw.randrange(1, cards))
    # Not among the last tokens, which may be computed already.
    faults = [(draw.randrange(1, TOKENS - 4), draw.choice(["kill", "hang"]), c) for c in dying]
    print(f"seed {seed}: {cards} cards, {faults}")
    assert await answer(path, cards, faults) == await answer(path, 1, [])


@pytest.mark.parametrize("seed", range(3))
async def test_dying_cards_leave_every_bit(seed: int, smollm2_path: Path) -> None:
    await survives(seed, smollm2_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3, 40))
async def test_dying_cards_leave_every_bit_again_and_again(seed: int, smollm2_path: Path) -> None:
    await survives(seed, smollm2_path)
