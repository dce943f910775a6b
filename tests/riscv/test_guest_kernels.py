# SPDX-License-Identifier: Apache-2.0
"""What the tests in a guest would find: kernels that depend on the length of a register, or that
leave their buffers, and instructions that must not be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import test_matmul_equals_reference
from guest_kernels import LENGTHS, Guest, GuestError, GuestKernels, cpu, qemu

from spanker.native import ffi

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "spanker" / "kernels" / "csrc"
COMPILE = (
    *("clang-19", "--target=riscv64-linux-gnu", "-march=rv64gcv", "-mabi=lp64d", "-O2"),
    *("-ffp-contract=off", f"-I{CSRC}", f"-I{CSRC / 'rvv'}"),
)


@attrs.frozen
class Mutant:
    """One RVV source file in which `old` is `new`, and the lengths that do not show it."""

    source: str
    old: str
    new: str
    right_at: tuple[int, ...]


MUTANTS = {
    # As many elements as there are, where 16 are meant.
    "sums all bytes of a register": Mutant(
        "quantize.c",
        "__riscv_vwredsum_vs_i8m1_i16m1(x, zero, LANES)",
        "__riscv_vwredsum_vs_i8m1_i16m1(x, zero, __riscv_vsetvlmax_e8m1())",
        right_at=(128,),
    ),
    # Half of the registers that 128 bits need.
    "adds what fits into two registers": Mutant(
        "matmul_q.c",
        "__riscv_vfadd_vv_f32m4(x, y, LANES)",
        "__riscv_vfadd_vv_f32m4(x, y, __riscv_vsetvl_e32m2(LANES))",
        right_at=(256, 512, 1024),
    ),
}


def build(mutant: Mutant, server: Path, directory: Path) -> Path:
    """The kernel server with that file instead of the one it was built with."""
    lanes = (CSRC / "rvv" / "lanes.h").read_text()
    assert lanes.count(mutant.old) == 1, "the kernels no longer have what the mutant changes"
    (directory / "lanes.h").write_text(lanes.replace(mutant.old, mutant.new))
    shutil.copy(CSRC / "rvv" / mutant.source, directory)
    changed = (directory / mutant.source).with_suffix(".o")
    subprocess.run([*COMPILE, "-c", directory / mutant.source, "-o", changed], check=True)
    objects = list(server.parent.rglob("*.o"))
    others = [path for path in objects if path.parts[-2:] != ("rvv", changed.name)]
    assert len(others) == len(objects) - 1
    program = directory / "kernel-server"
    subprocess.run([*COMPILE[:2], "-static", changed, *others, "-o", program, "-lm"], check=True)
    return program


@pytest.mark.parametrize("name", MUTANTS)
def test_a_kernel_that_depends_on_the_length_fails(
    kernel_server: Path, tmp_path: Path, name: str
) -> None:
    mutant = MUTANTS[name]
    program = build(mutant, kernel_server, tmp_path)
    right = []
    for length in LENGTHS:
        with Guest([*qemu(cpu(length)), str(program)], "rvv") as guest:
            try:
                test_matmul_equals_reference.test_matmul_equals_reference(
                    GuestKernels(guest), "q4_0", 17, 96
                )
                right.append(length)
            except AssertionError:
                pass
    assert tuple(right) == mutant.right_at


def test_kernels_that_leave_their_buffers_are_found(kernel_server: Path) -> None:
    x = np.ones((2, 64), np.float32)
    rows = ffi.new("float[128]", [1.0] * 128)
    with Guest([*qemu(cpu(256)), str(kernel_server)], "rvv") as guest:
        kernels = GuestKernels(guest)
        expected = kernels.add(x, x)
        whole = (rows, 128 * 4, False)
        with pytest.raises(GuestError, match="the guest died"):  # the last float is missing
            guest.call("add", [64, 64, 64, 2], [(rows, 127 * 4, True), whole])
        back = 2**64 - 1  # the second row begins a float before the first
        with pytest.raises(GuestError, match=r"add of rvv wrote before its buffers \(mask 0x1\)"):
            guest.call("add", [back, 64, 64, 2], [(rows, 128 * 4, True), whole])
        assert np.array_equal(kernels.add(x, x), expected)


BAD = {
    "vfmacc": "return __riscv_vfmacc_vv_f32m4(x, y, y, 16);",
    "vfredusum": (
        "return __riscv_vfmv_v_f_f32m4(__riscv_vfmv_f_s_f32m1_f32("
        "__riscv_vfredusum_vs_f32m4_f32m1(x, __riscv_vfmv_s_f_f32m1(0, 1), 16)), 16);"
    ),
    "fmadd.s": "return __riscv_vfmv_v_f_f32m4(__builtin_fmaf(p[0], p[1], p[2]), 16);",
}


def lint(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "lint_fma.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_kernels_have_no_fused_operation_and_no_unordered_sum(kernel_server: Path) -> None:
    result = lint(kernel_server.parent)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mnemonic", BAD)
def test_the_lint_finds_one_that_is_planted(tmp_path: Path, mnemonic: str) -> None:
    source, target = tmp_path / "planted.c", tmp_path / "planted.o"
    source.write_text(
        "#include <riscv_vector.h>\n"
        "vfloat32m4_t planted(vfloat32m4_t x, vfloat32m4_t y, const float *p)\n"
        f"{{ (void)x; (void)y; (void)p; {BAD[mnemonic]} }}\n"
    )
    subprocess.run([*COMPILE, "-c", source, "-o", target], check=True)
    result = lint(tmp_path)
    assert result.returncode == 1
    assert f"{target}: planted: {mnemonic}" in result.stdout
