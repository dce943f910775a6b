# SPDX-License-Identifier: Apache-2.0
"""Three models of Xpop_matmul that share no code agree: emulation by trap, Spike, numpy.

The seed is printed; $XPOP_SEED sets it.  What differs is repeated by
`python tests/riscv/xpop_cases.py --seed SEED --batch BATCH`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import xpop_cases
import xpop_reference as reference

pytestmark = pytest.mark.riscv

BATCHES = 1600  # of 64 instructions each
FAULTS_BATCHES = 100


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("XPOP_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"XPOP_SEED={chosen}")
    return chosen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := xpop_cases.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    directory = tmp_path_factory.mktemp("models")
    xpop_cases.build_trap(directory)
    xpop_cases.build_bare(directory)
    xpop_cases.build_spike(directory)
    return directory


def test_random_instructions_agree_in_all_models(models: Path, seed: int) -> None:
    assert BATCHES * xpop_cases.CASES >= 100_000
    xpop_cases.compare(models, seed, 0, BATCHES)


@pytest.mark.parametrize("which", ["trap", "spike"])
def test_an_instruction_that_faults_can_be_executed_again(
    models: Path, seed: int, which: str
) -> None:
    """Pages of the operands are out of reach until they are touched: the results are the same."""
    *got, faults = xpop_cases.execute(
        which, models, xpop_cases.FAULTS, seed, BATCHES, FAULTS_BATCHES
    )
    index = ("trap", "spike").index(which)
    expected = [
        xpop_cases.batch_digests(seed, BATCHES + i)[index][-1] for i in range(FAULTS_BATCHES)
    ]
    assert got == expected, f"seed {seed}, batches {BATCHES} to {BATCHES + FAULTS_BATCHES}"
    assert faults > 20 * FAULTS_BATCHES


@pytest.mark.parametrize("which", ["trap", "spike"])
def test_exactly_the_defined_encodings_execute(models: Path, seed: int, which: str) -> None:
    """All values of funct7 and funct3 in the four custom opcodes; the others are illegal."""
    *lines, _ = xpop_cases.execute(which, models, xpop_cases.SWEEP, seed)
    executed = [64 * i + j for i, line in enumerate(lines) for j in range(64) if line >> j & 1]
    assert len(lines) == 4 * 16
    assert executed == [128 * funct3 + funct7 for funct3, funct7 in reference.DEFINED]
    assert len(executed) == 48


# Each is one wrong line in the emulation, of the kind that is easily written.
MUTATIONS = [
    ("acc[r] = acc[r] - (block->m[r] * dx)", "acc[r] = acc[r] + (block->m[r] * dx)"),
    ("(block->d[r] * dx) * (float)idot", "block->d[r] * (dx * (float)idot)"),
    ("acc[r] = acc[r] + (block->d[r] * dx) * (float)idot",
     "acc[r] = __builtin_fmaf(block->d[r] * dx, (float)idot, acc[r])"),
    ("? b / 8", "? 0"),
    ("w[0] >> (c + 6) & 3", "w[0] >> (c + 4) & 3"),
    ("16 * v - 32", "16 * v - 31"),
    ("isum += xq[k]", "isum += x[k]"),
    ("SPK_POP_SOURCES_ALIGN, SPK_POP_SOURCES_ALIGN,", "SPK_POP_SOURCES_ALIGN, 8,"),
    ('"csrrw %0, fcsr, zero"', '"csrr %0, fcsr"'),
    ("(funct7 & 1))", "0)"),
    ("? x[registers[j]] : 0", "? x[registers[j]] + (j == 2 && registers[0] == registers[2]) : 0"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_wrong_emulation_is_found(models: Path, tmp_path: Path, number: int) -> None:
    right, wrong = MUTATIONS[number]
    source = xpop_cases.TRAP.read_text()
    assert source.count(right) == 1, right
    mutant = tmp_path / "xpop_trap.c"
    mutant.write_text(source.replace(right, wrong))
    xpop_cases.build_trap(tmp_path, mutant)
    got = xpop_cases.execute("trap", tmp_path, xpop_cases.DIGESTS, 1, 0, 32)
    assert got != [xpop_cases.batch_digests(1, i)[0][-1] for i in range(32)]
