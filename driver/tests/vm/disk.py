# SPDX-License-Identifier: Apache-2.0
"""The guest's disk: this tree's Python with the packages that Spanker needs, and the model.

Read-only ext4, made without mounting anything and cached by what is in it.  Spanker itself and its
tests are not on it: they come with each boot, so that a change costs no new disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from host import CACHE, HERE, ROOT, Failure, building, key_of, run, say

VENV_PYTHON = ROOT / ".venv/bin/python"
SITE = "site"
MODELS = "cache/spanker/models"
SPARE_BYTES = 64 << 20


def python() -> Path:
    if not VENV_PYTHON.exists():
        raise Failure(f"no {VENV_PYTHON}: run make build")
    return VENV_PYTHON


def facts() -> dict:
    return json.loads(run([python(), "-I", HERE / "python_in_guest.py"]))


def model() -> Path:
    """The small real model, fetched when it is not in the cache."""
    found = run(
        [python(), "-m", "spanker", "pull", "smollm2"], cwd=ROOT, timeout_s=300
    ).splitlines()
    paths = [Path(word) for line in found for word in line.split() if word.endswith(".gguf")]
    for path in [*paths, *_cached_models()]:
        if path.is_file():
            return path
    raise Failure(f"spanker pull smollm2 says {found}, and its cache has no .gguf")


def _cached_models() -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return sorted((cache / "spanker/models").glob("SmolLM2*.gguf"))


def disk() -> Path:
    """The image, and where Python is in it: /disk + its path on this machine."""
    known = facts()
    source = model()
    sizes = [(name, tuple(entry["files"])) for name, entry in known["packages"].items()]
    stamp = source.stat()
    key = key_of(
        known["executable"],
        known["standard"],
        sizes,
        source.name,
        stamp.st_size,
        (HERE / "disk.py").read_text(),
        (HERE / "python_in_guest.py").read_text(),
    )
    target = CACHE / f"disk-{key}"
    if not target.exists():
        with building(target) as partial:
            root = partial / "root"
            _fill(root, known, source)
            image = partial / "disk.ext4"
            used = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            kib = (used * 5 // 4 + SPARE_BYTES) // 1024
            run(
                [
                    "mke2fs",
                    "-q",
                    "-t",
                    "ext4",
                    "-O",
                    "^has_journal",
                    "-m",
                    "0",
                    "-d",
                    root,
                    image,
                    f"{kib}k",
                ],
                env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
            )
            shutil.rmtree(root)
            say(f"{used / 2**20:,.0f} MiB in it")
    return target / "disk.ext4"


def _fill(root: Path, known: dict, source: Path) -> None:
    def copy(path: Path, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        # With the times, which compiled Python files depend on.
        shutil.copy2(path, to)

    executable = Path(known["executable"])
    copied = [executable]
    copy(executable, root / str(executable).lstrip("/"))
    stdlib = Path(known["stdlib"])
    for name in known["standard"]:
        copy(stdlib / name, root / str(stdlib / name).lstrip("/"))
        copied.append(stdlib / name)
    for entry in known["packages"].values():
        for name in entry["files"]:
            path = Path(entry["root"]) / name
            if path.is_file():
                copy(path, root / SITE / name)
                copied.append(path)
    for path in _libraries([path for path in copied if ".so" in path.name] + [executable]):
        # By the loader's fixed name or from the one directory that is named to it.
        copy(path, root / "lib" / path.name)
    copy(source, root / MODELS / source.name)


def _libraries(programs: list[Path]) -> set[Path]:
    """What the dynamic loader would take from this machine for them."""
    found: set[Path] = set()
    for begin in range(0, len(programs), 100):
        command = ["ldd", *map(str, programs[begin : begin + 100])]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for line in output.splitlines():
            place = re.search(r"(?:=> )?(/\S+) \(0x", line)
            if place and "/site-packages/" not in place[1]:
                found.add(Path(place[1]))
    return found
