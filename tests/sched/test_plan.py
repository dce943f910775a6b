# SPDX-License-Identifier: Apache-2.0
"""Plans: every row of every matrix has exactly one owner, stages are balanced, names are right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from model_shapes import SHAPES, make_shape, uneven_layers

from spanker.errors import PlanError
from spanker.sched.plan import (
    CardShare,
    FleetPlan,
    ModelShape,
    Plan,
    check_fleet_plan,
    on_cards,
    side_by_side,
    tensor_pipeline,
)
from spanker.sched.shares import Share

CARDS = range(1, 17)


def covers(shares: Iterable[Share], total: int) -> bool:
    """Contiguous, in order, each element once."""
    at = 0
    for share in shares:
        if share.start != at:
            return False
        at = share.stop
    return at == total


def all_plans(shape: ModelShape) -> Iterable[Plan]:
    for tensor, pipeline in itertools.product(CARDS, (1, 2, 3)):
        if pipeline <= len(shape.layers):
            yield tensor_pipeline(shape, tensor, pipeline)


@pytest.mark.parametrize("name", SHAPES)
def test_each_row_of_a_layer_has_one_owner(name: str) -> None:
    shape = SHAPES[name]
    for plan in all_plans(shape):
        for stage in plan.stages:
            assert covers((s.heads for s in stage.shares), shape.heads)
            assert covers((s.hidden for s in stage.shares), shape.hidden)
            assert covers((s.ffn for s in stage.shares), shape.ffn)


@pytest.mark.parametrize("name", SHAPES)
def test_vocabulary_is_with_the_last_stage_and_columns_with_the_first(name: str) -> None:
    shape = SHAPES[name]
    for plan in all_plans(shape):
        assert covers((s.vocabulary for s in plan.stages[-1].shares), shape.vocabulary)
        assert covers((s.columns for s in plan.stages[0].shares), shape.hidden)
        for stage in plan.stages[:-1]:
            assert all(s.vocabulary.empty for s in stage.shares)
        for stage in plan.stages[1:]:
            assert all(s.columns.empty for s in stage.shares)


@pytest.mark.parametrize("name", SHAPES)
def test_shares_start_where_the_kernels_need_it(name: str) -> None:
    shape = SHAPES[name]
    unit = shape.embedding.columns_unit
    for plan in all_plans(shape):
        for share in (s for stage in plan.stages for s in stage.shares):
            assert share.vocabulary.start % 256 == 0 or share.vocabulary.empty
            assert share.hidden.start % 16 == 0 or share.hidden.empty
            assert share.ffn.start % 32 == 0 or share.ffn.empty
            assert share.columns.start % max(unit, 16) == 0 or share.columns.empty
            assert share.columns.size % unit == 0


@pytest.mark.parametrize("name", SHAPES)
def test_kv_heads_are_exactly_those_that_the_query_heads_read(name: str) -> None:
    shape = SHAPES[name]
    for plan in all_plans(shape):
        for share in (s for stage in plan.stages for s in stage.shares):
            read = {h // shape.group for h in range(share.heads.start, share.heads.stop)}
            kv = share.kv_heads(shape.group)
            assert set(range(kv.start, kv.stop)) == read


def test_uneven_heads_are_spread_as_evenly_as_they_can() -> None:
    shape = SHAPES["smollm2"]
    sizes = {
        n: [s.heads.size for s in tensor_pipeline(shape, n, 1).stages[0].shares] for n in CARDS
    }
    assert sizes[2] == [5, 4]
    assert sizes[4] == [3, 2, 2, 2]
    assert sizes[8] == [2, 1, 1, 1, 1, 1, 1, 1]
    assert sizes[9] == [1] * 9
    assert sorted(sizes[12], reverse=True) == [1] * 9 + [0] * 3
    for counts in sizes.values():
        assert max(counts) - min(counts) <= 1
    # Three KV heads on two cards: the middle one is on both.
    shares = tensor_pipeline(shape, 2, 1).stages[0].shares
    assert [s.kv_heads(3) for s in shares] == [Share(0, 2), Share(1, 3)]


def test_a_card_may_get_nothing_of_a_tensor() -> None:
    shares = tensor_pipeline(SHAPES["one head"], 16, 1).stages[0].shares
    assert [s.heads.size for s in shares] == [1] + [0] * 15
    assert shares[7].kv_heads(1).empty
    assert all(s.vocabulary.empty for s in shares[2:])
    assert all(s.ffn.empty for s in shares[4:])


# --- stages --------------------------------------------------------------------------


def stage_bytes(shape: ModelShape, edges: tuple[int, ...]) -> int:
    """What the stage that reads most bytes reads, when layers are cut at `edges`."""
    loads = [
        sum(layer.weight_bytes for layer in shape.layers[a:b])
        for a, b in itertools.pairwise((0, *edges, len(shape.layers)))
    ]
    loads[-1] += shape.output.rows * shape.output.row_bytes
    return max(loads)


@pytest.mark.parametrize("seed", range(30))
def test_stages_are_balanced_as_well_as_any_cut_can(seed: int) -> None:
    rng = random.Random(seed)
    base = make_shape(vocabulary=rng.choice((16, 300, 5000)))
    shape = uneven_layers(base, [32 * rng.randrange(1, 60) for _ in range(rng.randrange(1, 8))])
    for stages in range(1, len(shape.layers) + 1):
        plan = tensor_pipeline(shape, 1, stages)
        layers = [stage.layers for stage in plan.stages]
        assert covers(layers, len(shape.layers))
        assert not any(share.empty for share in layers)
        edges = tuple(share.stop for share in layers[:-1])
        cuts = itertools.combinations(range(1, len(shape.layers)), stages - 1)
        assert stage_bytes(shape, edges) == min(stage_bytes(shape, cut) for cut in cuts)


def test_the_last_stage_gets_fewer_layers_where_the_output_is_large() -> None:
    plan = tensor_pipeline(SHAPES["smollm2"], 1, 2)
    first, last = (stage.layers.size for stage in plan.stages)
    assert first + last == 30 and first > last


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(
        PlanError, match="3 pipeline stages need at least 3 layers, the model has 2"
    ):
        tensor_pipeline(make_shape(layers=2), 1, 3)


@pytest.mark.parametrize(("tensor", "pipeline"), [(0, 1), (1, 0), (-1, 2)])
def test_empty_plans_are_refused(tensor: int, pipeline: int) -> None:
    with pytest.raises(PlanError, match="at least one card and one stage"):
        tensor_pipeline(make_shape(), tensor, pipeline)


# --- the plan as a value -----------------------------------------------------------------


def test_cards_are_numbered_stage_by_stage() -> None:
    plan = tensor_pipeline(make_shape(layers=3), 2, 3)
    assert plan.name == "tp2xpp3"
    assert [stage.cards for stage in plan.stages] == [(0, 1), (2, 3), (4, 5)]
    assert plan.cards == tuple(range(6))
    for card in plan.cards:
        number, share = plan.place(card)
        assert share.card == card and share in plan.stages[number].shares


@pytest.mark.parametrize(
    ("tensor", "pipeline", "name"), [(1, 1, "tp1"), (5, 1, "tp5"), (1, 2, "pp2"), (3, 2, "tp3xpp2")]
)
def test_plans_are_named_by_their_shape(tensor: int, pipeline: int, name: str) -> None:
    assert tensor_pipeline(make_shape(), tensor, pipeline).name == name


def test_a_card_without_a_place_is_an_error_that_says_so() -> None:
    plan = tensor_pipeline(make_shape(), 2, 1)
    with pytest.raises(PlanError, match=r"tp2 gives card 2 nothing; it uses \(0, 1\)"):
        plan.place(2)


def test_plans_are_equal_by_value() -> None:
    shape = SHAPES["smollm2"]
    assert tensor_pipeline(shape, 3, 2) == tensor_pipeline(shape, 3, 2)
    assert hash(tensor_pipeline(shape, 3, 2)) == hash(tensor_pipeline(shape, 3, 2))
    assert tensor_pipeline(shape, 3, 2) != tensor_pipeline(shape, 2, 3)


def test_kv_heads_of_a_card_without_heads_are_none() -> None:
    nothing = Share(0, 0)
    share = CardShare(0, Share(9, 9), nothing, nothing, nothing, nothing)
    assert share.kv_heads(3) == nothing


# --- replicas ----------------------------------------------------------------------------


def test_replicas_are_the_same_plan_on_cards_of_their_own() -> None:
    shape = make_shape(layers=4)
    one = tensor_pipeline(shape, 2, 2)
    plan = side_by_side(one, 3)
    assert plan.cards == tuple(range(12)) and plan.parallel
    assert [p.cards for p in plan.replicas] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert [plan.replica_of(card) for card in (0, 3, 4, 11, 12)] == [0, 0, 1, 2, None]
    for number, replica in enumerate(plan.replicas):
        assert on_cards(replica, [0] * 4 * number + [0, 1, 2, 3]) == one
    assert side_by_side(one, 1) == FleetPlan.of(one) and not side_by_side(one, 1).parallel
    check_fleet_plan(shape, plan, 12)


def test_replicas_may_differ_and_leave_cards_idle() -> None:
    shape = make_shape(layers=4)
    big, small = tensor_pipeline(shape, 2, 2), tensor_pipeline(shape, 1, 1)
    plan = FleetPlan("mixed", (on_cards(big, [7, 0, 3, 4]), on_cards(small, [2])))
    check_fleet_plan(shape, plan, 8)
    assert plan.cards == (7, 0, 3, 4, 2)


def test_fleet_plans_that_cannot_be_are_refused() -> None:
    shape = make_shape(layers=4)
    one = tensor_pipeline(shape, 2, 1)
    for plan, message in (
        (FleetPlan("none", ()), "plan none has no replicas"),
        (FleetPlan("same", (one, on_cards(one, [1, 2]))), "replicas share cards"),
        (FleetPlan("far", (one, on_cards(one, [2, 4]))), "uses card 4, the fleet has cards 0 to 3"),
        (FleetPlan("below", (on_cards(one, [-1, 0]),)), "uses card -1"),
        (FleetPlan.of(tensor_pipeline(make_shape(layers=3), 2, 1)), "the model 4"),
    ):
        with pytest.raises(PlanError, match=message):
            check_fleet_plan(shape, plan, 4)
