# SPDX-License-Identifier: Apache-2.0
"""Compiles C files of the project to objects, what is older than its sources only.

Shared by the tools that build without setuptools; the flags are those of spanker/native_build.py.
They all run in the project's root.
"""

from __future__ import annotations

import glob
import os
import runpy
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

native: dict[str, Any] = runpy.run_path("spanker/native_build.py")


class CommandError(Exception):
    """A command failed; the text is all there is to say."""


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CommandError(f"{shlex.join(command)}\n{done.stdout}")


def compile_one(source: str, out: Path, command: list[str]) -> str:
    """Compiles when a source, a header or the flags' own file is newer than the object."""
    target = out / Path(source).with_suffix(".o")
    inputs = [source, *native["headers"](), "spanker/native_build.py", __file__]
    inputs += glob.glob("tests/native/*.h")
    if not target.exists() or target.stat().st_mtime <= max(map(os.path.getmtime, inputs)):
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*command, "-c", source, "-o", str(target)])
    return str(target)


def compile_all(
    compiler: str, out: Path, extra: list[str], tests: list[str], libraries: Any
) -> list[str]:
    """Objects of every C file of the libraries, then of `tests`, in that order."""
    base = [*shlex.split(compiler), *(f"-I{path}" for path in native["INCLUDE_DIRS"])]
    jobs = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for library in libraries:
            macros = [f"-D{name}={value}" for name, value in library.macros]
            command = [*base, *macros, *library.cflags, *extra]
            jobs += [pool.submit(compile_one, source, out, command) for source in library.sources]
        command = [*base, *native["CFLAGS"], *extra]
        jobs += [pool.submit(compile_one, test, out, command) for test in tests]
    return [job.result() for job in jobs]


def build_program(
    libraries: Any, compiler: str, program: Path, out: Path, extra: list[str], link: list[str]
) -> None:
    """Compiles and links a program; nobody finds half of one."""
    objects = compile_all(compiler, out, extra, [], libraries)
    link_program(compiler, objects, program, [*extra, *link])


def link_program(compiler: str, objects: list[str], program: Path, flags: list[str]) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    partial = program.with_suffix(".partial")
    run([*shlex.split(compiler), *objects, "-o", str(partial), *flags, *native["LINK_FLAGS"]])
    partial.rename(program)
