#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds tests/native/cross/kernel_server.c with the kernels of a machine, by its cross compiler.

The kernels have the flags of the real build; the program is static, so that qemu-user runs it
without a root directory of that machine.  The objects are left in build/kernel-server/MACHINE, for
tools/lint_fma.py.  Runs in the project's root.
"""

from __future__ import annotations

import argparse
import fcntl
import shlex
import sys
from pathlib import Path

from native_objects import CommandError, compile_all, native, run

OUT = Path("build/kernel-server")
SERVER = "tests/native/cross/kernel_server.c"
COMPILERS = {"riscv64": "clang-19 --target=riscv64-linux-gnu"}


def build(machine: str, compiler: str) -> Path:
    directory = OUT / machine
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "kernel-server"
    kernels = [
        library
        for library in native["libraries"](machine)
        if library.directory.startswith((native["KERNELS"], native["XPOP_TRAP"]))
    ]
    with open(directory / "lock", "w") as lock:  # test processes side by side build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = compile_all(compiler, directory, ["-Werror"], [SERVER], kernels)
        newest = max(Path(path).stat().st_mtime for path in objects)
        if not program.exists() or program.stat().st_mtime <= newest:
            run([*shlex.split(compiler), "-static", *objects, "-o", str(program), "-lm"])
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("machine", choices=sorted(COMPILERS), help="as `uname -m` names it")
    parser.add_argument("--cc", help="another cross compiler, with arguments")
    options = parser.parse_args()
    try:
        print(build(options.machine, options.cc or COMPILERS[options.machine]))
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
