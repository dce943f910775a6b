# SPDX-License-Identifier: Apache-2.0
"""Audits find a card whose memory or arithmetic lies, and leave an honest one alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.testing

import spanker
from spanker.actors.audit import Auditor, Tile
from spanker.actors.message import AllocBuffers, ReadBuffer, WriteBuffers
from spanker.actors.steps import LoadedModel
from spanker.errors import CardAuditError, CardLostError, ConfigError
from spanker.events import AuditsEnded, CardLost, CardReturned, Replanned
from spanker.testing import kill, run_virtual, write_tiny_llama

TOKENS = 40


def written(path: Path, format: str = "q4_0") -> Path:
    wide = 256 if format.endswith("_k") else 128
    return write_tiny_llama(
        path / f"{format}.gguf",
        layers=2,
        hidden=wide,
        heads=8,
        kv_heads=4,
        ffn=256,
        format=format,
        vocabulary=600,
    )


async def answer(model: spanker.Model) -> tuple[int, ...]:
    generation = model.generate([5, 6, 7], max_tokens=TOKENS, ignore_eos=True)
    await generation.collect()
    return tuple(generation.token_ids)


def auditor_of(model: spanker.Model) -> Auditor:
    auditor = model._replicas.sessions[0]._auditor
    assert auditor is not None
    return auditor


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k", "f16", "f32"])
async def test_honest_cards_are_found_right(format: str, tmp_path: Path) -> None:
    path = written(tmp_path, format)
    async with spanker.open_fleet(3, audit_every=1) as fleet:
        model = await fleet.load(path, plan="tp")
        given = await answer(model)
        assert auditor_of(model).made >= TOKENS - 2
        assert fleet.events.history == ()
    async with spanker.open_fleet(1) as fleet:
        assert given == await answer(await fleet.load(path))


@pytest.mark.parametrize("plan", ["tp", "tp2xpp2"])
async def test_audits_go_with_every_plan(plan: str, tmp_path: Path) -> None:
    async with spanker.open_fleet("soft:2,soft:2@scalar", audit_every=2) as fleet:
        model = await fleet.load(written(tmp_path), plan=plan)
        await answer(model)
        assert auditor_of(model).made >= TOKENS // 2 - 2
        assert fleet.events.history == ()


def test_virtual_cards_are_audited_too(tmp_path: Path) -> None:
    async def main() -> int:
        async with spanker.open_fleet("virtual:2", plan="tp", audit_every=3) as fleet:
            model = await fleet.load(written(tmp_path))
            await answer(model)
            return auditor_of(model).made

    assert run_virtual(main) >= TOKENS // 3 - 2


async def test_a_card_with_damaged_weights_is_lost_and_the_answers_are_right_again(
    tmp_path: Path,
) -> None:
    path = written(tmp_path)
    async with spanker.open_fleet(3, audit_every=1) as fleet:
        model = await fleet.load(path, plan="tp")
        handles = model._replicas.sessions[0].loaded.handles[1]
        for name, handle in handles.items():
            if name.endswith(("ffn_down.weight", "ffn_up.weight", "output.rows")):
                old = fleet.devices[1].read(handle, 0, 10 * 16 * 18)
                fleet.devices[1].write(handle, 0, bytes(b ^ 0x11 for b in old))
        for _ in range(20):
            await answer(model)
            if fleet.events.history:
                break
        lost, replanned = fleet.events.history
        assert isinstance(lost, CardLost) and lost.card == 1
        assert "computes something else than its file says for rows" in lost.reason
        assert isinstance(replanned, Replanned) and 1 not in replanned.cards
        right = await answer(model)
    async with spanker.open_fleet(1) as fleet:
        assert right == await answer(await fleet.load(path))


async def test_what_is_wrong_on_a_card_stays_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    async with spanker.open_fleet(2, audit_every=1) as fleet:
        model = await fleet.load(path, plan="tp")
        right = await answer(model)
        for name, handle in model._replicas.sessions[0].loaded.handles[0].items():
            if name.endswith(".weight") and "norm" not in name:
                old = fleet.devices[0].read(handle, 0, 64)
                fleet.devices[0].write(handle, 0, bytes(b ^ 0x11 for b in old))
        await fleet.drain(0)
        assert model.plan.cards == (1,)
        for _ in range(5):
            assert await answer(model) == right
        assert fleet.health().lost == () and fleet.health().serving


@pytest.mark.parametrize("audit_every", [None, 1])
def test_with_audits_replicas_are_loaded_from_the_host(
    audit_every: int | None, tmp_path: Path
) -> None:
    async def main() -> list[bool]:
        async with spanker.open_fleet(
            "virtual:2", profile="rev-a", audit_every=audit_every
        ) as fleet:
            await fleet.load(written(tmp_path), plan="dp2")
            return [any(device.counters().link_tx_bytes) for device in fleet.devices]

    assert run_virtual(main) == [audit_every is None, False]


async def test_without_recovery_a_lying_card_ends_its_sequences(tmp_path: Path) -> None:
    async with spanker.open_fleet(2, audit_every=1, recover=False) as fleet:
        model = await fleet.load(written(tmp_path), plan="tp")
        for name, handle in model._replicas.sessions[0].loaded.handles[0].items():
            if name.endswith("ffn_down.weight"):
                nbytes = len(fleet.devices[0].read(handle, 0, 16 * 18 * 4))
                fleet.devices[0].write(handle, 0, bytes(nbytes))
        with pytest.raises(CardAuditError, match="may be wrong; have its memory tested"):
            for _ in range(50):
                await answer(model)


async def test_where_no_audit_can_be_made_sequences_go_on_and_it_is_told(tmp_path: Path) -> None:
    path = written(tmp_path)
    async with spanker.open_fleet(2, audit_every=4) as fleet:
        model = await fleet.load(path, plan="tp")
        right = await answer(model)
        moved = path.rename(tmp_path / "elsewhere.gguf")
        auditor_of(model).close()
        assert await answer(model) == right
        (ended,) = fleet.events.history
        assert isinstance(ended, AuditsEnded) and "no more audits: " in str(ended)
        assert await answer(model) == right
        assert len(fleet.events.history) == 1 and moved.exists()


async def test_every_tile_is_drawn_as_often_as_the_others(tmp_path: Path) -> None:
    async with spanker.open_fleet(2, audit_every=1) as fleet:
        model = await fleet.load(written(tmp_path), plan="tp")
        auditor, loaded = auditor_of(model), model._replicas.sessions[0].loaded
        tiles = [auditor._drawn(loaded) for _ in range(20000)]
        found = Counter((t.card, t.held.buffer, t.first) for t in tiles)
        # Of each layer's seven matrices and of the output: rows in tiles of 16, all on some card.
        shape = loaded.model.shape
        matrices = [m for layer in shape.layers for m in layer.matrices] + [shape.output]
        assert len(found) >= sum(-(-m.rows // 16) for m in matrices)
        mean = len(tiles) / len(found)
        assert min(found.values()) > mean / 2 and max(found.values()) < mean * 2
        assert {t.rows for t in tiles} <= {8, 16}


@pytest.mark.parametrize("every", [0, -3])
async def test_senseless_rates_are_refused(every: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1 step, got {every}"):
        async with spanker.open_fleet(1, audit_every=every):
            pass


async def test_an_audit_that_waits_for_a_card_leaves_alone_what_is_on_a_new_one(
    tmp_path: Path,
) -> None:
    path, size = written(tmp_path), 1 << 16
    async with spanker.open_fleet(3, audit_every=1, hang_timeout_s=0.5) as fleet:
        model, coordinator = await fleet.load(path, plan="tp"), fleet._coordinator
        given = await answer(model)
        auditor, held = auditor_of(model), model._replicas.sessions[0].loaded.handles[1]
        look, drawn = auditor.look, auditor._drawn
        others: list[int] = []

        def of_card_1(loaded: LoadedModel) -> Tile:
            while (tile := drawn(loaded)).card != 1:
                pass
            return tile

        async def come_between(loaded: LoadedModel, steps: int) -> None:
            auditor.look = look  # type: ignore[method-assign]
            await coordinator.take_cards((1,))
            nursery.start_soon(replace_card)
            await look(loaded, steps)

        async def replace_card() -> None:
            await trio.testing.wait_all_tasks_blocked()
            kill(fleet, 1)
            coordinator.lose(CardLostError("card 1 is lost: pulled out", card=1))
            await coordinator.revive(1)
            # Somebody else's, of the same numbers.
            client = coordinator.clients[1]
            for _ in held:
                others.extend((await client.request(AllocBuffers((size,)))).handles)
                filled = bytes([17]) * size
                await client.request(WriteBuffers(((others[-1], 0, size),), buffers=(filled,)))
            coordinator.give_cards_back((1,))

        auditor._drawn = of_card_1  # type: ignore[method-assign]
        auditor.look = come_between  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            assert await answer(model) == given
        assert [type(e) for e in fleet.events.history] == [CardLost, CardReturned, Replanned]
        assert others
        for handle in others:
            reply = await coordinator.ask(1, ReadBuffer(handle, 0, size))
            assert bytes(reply.buffers[0]) == bytes([17]) * size
