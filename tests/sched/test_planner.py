# SPDX-License-Identifier: Apache-2.0
"""Plans by name and from files, and what `pick_strategy` says of whole models."""

from __future__ import annotations

import pytest
from model_shapes import SHAPES, make_shape

from spanker.errors import PlanError
from spanker.sched.bandwidth import PROFILES, Profile
from spanker.sched.decision import Strategy, decide
from spanker.sched.plan import check_fleet_plan
from spanker.sched.planner import make_plan

TP, PP = Strategy.TENSOR_PARALLEL, Strategy.MODEL_PARALLEL


def turning_at(k: int) -> Profile:
    """A profile under which `pick_strategy` prefers tensor parallel from k input features on.

    At n = 1 weights are m*k*4 bytes and activations m*4: a draw at k = local / inter-card.
    """
    return Profile("turning", 1000 * k, 1000, None, 0.0)


@pytest.mark.parametrize(
    ("spec", "cards", "name"),
    [
        ("tp", 3, "tp3"),
        ("pp", 2, "pp2"),
        ("pp", 1, "tp1"),
        ("tp4", 4, "tp4"),
        ("pp2", 2, "pp2"),
        ("tp2xpp2", 4, "tp2xpp2"),
        (" TP2xPP2 ", 4, "tp2xpp2"),
        ("tp1xpp2", 2, "pp2"),
        ("tp3xpp1", 3, "tp3"),
        ("dp3", 3, "dp3"),
        ("dp1", 1, "tp1"),
        ("dp1xtp2", 2, "tp2"),
        ("dp2xtp2", 4, "dp2xtp2"),
        ("dp3xpp2", 6, "dp3xpp2"),
        ("DP2xtp2xpp2", 8, "dp2xtp2xpp2"),
        ("dp2xtp1xpp1", 2, "dp2"),
    ],
)
def test_plans_by_name(spec: str, cards: int, name: str) -> None:
    shape = make_shape()
    plan = make_plan(spec, shape, cards)
    assert plan.name == name
    assert plan.cards == tuple(range(cards))
    assert plan.reason and all(replica.reason for replica in plan.replicas)
    check_fleet_plan(shape, plan, cards)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        " ",
        "x",
        "tp2x",
        "xpp2",
        "tp2pp2",
        "pp2xtp2",
        "tp2xpp2x",
        "best",
        "tp-1",
        "tp2.0",
        "tp12345",
        "dp",
        "dp2x",
        "dp2xdp2",
        "dp2tp2",
        "tp2xdp2",
        "pp2xdp2",
        "dp2xx",
        "dp12345",
    ],
)
def test_unknown_plans_are_refused_by_name(spec: str) -> None:
    with pytest.raises(PlanError, match="expected auto, tp, pp, or tpAxppB") as caught:
        make_plan(spec, make_shape(), 2)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "uses"),
    [
        ("tp3", 3),
        ("tp2xpp2", 4),
        ("pp1", 1),
        ("tp0", 0),
        ("tp0xpp2", 0),
        ("dp2xtp2", 4),
        ("dp0", 0),
    ],
)
def test_plans_for_another_number_of_cards_are_refused(spec: str, uses: int) -> None:
    with pytest.raises(PlanError, match=f"plan {spec} uses {uses} cards, the fleet has 2"):
        make_plan(spec, make_shape(), 2)


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(PlanError, match="the model has 2"):
        make_plan("pp", make_shape(layers=2), 3)


# --- decisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_every_matrix_is_asked_about_once(name: str, profile: Profile) -> None:
    shape = SHAPES[name]
    decisions = decide(shape, 4, profile)
    assert sum(d.count for d in decisions) == 7 * len(shape.layers) + 1
    total = sum(layer.weight_bytes for layer in shape.layers)
    total += shape.output.rows * shape.output.row_bytes
    assert sum(d.weight_bytes for d in decisions) == total


def test_a_decision_is_the_rule_at_one_token_with_the_profiles_bandwidths() -> None:
    shape = make_shape(hidden=64, ffn=128)
    by_role = {d.name: d for d in decide(shape, 2, turning_at(65))}
    assert (by_role["ffn_down"].m, by_role["ffn_down"].k) == (64, 128)
    assert (by_role["output"].m, by_role["output"].k) == (320, 64)
    assert by_role["ffn_down"].count == 2 and by_role["output"].count == 1
    assert {r for r, d in by_role.items() if d.strategy is TP} == {"ffn_down"}
    # A draw goes to tensor parallel.
    assert all(d.strategy is TP for d in decide(shape, 2, turning_at(64)))
    assert all(d.strategy is PP for d in decide(shape, 2, turning_at(129)))
    # One card has nothing to decide.
    assert all(d.strategy is TP for d in decide(shape, 1, turning_at(129)))
