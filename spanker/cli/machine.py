# SPDX-License-Identifier: Apache-2.0
"""What this machine is: processor, cores, memory."""

from __future__ import annotations

import os
import platform

import attrs


@attrs.frozen
class Machine:
    """`cores` are those this process may use; `ram_gb` counts 10**9 bytes."""

    cpu: str
    cores: int
    ram_gb: float


def this_machine() -> Machine:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        ram_gb=round(pages * page_bytes / 1e9, 1),
    )


def _cpu_name() -> str:
    """The kernel's name for the processor; x86 has one, other architectures may not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model", "cpu model") and value.strip():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
