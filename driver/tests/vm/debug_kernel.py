# SPDX-License-Identifier: Apache-2.0
"""A kernel that looks for bugs: KASAN, lockdep, kmemleak, DMA debugging, allocations that fail.

Built from the distribution's source on tinyconfig, some ten minutes, and cached by its settings.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from host import CACHE, HERE, WORK, Failure, building, key_of, run, say
from kernels import SOURCE_PACKAGE, copy_source, module_in, unpack_source

BUILD_S = 3600


def config() -> Path:
    return HERE / "debug.config"


def tree() -> Path:
    """The built source tree: arch/x86/boot/bzImage, and what a module's build needs."""
    target = CACHE / f"debug-{key_of(SOURCE_PACKAGE, config().read_text())}"
    if not target.exists():
        # Where an interrupted build goes on.
        partial = target.with_name(target.name + ".source")
        if not (partial / SOURCE_PACKAGE).exists():
            with building(partial) as fresh:
                unpack_source(fresh)
        source = partial / SOURCE_PACKAGE
        make = ["make", "-C", source]
        run([*make, "tinyconfig"])
        run(["scripts/kconfig/merge_config.sh", "-m", ".config", config()], cwd=source)
        run([*make, "olddefconfig"])
        _check_settings(source)
        say("building the kernel, some ten minutes")
        log = WORK / "logs" / "debug-kernel.log"
        run([*make, f"-j{os.cpu_count()}", "bzImage", "modules"], log=log, timeout_s=BUILD_S)
        source.rename(target)
        shutil.rmtree(partial)
    return target


def _check_settings(source: Path) -> None:
    got = set((source / ".config").read_text().splitlines())
    wanted = [line for line in config().read_text().splitlines() if line.startswith("CONFIG_")]
    refused = [line for line in wanted if line not in got]
    if refused:
        raise Failure(f"{config().name}: kconfig does not take {' '.join(refused)}")


def build_module() -> Path:
    target = WORK / "module-debug"
    with building(target) as partial:
        copy_source(partial)
        command = ["make", "-C", tree(), f"M={partial}", "W=1", "modules"]
        run(command, log=WORK / "logs" / "module-debug.log")
    return module_in(target)


def image() -> Path:
    return tree() / "arch/x86/boot/bzImage"
