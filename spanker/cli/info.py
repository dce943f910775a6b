# SPDX-License-Identifier: Apache-2.0
"""`spanker info`: versions, this machine, cached models, cards; the shape and plan of a model."""

from __future__ import annotations

import platform
from importlib import metadata

import attrs

from spanker._version import __version__
from spanker.actors.message import PROTOCOL_VERSION
from spanker.actors.placement import PLANNED_POSITION
from spanker.cli import terminal
from spanker.cli.machine import this_machine
from spanker.cli.opening import Inspected, inspect
from spanker.cli.options import FleetOptions
from spanker.cli.reports import plan_json
from spanker.device import uapi
from spanker.device.kernel.survey import Survey, survey
from spanker.device.riscv.emulator import Seen
from spanker.device.riscv.emulator import survey as look
from spanker.device.spec import parse_fleet
from spanker.fleet import describe_share
from spanker.ggml import catalog
from spanker.native import default_isa, isas, lib
from spanker.sched import profiles
from spanker.sched.decision import Decision, decide
from spanker.sched.layout import weight_buffers
from spanker.sched.limits import step_limits
from spanker.sched.plan import FleetPlan, Plan
from spanker.sched.planner import plan_for
from spanker.sched.planning import Request
from spanker.sched.topology import Topology

_LIBRARIES = ("numpy", "trio", "tokenizers")


@attrs.frozen
class Forecast:
    """What loading a model would do."""

    inspected: Inspected
    plan: FleetPlan
    decisions: tuple[Decision, ...]


def info(where: FleetOptions | None, *, as_json: bool) -> None:
    forecast = None if where is None else _forecast(where)
    if as_json:
        out = _json()
        if forecast is not None:
            out["model"] = _forecast_json(forecast)
        terminal.emit_json(out)
    elif forecast is None:
        seen = survey()
        rows = [*_rows(), ("kernel module", _module(seen)), ("RISC-V cards", _riscv(look()))]
        terminal.show(terminal.facts(rows))
        _show_cards(seen)
    else:
        _show_forecast(forecast)


# --- the machine -----------------------------------------------------------------------


def _json() -> dict[str, object]:
    return {
        "spanker_version": __version__,
        "semantics_version": lib.SPK_SEMANTICS_VERSION,
        "protocol_version": PROTOCOL_VERSION,
        "python_version": platform.python_version(),
        "library_versions": {name: metadata.version(name) for name in _LIBRARIES},
        "host": attrs.asdict(this_machine()),
        "isas": list(isas()),
        "default_isa": default_isa(),
        "cache": str(catalog.cache_dir()),
        "models": {
            entry.name: {
                "path": str(entry.path),
                "cached": entry.is_cached,
                "size_bytes": entry.size_bytes,
                "licence": entry.licence,
            }
            for entry in catalog.CATALOG.values()
        },
        "driver": _driver_json(survey()),
        "riscv": _riscv_json(look()),
    }


def _rows() -> list[tuple[str, str]]:
    machine = this_machine()
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
    models = ", ".join(
        f"{entry.name} ({terminal.size(entry.size_bytes)}"
        f"{'' if entry.is_cached else f', not here: spanker pull {entry.name}'})"
        for entry in catalog.CATALOG.values()
    )
    return [
        (
            "spanker",
            f"{__version__} (semantics {lib.SPK_SEMANTICS_VERSION}, protocol {PROTOCOL_VERSION})",
        ),
        ("python", f"{platform.python_version()}, {libraries}"),
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.ram_gb} GB"),
        ("instructions", f"{', '.join(isas())}; default {default_isa()}"),
        ("cache", str(catalog.cache_dir())),
        ("models", models),
    ]


# --- the kernel module -----------------------------------------------------------------


def _module(seen: Survey) -> str:
    if not seen.loaded:
        return "module not loaded (driver/README.md)"
    if seen.version is None:
        return seen.problems[0]
    wanted = ".".join(map(str, uapi.VERSION))
    return (
        f"interface {seen.version} (this Spanker {wanted}), "
        f"{len(seen.cards) or 'no'} card{'' if len(seen.cards) == 1 else 's'}"
    )


def _state(info: uapi.Info) -> str:
    return "failed" if info.failed else "emulated" if info.emulated else "ready"


def _show_cards(seen: Survey) -> None:
    if seen.cards:
        terminal.emit("")
        columns = (">card", "serial", "sku", ">memory", ">free", ">links", ">resets", "state")
        cards = terminal.table(*columns)
        for card in seen.cards:
            info = card.info
            cards.add_row(
                str(info.number),
                f"{info.serial:016x}",
                info.sku,
                terminal.size(info.ddr_bytes),
                terminal.size(info.ddr_free),
                f"{card.links_up} of {card.peers} up",
                str(info.generation),
                _state(info),
            )
        terminal.show(cards)
    for problem in seen.problems[seen.version is None :]:
        terminal.note(problem)


def _driver_json(seen: Survey) -> dict[str, object]:
    return {
        "loaded": seen.loaded,
        "version": None if seen.version is None else str(seen.version),
        "cards": [
            {
                **attrs.asdict(card.info),
                "serial": f"{card.info.serial:016x}",
                "emulated": card.info.emulated,
                "failed": card.info.failed,
                "peers": card.peers,
                "links_up": card.links_up,
                "temperature_mc": card.temperature_mc,
            }
            for card in seen.cards
        ],
        "problems": list(seen.problems),
    }


# --- RISC-V cards ----------------------------------------------------------------------


def _riscv(seen: Seen) -> str:
    if seen.firmware is None:
        return seen.problem
    return f"{seen.path} ({seen.firmware.isa}) in {seen.emulator}"


def _riscv_json(seen: Seen) -> dict[str, object]:
    return {
        "emulator": seen.emulator or None,
        "firmware": seen.path or None,
        "isa": seen.firmware.isa if seen.firmware else None,
        "sha256": seen.firmware.sha256 if seen.firmware else None,
        "problem": seen.problem or None,
    }


# --- a model ---------------------------------------------------------------------------


def _forecast(where: FleetOptions) -> Forecast:
    specs = parse_fleet(where.cards)
    inspected = inspect(where.model)
    shape, speeds = inspected.model.shape, profiles.find(where.profile)
    request = Request(
        shape,
        speeds,
        Topology.with_mock(len(specs)),
        tuple(spec.ddr_bytes for spec in specs),
        step_limits(shape),
        position=min(PLANNED_POSITION, shape.context),
    )
    return Forecast(inspected, plan_for(where.plan, request), decide(shape, len(specs), speeds))


def _formats(inspected: Inspected) -> dict[str, tuple[int, int]]:
    """Tensors and bytes by format."""
    found: dict[str, tuple[int, int]] = {}
    for info in inspected.gguf.tensors.values():
        count, nbytes = found.get(info.type.name, (0, 0))
        found[info.type.name] = (count + 1, nbytes + info.nbytes)
    return found


def _weight_bytes(forecast: Forecast, replica: Plan, card: int) -> int:
    buffers = weight_buffers(forecast.inspected.model.shape, replica, card)
    return sum(b.ddr_bytes for b in buffers)


def _forecast_json(forecast: Forecast) -> dict[str, object]:
    inspected, plan = forecast.inspected, forecast.plan
    shape = inspected.model.shape
    return {
        "path": str(inspected.path),
        "name": inspected.gguf.metadata.get("general.name"),
        "layers": len(shape.layers),
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "ffn": shape.ffn,
        "vocabulary": shape.vocabulary,
        "context": shape.context,
        "tied_output": inspected.model.tied,
        "formats": {
            name: {"tensors": count, "bytes": nbytes}
            for name, (count, nbytes) in _formats(inspected).items()
        },
        "weight_bytes_per_token": inspected.model.weight_bytes,
        "plan": plan_json(plan),
        "card_weight_bytes": [
            _weight_bytes(forecast, replica, card)
            for replica in plan.replicas
            for card in replica.cards
        ],
        "decisions": [attrs.asdict(d) | {"strategy": d.strategy.value} for d in forecast.decisions],
    }


def _show_forecast(forecast: Forecast) -> None:
    inspected, plan = forecast.inspected, forecast.plan
    shape, model = inspected.model.shape, inspected.model
    formats = ", ".join(
        f"{name} {terminal.size(nbytes)} in {count}"
        for name, (count, nbytes) in _formats(inspected).items()
    )
    terminal.show(
        terminal.facts(
            [
                ("model", str(inspected.gguf.metadata.get("general.name", inspected.path.name))),
                ("file", str(inspected.path)),
                (
                    "shape",
                    f"{len(shape.layers)} layers, hidden {shape.hidden:,}, {shape.heads} heads "
                    f"over {shape.kv_heads} KV heads of {shape.head_dim}, FFN {shape.ffn:,}, "
                    f"vocabulary {shape.vocabulary:,}{' (tied)' if model.tied else ''}, "
                    f"context {shape.context:,}",
                ),
                ("tensors", formats),
                ("per token", f"{terminal.size(model.weight_bytes)} of weights are read"),
                ("plan", f"{plan.name}: {plan.reason}"),
            ]
        )
    )
    terminal.emit("")
    several = [">replica"] if plan.parallel else []
    cards = terminal.table(">card", *several, ">weights", "share")
    for number, replica in enumerate(plan.replicas):
        for card in replica.cards:
            cards.add_row(
                str(card),
                *([str(number)] if plan.parallel else []),
                terminal.size(_weight_bytes(forecast, replica, card)),
                describe_share(plan, card),
            )
    terminal.show(cards)
    terminal.emit("")
    answers = terminal.table("matrix", ">m", ">k", ">count", ">weights", "pick_strategy, n = 1")
    for d in forecast.decisions:
        answers.add_row(
            d.name,
            f"{d.m:,}",
            f"{d.k:,}",
            str(d.count),
            terminal.size(d.weight_bytes),
            d.strategy.value,
        )
    terminal.show(answers)
