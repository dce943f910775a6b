# SPDX-License-Identifier: Apache-2.0
"""The lint over object files finds fused multiply-adds, and never passes on nothing."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "lint_fma.py"
AXPY = """
void axpy(float *x, const float *y, const float *w);
void axpy(float *x, const float *y, const float *w) {
  for (int i = 0; i < 64; i++) x[i] = x[i] + y[i] * w[i];
}
"""
lint_module = runpy.run_path(str(TOOL))


def lint(*paths: Path, objdump: str | None = None) -> subprocess.CompletedProcess[str]:
    chosen = [] if objdump is None else ["--objdump", objdump]
    command = [sys.executable, str(TOOL), *chosen, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def build(directory: Path, name: str, source: str, *flags: str) -> Path:
    if platform.machine() != "x86_64":
        pytest.skip(f"-mfma is for x86-64, this is {platform.machine()}")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("neither gcc nor clang is installed")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    return compiled(directory, name, source, compiler, *flags)


def build_aarch64(directory: Path, name: str, source: str, *flags: str) -> Path:
    prefix = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
    for tool in ("gcc", "objdump"):
        if shutil.which(prefix + tool) is None:
            pytest.skip(f"{prefix}{tool} is not installed")
    return compiled(directory, name, source, f"{prefix}gcc", "-march=armv8.2-a+dotprod", *flags)


def compiled(directory: Path, name: str, source: str, compiler: str, *flags: str) -> Path:
    (directory / f"{name}.c").write_text(source)
    target = directory / f"{name}.o"
    subprocess.run([compiler, "-c", *flags, str(directory / f"{name}.c"), "-o", target], check=True)
    return target


def test_fused_code_is_found_with_function_and_file(tmp_path: Path) -> None:
    fused = build(tmp_path, "fused", AXPY, "-mfma", "-O2", "-ffp-contract=fast")
    result = lint(fused)
    assert result.returncode == 1
    assert f"{fused}: axpy: vfmadd" in result.stdout


def test_the_same_code_without_contraction_passes(tmp_path: Path) -> None:
    result = lint(build(tmp_path, "plain", AXPY, "-mfma", "-O2", "-ffp-contract=off"))
    assert result.returncode == 0
    assert "none forbidden" in result.stdout


def test_aarch64_objects_are_decoded_with_their_own_objdump(tmp_path: Path) -> None:
    fused = build_aarch64(tmp_path, "fused", AXPY, "-O3", "-ffp-contract=fast")
    plain = build_aarch64(tmp_path, "plain", AXPY, "-O3", "-ffp-contract=off")
    result = lint(fused)
    assert result.returncode == 1
    assert f"{fused}: axpy: fmla" in result.stdout
    assert lint(plain).returncode == 0


def test_a_directory_may_hold_objects_of_two_machines(tmp_path: Path) -> None:
    build(tmp_path, "here", AXPY, "-mfma", "-O2", "-ffp-contract=fast")
    build_aarch64(tmp_path, "there", AXPY, "-O3", "-ffp-contract=fast")
    output = lint(tmp_path).stdout
    assert f"{tmp_path / 'here.o'}: axpy: vfmadd" in output
    assert f"{tmp_path / 'there.o'}: axpy: fmla" in output


@pytest.mark.parametrize("machine", sorted(lint_module["MACHINES"]))
@pytest.mark.parametrize("before", [b"", b"!<arch>\n" + b"/ member header" * 4])
def test_the_objdump_is_that_of_the_elf_header(tmp_path: Path, before: bytes, machine: int) -> None:
    (tmp_path / "k.o").write_bytes(before + b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little"))
    name = lint_module["MACHINES"][machine]
    expected = "objdump" if name == platform.machine() else f"{name}-linux-gnu-objdump"
    assert lint_module["objdump_of"](tmp_path / "k.o") == expected


def test_directories_and_archives_are_searched(tmp_path: Path) -> None:
    plain = build(tmp_path, "plain", AXPY, "-O2", "-ffp-contract=off")
    fused = build(tmp_path, "fused", AXPY, "-mfma", "-O2", "-ffp-contract=fast")
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    subprocess.run(["ar", "rcs", deep / "libboth.a", plain, fused], check=True)
    fused.unlink()
    result = lint(tmp_path)
    assert result.returncode == 1
    assert f"{deep / 'libboth.a'}(fused.o): axpy: vfmadd" in result.stdout
    assert "plain.o" not in result.stdout


def test_nothing_to_check_is_a_failure(tmp_path: Path) -> None:
    empty = build(tmp_path, "empty", "extern int table[2]; int table[2] = {1, 2};")
    for path in (empty, tmp_path):
        result = lint(path)
        assert result.returncode == 1
        assert "nothing was checked" in result.stdout


def test_missing_files_and_a_missing_objdump_are_named(tmp_path: Path) -> None:
    assert "no-such-objdump not found" in lint(tmp_path, objdump="no-such-objdump").stderr
    foreign = lint(tmp_path, objdump="sparc-linux-gnu-objdump").stderr
    assert "apt-get install binutils-sparc-linux-gnu" in foreign
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    result = lint(tmp_path / "absent.o")
    assert result.returncode != 0
    assert "absent.o does not exist" in result.stderr


@pytest.mark.parametrize(
    "mnemonic",
    [
        "vfmadd231ps", "vfmadd132sd", "vfmsub213pd", "vfnmadd231ss", "vfnmsub132ps",
        "vfmaddsub213ps", "vfmsubadd231pd", "vfmaddps", "vfmaddcph", "vdpbf16ps",
        "rcpps", "vrsqrtss", "vrcp14ps", "vrsqrt14pd", "vrcpph",
        "fmla", "fmls", "fmlal", "fmlal2", "fmlslb", "fmlallbb", "fmadd", "fmsub", "fnmadd",
        "fnmsub", "fmad", "fnmsb", "fcmla", "ftmad", "bfdot", "bfmmla", "bfmlalt", "bfmlslb",
        "bfmla", "fmmla", "fdot", "bfvdot", "fmopa", "bfmops", "faddv", "frecpe", "frsqrts",
        "fmadd.s", "fnmsub.d", "vfmacc.vv", "vfnmacc.vf", "vfmadd.vv", "vfwmacc.vf", "vfmsac.vf",
        "vfnmsac.vv", "vfnmsub.vv", "vfredusum.vs", "vfwredusum.vs", "vfrec7.v",
    ],
)  # fmt: skip
def test_forbidden_mnemonics(mnemonic: str) -> None:
    listing = f"0000 <kernel>:\n   4:\t{mnemonic} a,b,c\n   8:\tret\n"
    count, findings = lint_module["lint"](listing, "k.o")
    assert count == 2
    assert [(found.function, found.instruction) for found in findings] == [
        ("kernel", f"{mnemonic} a,b,c")
    ]


@pytest.mark.parametrize(
    "line",
    [
        "vmulps %ymm0,%ymm1,%ymm2", "vaddps %zmm0,%zmm1,%zmm2", "vpmaddubsw a,b,c",
        "vpdpbusd a,b,c", "vpmadd52luq a,b,c", "vsqrtps a,b", "call 40 <vfmadd231ps>",
        "rep stos %al,%es:(%rdi)", "fmul v0.4s, v1.4s, v2.4s", "fmov s0, s1", "sdot a, b, c",
        "mla v0.4s, v1.4s, v2.4s", "madd x0, x1, x2, x3", "umaddl x0, w1, w2, x3",
        "fmaxnmv s0, v1.4s", "faddp v0.4s, v1.4s, v2.4s", "fcvtl v0.4s, v1.4h",
        "bfi x0, x1, #2, #3", "bfcvt h0, s1",
        "fmul.s fa0,fa1,fa2", "vfmul.vv v1,v2,v3", "vfredosum.vs v1,v2,v3", "vfredmax.vs v1,v2,v3",
        "vfmv.v.f v1,fa0", "vfmin.vv v1,v2,v3",
    ],
)  # fmt: skip
def test_allowed_instructions(line: str) -> None:
    assert lint_module["lint"](f"0000 <f>:\n   4:\t{line}\n", "k.o") == (1, [])


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        (0x4869860B, True), (0x0859160B, True), (0x8C00100B, True),  # dot.s8, step.q4_0, q6_k
        (0x6869160B, True), (0x7869160B, False),  # q4_k, of which no run has two
        (0x6869860B, False), (0x5869860B, False), (0x4A69860B, False),  # type 3, bits 28 and 25
        (0xA869160B, False), (0x4869A60B, False), (0x4869862B, False),  # format, funct3, opcode
    ],
)  # fmt: skip
def test_of_what_objdump_cannot_name_xpop_matmul_is_allowed(word: int, allowed: bool) -> None:
    for elf, passes in (("elf64-littleriscv", allowed), ("elf64-littleaarch64", False)):
        listing = f"k.o:     file format {elf}\n0000 <f>:\n   4:\t.4byte\t{word:#x}\n"
        count, findings = lint_module["lint"](listing, "k.o")
        assert (count, not findings) == (1, passes)


def test_prefixes_do_not_hide_an_instruction_and_undecoded_ones_are_reported() -> None:
    listing = "0000 <f>:\n 0:\t{evex} vfmadd231ps a,b,c\n 6:\t(bad)\n 7:\t0xd0572d7\n"
    count, findings = lint_module["lint"](listing, "k.o")
    assert count == 3
    assert len(findings) == 3
