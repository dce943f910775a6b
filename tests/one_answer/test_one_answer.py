# SPDX-License-Identifier: Apache-2.0
"""One answer: tokens and logits are the same bits however the work is spread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import spanker
from spanker.errors import CardMemoryError
from spanker.ggml import packed
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile

sys.path.insert(0, str(Path(__file__).parent))

import matrix


@pytest.mark.parametrize("case", matrix.single_factor_cases(), ids=str)
async def test_each_factor_alone_leaves_every_bit(case: matrix.Case, smollm2_path: Path) -> None:
    # Sampling is a function of the logits: of slow cases it is left to the long tests.
    found = await matrix.answers(case, smollm2_path, sampled=not case.slow)
    assert found == [matrix.GREEDY, matrix.AT_0_8][: len(found)]


@pytest.mark.long
@pytest.mark.parametrize("case", matrix.pair_cases(), ids=str)
async def test_pairs_of_factors_leave_every_bit(case: matrix.Case, smollm2_path: Path) -> None:
    assert await matrix.answers(case, smollm2_path) == [matrix.GREEDY, matrix.AT_0_8]


async def test_a_packed_copy_leaves_every_bit(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANKER_CACHE", str(tmp_path))
    with GGUFFile(smollm2_path) as gguf:
        packed.write(gguf, llama.read_model(gguf).multiplied)
    assert await matrix.answers(matrix.Case("soft:3"), smollm2_path, sampled=False) == [
        matrix.GREEDY
    ]


async def test_cards_too_small_for_the_model_run_it_together(smollm2_path: Path) -> None:
    # 100 MB of weights: a quarter fits into 64 MiB, the whole does not.
    small = {"ctx": 256, "prompt_chunk": 64}
    with pytest.raises(CardMemoryError, match=r"needs [\d,]+ bytes on card 0 .*has 67,108,864"):
        async with spanker.open_fleet("soft:1:64MiB", plan="tp") as fleet:
            await fleet.load(smollm2_path, **small)
    texts = []
    for cards in ("soft:4:64MiB", "soft:1"):
        async with spanker.open_fleet(cards, plan="tp") as fleet:
            model = await fleet.load(smollm2_path, **small)
            texts.append(await model.generate("The capital of France is", max_tokens=8).collect())
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]


async def test_candidates_give_the_tokens_that_all_logits_give(smollm2_path: Path) -> None:
    # No filter and a high temperature: many tokens lie beyond the cards' candidates, and the whole
    # logits are fetched for them.
    tokens = []
    for cards, logits in (("soft:1", True), ("soft:1", False), ("soft:3", False)):
        async with spanker.open_fleet(cards, plan="tp") as fleet:
            model = await fleet.load(smollm2_path, ctx=256)
            generation = model.generate(
                "Once upon a time",
                max_tokens=32,
                temperature=1.4,
                seed=7,
                ignore_eos=True,
                logits=logits,
            )
            await generation.collect()
            tokens.append(generation.token_ids)
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(tokens[0])) > 16


async def test_every_card_holds_what_its_plan_says_and_no_card_holds_everything(
    smollm2_path: Path,
) -> None:
    from spanker.sched.layout import card_bytes

    async with spanker.open_fleet("soft:4", plan="tp") as fleet:
        model = await fleet.load(smollm2_path, ctx=256, prompt_chunk=64)
        (loaded,) = (s.loaded for s in model._replicas.sessions)
        stats = await fleet.stats()
        used = [card.ddr_used_bytes for card in stats.cards]
        limits, shape = loaded.limits, loaded.model.shape
        assert used == [card_bytes(shape, loaded.plan, card, limits) for card in range(4)]
        await model.generate("Hello", max_tokens=4).collect()
        stats = await fleet.stats()
        assert all(card.busy_s > 0 for card in stats.cards)
        read = [card.ddr_read_bytes for card in stats.cards]
        assert max(read) < 0.4 * sum(read)
