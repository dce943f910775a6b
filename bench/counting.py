# SPDX-License-Identifier: Apache-2.0
"""What a card's processor executes: instructions of a RISC-V program, by function and kind, and the
cycles that the first board would take for them.

The program runs under qemu-riscv64 with a plugin (bench/native/count_instructions.c) that counts.
Counts are exact, the same on every machine and in every run; they change only with the code and
its compiler.  Cycles are counts times the table below, which is an assumption about a small
processor: one instruction at a time, in order, with caches that hold what kernels use again, four
vector lanes of 32 bits (a beat of 128 bits each cycle), and the Xpop unit of
docs/api/xpop-matmul.md.  What memory takes is not in them: of a command the larger of both counts
(docs/api/timing-model.md).
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

SOURCE = Path(__file__).resolve().parent / "native" / "count_instructions.c"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden")

#: A vector register of the first board: one beat of its four lanes.
VLEN = 128

# --- kinds, as in count_instructions.c ------------------------------------------------------

SCALAR = (*("alu", "load", "store", "jump", "mul", "div", "float", "float_div", "system", "vset"),)
VECTOR = (
    *("int", "mul", "float", "float_div", "reduce", "permute"),
    *("load", "store", "load_elements", "store_elements"),
)
_VECTOR_FIRST = 16
_BEATS_MAX = 128
_XPOP_FIRST = _VECTOR_FIRST + len(VECTOR) * _BEATS_MAX

#: Cycles of a scalar instruction.  A jump costs one more for what was fetched behind it.
SCALAR_CYCLES = {
    **dict.fromkeys(("alu", "load", "store", "mul", "float", "system", "vset"), 1),
    "jump": 2,
    "div": 32,
    "float_div": 16,
}
#: Cycles of a vector instruction: (for the instruction, for each beat or element).
VECTOR_CYCLES = {
    **dict.fromkeys(("int", "mul", "float", "load", "store"), (0, 1)),
    # One divider a lane, not pipelined.
    "float_div": (0, 16),
    # All beats, then the four lanes, two steps.
    "reduce": (2, 1),
    # A crossbar between four lanes takes a beat from each of two registers.
    "permute": (0, 2),
    **dict.fromkeys(("load_elements", "store_elements"), (0, 1)),
}


class CountError(Exception):
    """The program cannot be counted; the message says what to do."""


@attrs.frozen
class Counts:
    """What was executed: by kind, as the plugin numbers them."""

    by_kind: Mapping[int, int]

    @classmethod
    def total(cls, parts: Iterable[Counts]) -> Counts:
        """All of them together."""
        sums: collections.Counter[int] = collections.Counter()
        for part in parts:
            sums.update(part.by_kind)
        return cls(sums)

    def less(self, other: Counts) -> Counts:
        """What is executed beyond `other`."""
        sums = collections.Counter(self.by_kind)
        sums.subtract(other.by_kind)
        return Counts({kind: n for kind, n in sums.items() if n})

    @property
    def scalar(self) -> int:
        """Scalar instructions, vset* among them."""
        return sum(n for kind, n in self.by_kind.items() if kind < _VECTOR_FIRST)

    @property
    def vector(self) -> int:
        return sum(n for kind, n in self.by_kind.items() if _VECTOR_FIRST <= kind < _XPOP_FIRST)

    @property
    def xpop(self) -> int:
        return sum(n for kind, n in self.by_kind.items() if kind >= _XPOP_FIRST)

    @property
    def cycles(self) -> int:
        """Of the first board, without waiting for its memory."""
        return sum(n * _cycles(kind) for kind, n in self.by_kind.items())


def _cycles(kind: int) -> int:
    if kind < _VECTOR_FIRST:
        return SCALAR_CYCLES[SCALAR[kind]]
    if kind < _XPOP_FIRST:
        what, beats = divmod(kind - _VECTOR_FIRST, _BEATS_MAX)
        once, each = VECTOR_CYCLES[VECTOR[what]]
        return once + each * (beats + 1)
    funct7, funct3 = divmod(kind - _XPOP_FIRST, 8)
    return xpop_cycles(funct7, funct3)


# --- the Xpop unit, by the sketch of docs/api/xpop-matmul.md -----------------------------------

_PORT_BYTES = 32
_TILE_ROWS = 16
_LANES = 4
#: Of pop.step, by bits 31:29: bytes of a tile for one L, blocks of 32 weights in it, additions.
_STEP_FORMATS = ((288, 1, 1), (320, 1, 2), (544, 1, 1), (2304, 8, 2), (3360, 8, 1))
_DOT_BYTES = (256, 256, 512)


def xpop_cycles(funct7: int, funct3: int) -> int:
    """Of one instruction whose operands are in the scratchpad: the unit's or the port's, whichever
    takes longer.  KeyError for a reserved encoding."""
    code, tokens = funct7 >> 4, (funct7 >> 1 & 3) + 1
    if funct3 == 0 and code < len(_DOT_BYTES):
        tile, blocks, additions = _DOT_BYTES[code], 1, 1
        accumulators = 64 * tokens
    elif funct3 == 1 and code < len(_STEP_FORMATS):
        runs = (funct7 >> 3 & 1) + 1
        tile, blocks, additions = _STEP_FORMATS[code]
        tile, blocks = tile * runs, blocks * runs
        accumulators = 128 * tokens
    else:
        raise KeyError(f"reserved encoding: funct7 {funct7:#x}, funct3 {funct3}")
    unit = blocks * additions * tokens * _TILE_ROWS // _LANES
    port = -(-(tile + 48 * blocks * tokens + accumulators) // _PORT_BYTES)
    return max(unit, port)


# --- programs -----------------------------------------------------------------------------


def functions(program: Path) -> list[tuple[str, int, int]]:
    """(name, first address, address behind the last) of a program's functions, ascending."""
    found: dict[int, tuple[str, int]] = {}
    with open(program, "rb") as file:
        elf = ELFFile(file)
        for section in elf.iter_sections():
            if not isinstance(section, SymbolTableSection):
                continue
            for symbol in section.iter_symbols():
                begin, size = symbol["st_value"], symbol["st_size"]
                if symbol["st_info"]["type"] == "STT_FUNC" and size:
                    found.setdefault(begin, (symbol.name, begin + size))
    ordered: list[tuple[str, int, int]] = []
    for begin, (name, end) in sorted(found.items()):
        if not ordered or begin >= ordered[-1][2]:  # aliases that begin later are left to the first
            ordered.append((name, begin, end))
    if not ordered:
        raise CountError(f"{program} has no symbols: build it without stripping it")
    return ordered


@attrs.define
class Counter:
    """Counts what one program executes, in one run after another: QEMU takes the plugin from its
    environment (`environment`), and `counts` reads what the run has left that ended last.
    CountError where the plugin cannot be built or the program has no symbols."""

    program: Path
    vlen: int = VLEN
    _directory: tempfile.TemporaryDirectory[str] = attrs.field(
        init=False, factory=tempfile.TemporaryDirectory
    )
    _names: list[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        listed = functions(self.program)
        self._names = ["", *dict.fromkeys(name for name, _, _ in listed)]
        numbers = {name: i for i, name in enumerate(self._names)}
        lines = "".join(f"{b:x} {e:x} {numbers[name]:x}\n" for name, b, e in listed)
        self._functions.write_text(lines)
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or "clang"
        done = subprocess.run(
            [*compiler.split(), *FLAGS, "-o", str(self._plugin), str(SOURCE)],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise CountError(f"{SOURCE.name} does not compile:\n{done.stderr}")

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._directory.cleanup()

    @property
    def _functions(self) -> Path:
        return Path(self._directory.name, "functions")

    @property
    def _plugin(self) -> Path:
        return Path(self._directory.name, "count_instructions.so")

    @property
    def _out(self) -> Path:
        return Path(self._directory.name, "counts")

    @property
    def environment(self) -> dict[str, str]:
        """What has qemu-riscv64 count."""
        arguments = f"functions={self._functions},out={self._out},count={len(self._names)}"
        return {"QEMU_PLUGIN": f"{self._plugin},{arguments},vlen={self.vlen}"}

    def counts(self) -> dict[str, Counts]:
        """What the last run has executed, by function; "" is what lies in none.  CountError where
        no run has ended since the last call: a program that is killed leaves no counts."""
        if not self._out.exists():
            raise CountError(f"{self.program.name} has left no counts: it must end by itself")
        found: dict[str, dict[int, int]] = {}
        for line in self._out.read_text().splitlines():
            number, kind, count = map(int, line.split())
            found.setdefault(self._names[number], {})[kind] = count
        self._out.unlink()
        return {name: Counts(kinds) for name, kinds in found.items()}
