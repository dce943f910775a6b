# SPDX-License-Identifier: Apache-2.0
"""Builds the native part; everything else about the package is in pyproject.toml.

One static library per instruction set, each with its own flags (spanker/native_build.py), linked
into the cffi module `spanker._native`.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import setup
from setuptools.command.build_clib import build_clib
from setuptools.modified import newer_group

if sys.platform != "linux":
    sys.exit(f"Spanker runs on Linux only (this is {sys.platform}): use a Linux machine or VM.")

native = runpy.run_path("spanker/native_build.py")


class BuildLibraries(build_clib):
    """Compiles what changed, on all cores, into build/clib whatever pip's temporary directory."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # A directory per compiler and flags: objects of another compiler are not reused.
        facts = [os.environ.get(name, "") for name in ("CC", "CFLAGS", "CPPFLAGS")]
        facts += [sys.version, *(repr(info["cflags"]) for _, info in self.libraries)]
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
        self.build_temp = self.build_clib = os.path.join("build", "clib", key)

    def build_libraries(self, libraries: list[tuple[str, dict]]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                (name, [pool.submit(self._object, source, info) for source in info["sources"]])
                for name, info in libraries
            ]
        for name, objects in jobs:
            # `ar` keeps members whose source is gone, so an archive always starts empty.
            archive = self.compiler.library_filename(name, output_dir=self.build_clib)
            if os.path.exists(archive):
                os.unlink(archive)
            self.compiler.create_static_lib(
                [path for job in objects for path in job.result()], name, output_dir=self.build_clib
            )

    def _object(self, source: str, info: dict) -> list[str]:
        objects = self.compiler.object_filenames([source], output_dir=self.build_temp)
        if self.force or newer_group([source, *native["headers"]()], objects[0], "newer"):
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=info["macros"],
                include_dirs=native["INCLUDE_DIRS"],
                extra_postargs=info["cflags"],
            )
        return objects


setup(
    cmdclass={"build_clib": BuildLibraries},
    libraries=[
        (
            library.name,
            {
                "sources": library.sources,
                "cflags": library.cflags,
                "macros": list(library.macros),
            },
        )
        for library in native["LIBRARIES"]
    ],
    cffi_modules=["spanker/native_build.py:ffibuilder"],
    # The wrapper takes a second, and must always be linked with the libraries of this very build.
    options={"build_ext": {"force": True}},
)
