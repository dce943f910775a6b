# SPDX-License-Identifier: Apache-2.0
"""What is particular about kernel cards: opening, the module's answers, and how a card is lost.

Over the model of the module; the conformance suite says that they are cards like any others.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio
from conformance_rigs import (
    adder,
    collect,
    finish,
    floats,
    gather_programs,
    make_program,
    sender,
    step,
    waiter,
)
from driver_model import SERIAL_0, DriverModel

from spanker import open_fleet
from spanker.device import uapi
from spanker.device.kernel.card import KernelCard
from spanker.device.kernel.programs import PACKED_COMMAND, translated
from spanker.device.kernel.rig import KernelRig
from spanker.device.kernel.spec import KernelCardSpec, first_cards
from spanker.device.kernel.survey import survey
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    DriverError,
)
from spanker.kernels import program as op
from spanker.kernels.program import OPERANDS, PROGRAM_HEADER, Op, Ref, Transfer
from spanker.native import ffi, lib
from spanker.sched.topology import LinkState

DDR_BYTES = 32 << 20


@pytest.fixture
def driver() -> Iterator[DriverModel]:
    model = DriverModel(3, DDR_BYTES)
    yield model
    model.shut_down()


@pytest.fixture
def rig(driver: DriverModel) -> Iterator[KernelRig]:
    with KernelRig(first_cards(3), driver) as opened:
        yield opened


@pytest.fixture
def card(rig: KernelRig) -> KernelCard:
    return rig.cards[0]


def queue_a_step(file: uapi.DeviceFile) -> None:
    """One that waits for whoever is at the other end of the card's first link."""
    handle = file.buffer_create(64)
    commands = op.exchange([Transfer(False, 0, Ref("x"), 64)])
    data = make_program(*commands, tokens=1).encode({"x": 0})
    number, program_id, _, _ = file.program_load(data, [handle.handle])
    assert number == 0
    file.submit(program_id, step(), [])


# --- the header -------------------------------------------------------------------------


def test_the_ioctls_and_structures_of_the_first_version_are_as_they_were() -> None:
    assert lib.SPANKER_IOC_PING == 0xE301
    assert lib.SPANKER_IOC_GET_VERSION == 0x8008E302
    assert ffi.sizeof("struct spanker_version") == 8


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("info", 152),
        ("buffer_create", 40),
        ("buffer_destroy", 8),
        ("program_load", 48),
        ("program_unload", 8),
        ("read", 24),
        ("submit", 40),
        ("collect", 56),
        ("wait", 24),
        ("abort", 8),
        ("link", 40),
        ("link_control", 8),
        ("telemetry", 104),
        ("image", 24),
        ("event", 24),
    ],
)
def test_structures_have_the_sizes_of_the_interface(name: str, nbytes: int) -> None:
    assert ffi.sizeof(f"struct spanker_{name}") == nbytes


def test_operands_are_those_that_the_card_takes() -> None:
    """The card's own table, in C."""
    source = Path(__file__).parents[2] / "spanker/device/csrc/program.c"
    match = re.search(r"refs_of\[\] = \{([^}]*)\}", source.read_text())
    assert match
    numbers = [int(number) for number in match[1].split(",")]
    assert [OPERANDS[o] for o in Op] == numbers[1:]


# --- opening ----------------------------------------------------------------------------


def test_without_the_module_the_error_says_so(driver: DriverModel) -> None:
    driver.loaded = False
    with pytest.raises(
        DriverError, match=r"open /dev/spanker0: .*the spanker module is not loaded"
    ):
        KernelRig(first_cards(1), driver)


def test_this_machine_may_have_no_module(tmp_path: Path) -> None:
    """The real system calls."""
    with pytest.raises(DriverError, match="not loaded"):
        KernelRig([KernelCardSpec(0, str(tmp_path))])
    (tmp_path / "spankerctl").touch()
    with pytest.raises(DriverError, match="there is no such card"):
        KernelRig([KernelCardSpec(0, str(tmp_path))])
    (tmp_path / "spanker0").touch()
    with pytest.raises(CardError, match=r"card 0: SPANKER_IOC_GET_VERSION on .*spanker0.*ENOTTY"):
        KernelRig([KernelCardSpec(0, str(tmp_path))])


def test_a_card_that_is_missing_is_named(driver: DriverModel) -> None:
    with pytest.raises(DriverError, match=r"open /dev/spanker3: .*there is no such card"):
        KernelRig(first_cards(4), driver)
    assert driver.open_files == 0


def test_a_card_without_access_is_named(driver: DriverModel) -> None:
    driver.denied.add("/dev/spanker1")
    with pytest.raises(DriverError, match=r"/dev/spanker1: .*EACCES.*ask for access"):
        KernelRig(first_cards(2), driver)
    assert driver.open_files == 0


@pytest.mark.parametrize("version", [(1, 2, 0), (0, 1, 9)])
def test_another_major_version_or_an_older_minor_one_is_refused(
    driver: DriverModel, version: tuple[int, int, int]
) -> None:
    driver.version = version
    words = rf"version {'.'.join(map(str, version))} of the interface, this Spanker 0\.2\.0"
    with pytest.raises(DriverError, match=words):
        KernelRig(first_cards(1), driver)
    assert driver.open_files == 0


def test_a_later_minor_version_will_do(driver: DriverModel) -> None:
    driver.version = (0, 3, 7)
    with KernelRig(first_cards(1), driver) as rig:
        assert rig.cards[0].info.serial == SERIAL_0


def test_a_card_belongs_to_one_fleet_at_a_time(driver: DriverModel) -> None:
    with KernelRig(first_cards(2), driver):
        with pytest.raises(CardError, match=r"/dev/spanker0 is used by another fleet"):
            KernelRig(first_cards(1), driver)
        with KernelRig([KernelCardSpec(2)], driver) as other:
            assert other.cards[0].number == 0
            assert other.cards[0].info.name == "spanker2"
    KernelRig(first_cards(1), driver).close()


def test_a_card_at_work_for_somebody_else_is_left_alone(driver: DriverModel) -> None:
    """Somebody who does not ask for it."""
    with uapi.DeviceFile("/dev/spanker1", system=driver) as file:
        queue_a_step(file)
        with pytest.raises(CardCommandError, match="another process has steps queued on /dev/span"):
            KernelRig(first_cards(2), driver)
    KernelRig(first_cards(2), driver).close()


def test_a_card_that_has_failed_is_reset_when_it_is_opened(driver: DriverModel) -> None:
    driver.cards[1].failed = True
    with KernelRig(first_cards(2), driver) as rig:
        program, _, _ = adder(rig.cards[1])
        rig.cards[1].submit(program, step())
        finish(rig.cards[1])
    assert [card.generation for card in driver.cards] == [0, 1, 0]


def test_no_cards_and_too_many_are_refused(driver: DriverModel) -> None:
    for count in (0, 65):
        with pytest.raises(ConfigError, match="1 to 64"):
            KernelRig([KernelCardSpec(0)] * count, driver)


# --- cards that join ----------------------------------------------------------------------


def test_a_new_card_is_the_first_that_nobody_has(driver: DriverModel) -> None:
    with KernelRig([KernelCardSpec(1)], driver) as rig, KernelRig([KernelCardSpec(0)], driver):
        with pytest.raises(CardError, match="spanker0 is used by another fleet"):
            rig.create(KernelCardSpec(0))
        card = rig.create(None)
        assert (card.number, card.info.name) == (1, "spanker2")
        files = driver.open_files
        # What is created has nothing to do with the fleet until it has joined.
        with pytest.raises(ConfigError, match=r"no card of /dev can join: .*another fleet"):
            rig.create(None)
        assert driver.open_files == files and rig.cards[0].counters().link_tx_bytes == (0,)
        card.release()
        assert driver.open_files == files - 1
        rig.join(rig.create(None))
        with pytest.raises(ConfigError, match="spanker1 is in the fleet"):
            rig.create(KernelCardSpec(1))


def test_cards_of_all_ages_exchange_once_they_have_joined(driver: DriverModel) -> None:
    """The epochs that they have been in, and what they have sent before, are all the same."""
    with KernelRig([KernelCardSpec(0)], driver) as rig:
        rig.cards[0].abort(7)
        for _ in range(2):
            card = rig.create(None)
            links = rig.join(card)
            with_others = {(peer, card.number) for peer in range(card.number)}
            ends = {(link.local_sail, link.remote_sail) for link in links}
            assert ends == with_others | {(b, a) for a, b in with_others}
            assert all(link.state is LinkState.UP for link in links)
        for each in rig.cards:
            each.abort(8)
        programs, _ = gather_programs(rig.cards, [64, 64, 64], 1, seed=1)
        for each, program in zip(rig.cards, programs, strict=True):
            each.submit(program, step())
        for each in rig.cards:
            finish(each)
            others = [64 if peer != each.number else 0 for peer in range(3)]
            counters = each.counters()
            assert counters.link_tx_bytes == counters.link_rx_bytes == tuple(others)


def test_a_card_that_goes_while_it_joins_leaves_all_as_it_was(driver: DriverModel) -> None:
    with KernelRig([KernelCardSpec(0)], driver) as rig:
        card = rig.create(None)
        driver.kill(1)
        with pytest.raises(CardError):
            rig.join(card)
        card.release()
        assert len(rig.cards) == 1 and rig.cards[0].counters().link_tx_bytes == (0,)
        driver.put_in(1)
        rig.join(rig.create(None))
        assert rig.cards[0].counters().link_tx_bytes == (0, 0)


async def test_a_join_that_is_cancelled_lets_the_card_go(
    driver: DriverModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uapi, "LINUX", driver)
    async with open_fleet("kernel:1") as fleet:
        files = driver.open_files
        await fleet._coordinator.take_cards()
        with trio.move_on_after(0.1) as scope:
            await fleet.add("kernel:1")
        fleet._coordinator.give_cards_back()
        assert scope.cancelled_caught and driver.open_files == files
        assert len(fleet.cards) == 1 and fleet.events.history == ()
        for kind in ("soft:1", "virtual:1", "riscv:1"):
            with pytest.raises(ConfigError, match=r"open e\.g\. kernel:1"):
                await fleet.add(kind)
        assert await fleet.add("kernel:1") == 1


# --- epochs and links -------------------------------------------------------------------


def test_a_fleet_begins_in_an_epoch_that_none_of_its_cards_has_been_in(driver: DriverModel) -> None:
    driver.cards[1].soft.abort(60)
    driver.cards[1].epoch = 60
    with KernelRig(first_cards(2), driver) as rig:
        assert [card.epoch for card in driver.cards] == [61, 61, 41]
        for card in rig.cards:
            card.abort(5)
        assert [card.epoch for card in driver.cards] == [65, 65, 41]
        with pytest.raises(CardCommandError, match="no epoch 5: expected 6 to"):
            rig.cards[0].abort(5)


def test_an_abort_leaves_steps_of_other_processes_alone(
    rig: KernelRig, card: KernelCard, driver: DriverModel
) -> None:
    file = uapi.DeviceFile("/dev/spanker0", system=driver)
    queue_a_step(file)
    with pytest.raises(CardCommandError, match="another process has steps queued"):
        card.abort(2)
    # Whose end is an abort of its own.
    file.close()
    with pytest.raises(CardCommandError, match="another process has aborted the card's work"):
        card.abort(2)
    card.abort(3)


def test_cards_are_linked_by_their_serial_numbers(driver: DriverModel) -> None:
    """The model's cards have no link to themselves, so that numbers of links and cards differ; and
    a fleet may have its cards in any order."""
    with KernelRig([KernelCardSpec(2), KernelCardSpec(0)], driver) as rig:
        assert rig.links() == {(0, 1): LinkState.UP, (1, 0): LinkState.UP}
        programs, buffers = gather_programs(rig.cards, (100, 50), 1, seed=0)
        whole = bytes(range(150))
        rig.cards[0].write(buffers[0], 0, whole[:100])
        rig.cards[1].write(buffers[1], 100, whole[100:])
        for one, program in zip(rig.cards, programs, strict=True):
            one.submit(program, step())
        for one, buffer in zip(rig.cards, buffers, strict=True):
            finish(one)
            assert one.read(buffer, 0, 150) == whole
        assert rig.cards[0].counters().link_tx_bytes == (0, 100)
        assert driver.cards[2].soft.counters().link_tx_bytes == (100, 0, 0)


def test_a_transfer_without_a_link_is_refused(rig: KernelRig, driver: DriverModel) -> None:
    program = make_program(*op.exchange([Transfer(True, 2, Ref("x"), 4)]), tokens=1)
    with pytest.raises(CardCommandError, match=r"card 0: program refused at command 1: no link"):
        translated(program.encode({"x": 0}), (None, 0, None), 0)


def test_links_that_are_down_are_told_by_the_numbers_of_the_fleet(driver: DriverModel) -> None:
    with KernelRig(first_cards(3)[::-1], driver) as rig:
        driver.cards[2].soft.cut(1)
        assert [card.counters().links_down for card in rig.cards] == [(1,), (0,), ()]
        driver.cards[2].soft.mend(1)
        assert [card.counters().links_down for card in rig.cards] == [(), (), ()]


def test_counters_begin_with_the_fleet(driver: DriverModel) -> None:
    for _ in range(2):
        with KernelRig(first_cards(2), driver) as rig:
            programs, _ = gather_programs(rig.cards, (100, 50), 1, seed=0)
            for card, program in zip(rig.cards, programs, strict=True):
                card.submit(program, step())
            for card in rig.cards:
                finish(card)
            assert rig.cards[0].counters().steps == 1
            assert rig.cards[0].counters().link_rx_bytes == (0, 50)


# --- programs ---------------------------------------------------------------------------


def test_operands_name_places_in_the_table_and_the_rest_is_zero() -> None:
    program = bytearray(
        make_program(
            op.add(Ref("a", 128), Ref("b", 128, 4), n=32),
            op.quantize(Ref("b", 128), Ref("c", 34), k=32),
        ).encode({"a": 900, "b": 17, "c": 300})
    )
    # What an operation does not take may be anything.
    struct.pack_into("<IIQ", program, PROGRAM_HEADER.size + 8 + 3 * 16, 5, 6, 7)
    data, buffers = translated(program, (), 0)
    assert buffers == (17, 300, 900)
    refs = np.frombuffer(data, PACKED_COMMAND, offset=PROGRAM_HEADER.size)["ref"].tolist()
    assert refs == [
        [(2, 128, 0), (0, 128, 4), (0, 0, 0), (0, 0, 0)],
        [(0, 128, 0), (0, 0, 0), (0, 0, 0), (1, 34, 0)],
    ]


def test_what_the_card_refuses_is_told_with_its_reason(
    card: KernelCard, driver: DriverModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin finds everything that this version knows of; a card may know more."""
    monkeypatch.setattr(card.file, "program_load", lambda *_: (errno.ENOEXEC, 0, 3, "too hot"))
    with pytest.raises(CardCommandError, match=r"card 0: program refused at command 3: too hot"):
        adder(card)
    monkeypatch.undo()
    program, x, _ = adder(card)
    card.unload_program(program)
    card.free(x)


def test_reads_of_what_no_command_names_take_a_slot_and_give_it_back(
    card: KernelCard, driver: DriverModel
) -> None:
    program, x, _ = adder(card)
    other = card.alloc(10)
    card.write(other, 0, b"0123456789")
    for _ in range(3):
        card.submit(program, step(), [(other, 2, 3), (x, 0, 4)])
        (done,) = collect(card, 1)
        assert done.data[0] == b"234"
    assert driver.calls.count("PROGRAM_LOAD") == 2
    card.free(other)
    assert driver.calls.count("PROGRAM_UNLOAD") == 1
    card.unload_program(program)
    card.free(x)


# --- steps that bring back more than the module carries ---------------------------------


def test_much_is_brought_back_by_steps_that_run_one_by_one(card: KernelCard) -> None:
    n = uapi.READ_BYTES_MAX // 16 + 100
    program, x, _ = adder(card, n=n, tokens=4)
    fences = [
        card.submit(program, step(4), [(x, 0, 16 * n)] if i % 3 else [(x, 0, 4)]) for i in range(8)
    ]
    with pytest.raises(CardCommandError):
        card.unload_program(program)
    done = collect(card, 8)
    assert [c.fence for c in done] == fences
    for i, completion in enumerate(done):
        values = np.frombuffer(completion.data[0], np.float32)
        assert values.size == (4 * n if i % 3 else 1) and np.all(values == i + 1)
    card.unload_program(program)


def test_steps_held_back_are_aborted_with_the_others(rig: KernelRig, card: KernelCard) -> None:
    n = uapi.READ_BYTES_MAX // 4 + 1
    receive, _ = waiter(card, 1)
    big = card.alloc(4 * n)
    counting, x, _ = adder(card)
    card.submit(receive, step(), [(big, 0, 4 * n)])
    card.submit(counting, step())
    card.submit(receive, step(), [(big, 0, 4 * n)])
    assert card.counters().queued == 3
    with pytest.raises(CardCommandError):
        card.free(big)
    card.abort(2)
    card.submit(counting, step())
    done = collect(card, 4)
    assert [type(c.error) for c in done] == [CardAbortedError] * 3 + [type(None)]
    assert floats(card, x, 1)[0] == 1
    card.free(big)


# --- losing a card ----------------------------------------------------------------------


def everything(card: KernelCard, buffer: int, program: int) -> list[object]:
    return [
        lambda: card.alloc(64),
        lambda: card.free(buffer),
        lambda: card.write(buffer, 0, b"x"),
        lambda: card.fill(buffer, 0, 1, lambda out: None),
        lambda: card.read(buffer, 0, 1),
        lambda: card.load_program(b""),
        lambda: card.unload_program(program),
        lambda: card.submit(program, step()),
        lambda: card.submit(99, b""),
        lambda: card.abort(77),
        lambda: card.load_image(b"x"),
        card.completions,
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", "card 0: /dev/spanker0 is gone; admit it once it is back"),
        ("reset", "card 0: /dev/spanker0 was reset since it was opened"),
        ("failed", "card 0: /dev/spanker0 has failed; admit it to the fleet again"),
    ],
)
def test_a_card_that_is_lost_says_why_to_everything(
    rig: KernelRig, card: KernelCard, driver: DriverModel, how: str, words: str
) -> None:
    program, x, _ = adder(card)
    card.write(x, 0, b"mapped")
    if how == "gone":
        driver.kill(0)
    elif how == "failed":
        driver.cards[0].failed = True
    else:
        with uapi.DeviceFile("/dev/spanker0", system=driver) as other:
            other.reset()
    for call in everything(card, x, program):
        with pytest.raises(CardLostError, match=words) as caught:
            call()  # type: ignore[operator]
        assert caught.value.card == 0
    send, _ = sender(rig.cards[1], 2)
    rig.cards[1].submit(send, step())
    finish(rig.cards[1])


def test_steps_of_a_card_that_somebody_resets_are_lost(
    card: KernelCard, driver: DriverModel
) -> None:
    receive, _ = waiter(card, 1)
    fences = [card.submit(receive, step()) for _ in range(3)]
    with uapi.DeviceFile("/dev/spanker0", system=driver) as other:
        other.reset()
    done = collect(card, 3)
    assert [c.fence for c in done] == fences
    assert all(isinstance(c.error, CardLostError) for c in done)


def test_a_card_that_is_closed_says_so(card: KernelCard) -> None:
    program, x, _ = adder(card)
    card.close()
    for call in (*everything(card, x, program), card.counters):
        with pytest.raises(CardLostError, match="card 0 is closed"):
            call()  # type: ignore[operator]


def test_nothing_is_left_of_a_fleet(driver: DriverModel) -> None:
    def descriptors() -> list[str]:
        return sorted(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        rig = KernelRig(first_cards(3), driver)
        for card in rig.cards:
            program, x, ones = adder(card)
            card.write(x, 0, b"1234")
            card.submit(program, step())
            assert card.read(ones, 0, 1) == b"\0"
        assert driver.mapped == 6
        rig.close()
        assert driver.mapped == driver.open_files == 0
    assert descriptors() == before
    assert all(card.soft.counters().ddr_used_bytes == 0 for card in driver.cards)


def test_a_buffer_that_the_host_cannot_reach_is_not_left_behind(
    card: KernelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = card.file.buffer_create
    monkeypatch.setattr(
        card.file, "buffer_create", lambda n: uapi.NewBuffer(create(n).handle, mmap_offset=0)
    )
    with pytest.raises(CardMemoryError, match="that part of the DDR which the host can reach"):
        card.alloc(4096)
    assert card.counters().ddr_used_bytes == 0


def test_images_reach_the_card_or_are_refused(card: KernelCard, driver: DriverModel) -> None:
    card.load_image(b"image")
    assert driver.cards[0].image == b"image"
    with pytest.raises(CardCommandError, match=r"takes at most 4,194,304"):
        card.load_image(bytes(uapi.IMAGE_BYTES_MAX + 1))
    driver.cards[0].takes_image = False
    with pytest.raises(CardCommandError, match="card 0 takes no firmware image"):
        card.load_image(b"image")


# --- fleets -----------------------------------------------------------------------------


@pytest.fixture
def module(driver: DriverModel, monkeypatch: pytest.MonkeyPatch) -> DriverModel:
    """The model instead of this machine's kernel."""
    monkeypatch.setattr(uapi, "LINUX", driver)
    return driver


async def test_a_fleet_of_kernel_cards_gives_the_answers_of_soft_ones(
    module: DriverModel, tiny_model: Path
) -> None:
    async def answer(cards: str) -> list[int]:
        async with open_fleet(cards) as fleet:
            model = await fleet.load(tiny_model, plan="tp")
            async with model.generate([1, 2, 3], max_tokens=12, ignore_eos=True) as generation:
                await generation.collect()
            return generation.token_ids

    assert await answer("kernel:2") == await answer("soft:2")
    assert module.open_files == 0 and module.mapped == 0


async def test_a_fleets_topology_is_that_of_the_links(module: DriverModel) -> None:
    async with open_fleet("kernel:3") as fleet:
        assert fleet.topology.fully_meshed and fleet.topology.shard_count() == 3
        assert [card.name for card in fleet.cards] == ["spanker0", "spanker1", "spanker2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"workers": 1}, "leave workers out"), ({"throttle": True}, "leave throttle out")],
)
async def test_what_makes_no_sense_for_kernel_cards_is_refused(
    module: DriverModel, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        async with open_fleet("kernel:1", **options):  # type: ignore[arg-type]
            pass


async def test_without_the_module_no_fleet_opens(module: DriverModel) -> None:
    module.loaded = False
    with pytest.raises(DriverError, match="the spanker module is not loaded"):
        async with open_fleet("kernel:2"):
            pass


def test_a_survey_tells_what_there_is(module: DriverModel) -> None:
    seen = survey()
    assert str(seen.version) == "0.2.0" and not seen.problems
    assert [card.info.number for card in seen.cards] == [0, 1, 2]
    assert [card.links_up for card in seen.cards] == [2, 2, 2]
    module.denied.add("/dev/spanker1")
    module.cards[2].failed = True
    seen = survey()
    assert [card.info.failed for card in seen.cards] == [False, True]
    assert "/dev/spanker1" in seen.problems[0] and len(seen.problems) == 1
    module.loaded = False
    assert survey().loaded is False
