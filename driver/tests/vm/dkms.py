# SPDX-License-Identifier: Apache-2.0
"""The module as DKMS handles it, from `add` to `remove`, in a clean system of the distribution."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from host import (
    CACHE,
    DRIVER,
    WORK,
    Failure,
    debian_tree,
    distribution,
    in_tree,
    is_root,
    key_of,
    remove,
    run,
    say,
)

PACKAGES = ["dkms", "linux-headers-cloud-amd64", "gcc", "make", "libc6-dev"]


def check() -> None:
    if not is_root():
        raise Failure("only root may make a system for DKMS: run these tests as root")
    suite = distribution()["VERSION_CODENAME"]
    tree = debian_tree(
        CACHE / f"dkms-{key_of(suite, PACKAGES)}",
        suite,
        PACKAGES,
        variant="minbase",
        suites=[f"{suite}-security"],
    )
    name, version = _identity()
    source = tree / f"usr/src/{name}-{version}"
    for leftover in [*(tree / "usr/src").glob(f"{name}-*"), tree / f"var/lib/dkms/{name}"]:
        remove(leftover)
    shutil.copytree(DRIVER, source, ignore=shutil.ignore_patterns("tests", "*.ko", "*.o", "*.mod*"))
    (release,) = (path.name for path in (tree / "lib/modules").iterdir() if _has_build(path))
    installed = tree / f"lib/modules/{release}/updates/dkms/{name}.ko"
    try:
        for verb in ("add", "build", "install"):
            _dkms(tree, verb, name, version, release)
        status = _dkms(tree, "status", name, version, release)
        if "installed" not in status:
            raise Failure(f"dkms status after install: {status!r}")
        if not list(installed.parent.glob(f"{name}.ko*")):
            raise Failure(f"dkms installed no {installed}")
        _dkms(tree, "remove", name, version, release)
    except Failure as failure:
        logs = (tree / f"var/lib/dkms/{name}").rglob("make.log")
        texts = [path.read_text(errors="replace") for path in logs]
        raise Failure("\n".join([str(failure), *texts])) from None
    status = run(in_tree(tree, "dkms", "status"))
    if name in status or list(installed.parent.glob(f"{name}.ko*")):
        raise Failure(f"dkms remove leaves something behind: {status!r}")
    say(f"{name} {version} for {release}")


def _has_build(path: Path) -> bool:
    return (path / "build").is_symlink()


def _identity() -> tuple[str, str]:
    settings = (DRIVER / "dkms.conf").read_text()
    found = [
        re.search(rf'^{field}="?([\w.-]+)"?$', settings, re.MULTILINE)
        for field in ("PACKAGE_NAME", "PACKAGE_VERSION")
    ]
    if None in found:
        raise Failure(f"{DRIVER}/dkms.conf: no PACKAGE_NAME or PACKAGE_VERSION")
    return found[0][1], found[1][1]


def _dkms(tree: Path, verb: str, name: str, version: str, release: str) -> str:
    kernel = [] if verb == "add" else ["-k", release]
    command = ["dkms", verb, "-m", name, "-v", version, *kernel]
    return run(in_tree(tree, *command), log=WORK / "logs" / f"dkms-{verb}.log")
