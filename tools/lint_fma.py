#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fails when a kernel contains an instruction whose result is not the one defined answer.

That is a fused multiply-add (one rounding instead of two), an unordered reduction, or an estimate
of a reciprocal (which differs between makers).  Takes object files, archives or directories and
disassembles each with the objdump of its machine; object files, not linked ones, because objdump
does not decode RISC-V vector code there.  Runs on the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FORBIDDEN = re.compile(
    "|".join(
        (
            # x86: FMA3, FMA4, AVX-512 (packed, scalar, complex), then estimates.
            r"v4?fn?m(add|sub)\w*",
            r"vfc?m(add|ul)c[ps]h",
            r"vdpbf16ps",
            r"v?r(cp|sqrt)(14|28)?[ps][sdh]",
            # aarch64: scalar, NEON, SVE, SME; products of pairs and matrices; unordered sums;
            # estimates and their fused Newton steps.
            r"fml[as]\w*",
            r"fn?m(add|sub|ad|sb|la|ls)",
            r"fcmla|ftmad",
            r"bfml[as]\w*",
            r"(bf|f)v?dot[bt]?|(bf|f)mmla|(bf|f)mop[as]",
            r"faddq?v",
            r"fr(ecp|sqrt)[es]",
            # RISC-V: scalar, vector, widening, unordered sum, estimates.
            r"fn?m(add|sub)\.[hsdq]",
            r"vfw?n?m(acc|sac|add|sub)\w*\.\w+",
            r"vfw?redu?sum\.\w+",
            r"vfr(ec|sqrt)7\.v",
        )
    )
)
# An instruction that objdump cannot name might be any of the above.
UNDECODED = re.compile(r"\(bad\)|\.insn|\.inst|\.[248]byte|0x[0-9a-f]+")

# Nor can it name those of Xpop_matmul, each float operation of which rounds once.
RISCV = re.compile(r"file format elf64-littleriscv$", re.MULTILINE)

FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:$")
MEMBER = re.compile(r"(.+):\s+file format ")
INSTRUCTION = re.compile(
    r"\s*[0-9a-f]+:\t(?:\{\w+\}\s+|(?:lock|rep\w*|data16|addr32|bnd|notrack|[cdefgs]s)\s+)*(\S+)(.*)"
)


# e_machine of an ELF header, as `uname -m` names it, and Debian its cross tools.
MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64"}


class Finding(NamedTuple):
    """One instruction that must not be there."""

    file: str
    function: str
    instruction: str


def is_xpop_matmul(mnemonic: str, operands: str) -> bool:
    """Whether this RISC-V word is one of the encodings of docs/api/xpop-matmul.md."""
    match = re.fullmatch(r"\.4byte 0x([0-9a-f]+)", f"{mnemonic} {operands.strip()}")
    word = int(match[1], 16) if match else 0
    kind, long_run, funct3 = word >> 29, word >> 28 & 1, word >> 12 & 7
    if word & 0x7F != 0b0001011 or word >> 25 & 1:
        return False
    if funct3 == 0:  # pop.dot: u4, s4, s8
        return kind <= 2 and not long_run
    return funct3 == 1 and (kind <= 4 and not (kind == 3 and long_run))  # pop.step: q4_k is 3


def lint(listing: str, file: str) -> tuple[int, list[Finding]]:
    """How many instructions an objdump listing holds, and which of them are wrong."""
    count = 0
    findings = []
    member, function = file, "?"
    riscv = RISCV.search(listing) is not None
    for line in listing.splitlines():
        if match := INSTRUCTION.match(line):
            count += 1
            mnemonic, operands = match.groups()
            if FORBIDDEN.fullmatch(mnemonic):
                findings.append(Finding(member, function, (mnemonic + operands).strip()))
            elif UNDECODED.fullmatch(mnemonic) and not (riscv and is_xpop_matmul(*match.groups())):
                findings.append(Finding(member, function, f"not decoded: {mnemonic}{operands}"))
        elif match := FUNCTION.match(line):
            function = match[1]
        elif match := MEMBER.match(line):
            member = file if match[1] == file else f"{file}({match[1]})"
    return count, findings


def objdump_of(file: Path) -> str:
    """The objdump that decodes this object file or archive."""
    content = file.read_bytes()
    at = content.find(b"\x7fELF")  # an archive's first member
    number = int.from_bytes(content[at + 18 : at + 20], "little") if at >= 0 else 0
    machine = MACHINES.get(number, platform.machine())
    return "objdump" if machine == platform.machine() else f"{machine}-linux-gnu-objdump"


def check_installed(objdump: str) -> None:
    if shutil.which(objdump) is None:
        package = f"binutils-{objdump}".removesuffix("-objdump").replace("_", "-")
        sys.exit(f"lint_fma: {objdump} not found; apt-get install {package}")


def object_files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in (".o", ".a"))
        elif path.exists():
            files.append(path)
        else:
            sys.exit(f"lint_fma: {path} does not exist")
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, help=".o or .a files, or directories")
    parser.add_argument(
        "--objdump",
        default=os.environ.get("OBJDUMP"),
        help="instead of the one that each file's machine calls for",
    )
    options = parser.parse_args(argv)
    check_installed(options.objdump or "objdump")

    files = object_files(options.paths)
    total = 0
    findings: list[Finding] = []
    for file in files:
        objdump = options.objdump or objdump_of(file)
        check_installed(objdump)
        listing = subprocess.run(
            [objdump, "-d", "--no-show-raw-insn", str(file)],
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        if listing.returncode != 0:
            sys.exit(f"lint_fma: {objdump} failed: {listing.stderr.strip()}")
        count, found = lint(listing.stdout, str(file))
        total += count
        findings += found

    for finding in findings:
        print(f"{finding.file}: {finding.function}: {finding.instruction}")
    if findings:
        print(f"lint_fma: {len(findings)} forbidden of {total} instructions in {len(files)} files")
        return 1
    if total == 0:
        print(f"lint_fma: no instruction found in {len(files)} files: nothing was checked")
        return 1
    print(f"lint_fma: {total} instructions in {len(files)} files, none forbidden")
    return 0


if __name__ == "__main__":
    sys.exit(main())
