#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Says in one sentence what a machine lacks before `make` builds anything.

Runs on any Python from 3.6 on, to be able to say that it is too old, and needs no packages.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig


def compiles(compiler, source):
    include = sysconfig.get_paths()["include"]
    command = [*compiler.split(), "-fsyntax-only", "-I" + include, "-x", "c", "-"]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return False
    process.communicate(source.encode())
    return process.returncode == 0


def missing(compiler):
    version = ".".join(map(str, sys.version_info[:2]))
    if not sys.platform.startswith("linux"):
        return f"Spanker runs on Linux only (this is {sys.platform})."
    if sys.version_info < (3, 10):
        return f"Spanker needs Python 3.10 or newer, not {version}: try make PYTHON=python3.12."
    if not importlib.util.find_spec("ensurepip") or not importlib.util.find_spec("venv"):
        return (
            "This Python cannot make virtual environments: apt-get install python3-venv "
            f"(or python{version}-venv)."
        )
    if not compiles(compiler, "#include <stdio.h>\n"):
        return f"No working C compiler at '{compiler}': apt-get install gcc libc6-dev, or set CC."
    if not compiles(compiler, "#include <Python.h>\n"):
        return (
            f"The C headers of Python {version} are missing: apt-get install python3-dev "
            f"(or python{version}-dev)."
        )
    return None


if __name__ == "__main__":
    sys.exit(missing(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("CC", "cc")))
