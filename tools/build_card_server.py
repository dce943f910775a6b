#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds spanker-card-server: emulated cards behind vfio-user sockets, for QEMU.

The same C files with the same flags as in the Python package, each instruction set with its own,
and spanker/device/server in front.  --sanitize makes the one that the tests use, of plain C only,
which is built sooner and gives the same bits.  Runs in the project's root; needs a C compiler and
cffi.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from pathlib import Path

from native_objects import CommandError, build_program, native

OUT = Path("build/card-server")
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
SANITIZE += ["-fsanitize=address,undefined"]


def build(compiler: str, program: Path, machine: str, extra: list[str]) -> None:
    name = os.path.basename(shlex.split(compiler)[0])
    out = OUT / name / program.name
    build_program(native["card_server"](machine), compiler, program, out, extra, [])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cc", default=os.environ.get("CC", "cc"), help="the compiler to use")
    parser.add_argument("--sanitize", action="store_true", help="with address and UB sanitizers")
    parser.add_argument("program", nargs="?", help="where it goes (build/spanker-card-server)")
    options = parser.parse_args()
    name = "spanker-card-server-sanitized" if options.sanitize else "spanker-card-server"
    program = Path(options.program or f"build/{name}")
    try:
        if options.sanitize:
            build(options.cc, program, "", SANITIZE)
        else:
            build(options.cc, program, platform.machine().lower(), [])
    except CommandError as error:
        print(error)
        return 1
    print(f"built {program}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
