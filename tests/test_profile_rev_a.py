# SPDX-License-Identifier: Apache-2.0
"""A fleet behind the host link of the first board: the same bits, its pace, all bytes counted."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest
import trio
from reference_model import forward

import spanker
from spanker.actors import host_link
from spanker.actors.channel import StreamChannel
from spanker.actors.frame import frame_bytes
from spanker.actors.host_link import HostLink
from spanker.actors.message import Message, Request, encode
from spanker.sched.bandwidth import REV_A
from spanker.testing.models import tiny_llama

# A few megabytes: enough to measure a rate, little enough for a test.
MODEL = tiny_llama(format="f32", hidden=256, heads=8, kv_heads=4, ffn=512, vocabulary=1000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> list[HostLink]:
    """The host link of the fleet that the test opens, once it has."""
    made: list[HostLink] = []

    def make(*args: float) -> HostLink:
        made.append(HostLink(*args))
        return made[-1]

    monkeypatch.setattr(host_link, "HostLink", make)
    return made


@pytest.fixture
def sent_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of all frames that stream channels were given, by the direction of the message."""
    counts = {"to cards": 0, "to host": 0}
    send = StreamChannel.send

    async def counted(self: StreamChannel, message: Message, request_id: int) -> None:
        nbytes = frame_bytes(encode(message, request_id))
        is_request = isinstance(message, Request)
        await send(self, message, request_id)
        counts["to cards" if is_request else "to host"] += nbytes

    monkeypatch.setattr(StreamChannel, "send", counted)
    return counts


async def test_every_byte_over_the_host_link_is_counted(
    path: Path, link: list[HostLink], sent_bytes: dict[str, int]
) -> None:
    async with spanker.open_fleet("soft:3", plan="tp", profile="rev-a") as fleet:
        (host_link,) = link
        model = await fleet.load(path, ctx=64, kv_tokens=64)
        weights = host_link.bytes_to_cards
        # Everything that the cards hold has come this way, except their empty work memory.
        assert weights > MODEL_BYTES
        got = await model.logits([1, 2, 3])
        assert np.array_equal(got.view(np.uint32), forward(MODEL, [1, 2, 3]).view(np.uint32))
        to_host = host_link.bytes_to_host
        await model.generate([1, 2, 3], max_tokens=4, ignore_eos=True).collect()
        assert host_link.bytes_to_cards == sent_bytes["to cards"]
        assert host_link.bytes_to_host == sent_bytes["to host"]
        # A greedy token costs the host a few kilobytes, never the logits.
        per_token = (host_link.bytes_to_host - to_host) / 4
        assert per_token < 3 * 64 * 8 + 4 * 8 + 2000
    assert host_link.bytes_to_cards == sent_bytes["to cards"]
    assert host_link.bytes_to_host == sent_bytes["to host"]


MODEL_BYTES = sum(len(t.data) for t in MODEL.tensors.values() if "token_embd" not in t.name)


async def test_loading_keeps_to_the_rate_of_the_host_link(path: Path, link: list[HostLink]) -> None:
    """Paced by trio's clock: never faster, and hardly slower when the machine keeps up."""
    slow = attrs.evolve(REV_A, host_link_bytes_per_s=20_000_000)
    async with spanker.open_fleet("soft:2", plan="tp", profile=slow) as fleet:
        (host_link,) = link
        before, begin = host_link.bytes_to_cards, trio.current_time()
        await fleet.load(path, ctx=64, kv_tokens=64)
        took_s = trio.current_time() - begin
        sent = host_link.bytes_to_cards - before
    assert sent > 3_000_000
    # `send` returns up to 2 ms before the last byte has left.
    assert took_s > sent / 20e6 - 0.002
    assert took_s < 2 * sent / 20e6 + 1


async def test_the_profile_decides_what_is_planned_with(path: Path) -> None:
    async with spanker.open_fleet("soft:2", profile="rev-a") as fleet:
        assert fleet.profile is REV_A
        await fleet.load(path, ctx=64, kv_tokens=64)
        assert "with the rev-a figures" in fleet.plan.reason


async def test_a_fleet_without_a_throttled_link_has_none(path: Path, link: list[HostLink]) -> None:
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        await fleet.load(path, ctx=64, kv_tokens=64)
    assert link == []
