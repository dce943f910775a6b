# SPDX-License-Identifier: Apache-2.0
"""The machine's limits: how fast its memory is read, and how many int8 multiply-adds it does.

    python bench/probe.py --threads 1,2 --json limits.json

Loops that do nothing else, compiled here with the machine's C compiler (bench/native/probe.c):
what kernels and models reach is given as a share of these.  Measure them in the same run; on a
shared machine they move from minute to minute like everything else.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import cffi

SOURCE = Path(__file__).resolve().parent / "native" / "probe.c"
BUILD = SOURCE.parents[2] / "build" / "bench"
FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden")

# Must agree with probe.c.
STEP_BYTES = 256
STREAMS = (1, 2, 4, 8)
THREADS_MAX = 256

# A pass reads at least so much, and the memory's size counts from here on however small the cache
# says it is: a virtual machine may see less of the cache than there is.
_PASS_BYTES_MIN = 64 << 20
_MEMORY_BYTES_MIN = 256 << 20
_INT8_STEPS = 1_000_000

_CDEF = """
const char *probe_read_isa(void);
const char *probe_int8_isa(void);
int probe_read(size_t bytes, int threads, const int *cpus, int streams, int repeats, int passes,
               double *seconds);
int probe_int8(int threads, const int *cpus, long steps, int passes, double *seconds,
               double *multiply_adds);
"""


class ProbeError(Exception):
    """The probe cannot be built or run; the message says what to do."""


@attrs.frozen
class Limits:
    """The most that so many threads together reached.

    `read_gb_per_s` (10**9 bytes) of a working set of `working_set_bytes` in memory;
    `int8_gmac_per_s` are 10**9 multiply-adds, two operations each.
    """

    threads: int
    working_set_bytes: int
    read_gb_per_s: float
    read_isa: str
    int8_gmac_per_s: float
    int8_isa: str


def compiler() -> str:
    """$CC, else cc, gcc or clang; ProbeError when there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise ProbeError(
        f"no C compiler ({' or '.join(names)}) to build {SOURCE.name}: install gcc or clang, or "
        "set CC"
    )


@functools.cache
def _library() -> tuple[Any, Any]:
    """(ffi, lib), built once for each state of the source and compiler."""
    command = [compiler(), *FLAGS]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    target = BUILD / f"probe-{key}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(partial), "-pthread"], capture_output=True, text=True
        )
        if done.returncode:
            raise ProbeError(f"{command[0]} could not build {SOURCE}:\n{done.stderr.strip()}")
        os.replace(partial, target)
    ffi = cffi.FFI()
    ffi.cdef(_CDEF)
    return ffi, ffi.dlopen(str(target))


def _checked(status: int, what: str) -> None:
    if status:
        name = errno.errorcode.get(status, str(status))
        raise ProbeError(f"{what}: {os.strerror(status)} ({name})")


def cpus() -> list[int]:
    """The CPUs that this process may use; thread i is pinned to the i-th, round and round."""
    return sorted(os.sched_getaffinity(0))


def _pinned(ffi: Any, threads: int) -> Any:
    if not 1 <= threads <= THREADS_MAX:
        raise ProbeError(f"threads must be 1 to {THREADS_MAX}, got {threads}")
    allowed = cpus()
    return ffi.new("int[]", [allowed[t % len(allowed)] for t in range(threads)])


def read_bandwidth(threads: int, working_set_bytes: int, passes: int = 6) -> float:
    """GB/s of `threads` threads that read a working set together, each its own part of it.

    The best of `passes` passes and of several counts of streams per thread.  Blocks for about a
    second at a few hundred megabytes.
    """
    ffi, lib = _library()
    seconds, best = ffi.new("double *"), 0.0
    pinned = _pinned(ffi, threads)
    for streams in STREAMS:
        unit = threads * streams * STEP_BYTES
        size = max(working_set_bytes // unit, 1) * unit
        repeats = max(1, _PASS_BYTES_MIN // size)
        status = lib.probe_read(size, threads, pinned, streams, repeats, passes, seconds)
        _checked(status, f"reading {size:,} bytes with {threads} threads")
        best = max(best, size * repeats / seconds[0] / 1e9)
    return best


def int8_rate(threads: int, passes: int = 8) -> float:
    """10**9 int8 multiply-adds a second of `threads` threads together, operands in registers."""
    ffi, lib = _library()
    seconds, count = ffi.new("double *"), ffi.new("double *")
    pinned = _pinned(ffi, threads)
    _checked(
        lib.probe_int8(threads, pinned, _INT8_STEPS, passes, seconds, count),
        f"multiplying with {threads} threads",
    )
    return float(count[0] / seconds[0] / 1e9)


def last_level_cache_bytes() -> int:
    """The size of the largest cache of the first CPU; 32 MiB where the system does not say."""
    return max((size for _, size in caches()), default=32 << 20)


def caches() -> list[tuple[str, int]]:
    """(name, bytes) of each cache that the first CPU sees, as in [("L1d", 32768), ...]."""
    letters = {"Data": "d", "Instruction": "i"}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = []
    for index in sorted(Path(f"/sys/devices/system/cpu/cpu{cpus()[0]}/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            found.append((f"L{level}{letters.get(kind, '')}", int(size[:-1]) * units[size[-1]]))
        except (OSError, KeyError, ValueError):
            continue
    return found


def memory_working_set_bytes() -> int:
    """A size that no cache holds: 4 times the last level, as far as a quarter of memory goes."""
    wanted = max(4 * last_level_cache_bytes(), _MEMORY_BYTES_MIN)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted, max(available // 4, 1 << 20))


def limits(threads: int, passes: int = 6) -> Limits:
    """Measure both limits for a number of threads.  Blocks for a few seconds."""
    ffi, lib = _library()
    size = memory_working_set_bytes()
    return Limits(
        threads=threads,
        working_set_bytes=size,
        read_gb_per_s=read_bandwidth(threads, size, passes),
        read_isa=ffi.string(lib.probe_read_isa()).decode(),
        int8_gmac_per_s=int8_rate(threads, passes),
        int8_isa=ffi.string(lib.probe_int8_isa()).decode(),
    )


def thread_counts(text: str) -> list[int]:
    """Numbers as in `1,2,4`, for argparse."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers as in 1,2, got {text!r}")
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=thread_counts, default=sorted({1, len(cpus())}))
    parser.add_argument("--working-set-mib", type=float, help="measure reading at this size too")
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    records = []
    try:
        for threads in options.threads:
            found = limits(threads, options.passes)
            records.append(attrs.asdict(found))
            print(
                f"{threads:3} threads  read {found.read_gb_per_s:7.1f} GB/s "
                f"({found.read_isa}, {found.working_set_bytes >> 20} MiB)   "
                f"int8 {found.int8_gmac_per_s:8.1f} G multiply-adds/s ({found.int8_isa})"
            )
            if options.working_set_mib:
                size = int(options.working_set_mib * (1 << 20))
                rate = read_bandwidth(threads, size, options.passes)
                records[-1]["extra"] = {"working_set_bytes": size, "read_gb_per_s": rate}
                print(f"{threads:3} threads  read {rate:7.1f} GB/s ({size / (1 << 20):g} MiB)")
    except ProbeError as error:
        sys.exit(f"probe: {error}")
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
