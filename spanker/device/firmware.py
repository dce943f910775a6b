# SPDX-License-Identifier: Apache-2.0
"""The program container: what a card's own processors run, as a RISC-V ELF file with a note.

docs/api/program-container.md defines it.  `read_firmware` checks everything that can be known
before a card is there; whoever gives the image to a card (`CardDevice.load_image`) has a
`Firmware`, and so has checked it.  Nothing of it runs here.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from spanker.errors import FirmwareError
from spanker.kernels.program import Op
from spanker.native import lib

IMAGE_BYTES_MAX = int(lib.SPANKER_IMAGE_BYTES_MAX)
# What the segments may take together once they are loaded.
MEMORY_BYTES_MAX = 64 << 20
ABI_VERSION = (int(lib.SAIL_VERSION_MAJOR), int(lib.SAIL_VERSION_MINOR))

NOTE_NAME = "Spanker"
NOTE_TYPE = 1
NOTE_VERSION = 1
# version, bytes, abi major and minor, semantics, kernels, bytes of text, SHA-256.
NOTE_HEADER = struct.Struct("<IIHHIII32s")
# op, format, where in the text its symbol is.
NOTE_KERNEL = struct.Struct("<HHI")
# name, info, other, section, value, size.
SYMBOL = struct.Struct("<IBBHQQ")
KERNELS_MAX = 4096
SEGMENTS_MAX = 64
SECTIONS_MAX = 4096

# RVA23U64 without what only concerns privileged software, and the matrix extension of the card.
_BASE = frozenset("imafdcvb")
_EXTENSIONS = frozenset(
    "zicsr zicntr zihpm zifencei ziccif ziccrse ziccamoa ziccamoc zicclsm za64rs zihintpause "
    "zihintntl zic64b zicbom zicbop zicboz zicond zimop zcmop zca zcb zcd zfa zfh zfhmin zawrs "
    "zaamo zalrsc zkt zvkt zba zbb zbs zmmul zvfhmin zvfh zvbb zvkb zve32x zve32f zve64x zve64f "
    "zve64d zvl32b zvl64b zvl128b xpopmatmul".split()
)
_OWN = frozenset({"xpopmatmul"})  # of the card alone: what RVA23 does not have
_NEEDED = ("i", "m", "a", "f", "d", "v")
_ATTRIBUTES = ".riscv.attributes"
_TAG_FILE, _TAG_ARCH = 1, 5
_PT_LOAD, _PF_X, _PF_W = 1, 1, 2
_STT_FUNC = 2


@attrs.frozen
class Kernel:
    """A kernel of an image: the operation and weight format that it is for, and where it begins."""

    op: Op
    format: int
    symbol: str
    address: int


@attrs.frozen
class Segment:
    """What is loaded: `nbytes` of the file at `address`, and zeros up to `memory_bytes`."""

    address: int
    nbytes: int
    memory_bytes: int
    executable: bool


@attrs.frozen
class Firmware:
    """An image that has passed every check; `data` is the whole file."""

    data: bytes = attrs.field(repr=False)
    isa: str
    abi: tuple[int, int]
    semantics: int
    kernels: tuple[Kernel, ...]
    segments: tuple[Segment, ...]
    entry: int
    sha256: str


def read_firmware(path: str | os.PathLike[str]) -> Firmware:
    """The image in a file; FirmwareError says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            data = file.read(IMAGE_BYTES_MAX + 1)
    except OSError as error:
        raise FirmwareError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    return parse_firmware(data, name=os.fspath(path))


def parse_firmware(data: bytes, *, name: str = "firmware") -> Firmware:
    """Check an image; FirmwareError names what of it is wrong, and what was expected."""
    elf_file, elf_errors = _elftools()
    if len(data) > IMAGE_BYTES_MAX:
        raise FirmwareError(
            f"{name}: more than {IMAGE_BYTES_MAX:,} bytes, which is the most that a card takes; "
            f"link it without debugging information"
        )
    try:
        elf = elf_file(io.BytesIO(data))
        return _Reader(name, data, elf).firmware()
    except FirmwareError:
        raise
    except elf_errors as error:
        raise FirmwareError(f"{name}: not a well-formed ELF file ({error})") from error


def _elftools() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        from elftools.common.exceptions import ELFError
        from elftools.construct import ConstructError
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise FirmwareError(
            "reading firmware needs pyelftools: pip install 'spanker[firmware]'"
        ) from None
    # It takes most of what it finds for granted.
    by_the_way = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
    return ELFFile, (ELFError, ConstructError, struct.error, OSError, *by_the_way)


@attrs.frozen
class _Note:
    """The descriptor, and where in the file its hash is."""

    abi: tuple[int, int]
    semantics: int
    isa: str
    kernels: tuple[tuple[int, int, str], ...]
    sha256: bytes
    hash_at: int


class _Reader:
    """One image; every method raises FirmwareError."""

    def __init__(self, name: str, data: bytes, elf: Any) -> None:
        self._name = name
        self._data = data
        self._elf = elf

    def _wrong(self, what: str) -> FirmwareError:
        return FirmwareError(f"{self._name}: {what}")

    def firmware(self) -> Firmware:
        self._check_header()
        segments = self._segments()
        note = self._note()
        self._check_abi(note)
        check_isa(note.isa, self._name)
        self._check_attributes(note)
        digest = hash_segments(self._data, self._load_headers(), note.hash_at)
        if digest != note.sha256:
            raise self._wrong(
                f"its segments have SHA-256 {digest.hex()}, its note says {note.sha256.hex()}: "
                f"the file is damaged, or was changed after it was sealed"
            )
        entry = int(self._elf.header["e_entry"])
        if not _within(entry, segments):
            raise self._wrong(f"its entry {entry:#x} is in no executable segment")
        kernels = self._kernels(note, segments)
        return Firmware(
            self._data, note.isa, note.abi, note.semantics, kernels, segments, entry, digest.hex()
        )

    def sealed(self) -> bytes:
        at = self._note().hash_at
        digest = hash_segments(self._data, self._load_headers(), at)
        return self._data[:at] + digest + self._data[at + len(digest) :]

    def _check_header(self) -> None:
        header = self._elf.header
        ident = header["e_ident"]
        for field, got, wanted in (
            ("class", ident["EI_CLASS"], "ELFCLASS64"),
            ("byte order", ident["EI_DATA"], "ELFDATA2LSB"),
            ("machine", header["e_machine"], "EM_RISCV"),
            ("type", header["e_type"], "ET_EXEC"),
        ):
            if got != wanted:
                raise self._wrong(f"{field} is {got}, a card takes {wanted}")
        # So that looking at all of them is a matter of milliseconds, whatever the file says.
        for table, nbytes, expected, count, most in (
            ("program", header["e_phentsize"], 56, header["e_phnum"], SEGMENTS_MAX),
            ("section", header["e_shentsize"], 64, header["e_shnum"], SECTIONS_MAX),
        ):
            if nbytes != expected or not 1 <= count <= most:
                raise self._wrong(
                    f"{count} {table} headers of {nbytes} bytes, expected 1 to {most} of {expected}"
                )

    # --- segments -----------------------------------------------------------------------

    def _load_headers(self) -> list[Any]:
        return [s.header for s in self._elf.iter_segments() if s.header["p_type"] == "PT_LOAD"]

    def _segments(self) -> tuple[Segment, ...]:
        found: list[Segment] = []
        end = 0
        for number, h in enumerate(self._load_headers()):
            begin, nbytes, memory = h["p_vaddr"], h["p_filesz"], h["p_memsz"]
            what = f"loadable segment {number}"
            if nbytes > memory:
                raise self._wrong(f"{what} has {nbytes:,} bytes for {memory:,} of memory")
            if h["p_offset"] + nbytes > len(self._data):
                raise self._wrong(
                    f"{what} ends at byte {h['p_offset'] + nbytes:,}, the file at "
                    f"{len(self._data):,}: it is truncated"
                )
            if begin < end or begin + memory > 1 << 64:
                raise self._wrong(
                    f"{what} at {begin:#x} overlaps another, or they are not in order"
                )
            if h["p_flags"] & _PF_W and h["p_flags"] & _PF_X:
                raise self._wrong(f"{what} is writable and executable: no card loads that")
            end = begin + memory
            found.append(Segment(begin, nbytes, memory, bool(h["p_flags"] & _PF_X)))
        total = sum(segment.memory_bytes for segment in found)
        if not total or total > MEMORY_BYTES_MAX:
            raise self._wrong(
                f"its segments take {total:,} bytes of memory, expected 1 to {MEMORY_BYTES_MAX:,}"
            )
        return tuple(found)

    # --- the note -----------------------------------------------------------------------

    def _notes(self) -> Iterator[tuple[bytes, int]]:
        """The descriptors of our notes, and where in the file they are."""
        for segment in self._elf.iter_segments():
            h = segment.header
            if h["p_type"] != "PT_NOTE":
                continue
            at, end = h["p_offset"], min(h["p_offset"] + h["p_filesz"], len(self._data))
            while at + 12 <= end:
                name_bytes, nbytes, kind = struct.unpack_from("<3I", self._data, at)
                name_at = at + 12
                begin = name_at + -(-name_bytes // 4) * 4
                at = begin + -(-nbytes // 4) * 4
                if begin + nbytes > end:
                    raise self._wrong(f"a note at byte {name_at - 12:,} goes beyond its segment")
                name = self._data[name_at : name_at + name_bytes]
                if name == NOTE_NAME.encode() + b"\0" and kind == NOTE_TYPE:
                    yield self._data[begin : begin + nbytes], begin

    def _note(self) -> _Note:
        notes = list(self._notes())
        if len(notes) != 1:
            raise self._wrong(
                f"{len(notes) or 'no'} notes {NOTE_NAME!r} of type {NOTE_TYPE}, expected one: "
                f"docs/api/program-container.md says what is in it"
            )
        data, begin = notes[0]
        if len(data) < NOTE_HEADER.size:
            raise self._wrong(
                f"its note has {len(data)} bytes, expected {NOTE_HEADER.size} or more"
            )
        header = NOTE_HEADER.unpack_from(data)
        version, nbytes, major, minor, semantics, kernels, text_bytes, sha256 = header
        if version != NOTE_VERSION:
            raise self._wrong(
                f"its note has version {version}, this Spanker reads version {NOTE_VERSION}"
            )
        if kernels > KERNELS_MAX:
            raise self._wrong(f"its note has {kernels:,} kernels, expected at most {KERNELS_MAX:,}")
        text_at = NOTE_HEADER.size + kernels * NOTE_KERNEL.size
        if not nbytes == len(data) == text_at + text_bytes:
            raise self._wrong(
                f"its note has {len(data):,} bytes, says {nbytes:,}, and {kernels} kernels with "
                f"{text_bytes:,} bytes of text make {text_at + text_bytes:,}"
            )
        text = data[text_at:]
        table = NOTE_KERNEL.iter_unpack(data[NOTE_HEADER.size : text_at])
        return _Note(
            (major, minor),
            semantics,
            self._text(text, 0),
            tuple([(op, fmt, self._text(text, at)) for op, fmt, at in table]),
            sha256,
            begin + NOTE_HEADER.size - len(sha256),
        )

    def _text(self, text: bytes, at: int) -> str:
        end = text.find(b"\0", at)
        if at >= len(text) or end < 0:
            raise self._wrong(f"a text of its note at {at} has no end")
        found = text[at:end]
        if not found or not all(0x21 <= byte <= 0x7E for byte in found):
            raise self._wrong(f"a text of its note at {at} is empty, or has spaces or is not ASCII")
        return found.decode("ascii")

    def _check_abi(self, note: _Note) -> None:
        if note.abi[0] != ABI_VERSION[0] or note.abi[1] > ABI_VERSION[1]:
            raise self._wrong(
                f"made for version {note.abi[0]}.{note.abi[1]} of the card's interface, this "
                f"Spanker knows {ABI_VERSION[0]}.{ABI_VERSION[1]}: install the one that it is of"
            )
        if note.semantics != lib.SPK_SEMANTICS_VERSION:
            raise self._wrong(
                f"its kernels compute by semantics {note.semantics}, expected "
                f"{lib.SPK_SEMANTICS_VERSION}: answers could differ; build it from this version"
            )

    def _check_attributes(self, note: _Note) -> None:
        """What the compiler says that it has used must be in the note, or in RVA23.  It need not
        name all: compilers leave out extensions that they do not know."""
        section = self._elf.get_section_by_name(_ATTRIBUTES)
        if section is None:
            return
        begin, nbytes = int(section["sh_offset"]), int(section["sh_size"])
        if begin + nbytes > len(self._data):
            raise self._wrong(f"its section {_ATTRIBUTES} goes beyond the end of the file")
        try:
            archs = list(riscv_archs(self._data[begin : begin + nbytes]))
        except (ValueError, IndexError, struct.error):
            raise self._wrong(f"its section {_ATTRIBUTES} is malformed") from None
        known = _EXTENSIONS - _OWN | _BASE | _extensions(note.isa)
        for arch in archs:
            if not arch.startswith("rv64"):
                raise self._wrong(f"compiled for {arch}, a card has 64 bits")
            unsaid = sorted(_extensions(arch) - known)
            if unsaid:
                raise self._wrong(
                    f"compiled with {', '.join(unsaid)} ({arch}), which neither its note "
                    f"({note.isa}) nor RVA23 has: note and code are not of the same build"
                )

    def _kernels(self, note: _Note, segments: tuple[Segment, ...]) -> tuple[Kernel, ...]:
        symbols: dict[str, int] = {}
        table = self._elf.get_section_by_name(".symtab")
        if table is not None:
            if table["sh_entsize"] != 24 or table["sh_size"] > len(self._data):
                raise self._wrong("its symbol table is malformed")
            # By hand: a C library has thousands, of which a handful are looked for.
            wanted = {symbol.encode() for _, _, symbol in note.kernels}
            longest = max(map(len, wanted), default=0)
            texts = self._elf.get_section(table["sh_link"]).data()
            for at, info, _, _, address, _ in SYMBOL.iter_unpack(table.data()):
                if info & 15 != _STT_FUNC:
                    continue
                text = texts[at : at + longest + 1].partition(b"\0")[0]
                if text in wanted:
                    symbols[text.decode()] = address
        if not note.kernels:
            raise self._wrong("its note lists no kernels")
        found: dict[tuple[int, int], Kernel] = {}
        for op, fmt, symbol in note.kernels:
            try:
                known = Op(op)
            except ValueError:
                raise self._wrong(
                    f"kernel {symbol} is for operation {op}, which this Spanker does not know"
                ) from None
            if (op, fmt) in found:
                raise self._wrong(f"two kernels for {known.name.lower()}, format {fmt}")
            if symbol not in symbols:
                raise self._wrong(
                    f"kernel {symbol} ({known.name.lower()}) is no function of its symbol table"
                )
            if not _within(symbols[symbol], segments):
                raise self._wrong(
                    f"kernel {symbol} is at {symbols[symbol]:#x}, in no executable segment"
                )
            found[op, fmt] = Kernel(known, fmt, symbol, symbols[symbol])
        return tuple(found.values())


def sealed(data: bytes, *, name: str = "firmware") -> bytes:
    """An image whose note has the hash of its segments; all else is as it was, and not checked.

    The last step of whoever links one.  FirmwareError where there is no note to put it into.
    """
    elf_file, elf_errors = _elftools()
    try:
        elf = elf_file(io.BytesIO(data))
        return _Reader(name, data, elf).sealed()
    except elf_errors as error:
        raise FirmwareError(f"{name}: not a well-formed ELF file ({error})") from error


def _within(address: int, segments: tuple[Segment, ...]) -> bool:
    """Whether there is code of the file at an address."""
    return any(s.executable and s.address <= address < s.address + s.nbytes for s in segments)


def hash_segments(data: bytes, headers: list[Any], hash_at: int) -> bytes:
    """SHA-256 of the loadable segments: of each its address, bytes in the file and in memory, and
    flags, then its bytes.  The 32 bytes of the hash itself count as zeros where they are loaded."""
    blank = bytearray(data)
    blank[hash_at : hash_at + 32] = bytes(32)
    digest = hashlib.sha256()
    for h in headers:
        digest.update(struct.pack("<QQQI", h["p_vaddr"], h["p_filesz"], h["p_memsz"], h["p_flags"]))
        digest.update(blank[h["p_offset"] : h["p_offset"] + h["p_filesz"]])
    return digest.digest()


def pack_note(isa: str, kernels: Sequence[tuple[Op, int, str]]) -> bytes:
    """The note of an image of this version's interface and semantics, its hash yet to be put in:
    `kernels` are the operation, weight format and symbol of each."""
    texts = [isa, *dict.fromkeys(symbol for _, _, symbol in kernels)]
    places = dict(zip(texts, itertools.accumulate([0, *[len(t) + 1 for t in texts]]), strict=False))
    text = b"".join(t.encode("ascii") + b"\0" for t in texts)
    table = b"".join(NOTE_KERNEL.pack(op, fmt, places[symbol]) for op, fmt, symbol in kernels)
    nbytes = NOTE_HEADER.size + len(table) + len(text)
    header = NOTE_HEADER.pack(
        NOTE_VERSION,
        nbytes,
        *ABI_VERSION,
        lib.SPK_SEMANTICS_VERSION,
        len(kernels),
        len(text),
        bytes(32),
    )
    name = NOTE_NAME.encode() + b"\0"
    head = struct.pack("<3I", len(name), nbytes, NOTE_TYPE) + name
    return head + header + table + text + bytes(-nbytes % 4)


def riscv_archs(data: bytes) -> Iterator[str]:
    """The ISA strings that a section .riscv.attributes has for the whole file, with versions, such
    as `rv64i2p1_m2p0_zba1p0`; ValueError, IndexError or struct.error where it is malformed.

    Source: RISC-V ELF psABI, "Attributes": `A`; for each vendor a length and a name; below it, for
    the file, sections or symbols, a tag, a length, and attributes, each a ULEB128 tag and, as the
    tag is odd or even, a text or a ULEB128 number.
    """
    if data[:1] != b"A":
        raise ValueError("another version")
    at = 1
    while at < len(data):
        end = _end(data, at, at, len(data))
        vendor_end = data.index(b"\0", at + 4, end)
        part = vendor_end + 1
        if data[at + 4 : vendor_end] != b"riscv":
            part = end
        while part < end:
            part_end = _end(data, part, part + 1, end)
            value = part + 5
            while data[part] == _TAG_FILE and value < part_end:
                tag, value = _uleb128(data, value, part_end)
                if tag % 2 == 0:
                    _, value = _uleb128(data, value, part_end)
                    continue
                text_end = data.index(b"\0", value, part_end)
                if tag == _TAG_ARCH:
                    yield data[value:text_end].decode("ascii")
                value = text_end + 1
            part = part_end
        at = end


def _end(data: bytes, begin: int, length_at: int, most: int) -> int:
    """Where something ends that begins there and has its length in there."""
    (nbytes,) = struct.unpack_from("<I", data, length_at)
    if begin + nbytes > most or begin + nbytes < length_at + 4:
        raise ValueError("a length")
    return begin + int(nbytes)


def _uleb128(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("a number without end")


def _extensions(isa: str) -> set[str]:
    """Of an ISA string of 64 bits, with versions or without."""
    names: set[str] = set()
    for name in re.sub(r"\d+p\d+", "", isa.removeprefix("rv64")).split("_"):
        names.update([name] if name[:1] in ("s", "x", "z") else name.replace("g", "imafd"))
    return names


def check_isa(isa: str, name: str = "firmware") -> None:
    """FirmwareError unless a card runs code for this ISA string, such as `rv64gcv_xpopmatmul`."""
    match = re.fullmatch(r"rv(32|64)([a-y]+)((?:_[a-z][a-z0-9]*)*)", isa)
    if not match:
        raise FirmwareError(
            f"{name}: no ISA {isa!r}: expected rv64, letters, then _ and each further extension, "
            f"e.g. rv64gcv_xpopmatmul"
        )
    bits, letters, rest = match.groups()
    if bits != "64":
        raise FirmwareError(f"{name}: made for {bits} bits ({isa}), a card has 64")
    has = set(letters.replace("g", "imafd"))
    names = [extension for extension in rest.split("_") if extension]
    unknown = sorted(has - _BASE) + [n for n in names if n not in _EXTENSIONS | _BASE]
    if unknown:
        raise FirmwareError(
            f"{name}: needs {', '.join(unknown)} ({isa}), which a card does not have: it has "
            f"RVA23U64 and xpopmatmul; compile it for that"
        )
    missing = [letter for letter in _NEEDED if letter not in has | set(names)]
    if missing:
        raise FirmwareError(
            f"{name}: made without {', '.join(missing)} ({isa}): its kernels need at least rv64gv"
        )
