#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the firmware of RISC-V cards: docs/api/program-container.md.

The same C files as in the Python package, each instruction set with its own flags, with
spanker/device/card_process in front; then the note that says what is in the image, and the hash of
its segments.  --here makes a program of this machine instead, of plain C with sanitizers, which
tests use.  Runs in the project's root, where the package is built; needs clang with a RISC-V back
end, and the linker and C library for riscv64.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from build_card_server import SANITIZE
from native_objects import CommandError, build_program, compile_all, link_program, native, run

from spanker.device.firmware import pack_note, parse_firmware, sealed
from spanker.errors import FirmwareError
from spanker.kernels.elements import Element
from spanker.kernels.formats import Format
from spanker.kernels.program import Op

FIRMWARE = "build/spanker-firmware.elf"
HERE = "build/spanker-card-process-sanitized"
OUT = Path("build/firmware")
COMPILERS = ("clang-19", "clang", "clang-20", "clang-18")
TARGET = ["--target=riscv64-linux-gnu", "-mabi=lp64d"]
PACKAGES = "clang-19 binutils-riscv64-linux-gnu libc6-dev-riscv64-cross libgcc-12-dev-riscv64-cross"
ISA = "rv64gcv_zvl128b_xpopmatmul"
# Of one operation and format the first that the image has.
ISAS = ("xpop", "rvv", "scalar")
# Which operation a kernel is for, and for which formats; a matmul's is in its name.
KERNELS: dict[str, tuple[Op, Iterable[int]]] = {
    "quantize_q8": (Op.QUANTIZE, [Format.Q8_0]),
    "rmsnorm": (Op.RMSNORM, [Format.F32]),
    "rope": (Op.ROPE, [Format.F32]),
    "kv_append": (Op.KV_APPEND, [Format.F16]),
    "attention": (Op.ATTENTION, [Format.F16]),
    "swiglu": (Op.SWIGLU, [Format.F32]),
    "add": (Op.ADD, [Format.F32]),
    "logit_stats": (Op.LOGIT_STATS, [Format.F32]),
    "top_k": (Op.TOP_K, [Format.F32]),
    "reduce": (Op.REDUCE, list(Element)),
    "divide": (Op.DIVIDE, list(Element)),
}


def find_compiler() -> str:
    for name in COMPILERS:
        if shutil.which(name):
            return name
    raise CommandError(f"the firmware needs clang: apt-get install {PACKAGES}")


def functions(objects: list[str]) -> Iterator[str]:
    from elftools.elf.elffile import ELFFile

    for path in objects:
        with open(path, "rb") as file:
            table = ELFFile(file).get_section_by_name(".symtab")
            for symbol in table.iter_symbols() if table else ():
                if symbol["st_info"]["type"] == "STT_FUNC":
                    yield symbol.name


def kernel_table(symbols: Iterable[str]) -> list[tuple[Op, int, str]]:
    """The kernels among these functions, by operation and format."""
    found: dict[tuple[Op, int], str] = {}
    split = [(*symbol.rpartition("__")[::2], symbol) for symbol in symbols]
    for isa in ISAS:
        for name, _, symbol in sorted(entry for entry in split if entry[1] == isa):
            op, formats = _purpose(name)
            for fmt in formats:
                found.setdefault((op, int(fmt)), symbol)
    return [(op, fmt, symbol) for (op, fmt), symbol in sorted(found.items())]


def _purpose(name: str) -> tuple[Op, Iterable[int]]:
    if name.startswith("matmul_"):
        return Op.MATMUL, [Format[name[len("matmul_") : name.rindex("_")].upper()]]
    return KERNELS.get(name, (Op.EMBED, ()))


def build(compiler: str, program: Path) -> None:
    command = shlex.join([compiler, *TARGET])
    objects = compile_all(command, OUT, [], [], native["card_process"]("riscv64"))
    note = OUT / "note.S"
    values = ", ".join(map(str, pack_note(ISA, kernel_table(functions(objects)))))
    note.write_text(f'.section .note.spanker,"a",@note\n.balign 4\n.byte {values}\n')
    note_object = str(OUT / "note.o")
    run([*shlex.split(command), "-march=rv64gc", "-c", str(note), "-o", note_object])
    flags = ["-static", "-no-pie", "-Wl,-z,separate-code"]
    linked = OUT / program.name
    link_program(command, [*objects, note_object], linked, flags)
    image = sealed(linked.read_bytes(), name=str(linked))
    parse_firmware(image, name=str(program))
    program.parent.mkdir(parents=True, exist_ok=True)
    partial = program.with_suffix(".partial")
    partial.write_bytes(image)
    partial.rename(program)


def make(program: Path, compiler: str | None, here: bool) -> None:
    if not here:
        build(compiler or find_compiler(), program)
        return
    parts = native["card_process"]("")
    compiler = compiler or os.environ.get("CC", "cc")
    build_program(parts, compiler, program, OUT / program.name, SANITIZE, [])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cc", help="the compiler to use")
    parser.add_argument("--here", action="store_true", help=f"a program of this machine ({HERE})")
    parser.add_argument("program", nargs="?", help=f"where it goes ({FIRMWARE})")
    options = parser.parse_args()
    program = Path(options.program or (HERE if options.here else FIRMWARE))
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        with open(OUT / "lock", "w") as lock:  # test processes side by side build one after another
            fcntl.flock(lock, fcntl.LOCK_EX)
            make(program, options.cc, options.here)
    except (CommandError, FirmwareError) as error:
        print(error)
        return 1
    print(f"built {program}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
