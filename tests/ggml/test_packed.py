# SPDX-License-Identifier: Apache-2.0
"""Packed copies: what is in them, when they are used, and what a fleet makes of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import trio

import spanker
from spanker.actors.client import CardClient
from spanker.actors.message import MapFile
from spanker.errors import ModelError
from spanker.ggml import packed
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.packed import PackedFile
from spanker.kernels.formats import Format, pack, row_bytes
from spanker.testing import kill, write_tiny_llama

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

PROMPT = list(range(20))
SIZES = {
    "q4_0": {"layers": 2},
    "q6_k": {"hidden": 256, "ffn": 256, "heads": 4, "format": "q6_k", "tied": False},
    "f16": {"format": "f16", "heads": 3, "kv_heads": 3, "hidden": 96},
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPANKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model.gguf", **SIZES[request.param])


@pytest.fixture
def q4_0(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model.gguf", **SIZES["q4_0"])


def write(path: Path, **options: object) -> Path:
    with GGUFFile(path) as gguf:
        return packed.write(gguf, llama.read_model(gguf).multiplied, **options)  # type: ignore[arg-type]


def find(path: Path) -> PackedFile | None:
    with GGUFFile(path) as gguf:
        found = PackedFile.find(gguf)
    if found is not None:
        found.close()
    return found


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Buffers in each MapFile that is sent."""
    sent: list[int] = []
    post = CardClient.post

    async def posting(self: CardClient, request: object, callback: object) -> None:
        if isinstance(request, MapFile):
            sent.append(len(request.places))
        await post(self, request, callback)  # type: ignore[arg-type]

    monkeypatch.setattr(CardClient, "post", posting)
    yield sent


async def answer(path: Path, cards: str, plan: str, **options: object) -> str:
    """The SHA-256 of the logits of some tokens."""
    async with spanker.open_fleet(cards, plan="tp", **options) as fleet:  # type: ignore[arg-type]
        return await generated(await fleet.load(path, plan=plan, ctx=64))


async def generated(model: spanker.Model) -> str:
    """The SHA-256 of the logits of some tokens."""
    digest = hashlib.sha256()
    async for token in model.generate(PROMPT, max_tokens=6, ignore_eos=True, logits=True):
        if token.logits is not None:
            digest.update(token.logits.tobytes())
    return digest.hexdigest()


# --- the file --------------------------------------------------------------------------


def test_it_holds_every_matrix_packed_as_a_whole(model: Path) -> None:
    reports: list[tuple[int, int]] = []
    path = write(model, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (path.stat().st_size,) * 2
    with GGUFFile(model) as gguf, PackedFile.find(gguf) or pytest.fail("no copy") as copy:
        assert copy.path == path == packed.path_of(model)
        for shape, format in llama.read_model(gguf).multiplied:
            place = copy.place(shape, format, 0, shape.rows)
            assert place is not None and place % packed.ALIGN == 0
            expected = pack(format, gguf.tensor_data(shape.name), shape.k)
            out = np.empty(expected.size, np.uint8)
            copy.read(place, out)
            assert np.array_equal(out, expected), shape.name
            # A share is a run of tiles; what cuts one is not to be had.
            if shape.rows >= 48:
                part = np.empty(32 * shape.row_bytes, np.uint8)
                at = copy.place(shape, format, 16, 32)
                assert at is not None
                copy.read(at, part)
                rows = gguf.tensor_data(shape.name)[16:48]
                assert np.array_equal(part, pack(format, rows, shape.k))
                assert copy.place(shape, format, 8, 16) is None
                assert copy.place(shape, format, 16, 24) is None
            assert copy.place(shape, Format.Q5_1, 0, 16) is None


@pytest.mark.parametrize("write_bytes", [64, 100, 4096])
def test_its_bytes_do_not_depend_on_how_they_are_written(
    q4_0: Path, monkeypatch: pytest.MonkeyPatch, write_bytes: int
) -> None:
    expected = write(q4_0).read_bytes()
    monkeypatch.setattr(packed, "_WRITE_BYTES", write_bytes)
    assert write(q4_0).read_bytes() == expected


def test_the_layout_of_tiles_is_that_of_this_version() -> None:
    rng = np.random.default_rng(5)
    digest = hashlib.sha256()
    for format in Format:
        k = 512
        rows = rng.integers(0, 256, (32, row_bytes(format, k)), np.uint8)
        digest.update(pack(format, rows, k).tobytes())
    # Whoever changes it changes packed.VERSION: older copies must not be taken for its own.
    assert (packed.VERSION, digest.hexdigest()[:16]) == (1, "dd47510d21b104f5")


# --- which one is used -----------------------------------------------------------------------


def test_a_changed_model_is_another_one(q4_0: Path) -> None:
    assert find(q4_0) is None
    write(q4_0)
    assert find(q4_0) is not None
    status = q4_0.stat()
    os.utime(q4_0, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert find(q4_0) is None
    assert [copy.current for copy in packed.copies()] == [False]
    write(q4_0)
    assert find(q4_0) is not None
    # As large and as old, and yet another one.
    data = bytearray(q4_0.read_bytes())
    at = data.index(b"general.")
    data[at : at + 8] = b"generic."
    status = q4_0.stat()
    q4_0.write_bytes(data)
    os.utime(q4_0, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert find(q4_0) is None


def test_a_link_to_the_model_finds_its_copy(q4_0: Path, tmp_path: Path) -> None:
    write(q4_0)
    link = tmp_path / "link.gguf"
    link.symlink_to(q4_0)
    assert find(link) is not None


def test_what_is_not_whole_is_not_used(q4_0: Path) -> None:
    path = write(q4_0)
    data = path.read_bytes()
    index = msgpack.packb([[1], {"a": [1]}])
    header = packed._HEADER.pack(packed.MAGIC, packed.VERSION, len(index), 0)
    damaged = [data[:end] for end in (0, 5, 20, 100, 2000, len(data) // 2, len(data) - 64)]
    damaged += [b"x" + data[1:], data[:8] + b"\2" + data[9:], data[:30] + b"x" + data[31:]]
    damaged += [header + index, header[:-4] + bytes.fromhex("deadbeef") + index]
    for content in damaged:
        path.write_bytes(content)
        assert find(q4_0) is None
    path.write_bytes(data)
    assert find(q4_0) is not None


def test_a_copy_can_be_listed_and_removed(q4_0: Path) -> None:
    assert packed.copies() == []
    path = write(q4_0)
    assert packed.copies() == [packed.Copy(path, q4_0, path.stat().st_size, True)]
    assert packed.remove(q4_0)
    assert not packed.remove(q4_0)
    assert find(q4_0) is None and packed.copies() == []


def test_nothing_is_left_of_a_copy_that_fails(q4_0: Path, cache: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(q4_0, progress=stop)
    assert not [path for path in (cache / "packed").iterdir() if path.suffix != ".lock"]
    assert find(q4_0) is None


def test_no_room_is_told_before_anything_is_written(
    q4_0: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"takes .* MB and .* has 0 MB; free some space"):
        write(q4_0)
    monkeypatch.undo()
    monkeypatch.setenv("SPANKER_CACHE", "/proc/nowhere")
    with pytest.raises(ModelError, match="cannot store the packed copy of"):
        write(q4_0)


# --- on cards ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "plan"), [("soft:1", "tp"), ("soft:3", "tp"), ("soft:2", "pp"), ("soft:2", "dp2xtp1")]
)
def test_cards_that_map_it_give_the_same_bits(
    model: Path, mapped: list[int], cards: str, plan: str
) -> None:
    expected = trio.run(answer, model, cards, plan)
    assert not mapped
    write(model)
    assert trio.run(answer, model, cards, plan) == expected
    assert sum(mapped) >= 10


def test_an_embedding_that_is_the_output_is_not_copied(q4_0: Path) -> None:
    """Each of two cards needs columns of all rows, which nobody writes: it looks into the mapped
    matrix.  What the plan says it takes, it takes."""
    write(q4_0)

    async def main() -> None:
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(q4_0, ctx=64)
            (session,) = model._replicas.sessions
            loaded = session.loaded
            for card in range(2):
                assert loaded.maps_table(card)
                embed = loaded.program(card).commands[0]
                assert embed.refs[0][1].buffer == llama.TABLE
                columns = loaded.handles[card][llama.COLUMNS]
                assert not any(fleet.devices[card].read(columns, 0, 256))

    trio.run(main)


def test_a_mapped_model_moves(q4_0: Path, mapped: list[int]) -> None:
    """Onto fewer cards, which then have all of it, and back: nobody reads the columns that are not
    there."""
    expected = trio.run(answer, q4_0, "soft:2", "tp")
    write(q4_0)

    async def main() -> None:
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(q4_0, ctx=64)
            for move in (None, fleet.drain, fleet.admit):
                if move is not None:
                    await move(1)
                assert await generated(model) == expected

    trio.run(main)
    assert mapped


@pytest.mark.parametrize("options", [{"channel": "unix"}, {"profile": "rev-a"}])
def test_cards_on_streams_get_its_bytes(
    q4_0: Path, mapped: list[int], options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trio.run(answer, q4_0, "soft:2", "tp")
    write(q4_0)
    reads: list[int] = []
    read = PackedFile.read
    monkeypatch.setattr(
        PackedFile, "read", lambda self, *args: (reads.append(1), read(self, *args))[1]
    )

    async def main() -> str:
        return await answer(q4_0, "soft:2", "tp", **options)

    assert trio.run(main) == expected
    assert reads and not mapped


def test_what_the_system_maps_in_small_pages_is_read(
    q4_0: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trio.run(answer, q4_0, "soft:2", "tp")
    write(q4_0)
    monkeypatch.setattr(PackedFile, "is_huge", lambda self: False)
    assert trio.run(answer, q4_0, "soft:2", "tp") == expected
    assert not mapped


def test_a_model_stays_when_its_copy_is_replaced_or_removed(q4_0: Path) -> None:
    expected = trio.run(answer, q4_0, "soft:2", "tp")
    write(q4_0)

    async def main() -> None:
        async with spanker.open_fleet("soft:2", plan="tp") as fleet:
            model = await fleet.load(q4_0, ctx=64)
            for change in (write, packed.remove):
                change(q4_0)
                assert await generated(model) == expected

    trio.run(main)


async def test_cards_map_it_while_other_models_have_steps_queued_there(q4_0: Path) -> None:
    """A card lets nothing be mapped while something is queued: loads, recoveries and moves wait."""
    write(q4_0)

    async def busy(model: spanker.Model) -> None:
        while True:
            await model.generate(PROMPT, max_tokens=200, ignore_eos=True).collect()

    async with spanker.open_fleet("soft:3", plan="tp") as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(busy, await fleet.load(q4_0, ctx=256))
        model = await fleet.load(q4_0, ctx=64)
        expected = await generated(model)
        for _ in range(3):
            await (await fleet.load(q4_0, ctx=64)).unload()
        await fleet.drain(1)
        await fleet.admit(1)
        kill(fleet, 2)
        assert await generated(model) == expected
        nursery.cancel_scope.cancel()
