# SPDX-License-Identifier: Apache-2.0
"""The program container: good images are read, bad ones refused with what is wrong."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest
from conformance_rigs import BODIES, EMULATED, MakeRig, soft_rig
from elf_images import ADD, EHDR, MATMUL, PHDR, Image, R, W, X, attributes_of

from spanker.device.firmware import (
    IMAGE_BYTES_MAX,
    check_isa,
    parse_firmware,
    read_firmware,
    riscv_archs,
)
from spanker.errors import CardCommandError, FirmwareError
from spanker.kernels.program import Op

# --- good ones --------------------------------------------------------------------------


@pytest.mark.parametrize("note_loaded", [True, False])
def test_a_good_image_is_read_whole(tmp_path: Path, note_loaded: bool) -> None:
    path = tmp_path / "good.elf"
    path.write_bytes(Image(note_loaded=note_loaded).build())
    firmware = read_firmware(path)
    assert firmware.data == path.read_bytes()
    assert firmware.isa == "rv64gcv_zvl128b_xpopmatmul" and firmware.abi == (1, 0)
    assert [(k.op, k.format, k.symbol, k.address) for k in firmware.kernels] == [
        (Op.MATMUL, 2, "matmul_q4_0", 0x1010),
        (Op.ADD, 0, "add_f32", 0x1020),
    ]
    assert [(s.address, s.executable) for s in firmware.segments][:2] == [
        (0x1000, True),
        (0x2000, False),
    ]
    assert firmware.segments[1].memory_bytes == 0x100 and firmware.entry == 0x1000
    assert len(firmware.segments) == 2 + note_loaded


@pytest.mark.parametrize(
    "isa", ["rv64imafdv", "rv64gv", "rv64gcv", "rv64imafdcvb_zba_zfh_xpopmatmul", "rv64imafd_v"]
)
def test_isas_that_a_card_has(isa: str) -> None:
    check_isa(isa)


# What clang 19 writes for -march=rv64gcv, and for RVA23.
CLANG = (
    "rv64i2p1_m2p0_a2p1_f2p2_d2p2_c2p0_v1p0_zicsr2p0_zifencei2p0_zmmul1p0_zve32f1p0_zve32x1p0"
    "_zve64d1p0_zve64f1p0_zve64x1p0_zvl128b1p0_zvl32b1p0_zvl64b1p0"
)
CLANG_RVA23 = (
    "rv64i2p1_m2p0_a2p1_f2p2_d2p2_c2p0_v1p0_zic64b1p0_zicbom1p0_zicbop1p0_zicboz1p0_ziccamoa1p0"
    "_ziccif1p0_zicclsm1p0_ziccrse1p0_zicntr2p0_zicond1p0_zicsr2p0_zihintntl1p0_zihintpause2p0"
    "_zihpm2p0_zimop1p0_zmmul1p0_za64rs1p0_zawrs1p0_zfa1p0_zfhmin1p0_zca1p0_zcb1p0_zcmop1p0_zba1p0"
    "_zbb1p0_zbs1p0_zkt1p0_zvbb1p0_zve32f1p0_zve32x1p0_zve64d1p0_zve64f1p0_zve64x1p0_zvfhmin1p0"
    "_zvkb1p0_zvkt1p0_zvl128b1p0_zvl32b1p0_zvl64b1p0"
)


@pytest.mark.parametrize("isa", ["rv64gv", "rv64gcv_zvl128b_xpopmatmul"])
@pytest.mark.parametrize("arch", [None, "rv64gcv", CLANG, CLANG_RVA23])
def test_code_may_be_compiled_for_what_the_note_or_rva23_has(isa: str, arch: str | None) -> None:
    assert parse_firmware(Image(isa=isa, arch=arch).build()).isa == isa


def test_extensions_that_only_the_card_has_are_in_the_note() -> None:
    parse_firmware(Image(arch=f"{CLANG}_xpopmatmul0p1").build())
    with pytest.raises(FirmwareError, match=r"compiled with xpopmatmul .*its note \(rv64gcv\)"):
        parse_firmware(Image(isa="rv64gcv", arch=f"{CLANG}_xpopmatmul0p1").build())


def test_attributes_of_others_are_left_alone() -> None:
    whole = attributes_of(CLANG)
    for other in (attributes_of("rv64i_zfoo", "gnu"), attributes_of("rv64i_zfoo", tag=2)):
        assert list(riscv_archs(whole + other[1:] + whole[1:])) == [CLANG, CLANG]

    # After the version, which is all that there need be.
    assert list(riscv_archs(whole[:1])) == []
    for end in (0, *range(2, len(whole))):
        with pytest.raises((ValueError, IndexError, struct.error)):
            list(riscv_archs(whole[:end]))


# --- bad ones ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa", "words"),
    [
        ("rv32gcv", "made for 32 bits"),
        ("rv64gc", "made without v"),
        ("rv64iv", "made without m, a, f, d"),
        ("rv64gcv_zfoo", "needs zfoo"),
        ("rv64gcvh", "needs h"),
        ("rv64gcv_xpop_matmul", "needs xpop, matmul"),
        ("RV64GCV", "no ISA"),
        ("rv64", "no ISA"),
        ("rv64gcv_", "no ISA"),
        ("armv8", "no ISA"),
    ],
)
def test_isas_that_a_card_has_not(isa: str, words: str) -> None:
    with pytest.raises(FirmwareError, match=words):
        check_isa(isa)


BAD: dict[str, tuple[Image, str]] = {
    "class": (Image(elf_class=1), "not a well-formed ELF|class is ELFCLASS32"),
    "byte order": (Image(byte_order=2), "not a well-formed ELF|byte order is"),
    "machine": (Image(machine=62), "machine is EM_X86_64, a card takes EM_RISCV"),
    "unknown machine": (Image(machine=999), "machine is 999"),
    "type": (Image(kind=1), "type is ET_REL, a card takes ET_EXEC"),
    "isa": (Image(isa="rv64gcv_zfoo"), "needs zfoo"),
    "major": (Image(abi=(2, 0)), "made for version 2.0 of the card's interface.*knows 1"),
    "minor": (Image(abi=(1, 99)), "made for version 1.99"),
    "semantics": (Image(semantics=2), "semantics 2, expected 1"),
    "attributes": (
        Image(arch="rv64i2p1_zba1p0_zvl256b1p0_zfoo1p0"),
        r"compiled with zfoo, zvl256b .*neither its note \(rv64gcv_zvl128b_xpopmatmul\) nor RVA23",
    ),
    "bits of attributes": (Image(arch="rv32i2p1"), "compiled for rv32i2p1, a card has 64 bits"),
    "form of attributes": (Image(attributes=b"A\1\0\0\0"), ".riscv.attributes is malformed"),
    "version of attributes": (Image(attributes=b"B"), "not a well-formed ELF file .*version"),
    "hash": (Image(sha256=bytes(32)), "have SHA-256 [0-9a-f]{64}, its note says 0{64}"),
    "no note": (Image(note_name=b"Sponker\0"), "no notes 'Spanker' of type 1, expected one"),
    "type of note": (Image(note_type=2), "no notes 'Spanker' of type 1"),
    "two notes": (Image(notes=2), "2 notes 'Spanker'"),
    "version of note": (Image(note_version=2), "version 2, this Spanker reads version 1"),
    "bytes of note": (Image(note_bytes=1), "says 1, and 2 kernels with"),
    "no kernels": (Image(kernels=[]), "lists no kernels"),
    "operation": (Image(kernels=[(99, 0, "add_f32")]), "operation 99, which this Spanker"),
    "twice": (
        Image(kernels=[(ADD, 0, "add_f32"), (ADD, 0, "matmul_q4_0")]),
        "two kernels for add, format 0",
    ),
    "symbol": (Image(kernels=[(MATMUL, 0, "nowhere")]), r"nowhere \(matmul\) is no function"),
    "no function": (Image(kernels=[(ADD, 0, "table")]), r"table \(add\) is no function"),
    "symbol in data": (
        Image(symbols=[("matmul_q4_0", 0x2000, 2), ("add_f32", 0x1000, 2)]),
        "in no",
    ),
    "text": (Image(isa="rv64 gcv"), "has spaces"),
    "no text": (Image(isa=""), "is empty"),
    "entry": (Image(entry=0x1100), "entry 0x1100 is in no executable segment"),
    "writable code": (Image(code_flags=R | W | X), "writable and executable"),
    "overlap": (Image(data_address=0x1080), "overlaps"),
    "too much file": (Image(data_memory=8), "64 bytes for 8 of memory"),
    "too much memory": (
        Image(data_memory=65 << 20, note_loaded=False),
        "of memory, expected",
    ),
    "beyond the end": (Image(data_address=(1 << 64) - 64), "overlaps another"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused_with_what_is_wrong(case: str) -> None:
    image, words = BAD[case]
    with pytest.raises(FirmwareError, match=words) as caught:
        parse_firmware(image.build(), name="bad.elf")
    assert str(caught.value).startswith("bad.elf: ") and "\n" not in str(caught.value)


def test_a_changed_byte_of_a_segment_is_found() -> None:
    image = bytearray(Image().build())
    image[EHDR.size + 4 * PHDR.size + 100] ^= 1
    with pytest.raises(FirmwareError, match="damaged, or was changed"):
        parse_firmware(bytes(image))


def test_an_image_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.elf"
    path.write_bytes(Image().build() + bytes(IMAGE_BYTES_MAX))
    with pytest.raises(FirmwareError, match="more than 4,194,304 bytes"):
        read_firmware(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FirmwareError, match=r"cannot read .*nowhere\.elf: No such file"):
        read_firmware(tmp_path / "nowhere.elf")


def test_every_prefix_is_refused() -> None:
    image = Image().build()
    for length in range(len(image)):
        with pytest.raises(FirmwareError):
            parse_firmware(image[:length])
    parse_firmware(image)


@pytest.mark.parametrize("seed", range(4))
def test_spoilt_files_are_refused_or_read_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    good = Image().build()
    begin = time.monotonic()
    for _ in range(500):
        image = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(image))
            if rng.random() < 0.5:
                image[at] = rng.randrange(256)
            else:
                value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
                at = min(at // 4 * 4, len(image) - 8)
                struct.pack_into("<Q", image, at, value)
        try:
            parse_firmware(bytes(image))
        except FirmwareError:
            pass
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(54, "<H", 0), (58, "<H", 0), (60, "<H", 0), (56, "<H", 65535), (60, "<H", 65535)],
    ids=["phentsize", "shentsize", "shnum", "phnum", "huge shnum"],
)
def test_tables_that_would_take_for_ever_are_refused(offset: int, size: str, value: int) -> None:
    image = bytearray(Image().build())
    struct.pack_into(size, image, offset, value)
    begin = time.monotonic()
    with pytest.raises(FirmwareError):
        parse_firmware(bytes(image))
    assert time.monotonic() - begin < 1


# --- loading ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_rig",
    [
        pytest.param(body, marks=pytest.mark.riscv) if body in EMULATED else body
        for body in sorted(set(BODIES) - {"kernel"})
    ],
    indirect=True,
)
def test_emulated_cards_take_no_image(make_rig: MakeRig) -> None:
    card = make_rig(1).cards[0]
    with pytest.raises(CardCommandError, match="card 0 takes no firmware image"):
        card.load_image(parse_firmware(Image().build()).data)


def test_soft_cards_go_on_after_refusing_one() -> None:
    with soft_rig(1, 1 << 20) as rig:
        with pytest.raises(CardCommandError):
            rig.cards[0].load_image(b"")
        assert rig.cards[0].alloc(64) == 0
