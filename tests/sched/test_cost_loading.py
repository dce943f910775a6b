# SPDX-License-Identifier: Apache-2.0
"""Loads by the cost model, against sums made by hand."""

from __future__ import annotations

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched import cost
from spanker.sched.bandwidth import NATIVE, REV_A, Profile
from spanker.sched.layout import card_bytes
from spanker.sched.plan import FleetPlan, Limits, ModelShape, Plan, tensor_pipeline
from spanker.sched.shapes import Dimensions, named_shape, shape_of
from spanker.sched.topology import Topology

LIMITS = Limits(
    context=64,
    prompt_chunk=64,
    tokens_max=64,
    outputs_max=64,
    candidates=64,
    kv_pages=1,
    page_positions=64,
)
# 8 MiB of output matrix in messages of 2 MiB; the rest is small.
SHAPE = shape_of(
    Dimensions(layers=1, hidden=1024, heads=8, kv_heads=8, ffn=32, vocabulary=4096, context=64),
    "f16",
)
BYTES = attrs.evolve(REV_A, host_link_bytes_per_s=1e6, host_link_latency_s=0.0)


def moved(plan: Plan, number: int) -> Plan:
    """The same plan on other cards."""
    count = len(plan.cards)
    stages = tuple(
        attrs.evolve(
            stage,
            shares=tuple(attrs.evolve(s, card=s.card + number * count) for s in stage.shares),
        )
        for stage in plan.stages
    )
    return attrs.evolve(plan, stages=stages)


def fleet_of(shape: ModelShape, tensor: int, replicas: int) -> FleetPlan:
    plan = tensor_pipeline(shape, tensor, 1)
    return FleetPlan("dp", tuple(moved(plan, number) for number in range(replicas)))


def load(plan: Plan | FleetPlan, profile: Profile, shape: ModelShape = SHAPE) -> cost.LoadCost:
    return cost.load(shape, plan, profile, Topology.with_mock(len(plan.cards)), LIMITS)


def test_all_weights_go_over_the_host_link() -> None:
    found = load(tensor_pipeline(SHAPE, 1, 1), BYTES)
    weights = sum(layer.weight_bytes for layer in SHAPE.layers)
    weights += 2 * SHAPE.output.rows * SHAPE.output.row_bytes
    # Norms, the table of RoPE, the program and the headers of messages are little beside.
    assert found.seconds == pytest.approx(weights / 1e6, rel=0.01)
    assert found.nbytes[0] == pytest.approx(weights, rel=0.01)
    assert found.from_host_s == found.seconds


def test_cards_share_the_link() -> None:
    plan = tensor_pipeline(SHAPE, 4, 1)
    one, four = load(tensor_pipeline(SHAPE, 1, 1), BYTES), load(plan, BYTES)
    assert four.seconds == pytest.approx(one.seconds, rel=0.02)
    # The FFN's 32 rows are cut nowhere.
    ffn = 32 * (2 * 2048)
    assert four.nbytes[0] - four.nbytes[3] == pytest.approx(ffn, rel=0.05)


def test_a_far_host_is_waited_for_message_by_message() -> None:
    """An embedding of 8 MiB and an output matrix as large, 2 MiB a message, and 8 MiB of layer."""
    far = attrs.evolve(REV_A, host_link_bytes_per_s=1e30, host_link_latency_s=0.5)
    one = load(tensor_pipeline(SHAPE, 1, 1), far)
    # Counters three times, an allocation, a program.  Of messages: RoPE's table, four quarters of
    # the embedding, two norms, q, k, v and the attention output, the FFN with the last norm, and
    # four quarters of the output matrix.
    assert one.seconds == pytest.approx(3 + 1 + 1 + (1 + 4 + 1 + 4 + 1 + 4))
    # Two cards are sent half of it each, at the same time.
    two = load(tensor_pipeline(SHAPE, 2, 1), far)
    assert two.seconds < one.seconds
    assert (one.startup_s, two.startup_s) == (pytest.approx(1.0), pytest.approx(2.0))


def test_without_a_host_link_a_load_takes_no_time() -> None:
    found = load(tensor_pipeline(SHAPE, 2, 1), NATIVE)
    assert (found.seconds, found.startup_s, found.from_host_s) == (0, 0, 0)
    assert min(found.nbytes.values()) > 0


def test_replicas_are_filled_from_card_to_card() -> None:
    one, four = load(fleet_of(SHAPE, 2, 1), BYTES), load(fleet_of(SHAPE, 2, 4), BYTES)
    assert four.from_host_s == pytest.approx(4 * one.seconds, rel=0.01)
    # The links are 500 times as fast: what the copies take is a few per cent, programs included.
    assert one.seconds < four.seconds < 1.1 * one.seconds


def test_copies_take_what_their_links_do() -> None:
    """Links twice as fast as the host's: the chain moves all bytes once more, and its largest
    buffer another time for each further card."""
    slow = attrs.evolve(BYTES, intercard_bytes_per_s=2e6, port_bytes_per_s=None)
    one, two, four = (load(fleet_of(SHAPE, 1, n), slow).seconds for n in (1, 2, 4))
    weights = one * 1e6
    assert two - one == pytest.approx(weights / 2e6, rel=0.05)
    largest = SHAPE.output.rows * SHAPE.output.row_bytes
    assert four - two == pytest.approx(2 * largest / 2e6, rel=0.1)


def test_replicas_behind_slow_links_come_from_the_host() -> None:
    slow = attrs.evolve(BYTES, intercard_bytes_per_s=0.5e6)
    found = load(fleet_of(SHAPE, 1, 3), slow)
    assert found.seconds == found.from_host_s


def test_replicas_in_a_fleet_without_some_link_come_from_the_host() -> None:
    found = cost.load(SHAPE, fleet_of(SHAPE, 1, 3), BYTES, Topology.line(3), LIMITS)
    assert found.seconds == found.from_host_s


def test_replicas_that_are_not_alike_come_from_the_host() -> None:
    pair, single = tensor_pipeline(SHAPE, 2, 1), moved(tensor_pipeline(SHAPE, 1, 1), 2)
    found = load(FleetPlan("dp", (pair, single)), BYTES)
    assert found.seconds == found.from_host_s


def test_memory_is_that_of_the_layout() -> None:
    plan = tensor_pipeline(SHAPE, 3, 1)
    expected = {card: card_bytes(SHAPE, plan, card, LIMITS) for card in plan.cards}
    assert cost.memory(SHAPE, plan, LIMITS) == expected
    fleet = cost.memory(SHAPE, fleet_of(SHAPE, 3, 2), LIMITS)
    assert [fleet[card] for card in range(6)] == 2 * [expected[card] for card in range(3)]


def test_plans_that_do_not_fit_are_errors() -> None:
    with pytest.raises(PlanError, match="uses card 1"):
        cost.load(SHAPE, tensor_pipeline(SHAPE, 2, 1), REV_A, Topology.with_mock(1), LIMITS)
    with pytest.raises(PlanError):
        load(tensor_pipeline(SHAPE, 2, 1), REV_A, named_shape("tinyllama"))
