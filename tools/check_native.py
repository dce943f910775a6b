#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The checks of the C code: warnings as errors, and the native tests under sanitizers.

`warnings` compiles every C file with the flags of the real build and -Werror, leaving the objects
in build/check/COMPILER for tools/lint_fma.py; with --machine, those of another machine by its cross
compiler.  `sanitize` builds each program of tests/native with all C
files and runs it under AddressSanitizer and UndefinedBehaviorSanitizer; those named
test_threads_*.c also under ThreadSanitizer.  Runs in the project's root.
"""

from __future__ import annotations

import argparse
import glob
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from native_objects import CommandError, compile_all, native, run

OUT = Path("build/check")
TEST_TIMEOUT_S = 180

# float-cast-overflow is not part of `undefined`, and what such a cast yields differs by ISA.
SANITIZERS = {
    "asan": "-fsanitize=address,undefined,float-cast-overflow",
    "tsan": "-fsanitize=thread",
}
SANITIZE_FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def check_warnings(compiler: str, machine: str | None) -> None:
    name = os.path.basename(shlex.split(compiler)[0])
    machine = machine or platform.machine().lower()
    programs = [native["card_server"](machine)[0], native["card_process"](machine)[0]]
    libraries = [*native["libraries"](machine), *programs]
    objects = compile_all(compiler, OUT / name, ["-Werror"], [], libraries)
    print(f"check-c: {len(objects)} C files without a warning ({name})")


def without_aslr() -> list[str]:
    """Older compilers' ThreadSanitizer cannot place its shadow under newer kernels' ASLR."""
    wrapper = ["setarch", platform.machine(), "-R"]
    if shutil.which("setarch") and subprocess.run([*wrapper, "true"]).returncode == 0:
        return wrapper
    return []


def check_sanitize(compiler: str, kind: str, tests: list[str]) -> None:
    if not tests:
        raise CommandError(f"no native tests for {kind}: nothing was checked")
    out = OUT / kind
    flags = [*SANITIZE_FLAGS, SANITIZERS[kind]]
    objects = compile_all(compiler, out, flags, tests, native["LIBRARIES"])
    library_objects = objects[: -len(tests)]
    for test, test_object in zip(tests, objects[-len(tests) :], strict=True):
        program = str(Path(test_object).with_suffix(""))
        link = [*shlex.split(compiler), *flags, test_object, *library_objects, "-o", program]
        run([*link, *native["LINK_FLAGS"], "-lm"])
        command = [*(without_aslr() if kind == "tsan" else []), program]
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **ENVIRONMENT},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=TEST_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as late:
            output = (late.stdout or b"").decode(errors="replace")
            raise CommandError(
                f"{program}: still running after {TEST_TIMEOUT_S} s\n{output}"
            ) from None
        if done.returncode != 0:
            raise CommandError(f"{program}: exit status {done.returncode}\n{done.stdout}")
        print(
            f"check-sanitize: {kind} {Path(test).stem} passed in {time.monotonic() - begin:.1f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("check", choices=["warnings", "sanitize"])
    parser.add_argument("--cc", default=os.environ.get("CC", "cc"), help="the compiler to use")
    parser.add_argument("--machine", help="that `warnings` compiles for, as uname -m names it")
    options = parser.parse_args()
    if not native["LIBRARIES"]:
        print("no C files found: run in the project's root")
        return 1
    tests = sorted(glob.glob("tests/native/test_*.c"))
    try:
        if options.check == "warnings":
            check_warnings(options.cc, options.machine)
        else:
            check_sanitize(options.cc, "asan", tests)
            threaded = [test for test in tests if Path(test).name.startswith("test_threads_")]
            check_sanitize(options.cc, "tsan", threaded)
    except CommandError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
