# SPDX-License-Identifier: Apache-2.0
"""Firmware images for tests, packed by hand: the layout is that of the ELF specification, not that
of the code under test.  `Image` has a good one, whose fields a test spoils before `build`."""

from __future__ import annotations

import hashlib
import struct

import attrs

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
SYM = struct.Struct("<IBBHQQ")
PT_LOAD, PT_NOTE = 1, 4
R, W, X = 4, 2, 1
CODE = b"\x13\x00\x00\x00" * 64  # nop
MATMUL, ADD = 4, 9


@attrs.define
class Image:
    """`kernels` are (op, format, symbol), `symbols` (name, address, type: 2 for a function); where
    `note_loaded`, the note is in a loadable segment, as linkers put it.  What is None is as it
    should be."""

    isa: str = "rv64gcv_zvl128b_xpopmatmul"
    abi: tuple[int, int] = (1, 0)
    semantics: int = 1
    note_version: int = 1
    note_name: bytes = b"Spanker\0"
    note_type: int = 1
    notes: int = 1
    note_loaded: bool = True
    kernels: list[tuple[int, int, str]] = attrs.Factory(
        lambda: [(MATMUL, 2, "matmul_q4_0"), (ADD, 0, "add_f32")]
    )
    symbols: list[tuple[str, int, int]] = attrs.Factory(
        lambda: [("matmul_q4_0", 0x1010, 2), ("add_f32", 0x1020, 2), ("table", 0x1030, 1)]
    )
    elf_class: int = 2
    byte_order: int = 1
    machine: int = 243
    kind: int = 2
    entry: int = 0x1000
    code_flags: int = R | X
    data_address: int = 0x2000
    data_memory: int = 0x100
    sha256: bytes | None = None
    note_bytes: int | None = None
    # Of .riscv.attributes; None where there is no such section.
    arch: str | None = "rv64i2p1_m2p0_a2p1_f2p2_d2p2_c2p0_v1p0_zicsr2p0_zmmul1p0_zvl128b1p0"
    attributes: bytes | None = None

    def build(self) -> bytes:
        names, text = [], b""
        for name in (self.isa, *(symbol for _, _, symbol in self.kernels)):
            names.append(len(text))
            text += name.encode() + b"\0"
        table = b"".join(
            struct.pack("<HHI", op, fmt, at)
            for (op, fmt, _), at in zip(self.kernels, names[1:], strict=True)
        )
        nbytes = 56 + len(table) + len(text)
        descriptor = struct.pack(
            "<IIHHIII32s",
            self.note_version,
            nbytes if self.note_bytes is None else self.note_bytes,
            *self.abi,
            self.semantics,
            len(self.kernels),
            len(text),
            bytes(32),
        )
        descriptor += table + text
        note = struct.pack("<3I", len(self.note_name), len(descriptor), self.note_type)
        note += _padded(self.note_name) + _padded(descriptor)
        hash_in_note = 12 + len(_padded(self.note_name)) + 24
        note *= self.notes

        code_at = EHDR.size + 4 * PHDR.size
        data = bytes(range(64))
        data_at = code_at + len(CODE)
        note_at = data_at + len(data)
        loads = [
            (self.code_flags, code_at, 0x1000, len(CODE), len(CODE)),
            (R | W, data_at, self.data_address, len(data), self.data_memory),
        ]
        if self.note_loaded:
            loads.append((R, note_at, 0x8000, len(note), len(note)))
        headers = [PHDR.pack(PT_LOAD, f, o, a, a, n, m, 8) for f, o, a, n, m in loads]
        headers.append(PHDR.pack(PT_NOTE, R, note_at, 0x8000, 0x8000, len(note), len(note), 4))
        file = bytearray(code_at)
        file += CODE + data + note

        digest = hashlib.sha256()
        for flags, offset, address, nbytes, memory in loads:
            digest.update(struct.pack("<QQQI", address, nbytes, memory, flags))
            digest.update(file[offset : offset + nbytes])
        at = note_at + hash_in_note
        file[at : at + 32] = digest.digest() if self.sha256 is None else self.sha256

        strings, symbols = b"\0", SYM.pack(0, 0, 0, 0, 0, 0)
        for name, address, kind in self.symbols:
            symbols += SYM.pack(len(strings), 1 << 4 | kind, 0, 1, address, 4)
            strings += name.encode() + b"\0"
        section_names = b"\0.symtab\0.strtab\0.shstrtab\0.riscv.attributes\0"
        attributes = self.attributes
        if attributes is None:
            attributes = attributes_of(self.arch or "")
        symbols_at = len(file)
        file += symbols + strings + section_names + attributes
        strings_at = symbols_at + len(symbols)
        names_at = strings_at + len(strings)
        attributes_at = names_at + len(section_names)
        sections = [
            SHDR.pack(*[0] * 10),
            SHDR.pack(1, 2, 0, 0, symbols_at, len(symbols), 2, 1, 8, SYM.size),
            SHDR.pack(9, 3, 0, 0, strings_at, len(strings), 0, 0, 1, 0),
            SHDR.pack(17, 3, 0, 0, names_at, len(section_names), 0, 0, 1, 0),
        ]
        if self.arch is not None:
            kind = 0x70000003
            sections.append(SHDR.pack(27, kind, 0, 0, attributes_at, len(attributes), 0, 0, 1, 0))
        sections_at = len(file)
        file += b"".join(sections)
        ident = b"\x7fELF" + bytes([self.elf_class, self.byte_order, 1]) + bytes(9)
        file[: EHDR.size] = EHDR.pack(
            ident,
            self.kind,
            self.machine,
            1,
            self.entry,
            EHDR.size,
            sections_at,
            0x5,
            EHDR.size,
            PHDR.size,
            len(headers),
            SHDR.size,
            len(sections),
            3,
        )
        file[EHDR.size : EHDR.size + PHDR.size * len(headers)] = b"".join(headers)
        return bytes(file)


def attributes_of(arch: str, vendor: str = "riscv", tag: int = 1) -> bytes:
    """A section .riscv.attributes: the stack's alignment, the ISA string, no unaligned accesses."""
    values = b"\x04\x10\x05" + arch.encode() + b"\0\x06\x00"
    part = struct.pack("<BI", tag, 5 + len(values)) + values
    name = vendor.encode() + b"\0"
    return b"A" + struct.pack("<I", 4 + len(name) + len(part)) + name + part


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
