# SPDX-License-Identifier: Apache-2.0
"""`spanker calibrate`: what this fleet really does, as a profile."""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from spanker.actors.calibration import Calibration, Figure
from spanker.cli import terminal
from spanker.cli.errors import Failure
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.machine import this_machine
from spanker.fleet import open_fleet
from spanker.sched import profiles
from spanker.sched.bandwidth import Profile

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def calibrate(
    cards: str, profile: str, seconds: float, out: str | None, *, throttle: bool, as_json: bool
) -> None:
    name = _check_out(out)
    busy = _busy()

    async def job(interrupts: Interrupts) -> Calibration:
        async with open_fleet(cards, profile=profile, throttle=throttle) as fleet:
            with terminal.progress_bar("measuring", counts_bytes=False) as progress:
                return await fleet.calibrate(name=name, seconds=seconds, progress=progress)

    measured = run_async(job)
    about = _about(measured, cards)
    if out is not None:
        profiles.save(measured.profile, out, about)
    if as_json:
        terminal.emit_json(
            {
                "profile": attrs.asdict(measured.profile, filter=lambda field, _: bool(field.init)),
                "about": about,
                "figures": [attrs.asdict(figure) for figure in measured.figures],
                "file": out,
            }
        )
        return
    _show(measured)
    if busy:
        terminal.note(busy)
    if out is None:
        terminal.note("nothing was written; --out FILE.toml keeps it for --profile FILE.toml")
    else:
        terminal.note(f"written to {out}; use it with --profile {out}")


def _check_out(out: str | None) -> str:
    """The name of the profile; Failure, before anything is measured, where the file cannot be."""
    if out is None:
        return "measured"
    if not profiles.is_path(out):
        raise Failure(
            f"--out {out}: expected a file that ends in .toml, by which --profile knows it"
        )
    folder = os.path.dirname(out) or "."
    if not os.access(folder, os.W_OK) or os.path.isdir(out):
        raise Failure(f"cannot write the profile {out}: choose a file in a folder that takes one")
    stem = Path(out).stem[: profiles.NAME_CHARS_MAX]
    taken = profiles.is_builtin(stem) or not stem.isprintable()
    return "measured" if taken else stem


def _busy() -> str:
    """A warning where the machine has other things to do, or nothing."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < 0.5 * cores:
        return ""
    return (
        f"the machine was busy with other things (load {load:.1f} on {cores} cores): what was "
        "measured is what they left"
    )


def _about(measured: Calibration, cards: str) -> dict[str, str | int | float]:
    machine = this_machine()
    return measured.about | {
        "fleet": cards,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "ram_gb": machine.ram_gb,
        "load": round(os.getloadavg()[0], 2),
    }


def _show(measured: Calibration) -> None:
    table = terminal.table("measured", ">median", ">quartiles", ">of")
    for figure in measured.figures:
        ends = f"{_value(figure.low, figure)} to {_value(figure.high, figure)}"
        table.add_row(figure.name, _value(figure.median, figure), ends, str(figure.count))
    terminal.show(table)
    terminal.emit("")
    terminal.show(terminal.facts(_limits(measured.profile)))


def _limits(profile: Profile) -> list[tuple[str, str]]:
    """What the profile says besides: who shares what, and who differs."""
    port, cores, shared = profile.port_bytes_per_s, profile.cores, profile.shared_bytes_per_s
    rows = [
        (
            "ports",
            "the links of a card are its only limit"
            if port is None
            else f"a card sends, or receives, {port / 1e9:.3g} GB/s over all links together",
        ),
        (
            "sharing",
            (
                "all cards work at a time"
                if cores is None
                else f"so many cards work at a time: {cores}"
            )
            + ("" if shared is None else f"; together they read {shared / 1e9:.3g} GB/s at most"),
        ),
    ]
    rows += [
        (f"card {card.card}", f"memory x {card.memory:.2f}, arithmetic x {card.compute:.2f}")
        for card in profile.cards
    ]
    rows += [
        (
            f"link {link.source} to {link.target}",
            f"{link.bytes_per_s / 1e9:.3g} GB/s, {link.latency_s * 1e6:.3g} µs",
        )
        for link in profile.links
    ]
    return rows


def _value(value: float, figure: Figure) -> str:
    """Three digits and a prefix: 31.2 GB/s, 174 G/s, 32 ns."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{figure.unit}".strip()
    return f"{value:.3g} {figure.unit}".strip()
