# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine in words, the arithmetic of a record, tables and files.

Nothing is measured here.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import probe
import rich.box
from rich.console import Console
from rich.table import Table

import spanker
from spanker.cli.machine import this_machine
from spanker.native import default_isa, isas

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("numpy", "trio", "cffi", "llama-cpp-python")


# --- the machine ---------------------------------------------------------------------


def describe_machine() -> dict[str, object]:
    """What the figures of a record were measured on."""
    known = this_machine()
    return {
        "cpu": known.cpu,
        "cores": known.cores,
        "caches_bytes": dict(probe.caches()),
        "ram_gb": known.ram_gb,
        "isas": list(isas()),
        "default_isa": default_isa(),
        "kernel": platform.release(),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part, and Spanker's commit where it runs from a checkout."""
    found = {"spanker": spanker.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found["commit"] = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return "unknown"


class Bystanders:
    """How much of the machine others take, from one call of `cores` to the next."""

    def __init__(self) -> None:
        self._last = self._now()

    def cores(self) -> dict[str, float]:
        """Cores that other processes kept busy, and that the hypervisor gave to other machines."""
        before, self._last = self._last, self._now()
        wall, busy, stolen, own = (b - a for a, b in zip(before, self._last, strict=True))
        return {"other_cores": max(0.0, busy - own) / wall, "stolen_cores": stolen / wall}

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        own = os.times()
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        user, nice, system, _idle, _wait, irq, softirq, steal = fields
        tick = 1 / os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + softirq) * tick
        return time.monotonic(), busy, steal * tick, sum(own[:4])


def now_utc() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- arithmetic ----------------------------------------------------------------------


def median(samples: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(samples) if samples else None


def spread(samples: Sequence[float]) -> float | None:
    """Half the distance between the quartiles, as a part of the median; None below 3 samples."""
    if len(samples) < 3 or not (middle := statistics.median(samples)):
        return None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2 / middle


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The median over rounds of ours / theirs: what drifts from round to round cancels."""
    return median([a / b for a, b in zip(ours, theirs, strict=False) if b])


def weights_gb_per_s(weight_bytes: int, tokens_per_s: float) -> float:
    """10**9 bytes of weights a second, when every token reads each weight once."""
    return weight_bytes * tokens_per_s / 1e9


def matmul_gmac_per_s(multiply_adds_per_token: int, tokens_per_s: float) -> float:
    """10**9 multiply-adds a second."""
    return multiply_adds_per_token * tokens_per_s / 1e9


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, positions: int) -> int:
    """Bytes of keys and values that one token reads at a position: two f16 per element."""
    return layers * kv_heads * head_dim * 2 * 2 * positions


def tokens_per_s_by_bytes(bytes_per_token: int, gb_per_s: float) -> float:
    """What reading alone allows."""
    return gb_per_s * 1e9 / bytes_per_token


# --- output --------------------------------------------------------------------------


def rounded(value: object, digits: int = 4) -> object:
    """A record with every float rounded to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def save_json(path: str | os.PathLike[str], record: Mapping[str, object]) -> Path:
    """Write a record, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(rounded(record), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output: plain where that is no terminal.  None is shown as a dash."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(item) for item in row))
    console.print(table)


def cell(value: object) -> str:
    """A number with three or four significant digits, a dash for None, other things as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def percent(part: float | None) -> str | None:
    return None if part is None else f"{part:.0%}"
