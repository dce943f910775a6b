#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests the kernel module for real: built for several kernels, run in virtual machines with cards.

`make test-driver` runs all stages in their order and says how long each took.  What takes long to
fetch or to build is kept in build/driver-vm/cache.  A stage alone: run.py --stage NAME; it takes
what it needs from that cache, and makes what is not there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import debug_kernel
import disk
import dkms
import host
import kernels
import packages
import qemu
import suites


@dataclass(frozen=True)
class Stage:
    name: str
    what: str
    run: Callable[[], object]


def build_modules() -> None:
    for line in kernels.LINES:
        kernels.build_module(kernels.kernel(line))


QEMU = Stage("qemu", "QEMU with vfio-user-pci, in a tree of its own", qemu.check_qemu)
PROGRAMS = Stage("programs", "the card server and the test programs in C", suites.build_programs)
STAGES = [
    Stage("packages", "what the distribution has to have installed",
          lambda: packages.install(packages.TOOLS)),
    Stage("kernels", f"images and headers of Linux {', '.join(kernels.LINES)}",
          lambda: [host.say(kernels.kernel(line).release) for line in kernels.LINES]),
    Stage("module", "the module for each kernel, W=1 and sparse", build_modules),
    Stage("checkpatch", "the kernel's style checker", kernels.checkpatch),
    QEMU,
    PROGRAMS,
    Stage("layout", "sizes and padding of the interface's structures", suites.check_layout),
    Stage("disk", "a guest's disk with Python and the model", disk.disk),
    Stage("one-card", "the whole interface on one card", suites.one_card),
    Stage("two-cards", "faults, removal and reloading beside a card that works", suites.two_cards),
    Stage("other-kernels", "the same on the other kernels", suites.other_kernels),
    Stage("conformance", "the suite of all cards on KernelCard", suites.conformance),
    Stage("model", "a real model on two cards, the same bits as on emulated ones", suites.model),
    Stage("dkms", "add, build, install and remove in a clean system", dkms.check),
]  # fmt: skip
DEBUG_STAGES = [
    Stage("packages", "what the distribution has to have installed",
          lambda: packages.install({**packages.TOOLS, **packages.DEBUG_TOOLS})),
    QEMU,
    Stage("debug-kernel", "a kernel that looks for bugs", debug_kernel.tree),
    PROGRAMS,
    Stage("debug-one-card", "the whole interface under that kernel", suites.debug_one_card),
    Stage("debug-two-cards", "faults and removal under that kernel", suites.debug_two_cards),
    Stage("debug-failures", "the same while allocations fail", suites.debug_failures),
]  # fmt: skip


def interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def run(stages: list[Stage]) -> int:
    begin = time.monotonic()
    for stage in stages:
        print(f"== {stage.name}: {stage.what}", flush=True)
        stage_begin = time.monotonic()
        status = "failed"
        try:
            stage.run()
            status = "ok"
        except host.Failure as failure:
            print(f"{failure}", file=sys.stderr, flush=True)
            return 1
        finally:
            now = time.monotonic()
            print(
                f"== {stage.name}: {status}, {now - stage_begin:.0f} s (total {now - begin:.0f} s)",
                flush=True,
            )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="name the stages and do nothing")
    parser.add_argument(
        "--stage", action="append", metavar="NAME", help="only this one (repeatable)"
    )
    parser.add_argument("--debug", action="store_true", help="the stages with the debug kernel")
    options = parser.parse_args()
    stages = DEBUG_STAGES if options.debug else STAGES
    if options.list:
        for stage in stages:
            print(f"{stage.name:<16}{stage.what}")
        return 0
    if options.stage:
        known = {stage.name: stage for stage in [*DEBUG_STAGES, *STAGES]}
        unknown = [name for name in options.stage if name not in known]
        if unknown:
            parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(known)}")
        stages = [known[name] for name in options.stage]
    os.chdir(host.ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        return run(stages)
    except KeyboardInterrupt as stopped:
        print(f"stopped by {stopped or 'SIGINT'}", file=sys.stderr)
        return 130
    finally:
        host.kill_all()


if __name__ == "__main__":
    sys.exit(main())
