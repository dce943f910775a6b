# SPDX-License-Identifier: Apache-2.0
"""Fleet specifications: what they mean, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from spanker.device.kernel.spec import KernelCardSpec, first_cards
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.soft import CARDS_MAX, DEFAULT_DDR_BYTES, SoftCardSpec, SoftRig
from spanker.device.spec import parse_bytes, parse_fleet
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.errors import ConfigError
from spanker.native import isas

ONE = SoftCardSpec(None, DEFAULT_DDR_BYTES)
SCALAR = SoftCardSpec("scalar", DEFAULT_DDR_BYTES)


@pytest.mark.parametrize(
    ("spec", "cards"),
    [
        (1, (ONE,)),
        ("3", (ONE,) * 3),
        ("soft:3", (ONE,) * 3),
        (" soft:1 , 2 ", (ONE,) * 3),
        ("soft:2@scalar,soft:1", (SCALAR, SCALAR, ONE)),
        ("soft:2:64MiB", (SoftCardSpec(None, 64 << 20),) * 2),
        ("soft:1@scalar:1.5G,1:4096", (SoftCardSpec("scalar", 3 << 29), SoftCardSpec(None, 4096))),
        ("2:1M", (SoftCardSpec(None, 1 << 20),) * 2),
        ("soft:0,soft:1", (ONE,)),
        (CARDS_MAX, (ONE,) * CARDS_MAX),
        ("virtual:2", (VirtualCardSpec(),) * 2),
        ("virtual:1@scalar:1M", (VirtualCardSpec("scalar", 1 << 20),)),
        ("hollow:1,hollow:1", (VirtualCardSpec(hollow=True),) * 2),
        ("riscv:2", (RiscvCardSpec(),) * 2),
        ("riscv:1@rvv", (RiscvCardSpec("rvv"),)),
        ("riscv:1@vlen256", (RiscvCardSpec(None, 256),)),
        ("riscv:1@scalar_vlen512:64M", (RiscvCardSpec("scalar", 512, 64 << 20),)),
        ("riscv:1,soft:2@scalar", (RiscvCardSpec(), SCALAR, SCALAR)),
        ("kernel:2", (KernelCardSpec(0), KernelCardSpec(1))),
        (" kernel:1, kernel:2 ", tuple(KernelCardSpec(n) for n in range(3))),
    ],
)
def test_specifications_name_cards_in_order(spec: str | int, cards: tuple[SoftCardSpec]) -> None:
    assert parse_fleet(spec) == cards


def test_all_kernel_cards_are_those_up_to_the_first_that_is_missing(tmp_path: Path) -> None:
    # One at least: opening it says what is wrong.
    assert first_cards(device_dir=str(tmp_path)) == (KernelCardSpec(0, str(tmp_path)),)
    for number in (0, 1, 3):
        (tmp_path / f"spanker{number}").touch()
    cards = first_cards(device_dir=str(tmp_path))
    assert [card.number for card in cards] == [0, 1]
    assert cards[1].path == str(tmp_path / "spanker1")


def test_every_instruction_set_of_this_machine_can_be_named() -> None:
    spec = ",".join(f"soft:1@{isa}" for isa in isas())
    assert [card.isa for card in parse_fleet(spec)] == list(isas())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("0", "at least one card, got '0'"),
        (0, "at least one card"),
        ("soft:0", "at least one card"),
        (-1, "no cards '-1'"),
        ("", "no cards ''"),
        ("soft", "no cards 'soft'"),
        ("soft:", "no cards"),
        ("soft:x", "no cards 'soft:x'"),
        ("1,,2", "no cards ''"),
        ("soft:1 @scalar", "no cards"),
        ("soft:1.5", "no cards"),
        ("imaginary:2", "no kind of card 'imaginary'"),
        ("soft:1,virtual:1", "soft and virtual cards do not go together"),
        ("virtual:1,hollow:1", "virtual and hollow cards do not go together"),
        ("hollow:65", "65 cards are too many: a hollow fleet has 1 to 64"),
        ("300", f"300 cards are too many: a soft fleet has 1 to {CARDS_MAX}"),
        (f"{CARDS_MAX},1", f"{CARDS_MAX + 1} cards are too many"),
        ("999999999", "too many"),
        ("9999999999", "no cards"),
        ("soft:1@mmx", "instruction set 'mmx' is not available here: expected one of scalar"),
        ("soft:1:", "no cards"),
        ("soft:1:12X", "no size '12X'"),
        ("soft:1:MiB", "no size 'MiB'"),
        ("riscv:1@avx2", "no option 'avx2' of a RISC-V card: expected one of scalar, rvv, xpop"),
        ("riscv:1@rvv_scalar", "no option 'scalar'"),
        ("riscv:1@vlen100", "no option 'vlen100'"),
        ("riscv:1@vlen", "no option 'vlen'"),
        ("riscv:1@rvv_", "no option ''"),
        ("riscv:1:1T", "64 to 17,179,869,184 bytes of DDR, not 1,099,511,627,776"),
        ("riscv:1:63", "64 to 17,179,869,184 bytes"),
        ("riscv:1,virtual:1", "riscv and virtual cards do not go together"),
        ("riscv:1,soft:1,kernel:1", "cards do not go together"),
        ("riscv:65", "65 cards are too many: a riscv fleet has 1 to 64"),
        ("kernel:0", "at least one card"),
        ("kernel:65", "65 cards are too many: a kernel fleet has 1 to 64"),
        ("kernel:1@scalar", "kernel cards are what they are: write kernel:1"),
        ("kernel:2:64MiB", "kernel cards are what they are: write kernel:2"),
        ("kernel:2,soft:1", "kernel and soft cards do not go together"),
        ("virtual:1,kernel:1", "virtual and kernel cards do not go together"),
        ("kernel,soft:1", "no cards 'kernel'"),
        ("kernel:", "no cards 'kernel:'"),
    ],
)
def test_bad_specifications_are_explained_on_one_line(spec: str | int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1000", 1000),
        ("1000B", 1000),
        ("64K", 65536),
        ("64KiB", 65536),
        ("64ki", 65536),
        ("64kB", 64000),
        ("64MB", 64_000_000),
        ("1.5G", 3 << 29),
        ("2TiB", 2 << 40),
        (" 0.5 KiB ", 512),
        ("0", 0),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "-1", "1e3", "1,000", "64 Mi B", "K", "1KK", "0x10", "1iB"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "words"),
    [("0", "at least 64 bytes"), ("63", "at least 64 bytes"), ("999999999999T", "at most")],
)
def test_impossible_cards_are_refused_when_opened(size: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SoftRig(parse_fleet(f"soft:1:{size}"))


def test_ddr_is_rounded_down_to_what_the_card_can_allocate() -> None:
    with SoftRig([SoftCardSpec(ddr_bytes=1000)]) as rig:
        assert rig.cards[0].info.ddr_bytes == 960
        rig.cards[0].alloc(960)


def test_the_environment_names_the_default_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPANKER_ISA", "scalar")
    with SoftRig([ONE, SoftCardSpec(isas()[-1])]) as rig:
        assert [card.info.isa for card in rig.cards] == ["scalar", isas()[-1]]
    monkeypatch.setenv("SPANKER_ISA", "mmx")
    with pytest.raises(ConfigError, match="'mmx' is not available"):
        SoftRig([ONE])
