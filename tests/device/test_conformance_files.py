# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of CardDevice: files that stand for the memory of buffers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conformance_rigs import collect, make_program, step

from spanker.device.base import MAP_ALIGN, CardDevice
from spanker.errors import CardCommandError
from spanker.kernels import program as op
from spanker.kernels.elements import Element
from spanker.kernels.formats import Format
from spanker.kernels.program import Ref, SequenceStep, encode_step

NBYTES = 100_000


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(3).bytes(NBYTES)


@pytest.fixture
def fd(tmp_path: Path, content: bytes) -> Iterator[int]:
    (tmp_path / "file").write_bytes(content)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def mapping(card: CardDevice) -> CardDevice:
    if not card.info.maps:
        with pytest.raises(CardCommandError, match="maps no files"):
            card.map_file(0, [])
        pytest.skip("this body maps no files")
    return card


def test_buffers_hold_the_bytes_of_the_file(mapping: CardDevice, fd: int, content: bytes) -> None:
    used = mapping.counters().ddr_used_bytes
    sizes = (64, 5000, 8192, 1)
    places = [(mapping.alloc(n), i * 3 * MAP_ALIGN, n) for i, n in enumerate(sizes)]
    mapping.write(places[1][0], 0, b"\x55" * 5000)  # which nothing is left of
    before = mapping.counters().ddr_used_bytes
    mapping.map_file(fd, places[:3])
    mapping.map_file(fd, places[3:])
    assert mapping.counters().ddr_used_bytes == before
    for handle, offset, nbytes in places:
        assert mapping.read(handle, 0, nbytes) == content[offset : offset + nbytes]
        with pytest.raises(CardCommandError):
            mapping.read(handle, 1, nbytes)
    for handle, _, _ in places:
        mapping.free(handle)
    assert mapping.counters().ddr_used_bytes == used
    # The place of those that are gone is empty again.
    handle = mapping.alloc(16384)
    assert mapping.read(handle, 0, 16384) == bytes(16384)


def test_what_is_written_to_them_stays_on_the_card(
    mapping: CardDevice, fd: int, content: bytes
) -> None:
    a, b, c = (mapping.alloc(8192) for _ in range(3))
    mapping.map_file(fd, [(a, 4096, 8192)])
    mapping.map_file(fd, [(b, 4096, 8192)])
    mapping.write(a, 100, b"\0" * 50)
    mapping.fill(a, 200, 4, lambda out: out.fill(7))
    program = make_program(op.copy(Element.F32, Ref("a", 0, 400), Ref("c"), count=16))
    handle = mapping.load_program(program.encode({"a": a, "c": c}))
    mapping.submit(handle, step(0), reads=[(a, 0, 8192)])
    [done] = collect(mapping, 1)
    want = bytearray(content[4096 : 4096 + 8192])
    want[100:150] = bytes(50)
    want[200:204] = b"\7" * 4
    want[400:464] = bytes(64)
    assert done.data == (bytes(want),)
    assert mapping.read(a, 0, 8192) == bytes(want)
    assert mapping.read(b, 0, 8192) == content[4096 : 4096 + 8192]
    assert os.pread(fd, NBYTES, 0) == content


def test_what_does_not_fit_is_refused(mapping: CardDevice, fd: int) -> None:
    a, b = mapping.alloc(4096), mapping.alloc(4096)
    for place in (
        (a, 0, 4095),  # not all of it
        (a, 0, 4097),
        (a, MAP_ALIGN // 2, 4096),
        (a, NBYTES // MAP_ALIGN * MAP_ALIGN, 4096),  # the file ends
        (a, 1 << 63, 4096),
        (a, -MAP_ALIGN, 4096),
        (b + 100, 0, 4096),
        (-1, 0, 4096),
    ):
        with pytest.raises(CardCommandError, match=str(mapping.number)):
            mapping.map_file(fd, [place])
    for file in (-1, 1 << 20):
        with pytest.raises(CardCommandError, match="mapping file descriptor"):
            mapping.map_file(file, [(a, 0, 4096)])
    assert mapping.read(a, 0, 4096) == bytes(4096)
    # Nor while a program refers to the buffer.
    program = make_program(op.copy(Element.F32, Ref("a"), Ref("b"), count=16))
    handle = mapping.load_program(program.encode({"a": a, "b": b}))
    with pytest.raises(CardCommandError):
        mapping.map_file(fd, [(a, 0, 4096)])
    mapping.unload_program(handle)
    mapping.map_file(fd, [(a, 0, 4096)])


def test_a_window_onto_a_file_takes_no_memory_and_is_only_read(
    mapping: CardDevice, fd: int, content: bytes
) -> None:
    used = mapping.counters().ddr_used_bytes
    window = mapping.window(8192)
    mapping.map_file(fd, [(window, 4096, 8192)])
    assert mapping.counters().ddr_used_bytes == used
    x, chosen = mapping.alloc(4 * 64), mapping.alloc(4 * 4)
    handles = {"table": window, "x": x, "chosen": chosen}
    table, rows = Ref("table", 64), Ref("x", 64)
    look_up = op.embed(Format.F32, table, Ref("chosen", 4), rows, columns=16, vocabulary=128)
    program = mapping.load_program(make_program(look_up, tokens=4, outputs=4).encode(handles))
    there = np.frombuffer(content[4096 : 4096 + 8192], np.float32).reshape(128, 16)
    numbers = np.flatnonzero(np.isfinite(there).all(axis=1))
    ids = numbers[[0, -1, 5, 5]].tolist()
    mapping.submit(program, encode_step([SequenceStep(ids, 0, [])]), reads=[(x, 0, 256)])
    [done] = collect(mapping, 1)
    assert done.error is None
    assert done.data == (there[ids].tobytes(),)
    for write in (
        op.copy(Element.F32, table, rows, count=16),
        op.add(Ref("table", 64), rows, n=16),
        op.embed(Format.F32, table, Ref("chosen", 4), table, columns=16, vocabulary=128),
    ):
        with pytest.raises(CardCommandError, match="only read"):
            mapping.load_program(make_program(write, tokens=4).encode(handles))
    with pytest.raises(CardCommandError):
        mapping.write(window, 0, b"1")
    mapping.unload_program(program)
    for handle in handles.values():
        mapping.free(handle)
    assert mapping.counters().ddr_used_bytes == used


def test_no_mapping_outlives_its_buffers(mapping: CardDevice, fd: int, tmp_path: Path) -> None:
    path = os.path.realpath(tmp_path / "file")

    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum(line.rstrip().endswith(path) for line in maps)

    a, b, c = (mapping.alloc(4096) for _ in range(3))
    mapping.map_file(fd, [(a, 0, 4096), (b, 4096, 4096)])
    mapping.map_file(fd, [(c, 0, 4096)])
    assert mappings() == 1
    for handle in (a, b, c):
        assert mappings() == 1
        mapping.free(handle)
    assert mappings() == 0
