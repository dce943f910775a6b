# SPDX-License-Identifier: Apache-2.0
"""RISC-V cards in an emulator: opened, supervised, refused where something is wrong, at work."""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from conformance_rigs import adder, collect, finish, floats, step, waiter
from crowd import Answers, At, Crowd, Schedule, check_nothing_held, kinds, lost_cards
from waiting import until

import spanker
from spanker.device.firmware import NOTE_HEADER, parse_firmware, sealed
from spanker.device.process import CardProcess
from spanker.device.remote import RemoteCard
from spanker.device.riscv.emulator import Emulator, find_emulator, firmware_path, survey
from spanker.device.riscv.spec import ISAS, VLENS, RiscvCardSpec
from spanker.device.soft import SoftRig
from spanker.errors import CardLostError, ConfigError, FirmwareError
from spanker.events import CardJoined, CardLost, CardReturned, Replanned
from spanker.fleet import Fleet
from spanker.sched.topology import Topology
from spanker.testing import kill
from spanker.testing.assertions import open_descriptors

pytestmark = [pytest.mark.usefixtures("firmware", "nothing_left_behind")]

SMALL = 4 << 20


def rig_of(*specs: RiscvCardSpec) -> SoftRig:
    return SoftRig(specs or [RiscvCardSpec(ddr_bytes=SMALL)])


def remote(rig: SoftRig, number: int = 0) -> RemoteCard:
    card = rig.cards[number]
    assert isinstance(card, RemoteCard)
    return card


def children() -> set[int]:
    """Processes that this one has started and that are there."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(name))
    return found


# --- opening ----------------------------------------------------------------------------


@pytest.mark.parametrize("vlen", VLENS)
def test_every_length_of_vectors_computes(vlen: int) -> None:
    with rig_of(*[RiscvCardSpec(isa, vlen, SMALL) for isa in ISAS]) as rig:
        assert [card.info.isa for card in rig.cards] == list(ISAS)
        assert [card.info.name for card in rig.cards] == ["riscv0", "riscv1", "riscv2"]
        for card in rig.cards:
            program, x, _ = adder(card)
            for _ in range(3):
                card.submit(program, step(tokens=4))
            finish(card, 3)
            assert set(floats(card, x, 64)) == {3.0}


def test_the_best_kernels_are_those_of_vectors() -> None:
    with rig_of() as rig:
        assert rig.cards[0].info.isa == "rvv"


def test_unknown_kernels_are_refused_by_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    with pytest.raises(CardLostError, match="this card has no kernels for avx2"):
        rig_of(RiscvCardSpec("avx2", ddr_bytes=SMALL))
    assert children() == before


def test_a_closed_fleet_leaves_no_process() -> None:
    before = children()
    rig = rig_of(*[RiscvCardSpec(ddr_bytes=SMALL)] * 3)
    assert len(children() - before) == 3
    receive, _ = waiter(rig.cards[0], 1)
    rig.cards[0].submit(receive, step())
    rig.close()
    assert children() == before
    with pytest.raises(CardLostError, match="closed with all cards"):
        rig.cards[0].reopen()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_emulator_is_killed_with_its_host(stopped: bool) -> None:
    """Also where it is stopped, and would not notice."""
    code = (
        "import sys, time\n"
        "from spanker.device.riscv.spec import RiscvCardSpec\n"
        "from spanker.device.soft import SoftRig\n"
        "rig = SoftRig([RiscvCardSpec(ddr_bytes=4096)] * 2)\n"
        "print(*[card.process.pid for card in rig.cards], flush=True)\n"
        "time.sleep(60)\n"
    )
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    pids = [int(pid) for pid in host.stdout.readline().split()]
    assert len(pids) == 2 and all(map(_alive, pids))
    if stopped:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    host.kill()
    host.wait()
    host.stdout.close()
    end = time.monotonic() + 20
    while any(map(_alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV"])
def test_a_crash_of_the_emulator_is_a_dead_card_with_its_last_words(how: str) -> None:
    with rig_of(*[RiscvCardSpec(ddr_bytes=SMALL)] * 2) as rig:
        card = remote(rig)
        receive, _ = waiter(card, 1)
        card.submit(receive, step())
        os.kill(card.process.pid, signal.Signals[how])
        (done,) = collect(card, 1)
        assert isinstance(done.error, CardLostError)
        assert f"ended by {how}" in str(done.error)
        card.reopen()
        program, x, _ = adder(card)
        card.submit(program, step())
        finish(card)
        assert floats(card, x, 1)[0] == 1


# --- what is missing, or wrong ----------------------------------------------------------


def test_without_an_emulator_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"qemu-riscv64.*package qemu-user"):
        rig_of()
    assert "qemu-user" in survey().problem


def test_without_firmware_the_error_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("spanker.device.riscv.emulator.BUILT", tmp_path / "none.elf")
    with pytest.raises(ConfigError, match=r"make firmware.*SPANKER_FIRMWARE"):
        rig_of()
    monkeypatch.setenv("SPANKER_FIRMWARE", str(tmp_path / "other.elf"))
    with pytest.raises(ConfigError, match=r"SPANKER_FIRMWARE names .*other\.elf"):
        rig_of()
    assert survey().emulator == find_emulator()


def _field(number: int, value: int) -> Callable[[bytes], bytes]:
    """An image with another number in its note, whose hash is right where that is looked at."""

    def make(data: bytes) -> bytes:
        at = data.index(b"Spanker\0") + 8
        fields = list(NOTE_HEADER.unpack_from(data, at))
        fields[number] = value
        made = data[:at] + NOTE_HEADER.pack(*fields) + data[at + NOTE_HEADER.size :]
        return sealed(made) if number else made

    return make


def _with_extension(data: bytes) -> bytes:
    """Needs something that no card has; as long as before."""
    return sealed(data.replace(b"rv64gcv_zvl128b_xpopmatmul\0", b"rv64gcv_zvl128b_zvksedxxxx\0"))


def _without_vectors(data: bytes) -> bytes:
    return sealed(data.replace(b"rv64gcv_zvl128b_xpopmatmul\0", b"rv64gcb_zvl128b_xpopmatmul\0"))


def _flipped(data: bytes) -> bytes:
    at = parse_firmware(data).entry % 4096 + 0x1000
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "ABI": (_field(2, 2), r"made for version 2\.0 of the card's interface.*knows 1\.0"),
    "semantics": (_field(4, 9), "semantics 9, expected 1"),
    "note version": (_field(0, 7), "version 7, this Spanker reads version 1"),
    "extension": (_with_extension, "needs zvksedxxxx .*which a card does not have"),
    "no vectors": (_without_vectors, "made without v"),
    "truncated": (lambda data: data[: len(data) // 2], "truncated|not a well-formed ELF"),
    "modified": (_flipped, "the file is damaged"),
    "empty": (lambda data: b"", "not a well-formed ELF"),
    "of another machine": (
        lambda data: data[:18] + struct.pack("<H", 62) + data[20:],
        "machine is EM_X86_64, a card takes EM_RISCV",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_firmware_is_refused_before_anything_runs(
    what: str, firmware: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, words = WRONG[what]
    image = tmp_path / "image.elf"
    image.write_bytes(make(firmware.read_bytes()))
    ran = tmp_path / "ran"
    fake = tmp_path / "qemu-riscv64"
    fake.write_text(f"#!/bin/sh\ntouch {ran}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SPANKER_FIRMWARE", str(image))
    assert firmware_path() == image
    with pytest.raises(FirmwareError, match=words):
        rig_of()
    assert not ran.exists()
    # The same with what is right would run.
    image.write_bytes(firmware.read_bytes())
    with pytest.raises(CardLostError, match=r"status (0|126|127)"):
        rig_of()


def test_what_runs_is_what_was_checked(
    firmware: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tmp_path / "image.elf"
    image.write_bytes(firmware.read_bytes())
    monkeypatch.setenv("SPANKER_FIRMWARE", str(image))
    emulator = Emulator.find()
    image.write_bytes(b"something else")
    with SoftRig([RiscvCardSpec(ddr_bytes=SMALL)], launcher=emulator) as rig:
        assert isinstance(remote(rig).process, CardProcess)


# --- fleets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cards", ["riscv:1@vlen256,soft:3", "soft:1,riscv:2@scalar", "riscv:1@xpop,soft:3"]
)
async def test_a_fleet_answers_as_any_other(cards: str, tiny: Path, expected: Answers) -> None:
    with trio.fail_after(120):
        async with spanker.open_fleet(cards) as fleet:
            model = await fleet.load(tiny, plan="tp")
            assert await Crowd(model).run() == expected
            await check_nothing_held(model)


def slay(fleet: Fleet, card: int) -> None:
    """The emulator is gone, from one moment to the next."""
    device = fleet.devices[card]
    assert isinstance(device, RemoteCard)
    os.kill(device.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("cards", "card"), [("riscv:2@scalar", 0), ("soft:1,riscv:1@scalar", 1), ("riscv:3@scalar", 2)]
)
@pytest.mark.parametrize("moment", [3, 60])
async def test_a_generation_survives_its_emulator(
    cards: str, card: int, moment: int, tiny: Path, expected: Answers
) -> None:
    before = children()
    with trio.fail_after(120):
        async with spanker.open_fleet(cards) as fleet:
            model = await fleet.load(tiny, plan="tp")
            assert await Crowd(model, Schedule(fleet, [(moment, slay, card)])).run() == expected
            assert lost_cards(fleet) == [card]
            assert kinds(fleet) == [CardLost, Replanned]
            assert card not in model.plan.cards
            await check_nothing_held(model)
            await fleet.admit(card)
            assert CardReturned in kinds(fleet)
            assert await Crowd(model).run() == expected
    assert children() == before


async def test_all_emulators_go_and_come_back(tiny: Path, expected: Answers) -> None:
    with trio.fail_after(120):
        async with spanker.open_fleet("riscv:2@scalar") as fleet:
            model = await fleet.load(tiny, plan="tp")
            for card in (0, 1):
                slay(fleet, card)
            with pytest.raises(CardLostError, match="no card is left"):
                await model.generate([1], max_tokens=2).collect()
            for card in (0, 1):
                await fleet.admit(card)
            again = await fleet.load(tiny, plan="tp")
            assert await Crowd(again).run() == expected


# --- cards that join ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "joins"),
    [
        ("riscv:2@scalar", "riscv:1@scalar"),
        ("riscv:1@scalar", "soft:1"),
        ("soft:2", "riscv:1@scalar"),
        ("soft:1,riscv:1@scalar", "riscv:1@xpop"),
        ("soft:1,riscv:1@scalar", "soft:1"),
    ],
)
async def test_a_card_joins_in_the_middle_of_generations(
    cards: str, joins: str, tiny: Path, expected: Answers
) -> None:
    before = children()
    with trio.fail_after(180):
        async with spanker.open_fleet(cards) as fleet, trio.open_nursery() as nursery:
            model, number = await fleet.load(tiny, plan="tp"), len(fleet.cards)
            joining = At({20: lambda: nursery.start_soon(fleet.add, joins)})
            assert await Crowd(model, joining).run() == expected
            await until(lambda: kinds(fleet) == [CardJoined, Replanned])
            assert model.plan.cards == fleet.health().cards == tuple(range(number + 1))
            assert fleet.cards[number].name == f"{joins.partition(':')[0]}{number}"
            assert fleet.topology == Topology.with_mock(number + 1)
            assert await Crowd(model).run() == expected
            arrays = [np.full(64, card, np.float32) for card in range(number + 1)]
            await spanker.all_reduce(fleet, arrays)
            total = float(sum(range(number + 1)))
            assert all(np.array_equal(array, np.full(64, total, np.float32)) for array in arrays)
            # One that was there before is opened again with its link to the new one.
            kill(fleet, 0)
            assert await Crowd(model).run() == expected
            await fleet.admit(0)
            assert len(model.plan.cards) == number + 1
            assert await Crowd(model).run() == expected
            await check_nothing_held(model)
    assert children() == before


async def test_a_new_card_dies_and_is_taken_into_use_again(tiny: Path, expected: Answers) -> None:
    with trio.fail_after(120):
        async with spanker.open_fleet("soft:2") as fleet:
            model = await fleet.load(tiny, plan="tp")
            assert await fleet.add("riscv:1@scalar") == 2
            slay(fleet, 2)
            assert await Crowd(model).run() == expected
            assert lost_cards(fleet) == [2] and model.plan.cards == (0, 1)
            await fleet.admit(2)
            assert model.plan.cards == (0, 1, 2)
            assert await Crowd(model).run() == expected


@pytest.mark.parametrize("cards", ["soft:2", "riscv:2@scalar"])
async def test_a_join_that_is_cancelled_leaves_nothing(cards: str, tiny: Path) -> None:
    with trio.fail_after(60):
        async with spanker.open_fleet(cards) as fleet:
            model = await fleet.load(tiny, plan="tp")
            before, descriptors = children(), open_descriptors()
            # While somebody has the cards, it waits.
            await fleet._coordinator.take_cards()
            with trio.move_on_after(0.5) as scope:
                await fleet.add("riscv:1@scalar")
            fleet._coordinator.give_cards_back()
            assert scope.cancelled_caught
            assert children() == before and open_descriptors() == descriptors
            assert len(fleet.cards) == len(fleet.devices) == 2 and fleet.events.history == ()
            right = model.generate([1, 2], max_tokens=4, ignore_eos=True)
            await right.collect()
            assert await fleet.add("riscv:1@scalar") == 2
            again = model.generate([1, 2], max_tokens=4, ignore_eos=True)
            await again.collect()
            assert again.token_ids == right.token_ids and len(model.plan.cards) == 3


async def test_a_process_that_does_not_answer_does_not_join(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "qemu-riscv64"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    with trio.fail_after(60):
        async with spanker.open_fleet("soft:2") as fleet:
            model = await fleet.load(tiny, plan="tp")
            before, descriptors = children(), open_descriptors()
            with monkeypatch.context() as patch:
                patch.setattr(fleet._rig, "answer_s", 0.3)
                patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
                with pytest.raises(CardLostError, match=r"card 2: greeting it: .* not answered"):
                    await fleet.add("riscv:1")
                patch.setenv("PATH", "/nonexistent")
                with pytest.raises(ConfigError, match="package qemu-user"):
                    await fleet.add("riscv:1")
            assert children() == before and open_descriptors() == descriptors
            assert len(fleet.cards) == 2 and fleet.events.history == ()
            await model.generate([1, 2], max_tokens=4, ignore_eos=True).collect()
            assert await fleet.add("riscv:1@scalar") == 2


@pytest.mark.parametrize("cards", ["riscv:2@scalar", "soft:1,riscv:1@scalar", "soft:1,riscv:1"])
async def test_a_real_model_gives_the_very_logits_of_soft_cards(
    cards: str, smollm2_path: Path
) -> None:
    async def tokens(spec: str) -> list[tuple[int | None, bytes]]:
        async with spanker.open_fleet(spec) as fleet:
            model = await fleet.load(smollm2_path, ctx=64)
            found = []
            async for token in model.generate("Hello", max_tokens=count, logits=True):
                logits = b"" if token.logits is None else token.logits.tobytes()
                found.append((token.id, logits))
            return found

    count = 8 if "scalar" in cards else 2
    assert await tokens(cards) == await tokens("soft:2")
