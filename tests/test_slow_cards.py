# SPDX-License-Identifier: Apache-2.0
"""A fleet with a straggler: it gets a smaller share, and nobody's bits change."""

from __future__ import annotations

from pathlib import Path

import pytest

import spanker
from spanker.events import CardSlow, Event, Replanned
from spanker.testing import run_virtual, write_tiny_llama

TOKENS = 120


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    return write_tiny_llama(
        path, layers=2, hidden=256, heads=8, kv_heads=8, ffn=1024, vocabulary=1024
    )


async def ids_of(model: spanker.Model, slow_after: int, device: object) -> tuple[int, ...]:
    generation = model.generate([5, 6, 7], max_tokens=TOKENS, ignore_eos=True)
    async for _ in generation:
        if len(generation.token_ids) == slow_after:
            device.slow(8.0)  # type: ignore[attr-defined]
    return tuple(generation.token_ids)


def rows_of(model: spanker.Model, card: int) -> int:
    """Rows of the FFN that a card has, of all layers; 0 where it has nothing."""
    replica = model.plan.replicas[0]
    if card not in replica.cards:
        return 0
    stage, share = replica.place(card)
    return share.ffn.size * replica.stages[stage].layers.size


def test_a_straggler_gets_a_smaller_share_and_its_own_back(wide: Path) -> None:
    # As rev-A, without a host link to wait for.
    async def main(rebalance: bool) -> tuple[tuple[int, ...], tuple[Event, ...], float]:
        import trio

        async with spanker.open_fleet("virtual:3", profile="rev-a", rebalance=rebalance) as fleet:
            model = await fleet.load(wide, plan="tp", ctx=256)
            equal = rows_of(model, 1)
            begin = trio.current_time()
            ids = await ids_of(model, 40, fleet.devices[1])
            took_s = trio.current_time() - begin
            events = fleet.events.history
            if rebalance:
                slow, replanned = events
                assert isinstance(slow, CardSlow) and slow.card == 1
                assert slow.factor == pytest.approx(8, rel=0.1)
                assert isinstance(replanned, Replanned) and replanned.lost == ()
                # Nothing is computed again for it.
                assert replanned.kept == replanned.sequences == 1
                assert rows_of(model, 1) < equal
            return ids, events, took_s

    ids, _, with_s = run_virtual(main, True)
    same, events, without_s = run_virtual(main, False)
    assert ids == same and events == ()
    assert with_s < without_s


def test_a_straggler_that_keeps_a_share_is_noticed_when_it_is_itself_again(wide: Path) -> None:
    async def main() -> list[str]:
        async with spanker.open_fleet("virtual:2", profile="rev-a", rebalance=True) as fleet:
            model = await fleet.load(wide, plan="tp", ctx=256)
            equal = rows_of(model, 1)
            device = fleet.devices[1]
            device.slow(3.0)  # type: ignore[union-attr]
            # From before the history begins it is only how this card is.
            await ids_of(model, -1, device)
            assert fleet.events.history == ()
            device.slow(9.0)  # type: ignore[union-attr]
            await ids_of(model, -1, device)
            assert rows_of(model, 1) < equal
            return [str(event) for event in fleet.events.history]

    (slow, *_) = run_virtual(main)
    assert slow == "card 1 takes 3.0 times as long as it did"


async def test_steady_soft_cards_keep_their_shares(wide: Path) -> None:
    async with spanker.open_fleet("soft:2", rebalance=True) as fleet:
        model = await fleet.load(wide, plan="tp", ctx=256)
        before = model.plan
        await ids_of(model, -1, fleet.devices[0])
        if not fleet.events.history:
            assert model.plan == before
