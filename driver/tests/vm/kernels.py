# SPDX-License-Identifier: Apache-2.0
"""The kernels: their images and headers, and the module built for each of them.

The distribution's own kernel has its headers installed; the others stay in trees of their own under
the cache, with the compiler that they were built with, and the module is built in there.
"""

from __future__ import annotations

import lzma
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import packages
from host import (
    CACHE,
    DRIVER,
    WORK,
    Failure,
    building,
    debian_tree,
    in_tree,
    is_root,
    key_of,
    run,
    say,
)

OWN = "6.1"
# Line: release of Debian, further suites, the one preferred, packages.
TREES = {
    "6.12": (
        "bookworm",
        ["bookworm-security"],
        "",
        ["linux-headers-6.12-cloud-amd64", "linux-image-6.12-cloud-amd64"],
    ),
    "7": (
        "trixie",
        ["trixie-backports"],
        "trixie-backports",
        ["linux-headers-cloud-amd64", "linux-image-cloud-amd64"],
    ),
}
LINES = (OWN, *TREES)
# What kbuild's recipes run; the compiler comes with the headers.
BUILD_TOOLS = ["binutils", "make", "dash", "bash", "coreutils", "sed", "grep", "mawk", "findutils"]
BUILD_TOOLS += ["perl", "python3"]  # kernel-doc, which W=1 runs: the one or the other
BUILD_TOOLS += ["sparse"]
NOT_CHECKED = {
    "BLOCK_COMMENT_STYLE",  # comments of several lines beside the fields of the interface
    "LINUX_VERSION_CODE",  # a module outside of the kernel's tree has no one version
    "CONSTANT_COMPARISON",  # the order in which KERNEL_VERSION() is always compared
}
SOURCE_PACKAGE = "linux-source-6.1"


@dataclass(frozen=True)
class Kernel:
    line: str
    release: str
    tree: Path  # where its headers are below usr/src
    image: Path
    modules: Path  # .../lib/modules/RELEASE

    @property
    def headers(self) -> str:
        return f"/usr/src/linux-headers-{self.release}"


def kernel(line: str) -> Kernel:
    return _own() if line == OWN else _in_tree(line)


def _own() -> Kernel:
    headers = packages.headers()
    if headers is None:
        raise Failure(f"no kernel headers below /usr/src: apt-get install {packages.HEADERS}")
    release = headers.name.removeprefix("linux-headers-")
    target = CACHE / f"image-{release}"
    if not target.exists():
        with building(target) as partial:
            # Unpacked, never installed: this machine does not boot it.
            run(["apt-get", "download", f"linux-image-{release}"], cwd=partial)
            (archive,) = partial.glob("*.deb")
            run(["dpkg-deb", "-x", archive, partial])
            archive.unlink()
    return _found(OWN, release, Path("/"), target)


def _in_tree(line: str) -> Kernel:
    if not is_root():
        raise Failure(f"only root may build in the tree of kernel {line}: run these tests as root")
    suite, suites, prefer, names = TREES[line]
    names = [*names, *BUILD_TOOLS]
    tree = debian_tree(
        CACHE / f"kernel-{line}-{key_of(suite, suites, prefer, names)}",
        suite,
        names,
        suites=suites,
        prefer=prefer,
    )
    awk = tree / "usr/bin/awk"
    if not awk.is_symlink():
        awk.symlink_to("mawk")  # which configuring the package would do
    releases = [path.name for path in (tree / "usr/src").glob("linux-headers-*-cloud-amd64")]
    if len(releases) != 1:
        raise Failure(f"{tree}: expected one kernel's headers in usr/src, got {releases}")
    return _found(line, releases[0].removeprefix("linux-headers-"), tree, tree)


def _found(line: str, release: str, tree: Path, unpacked: Path) -> Kernel:
    modules = unpacked / "lib/modules" / release
    for image in (unpacked / "boot" / f"vmlinuz-{release}", modules / "vmlinuz"):
        if image.exists():
            return Kernel(line, release, tree, image, modules)
    raise Failure(f"{unpacked}: no image of kernel {release} in boot/ or lib/modules/")


# --- the module -----------------------------------------------------------------------------------


def build_module(of: Kernel) -> Path:
    """The module for a kernel, with W=1 and sparse; a warning in its own files is a failure."""
    target = WORK / f"module-{of.release}"
    with building(target) as partial:
        copy_source(partial)
        log = WORK / "logs" / f"module-{of.release}.log"
        checks = ["W=1", "C=2"]
        if of.tree == Path("/"):
            command = ["make", "-C", of.headers, f"M={partial}"]
            output = run([*command, *checks, "modules"], log=log)
        else:
            inside = of.tree / "module"
            shutil.rmtree(inside, ignore_errors=True)
            shutil.copytree(partial, inside)
            command = ["make", "-C", of.headers, "M=/module", *checks, "modules"]
            output = run(in_tree(of.tree, *command), log=log)
            shutil.copytree(inside, partial, dirs_exist_ok=True)
        complaints = _complaints(output, partial)
        if complaints:
            raise Failure(f"kernel {of.release}: warnings in the module:\n" + "\n".join(complaints))
    module = module_in(target)
    say(f"{of.release}: {module.name}, {module.stat().st_size:,} bytes")
    return module


def module_in(target: Path) -> Path:
    found = list(target.rglob("spanker.ko"))
    if len(found) != 1:
        raise Failure(
            f"{target}: expected one spanker.ko, got {len(found)}: build the module first"
        )
    return found[0]


def has_changed_since(time: float) -> bool:
    """Whether a source of the module has."""
    sources = [DRIVER / "Kbuild", *DRIVER.glob("src/*"), *DRIVER.rglob("include/**/*.h")]
    return any(path.stat().st_mtime > time for path in sources)


def copy_source(target: Path) -> None:
    ignored = shutil.ignore_patterns("tests", "*.o", "*.ko", "*.mod*", ".*.cmd", "Module.symvers")
    shutil.copytree(DRIVER, target, ignore=ignored, dirs_exist_ok=True)


def _complaints(output: str, source: Path) -> list[str]:
    names = {path.name for path in source.rglob("*.[ch]")}
    found = []
    for line in output.splitlines():
        place = re.match(r"(\S+?\.[ch]):\d+:(?:\d+:)? (?:warning|error):", line)
        if place and Path(place[1]).name in names and "/linux-headers-" not in place[1]:
            found.append(line)
        elif re.search(r"(modpost|objtool):", line) and "warning" in line.lower():
            found.append(line)
    return found


def checkpatch() -> None:
    """The kernel's own style checker over everything that is written for the kernel."""
    script = _checkpatch_script()
    files = sorted([*DRIVER.glob("src/**/*.[ch]"), *DRIVER.glob("include/**/*.h")])
    options = ["--no-tree", "--no-summary", "--terse", "--show-types", "--max-line-length=100"]
    options += ["--ignore", ",".join(NOT_CHECKED)]
    try:
        run(["perl", script, *options, "-f", *files])
    except Failure as failure:
        raise Failure(f"checkpatch: {failure}") from None
    say(f"{len(files)} files")


def _checkpatch_script() -> Path:
    target = CACHE / "checkpatch"
    if not target.exists():
        with building(target) as partial:
            source = unpack_source(
                partial,
                "scripts/checkpatch.pl",
                "scripts/spelling.txt",
                "scripts/const_structs.checkpatch",
            )
            for path in (source / "scripts").iterdir():
                path.rename(partial / path.name)
    return target / "checkpatch.pl"


def unpack_source(into: Path, *members: str) -> Path:
    """Unpack the distribution's kernel source, or some members of it."""
    if not list(into.glob("*.deb")):
        run(["apt-get", "download", SOURCE_PACKAGE], cwd=into)
    (archive,) = into.glob("*.deb")
    name = SOURCE_PACKAGE
    pattern = [f"{name}/{member}" for member in members]
    run(["dpkg-deb", "-x", archive, into])
    archive.unlink()
    packed = into / f"usr/src/{name}.tar.xz"
    run(["tar", "-C", into, "-xf", packed, *pattern])
    shutil.rmtree(into / "usr")
    return into / name


# --- modules of the kernel itself -----------------------------------------------------------------


def with_dependencies(of: Kernel, *names: str) -> list[tuple[str, bytes]]:
    """Modules (file name, contents) in the order to load them; none of those built in."""
    builtin = {
        _module_name(Path(line))
        for line in (of.modules / "modules.builtin").read_text().splitlines()
    }
    files = {_module_name(path): path for path in of.modules.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in builtin or name in loaded:
            return
        if name not in files:
            raise Failure(f"kernel {of.release} has no module {name}, nor is it built in")
        contents = files[name].read_bytes()
        if files[name].suffix == ".xz":
            contents = lzma.decompress(contents)
        needs = re.search(rb"\0depends=([^\0]*)\0", contents)
        for other in needs[1].decode().split(",") if needs and needs[1] else []:
            load(other.replace("-", "_"))
        loaded[name] = contents

    for name in names:
        load(name)
    return [(f"{name}.ko", contents) for name, contents in loaded.items()]


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")
