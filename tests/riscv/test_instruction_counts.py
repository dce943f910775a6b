# SPDX-License-Identifier: Apache-2.0
"""What the firmware executes for a token is counted again and compared with the record that
docs/performance.md and the rev-a profile rest on (bench/results/instructions.json)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spanker.device.riscv.spec import ISAS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import counting  # noqa: E402
import instructions  # noqa: E402

# What another version of the compiler may change.
TOLERANCE = 0.05

_PROGRAM = """
    .option arch, +v
    .globl known
    .type known, @function
known:
    vsetivli zero, 16, e32, m4, ta, ma
    li t0, 10
1:  vle32.v v4, (a0)
    vfadd.vv v8, v4, v4
    vfredosum.vs v12, v8, v8
    addi t0, t0, -1
    bnez t0, 1b
    vsetvli t1, zero, e8, m1, ta, ma
    vwmul.vv v16, v4, v4
    vse8.v v4, (a1)
    mul t2, t1, t1
    divu t2, t2, t1
    fadd.s ft0, ft1, ft2
    fdiv.s ft0, ft1, ft2
    lw t3, 0(a0)
    sw t3, 0(a1)
    ret
    .size known, . - known
"""
_MAIN = """
void known(const float *from, float *to);
int main(void) { static float from[16], to[16]; known(from, to); return 0; }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a function whose instructions are known."""
    directory = tmp_path_factory.mktemp("known")
    (directory / "known.s").write_text(_PROGRAM)
    (directory / "main.c").write_text(_MAIN)
    command = ["clang-19", "--target=riscv64-linux-gnu", "-march=rv64gc", "-mabi=lp64d", "-static"]
    subprocess.run(
        [*command, "known.s", "main.c", "-o", "known"], cwd=directory, check=True, timeout=60
    )
    return directory / "known"


def _vector(name: str, beats: int) -> int:
    return 16 + counting.VECTOR.index(name) * 128 + beats - 1


def _scalar(name: str) -> int:
    return counting.SCALAR.index(name)


def test_every_instruction_is_counted_as_what_it_is(program: Path) -> None:
    with counting.Counter(program) as counter:
        subprocess.run(
            ["qemu-riscv64", "-cpu", "rv64,v=true,vlen=128,vext_spec=v1.0", str(program)],
            env=counter.environment,
            check=True,
            timeout=60,
        )
        known = counter.counts()["known"]
    assert dict(known.by_kind) == {
        _scalar("vset"): 2,
        _scalar("alu"): 11,
        _scalar("jump"): 11,
        _scalar("mul"): 1,
        _scalar("div"): 1,
        _scalar("float"): 1,
        _scalar("float_div"): 1,
        _scalar("load"): 1,
        _scalar("store"): 1,
        # 16 floats are four beats of 128 bits.
        _vector("load", 4): 10,
        _vector("float", 4): 10,
        _vector("reduce", 4): 10,
        # 16 bytes are one, and their products, twice as wide, two.
        _vector("mul", 2): 1,
        _vector("store", 1): 1,
    }
    assert (known.scalar, known.vector, known.xpop) == (30, 32, 0)
    scalar = 2 + 11 + 2 * 11 + 1 + 32 + 1 + 16 + 1 + 1
    assert known.cycles == scalar + 10 * (4 + 4 + 4 + 2) + 2 + 1


def test_a_run_that_leaves_no_counts_is_an_error(program: Path) -> None:
    with (
        counting.Counter(program) as counter,
        pytest.raises(counting.CountError, match="has left no counts: it must end by itself"),
    ):
        counter.counts()


def test_xpop_instructions_take_what_their_specification_sketches() -> None:
    """The table of docs/api/xpop-matmul.md: the unit's cycles or the port's, one token and four."""
    step = 1
    expected = {  # (code, L): cycles of T = 1 and 4
        (0, 2): (25, 46),
        (1, 2): (27, 64),
        (2, 2): (41, 62),
        (3, 1): (88, 256),
        (4, 2): (238, 322),
    }
    for (code, length), cycles in expected.items():
        for tokens, want in zip((1, 4), cycles, strict=True):
            funct7 = code << 4 | (length - 1) << 3 | (tokens - 1) << 1
            assert counting.xpop_cycles(funct7, step) == want, (code, length, tokens)
    with pytest.raises(KeyError, match="reserved"):
        counting.xpop_cycles(5 << 4, step)


@pytest.fixture(scope="module")
def counter(firmware: Path) -> Iterator[counting.Counter]:
    with counting.Counter(firmware) as counter:
        yield counter


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return dict(json.loads(instructions.RESULTS.read_text()))


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_takes_the_instructions_on_record(
    isa: str, counter: counting.Counter, record: dict[str, Any], smollm2_path: Path
) -> None:
    recorded = {
        (m["prompt"], m["position"]): m
        for m in record["measured"]
        if m["isa"] == isa and m["model"] == smollm2_path.stem
    }
    prompt = min(prompt for prompt, _ in recorded if prompt)
    same_compiler = record["compiler"] == instructions.compiler()
    for measured in instructions.measure(counter, isa, smollm2_path, prompt):
        expected = recorded[measured.prompt, measured.position]
        for group, part in measured.parts.items():
            for key in ("scalar", "vector", "xpop", "cycles"):
                want, got = expected["parts"][group][key], getattr(part, key)
                if not same_compiler:
                    want = pytest.approx(want, rel=TOLERANCE)
                assert got == want, (
                    f"{isa}, {group}: {key} are {got:,}, {want:,} on record; if that is meant, "
                    f"run bench/instructions.py --json {instructions.RESULTS.name}"
                )
