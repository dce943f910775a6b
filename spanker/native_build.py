# SPDX-License-Identifier: Apache-2.0
"""How the native part is built: flags, static libraries, and the cffi module.

The single source of these facts.  `setup.py` and `tools/check_native.py` run this file by its
path, so it must import nothing of the package; at run time nobody imports it.  All paths are
relative to the project's root, which is the working directory of every build.
"""

from __future__ import annotations

import glob
import platform
import re
import sys
from typing import Any, NamedTuple

import cffi

KERNELS = "spanker/kernels/csrc"
CARD = "spanker/device/csrc"
SERVER = "spanker/device/server"
PROCESS = "spanker/device/card_process"
VOCABULARY = "spanker/ggml/csrc"
XPOP_TRAP = "spanker/device/riscv/csrc"  # Xpop_matmul, emulated
INTERFACE = "driver/include"  # of the card, as the kernel module sees it
UAPI = "driver/include/uapi"
INCLUDE_DIRS = [KERNELS, CARD, XPOP_TRAP, VOCABULARY, INTERFACE, UAPI]
HEADERS_WITH_CDEFS = [
    f"{KERNELS}/spk_kernels.h",
    f"{CARD}/spk_card.h",
    f"{CARD}/spk_wire.h",
    f"{CARD}/spk_driver.h",
    f"{VOCABULARY}/spk_vocabulary.h",
]
UAPI_HEADER = f"{UAPI}/spanker_ioctl.h"
CARD_HEADER = f"{INTERFACE}/spanker_card.h"

# Every flag after -O3 either keeps float arithmetic exactly as written, whatever CFLAGS said
# before, or keeps the archives linkable and open to tools/lint_fma.py.
CFLAGS = [
    "-std=gnu11",
    "-O3",
    "-fno-fast-math",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fPIC",
    "-fno-lto",
    "-pthread",
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-pthread", "-fno-lto", "-lm"]

# First the baseline, so that a -march or -mfma in CFLAGS raises no library above its own level.
X86_BASELINE = ("-march=x86-64", "-mno-fma")
X86_AVX2 = (*X86_BASELINE, "-mavx2", "-mf16c", "-mbmi2")
X86_AVX512VNNI = (
    *(*X86_BASELINE, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *("-mf16c", "-mavx2"),
    # AVX-512F has fused instructions of its own, and gcc 12 makes a*c - b*s, a*s + b*c into
    # vfmaddsub whatever -ffp-contract says, but only where it vectorises by itself.
    "-fno-tree-vectorize",
)

ARM_BASELINE = ("-march=armv8-a",)
ARM_NEON = (
    "-march=armv8.2-a+dotprod",
    # Scheduling before register allocation makes gcc spill up to every second sum of a matmul.
    "-fno-schedule-insns",
    "-Wno-ignored-optimization-argument",  # clang neither has that flag nor needs it
)

RISCV_BASELINE = ("-march=rv64gc", "-mabi=lp64d")
# Needs the intrinsics of RVV 1.0: clang 17 or gcc 14.
RISCV_RVV = ("-march=rv64gcv", "-mabi=lp64d")


class Library(NamedTuple):
    """A static library: one directory of C files, one set of flags."""

    name: str
    directory: str
    isa_flags: tuple[str, ...]
    macros: tuple[tuple[str, str], ...] = ()

    @property
    def sources(self) -> list[str]:
        return sorted(glob.glob(f"{self.directory}/*.c"))

    @property
    def cflags(self) -> list[str]:
        return [*CFLAGS, *self.isa_flags]


def libraries(machine: str) -> list[Library]:
    """Of a machine as `uname -m` names it, in link order: a library uses only those after it."""
    baseline: tuple[str, ...] = ()
    macros: tuple[tuple[str, str], ...] = ()
    isas: tuple[Library, ...] = ()
    if machine in ("x86_64", "amd64"):
        baseline, macros = X86_BASELINE, (("SPK_HAVE_X86_ISAS", "1"),)
        isas = (
            Library("spk_avx2", f"{KERNELS}/avx2", X86_AVX2),
            Library("spk_avx512vnni", f"{KERNELS}/avx512vnni", X86_AVX512VNNI),
        )
    elif machine == "aarch64":
        baseline, macros = ARM_BASELINE, (("SPK_HAVE_NEON", "1"),)
        isas = (Library("spk_neon", f"{KERNELS}/neon", ARM_NEON),)
    elif machine == "riscv64":
        baseline = RISCV_BASELINE
        macros = (("SPK_HAVE_RVV", "1"), ("SPK_HAVE_XPOP", "1"))
        isas = (
            Library("spk_xpop", f"{KERNELS}/xpop", RISCV_RVV),
            Library("spk_rvv", f"{KERNELS}/rvv", RISCV_RVV),
            Library("spk_xpop_trap", XPOP_TRAP, RISCV_BASELINE),
        )
    found = (
        Library("spk_vocabulary", VOCABULARY, baseline),
        Library("spk_card", CARD, baseline),
        Library("spk_common", KERNELS, baseline, macros),
        Library("spk_scalar", f"{KERNELS}/scalar", baseline),
        *isas,
    )
    return [library for library in found if library.sources]


def _program(name: str, directory: str, machine: str) -> list[Library]:
    """What a program is linked from, in link order: its own sources come first."""
    parts = [library for library in libraries(machine) if library.directory != VOCABULARY]
    return [Library(name, directory, parts[0].isa_flags), *parts]


def card_server(machine: str) -> list[Library]:
    """Of spanker-card-server."""
    return _program("spk_server", SERVER, machine)


def card_process(machine: str) -> list[Library]:
    """Of a card that is a process of its own; for riscv64 this is a card's firmware."""
    return _program("spk_process", PROCESS, machine)


# A 32-bit Python on a 64-bit kernel builds 32-bit code: plain C only.
LIBRARIES = libraries(platform.machine().lower() if sys.maxsize > 2**32 else "")


def headers() -> list[str]:
    """Every header: each object depends on all of them, which is cheap and never wrong."""
    return sorted(
        path
        for top in (*INCLUDE_DIRS, SERVER, PROCESS)
        for path in glob.glob(f"{top}/**/*.h", recursive=True)
    )


def cdef_of(path: str) -> str:
    """The declarations between `/* cffi: begin */` and `/* cffi: end */` in a header."""
    kept: list[str] = []
    inside = False
    with open(path, encoding="utf-8") as header:
        for number, line in enumerate(header, 1):
            mark = line.strip()
            if mark in ("/* cffi: begin */", "/* cffi: end */"):
                begins = mark == "/* cffi: begin */"
                if begins == inside:
                    raise ValueError(f"{path}:{number}: {mark} without its counterpart before it")
                inside = begins
            elif inside:
                kept.append(line)
    if inside or not kept:
        raise ValueError(f"{path}: cffi regions are {'not closed' if inside else 'missing'}")
    return "".join(kept)


# As <linux/types.h> has them, on every machine.
_LINUX_TYPES = """
typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
"""


def uapi_cdef(path: str, *, constants_only: bool = False) -> str:
    """The structures and constants of a header between kernel and user space, which marks no
    regions.  A constant that is more than a number is left to the compiler."""
    with open(path, encoding="utf-8") as header:
        text = re.sub(r"/\*.*?\*/", "", header.read(), flags=re.DOTALL)
    defines = [
        f"#define {name} {value if value.isdigit() else '...'}\n"
        for name, value in re.findall(
            r"^#define[ \t]+(\w+)[ \t]+(\S.*?)[ \t]*$", text, re.MULTILINE
        )
    ]
    if constants_only:
        return "".join(defines)
    structs = re.findall(r"^struct \w+ \{.*?^\};\n", text, re.MULTILINE | re.DOTALL)
    if not defines or not structs:
        raise ValueError(f"{path}: neither constants nor structures found")
    return "".join([_LINUX_TYPES, *defines, *structs])


def _ffibuilder() -> Any:
    builder = cffi.FFI()
    builder.cdef(uapi_cdef(UAPI_HEADER))
    builder.cdef(uapi_cdef(CARD_HEADER, constants_only=True))
    for path in HEADERS_WITH_CDEFS:
        builder.cdef(cdef_of(path))
    builder.set_source(
        "spanker._native",
        "".join(
            f'#include "{path.rpartition("/")[2]}"\n' for path in (*HEADERS_WITH_CDEFS, CARD_HEADER)
        ),
        libraries=[library.name for library in LIBRARIES],
        include_dirs=INCLUDE_DIRS,
        extra_compile_args=["-std=gnu11", "-fvisibility=hidden", "-fno-lto", "-pthread"],
        extra_link_args=LINK_FLAGS,
    )
    return builder


ffibuilder = _ffibuilder()
