# SPDX-License-Identifier: Apache-2.0
"""A plan for what was asked: by name, from a file, or the best one (sched/planning)."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import attrs

from spanker.errors import PlanError
from spanker.sched.plan import (
    FleetPlan,
    ModelShape,
    Plan,
    check_fleet_plan,
    side_by_side,
    tensor_pipeline,
)

if TYPE_CHECKING:
    from spanker.sched.planning import Request

# dpD, tpA and ppB, in this order, at least one of them.
_NAMED = r"(?!$)(?:dp(\d{1,4})(?:x(?=[tp])|$))?(?:tp(\d{1,4})(?:x(?=p)|$))?(?:pp(\d{1,4}))?"


def plan_for(spec: str, request: Request) -> FleetPlan:
    """The plan for `spec`: `auto`, the best by the cost model, or as `make_plan` has it."""
    if spec.strip().lower() != "auto":
        return make_plan(spec, request.shape, len(request.topology.cards))
    # A plan that was named needs no search, and starts sooner without.
    from spanker.sched.planning import search

    return search(request).chosen.plan


def make_plan(spec: str, shape: ModelShape, cards: int) -> FleetPlan:
    """The plan for `spec` over all `cards`: `tp`, `pp`, or any of dpD, tpA and ppB joined by x: D
    replicas side by side, of B stages of A cards each; or that of a FILE.json, which may leave
    some idle.

    Raises PlanError when the spec is not understood or does not use exactly `cards` cards, and for
    a file that cannot be read or holds no plan for this model and so many cards.
    """
    if is_path(spec):
        return _from_file(spec, shape, cards)
    text = spec.strip().lower()
    if text == "tp":
        return _as_asked(tensor_pipeline(shape, cards, 1))
    if text == "pp":
        return _as_asked(tensor_pipeline(shape, 1, cards))
    match = re.fullmatch(_NAMED, text)
    if not match:
        raise PlanError(
            f"no plan {spec!r}: expected auto, tp, pp, or tpAxppB such as tp2xpp2, or several "
            f"replicas of it side by side such as dp2xtp2, or a FILE.json of `spanker plan --save`"
        )
    replicas, tensor, pipeline = (int(count or 1) for count in match.groups())
    if replicas * tensor * pipeline != cards:
        uses = replicas * tensor * pipeline
        raise PlanError(
            f"plan {text} uses {uses} cards, the fleet has {cards}: "
            f"use --cards {uses}, or --plan auto"
        )
    return _as_asked(tensor_pipeline(shape, tensor, pipeline), replicas)


def is_path(spec: str) -> bool:
    """Whether a spec means a file."""
    return spec.endswith(".json") or os.sep in spec


def _from_file(path: str, shape: ModelShape, cards: int) -> FleetPlan:
    from spanker.sched import plan_json  # most plans are not from files

    try:
        with open(path, "rb") as file:
            data = file.read(plan_json.TEXT_BYTES_MAX + 1)
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    try:
        plan = plan_json.from_json(data)
        check_fleet_plan(shape, plan, cards)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None
    return plan


def _as_asked(plan: Plan, replicas: int = 1) -> FleetPlan:
    return side_by_side(attrs.evolve(plan, reason="as asked"), replicas)
