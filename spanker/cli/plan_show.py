# SPDX-License-Identifier: Apache-2.0
"""`spanker plan show`: any plan as text and as a drawing, a model's or a collective's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from spanker.cli import terminal
from spanker.cli.errors import Failure
from spanker.cli.opening import inspect
from spanker.cli.plan import GRAPHS, write
from spanker.device.spec import parse_fleet
from spanker.errors import PlanError
from spanker.sched import draw, draw_plan, plan_json, profiles, verify
from spanker.sched.collectives import cost
from spanker.sched.collectives import plan_json as collective_json
from spanker.sched.collectives.catalog import make
from spanker.sched.collectives.plan import CollectivePlan, Kind
from spanker.sched.plan import FleetPlan, ModelShape
from spanker.sched.planner import make_plan
from spanker.sched.reading import parsed
from spanker.sched.search import report, search
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology

_KINDS = tuple(kind.value for kind in Kind)


@attrs.frozen
class Shown:
    """What to show: a file, the name of a collective or of a model's plan, and what that needs."""

    what: str
    model: str | None
    shape: str | None
    cards: str
    profile: str
    links: str
    algorithm: str
    op: str
    any_order: bool
    elements: int


def show(asked: Shown, *, svg: str | None, save: str | None, as_json: bool) -> None:
    plan, note = _find(asked)
    if as_json:
        terminal.emit_json(_json(plan))
    elif isinstance(plan, FleetPlan):
        terminal.emit(draw_plan.text(plan).rstrip())
    else:
        terminal.emit(draw.text(plan).rstrip())
    if note is not None and not as_json:
        terminal.emit(note)
    if svg is not None:
        drawn = draw_plan.svg(plan) if isinstance(plan, FleetPlan) else draw.svg(plan)
        write(svg, drawn)
        terminal.note(f"the drawing: {svg}")
    if save is not None:
        write(save, json.dumps(_json(plan)) + "\n")
        terminal.note(f"the plan as JSON: {save}")


def _json(plan: FleetPlan | CollectivePlan) -> dict[str, Any]:
    return plan_json.to_json(plan) if isinstance(plan, FleetPlan) else collective_json.to_json(plan)


def _find(asked: Shown) -> tuple[FleetPlan | CollectivePlan, str | None]:
    """The plan, and a remark about it."""
    if asked.what in _KINDS:
        return _collective(asked)
    if asked.what.endswith(".json") or "/" in asked.what:
        return _from_file(asked)
    if asked.model is None and asked.shape is None:
        raise Failure(
            f"cannot show {asked.what!r}: expected a FILE.json, one of {', '.join(_KINDS)}, or a "
            f"model's plan such as tp2xpp2 with --shape or --model"
        )
    cards = len(parse_fleet(asked.cards))
    return make_plan(asked.what, _shape(asked), cards), None


def _shape(asked: Shown) -> ModelShape:
    if asked.shape is not None:
        return named_shape(asked.shape)
    assert asked.model is not None
    return inspect(asked.model).model.shape


def _topology(asked: Shown) -> Topology:
    return GRAPHS[asked.links](len(parse_fleet(asked.cards)))


def _collective(asked: Shown) -> tuple[CollectivePlan, str]:
    kind, topology, profile = Kind(asked.what), _topology(asked), profiles.find(asked.profile)
    ordered = False if asked.any_order else None
    elements = 0 if kind is Kind.BARRIER else asked.elements
    if asked.algorithm == "best":
        found = search(kind, topology, elements, profile, op=asked.op, ordered=ordered)
        return found.plan, report(found)
    plan = make(kind, topology, elements, algorithm=asked.algorithm, op=asked.op, ordered=ordered)
    return plan, _checked(plan, topology, asked.profile)


def _checked(plan: CollectivePlan, topology: Topology, profile: str) -> str:
    verify.verify(plan, topology)
    taken = cost.seconds(plan, profiles.find(profile), topology)
    return f"verified; {terminal.seconds(taken)} with the figures of {profile}, float32"


def _from_file(asked: Shown) -> tuple[FleetPlan | CollectivePlan, str | None]:
    try:
        data = Path(asked.what).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read the plan {asked.what}: {error.strerror}") from error
    value = parsed(data, asked.what, collective_json.TEXT_BYTES_MAX)
    if isinstance(value, dict) and "replicas" in value:
        return plan_json.from_json(value), None
    if not isinstance(value, dict):
        raise Failure(f"{asked.what} holds no plan: expected an object, with replicas or a kind")
    plan = collective_json.from_json(value)
    topology = GRAPHS[asked.links](max(plan.cards) + 1)
    try:
        return plan, _checked(plan, topology, asked.profile)
    except PlanError as error:
        return plan, f"not right for {asked.links} links: {error}"
