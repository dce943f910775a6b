# SPDX-License-Identifier: Apache-2.0
"""The emulation of Xpop_matmul in ordinary programs, and its header with both compilers."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import xpop_cases
import xpop_reference as reference

pytestmark = pytest.mark.riscv

INCLUDE = ["-Ispanker/kernels/csrc", "-Ispanker/device/riscv/csrc"]
COMPILERS = {
    "clang": ["clang-19", "--target=riscv64-linux-gnu"],
    "gcc": ["riscv64-linux-gnu-gcc"],
}


def command(compiler: str) -> list[str]:
    start = COMPILERS[compiler]
    if not shutil.which(start[0]):
        pytest.skip(f"{start[0]} is not installed")
    return [*start, "-march=rv64gc", "-mabi=lp64d", "-Wall", "-Wextra", "-Werror", *INCLUDE]


@pytest.fixture(scope="module", params=COMPILERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xpop") / "program"
    sources = ["tests/riscv/xpop_program.c", str(xpop_cases.TRAP)]
    flags = ["-std=gnu11", "-O2", "-ffp-contract=off", "-static", "-pthread"]
    xpop_cases.run([*command(request.param), *flags, *sources, "-o", str(path)])
    return path


@pytest.mark.parametrize(
    ("what", "ends"),
    [
        ("threads", 0),
        ("without", signal.SIGILL),
        ("reserved", signal.SIGILL),
        ("other", signal.SIGILL),
        ("short", signal.SIGILL),
        ("misaligned", signal.SIGBUS),
        ("ignored", signal.SIGBUS),
        ("null", signal.SIGSEGV),
    ],
)
def test_a_program_ends_as_on_a_processor_that_has_it(program: Path, what: str, ends: int) -> None:
    qemu = xpop_cases.tool("qemu-riscv64", "qemu-riscv64-static")
    if not qemu:
        pytest.skip("qemu-riscv64 is not installed")
    done = subprocess.run([qemu, str(program), what], capture_output=True, timeout=60)
    assert done.returncode == (0 if ends == 0 else -ends), done.stderr


def word(mnemonic: str, run: int, tokens: int, rd: int, rs1: int, rs2: int) -> int:
    """The encoding, from the tables of docs/api/xpop-matmul.md."""
    kinds = reference.FORMATS if mnemonic in reference.FORMATS else reference.TYPES
    funct3 = int(kinds is reference.FORMATS)
    return (
        kinds.index(mnemonic) << 29
        | (run - 1) << 28
        | (tokens - 1) << 26
        | rs2 << 20
        | rs1 << 15
        | funct3 << 12
        | rd << 7
        | 0b0001011
    )


def every_instruction() -> list[tuple[str, int, int]]:
    runs = {"q4_0": 2, "q4_1": 2, "q8_0": 2, "q4_k": 1, "q6_k": 2}
    return [
        (kind, run, tokens)
        for kind in (*reference.TYPES, *reference.FORMATS)
        for run, tokens in itertools.product(range(1, runs.get(kind, 1) + 1), range(1, 5))
    ]


def words_of(compiler: str, source: Path, section: str) -> list[int]:
    """The 32-bit words of a section of what the compiler makes of a file."""
    from elftools.elf.elffile import ELFFile

    target = source.with_suffix(".o")
    xpop_cases.run([*command(compiler), "-O1", "-c", str(source), "-o", str(target)])
    with open(target, "rb") as file:
        data = ELFFile(file).get_section_by_name(section).data()
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_assembler_macros_encode_as_the_document_says(compiler: str, tmp_path: Path) -> None:
    lines, expected = ['#include "xpop/spk_xpop.h"', ".section .words"], []
    registers = itertools.cycle([(10, 11, 12), (31, 1, 16), (0, 0, 0), (5, 30, 5), (16, 8, 1)])
    for kind, run, tokens in every_instruction():
        rd, rs1, rs2 = next(registers)
        name = f"pop.{'step' if kind in reference.FORMATS else 'dot'}.{kind}"
        runs = f"{run}, " if kind in reference.FORMATS and kind != "q4_k" else ""
        lines.append(f"{name} x{rd}, x{rs1}, x{rs2}, {runs}{tokens}")
        expected.append(word(kind, run, tokens, rd, rs1, rs2))
    source = tmp_path / "macros.S"
    source.write_text("\n".join(lines) + "\n")
    assert len(expected) == 48
    assert words_of(compiler, source, ".words") == expected


@pytest.mark.parametrize("compiler", COMPILERS)
def test_c_macros_encode_as_the_document_says(compiler: str, tmp_path: Path) -> None:
    lines, expected = ['#include "xpop/spk_xpop.h"'], []
    for number, (kind, run, tokens) in enumerate(every_instruction()):
        step = kind in reference.FORMATS
        call = f"SPK_POP_{'STEP' if step else 'DOT'}(SPK_POP_{kind.upper()}, "
        call += f"{run}, {tokens}, r, w, x)" if step else f"{tokens}, r, w, x)"
        lines.append(
            f'void f{number}(void *r, void *w, void *x); __attribute__((section(".words"))) '
            f"void f{number}(void *r, void *w, void *x) {{ {call}; }}"
        )
        expected.append(word(kind, run, tokens, 10, 11, 12))  # a0, a1, a2
    source = tmp_path / "macros.c"
    source.write_text("\n".join(lines) + "\n")
    words = words_of(compiler, source, ".words")
    halves = [h for w in words for h in (w & 0xFFFF, w >> 16)]  # a return has 16 bits
    found = [low | high << 16 for low, high in itertools.pairwise(halves) if low & 0x7F == 0x0B]
    assert found == expected
