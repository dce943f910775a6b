# SPDX-License-Identifier: Apache-2.0
"""Spanker and its tests as files of an initramfs: what a boot brings besides the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from disk import python
from host import ROOT, WORK, Failure, building, run
from qemu import file_entry

PLACE = "src"


def files() -> dict[str, tuple[int, bytes, float]]:
    """The package with its native part, the tests and their settings, below /src."""
    target = WORK / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.h", "*.a", "*.o")
    with building(target) as partial:
        shutil.copytree(ROOT / "spanker", partial / "spanker", ignore=ignored)
        shutil.copytree(ROOT / "tests", partial / "tests", ignore=ignored)
        shutil.copy2(ROOT / "pyproject.toml", partial)
        uapi = ROOT / "driver/include"
        shutil.copytree(uapi, partial / "driver/include")
        if not list((partial / "spanker").glob("_native*.so")):
            raise Failure(f"no {ROOT}/spanker/_native*.so: run make build")
        # Compiling under emulation would take longer than the tests.
        run(
            [
                python(),
                "-m",
                "compileall",
                "-q",
                "-j",
                "0",
                "--invalidation-mode",
                "unchecked-hash",
                partial,
            ]
        )
    return {
        f"{PLACE}/{path.relative_to(target)}": file_entry(path)
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }


def environment(executable: str) -> str:
    """Shell lines after which `python` runs with Spanker."""
    home = Path(executable).parent
    return f"""
ln -s /disk/lib /lib
ln -s /disk/lib /lib64
mkdir -p /tmp/cache/spanker
ln -s /disk/cache/spanker/models /tmp/cache/spanker/models
export XDG_CACHE_HOME=/tmp/cache PYTHONPATH=/{PLACE}:/disk/site PYTHONDONTWRITEBYTECODE=1
export PATH=$PATH:/disk{home} PYTHONFAULTHANDLER=1
python() {{ /disk{executable} "$@"; }}
"""
