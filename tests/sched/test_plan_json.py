# SPDX-License-Identifier: Apache-2.0
"""Whole-model plans as JSON and as drawings."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from model_shapes import SHAPES, make_shape

from spanker.errors import PlanError
from spanker.sched import draw_plan
from spanker.sched.plan import FleetPlan, side_by_side, tensor_pipeline
from spanker.sched.plan_json import from_json, to_json
from spanker.sched.planner import make_plan

PLANS = [
    FleetPlan.of(tensor_pipeline(SHAPES["smollm2"], 4, 1)),
    FleetPlan.of(tensor_pipeline(SHAPES["smollm2"], 2, 3)),
    side_by_side(tensor_pipeline(SHAPES["smollm2"], 3, 2), 2),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan_comes_back_as_it_was(plan: FleetPlan) -> None:
    value = to_json(plan)
    assert from_json(value) == plan
    assert from_json(json.dumps(value)) == plan
    assert from_json(json.dumps(value).encode()) == plan


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    out = copy.deepcopy(to_json(PLANS[1]))
    at: Any = out
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return out


STAGE = ("replicas", 0, "stages", 1)
SHARE = (*STAGE, "shares", 0)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, "plan.version: expected 1, got 2"),
        (("version",), True, "plan.version: expected 1"),
        (("name",), 3, "plan.name: expected a text"),
        (("reason",), "x" * 5000, "plan.reason: expected a text of at most 4096"),
        (("replicas",), [], "plan.replicas: expected one replica or more"),
        (("replicas",), {}, "plan.replicas: expected a list"),
        ((*STAGE, "layers"), [3], r"stages\[1\].layers: expected \[start, stop\]"),
        ((*STAGE, "layers"), [5, 3], r"stages\[1\].layers.stop: expected 5 or more, got 3"),
        ((*STAGE, "layers"), [0, 1 << 40], "expected a number from 0 to"),
        ((*STAGE, "colour"), 1, "expected no fields but layers, shares"),
        ((*SHARE, "card"), 999, r"shares\[0\].card: expected a card"),
        ((*SHARE, "card"), 0, "plan.replicas: expected every card once"),
        ((*SHARE, "heads"), [0, "1"], r"shares\[0\].heads.stop: expected a number"),
        ((*SHARE, "heads"), [False, 1], r"shares\[0\].heads.start: expected a number"),
    ],
)
def test_what_is_wrong_is_named(path: tuple[str | int, ...], value: object, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "[", "3", '{"version": 1, "version": 1}', "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"^plan: expected"):
        from_json(text)


def test_a_missing_field_is_named() -> None:
    value = to_json(PLANS[0])
    del value["replicas"][0]["stages"]
    with pytest.raises(PlanError, match=r"plan.replicas\[0\]: expected a field 'stages'"):
        from_json(value)


def test_a_plan_from_a_file_is_checked_against_model_and_fleet(tmp_path: Path) -> None:
    shape, path = SHAPES["smollm2"], tmp_path / "plan.json"
    path.write_text(json.dumps(to_json(PLANS[1])))
    assert make_plan(str(path), shape, 6) == PLANS[1]
    assert make_plan(str(path), shape, 9) == PLANS[1]
    with pytest.raises(PlanError, match=r"plan.json: plan tp2xpp3 uses card 5, the fleet has"):
        make_plan(str(path), shape, 5)
    with pytest.raises(PlanError, match=r"plan.json: plan tp2xpp3, stage 0"):
        make_plan(str(path), make_shape(layers=2), 6)
    with pytest.raises(PlanError, match="cannot read the plan"):
        make_plan(str(tmp_path / "none.json"), shape, 6)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_drawings_show_every_card(plan: FleetPlan) -> None:
    text = draw_plan.text(plan)
    root = ElementTree.fromstring(draw_plan.svg(plan))
    titles = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}title")]
    for card in plan.cards:
        assert f"card {card}: heads [" in text
        assert any(title.startswith(f"card {card}: heads [") for title in titles)
    assert ("replica 1" in text) == (len(plan.replicas) > 1)
    assert draw_plan.svg(plan) == draw_plan.svg(plan)
