# SPDX-License-Identifier: Apache-2.0
"""The packages of the distribution that the tests need: installed when root, named otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

from host import Failure, distribution, is_root, run, say

# Package: a program that it brings, or a directory.
TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "libc6-dev": "/usr/include/stdio.h",
    # 32-bit programs; gcc-multilib would drive out the compilers for other machines.
    "libc6-dev-i386": "/usr/lib32/libc.a",
    "lib32gcc-12-dev": "/usr/lib/gcc/x86_64-linux-gnu/12/32/libgcc.a",
    "binutils": "ld",
    "bc": "bc",
    "e2fsprogs": "mke2fs",
    "kmod": "modinfo",
    "busybox-static": "/bin/busybox",
    "mmdebstrap": "mmdebstrap",
    "sparse": "sparse",
    "dwarves": "pahole",
    "perl": "perl",
    "xz-utils": "xz",
}
HEADERS = "linux-headers-cloud-amd64"  # of the distribution's own kernel, 6.1
DEBUG_TOOLS = {
    "flex": "flex",
    "bison": "bison",
    "libelf-dev": "/usr/include/libelf.h",
    "libssl-dev": "/usr/include/openssl/ssl.h",
}


def present(program: str) -> bool:
    # Administrators' programs are not on everybody's PATH.
    if program.startswith("/"):
        return Path(program).exists()
    return shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is not None


def headers() -> Path | None:
    """The newest installed headers of the distribution's own kernel."""
    found = [
        path
        for path in Path("/usr/src").glob("linux-headers-6.1.*-cloud-amd64")
        if (path / "Module.symvers").exists()
    ]
    return max(found, key=_version, default=None)


def _version(path: Path) -> list[int]:
    digits = "".join(c if c.isdigit() else " " for c in path.name)
    return [int(word) for word in digits.split()]


def install(tools: dict[str, str]) -> None:
    """Have the tools and headers, or fail naming what is not there."""
    lacking = _lacking(tools)
    if not lacking:
        say("all there")
        return
    if distribution().get("VERSION_CODENAME") != "bookworm" or not present("apt-get"):
        raise Failure(
            f"missing: {' '.join(lacking)} (Debian's names). These tests take kernels, QEMU and "
            "guest packages from Debian's archive: run them on Debian 12"
        )
    if not is_root():
        raise Failure(
            f"missing, and only root may install it: apt-get install "
            f"--no-install-recommends {' '.join(lacking)}"
        )
    say(f"installing {' '.join(lacking)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-q"], env=quiet)
    run(
        ["apt-get", "install", "-y", "-q", "--no-install-recommends", *lacking],
        env=quiet,
        timeout_s=900,
    )
    lacking = _lacking(tools)
    if lacking:
        raise Failure(f"apt-get install succeeded, and yet there is no {', '.join(lacking)}")


def _lacking(tools: dict[str, str]) -> list[str]:
    lacking = [package for package, program in tools.items() if not present(program)]
    if headers() is None:
        lacking.append(HEADERS)
    return lacking
