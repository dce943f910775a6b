# SPDX-License-Identifier: Apache-2.0
"""Whole steps by the cost model: decoding and prompts, against sums made by hand."""

from __future__ import annotations

import math

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched import cost
from spanker.sched.bandwidth import NATIVE, REV_A, CardSpeed, Profile
from spanker.sched.cost import Bound, Machine, Pieces, StepRows
from spanker.sched.plan import FleetPlan, Plan, tensor_pipeline
from spanker.sched.shapes import Dimensions, named_shape, shape_of
from spanker.sched.topology import Topology

LAYERS = 3
# A row of 256 floats; 8 heads of 32 on 2 KV heads, an FFN of 512, 4 chunks of logits.
SHAPE = shape_of(
    Dimensions(layers=LAYERS, hidden=256, heads=8, kv_heads=2, ffn=512, vocabulary=1024, context=64)
)
# Nothing takes any time.
FREE = Profile("free", math.inf, math.inf, None, 0.0)
COMMANDS = attrs.evolve(FREE, command_s=1.0)
# Of a layer: attention 10, its output 1, add and FFN 7, ffn_down 1; between layers an add.
LAYER_COMMANDS = LAYERS * (10 + 1 + 7 + 1) + (LAYERS - 1)
# EMBED; the last add and the output; CHOOSE.
OTHER_COMMANDS = 1 + (1 + 7) + 1


def decode(plan: Plan, profile: Profile, **options: object) -> cost.StepCost:
    topology = Topology.with_mock(len(plan.cards))
    return cost.decode(SHAPE, plan, profile, topology, context=10, **options)  # type: ignore[arg-type]


# --- decoding ----------------------------------------------------------------------------


def test_commands_of_a_step_are_counted() -> None:
    alone = decode(tensor_pipeline(SHAPE, 1, 1), COMMANDS)
    assert alone.cards_s == LAYER_COMMANDS + OTHER_COMMANDS
    # Four exchanges a layer, one for the embedding and one for the choice.
    two = decode(tensor_pipeline(SHAPE, 2, 1), COMMANDS)
    assert two.cards_s == LAYER_COMMANDS + OTHER_COMMANDS + 4 * LAYERS + 2
    # The first layer of the second stage adds nothing, the first stage adds before its handover;
    # the handover and the choice are exchanges.
    stages = decode(tensor_pipeline(SHAPE, 1, 2), COMMANDS)
    assert stages.cards_s == LAYER_COMMANDS + OTHER_COMMANDS + 2


def test_bytes_over_the_links_are_counted() -> None:
    profile = attrs.evolve(FREE, intercard_bytes_per_s=1.0)
    two = decode(tensor_pipeline(SHAPE, 2, 1), profile)
    layer = 128 // 32 * 34 + 128 * 4 + 256 // 32 * 34 + 128 * 4
    assert two.cards_s == 128 * 4 + LAYERS * layer + 8
    stages = decode(tensor_pipeline(SHAPE, 1, 3), profile)
    assert stages.cards_s == 2 * 256 * 4 + 8


def test_latencies_are_counted() -> None:
    profile = attrs.evolve(FREE, intercard_latency_s=1.0)
    assert decode(tensor_pipeline(SHAPE, 2, 1), profile).cards_s == 1 + 4 * LAYERS + 1
    assert decode(tensor_pipeline(SHAPE, 1, 3), profile).cards_s == 2 + 1


def test_a_step_is_taken_up_once_whatever_the_stages() -> None:
    profile = attrs.evolve(FREE, step_s=1.0)
    for tensor, pipeline in ((1, 1), (2, 1), (1, 3)):
        assert decode(tensor_pipeline(SHAPE, tensor, pipeline), profile).cards_s == 1.0


def test_the_slowest_card_of_a_stage_counts() -> None:
    slow = attrs.evolve(NATIVE, cards=(CardSpeed(1, 0.5, 0.5),))
    plan = tensor_pipeline(SHAPE, 2, 1)
    every = attrs.evolve(slow, cards=(CardSpeed(0, 0.5, 0.5), CardSpeed(1, 0.5, 0.5)))
    assert decode(plan, slow).seconds == pytest.approx(decode(plan, every).seconds)
    assert decode(plan, slow).seconds > decode(plan, NATIVE).seconds


def test_a_price_is_the_sum_of_its_pieces() -> None:
    """What a planner may count on."""
    plan, context, batch = tensor_pipeline(SHAPE, 3, 2), 10, 2
    profile = attrs.evolve(REV_A, cards=(CardSpeed(1, 0.5, 1.0), CardSpeed(5, 1.0, 0.3)))
    machine = Machine(profile, Topology.with_mock(6))
    p = Pieces(SHAPE, machine, StepRows.decode(batch, context))
    total = profile.step_s
    for number, stage in enumerate(plan.stages):
        shares, cards = stage.shares, stage.cards
        exchange_s = p.exchange_s(len(cards))

        def gathered(nbytes: list[float], cards: tuple[int, ...] = cards) -> float:
            return p.exchange_s(len(cards)) + p.machine.gather(cards, nbytes).seconds

        if number == 0:
            total += max(p.embed(s.card, s.columns) for s in shares)
            total += gathered([p.embed_gather(s.columns) for s in shares])
        for index in range(stage.layers.start, stage.layers.stop):
            layer = SHAPE.layers[index]
            add = 0.0 if index == stage.layers.start else 1.0
            total += max(
                add * p.add(s.card) + p.attention(s.card, layer, s.heads, True) for s in shares
            )
            total += gathered([p.attention_gather(s.heads, True) for s in shares])
            total += max(p.project(s.card, layer.attn_output, s.hidden.size, False) for s in shares)
            total += gathered([p.project_gather(s.hidden.size) for s in shares])
            total += max(p.add(s.card) + p.ffn(s.card, layer, s.ffn, True) for s in shares)
            total += gathered([p.ffn_gather(s.ffn, True) for s in shares])
            total += max(p.project(s.card, layer.ffn_down, s.hidden.size, False) for s in shares)
            total += gathered([p.project_gather(s.hidden.size) for s in shares])
        total += max(p.add(s.card) + p.output(s.card, s.vocabulary, 64) for s in shares)
        assert exchange_s == profile.command_s
    total += p.handover(plan.stages[0].cards, plan.stages[1].cards).seconds
    total += p.choose(plan.voters, plan.embedders)
    assert decode(plan, profile, batch=batch).cards_s == pytest.approx(total, rel=1e-12)


def test_what_time_is_spent_on_adds_up() -> None:
    for profile in (REV_A, NATIVE, attrs.evolve(NATIVE, cores=1)):
        for plan in (tensor_pipeline(SHAPE, 2, 1), tensor_pipeline(SHAPE, 1, 3)):
            found = decode(plan, profile)
            assert sum(found.spent.values()) == pytest.approx(found.seconds)
            assert sum(found.shares.values()) == pytest.approx(1.0)
            assert found.shares[found.bound] == max(found.shares.values())


@pytest.mark.parametrize(
    ("slow", "bound"),
    [
        ({"local_ddr_bytes_per_s": 1e3}, Bound.MEMORY),
        ({"int8_madds_per_s": 1e3}, Bound.ARITHMETIC),
        ({"float_madds_per_s": 1e1}, Bound.ARITHMETIC),
        ({"elements_per_s": 1e2}, Bound.ELEMENTS),
        ({"command_s": 10.0}, Bound.COMMANDS),
        ({"step_s": 1e4}, Bound.COMMANDS),
        ({"intercard_bytes_per_s": 1e1}, Bound.LINKS),
        ({"intercard_latency_s": 1e2}, Bound.LINKS),
        ({"port_bytes_per_s": 1e1}, Bound.LINKS),
        ({"host_link_bytes_per_s": 1e1}, Bound.HOST_LINK),
    ],
)
def test_what_is_slow_is_what_bounds(slow: dict[str, float], bound: Bound) -> None:
    profile = attrs.evolve(NATIVE, **slow)  # type: ignore[arg-type]
    assert decode(tensor_pipeline(SHAPE, 2, 1), profile).bound is bound


def test_a_far_host_is_hidden_by_two_steps_ahead() -> None:
    """Its round trip of two seconds counts for two steps."""
    profile = attrs.evolve(FREE, host_link_bytes_per_s=1e30, host_link_latency_s=1.0)
    plan = tensor_pipeline(SHAPE, 2, 1)
    far = decode(plan, profile)
    assert (far.seconds, far.bound) == (pytest.approx(1.0), Bound.HOST_LINK)
    assert decode(plan, attrs.evolve(profile, step_s=0.5)).seconds == pytest.approx(1.25)
    assert decode(plan, attrs.evolve(profile, step_s=3.0)).seconds == pytest.approx(3.0)


def test_sampling_makes_steps_one_by_one() -> None:
    profile = attrs.evolve(
        FREE, host_link_bytes_per_s=1e30, host_link_latency_s=1.0, step_s=0.5, host_step_s=4.0
    )
    found = decode(tensor_pipeline(SHAPE, 2, 1), profile, sampling=True)
    assert found.seconds == pytest.approx(1 + 0.5 + 1 + 4)
    assert found.bound is Bound.HOST_WORK
    assert found.spent[Bound.HOST_LINK] == pytest.approx(2.0)


def test_a_batch_has_so_many_tokens_a_step() -> None:
    plan = tensor_pipeline(SHAPE, 2, 1)
    one, eight = decode(plan, REV_A), decode(plan, REV_A, batch=8)
    assert eight.tokens_per_second == 8 / eight.seconds
    assert one.seconds < eight.seconds < 8 * one.seconds


def test_around_missing_links_there_are_exchanges_more() -> None:
    plan = tensor_pipeline(SHAPE, 4, 1)
    mesh = cost.decode(SHAPE, plan, REV_A, Topology.with_mock(4), context=10)
    ring = cost.decode(SHAPE, plan, REV_A, Topology.ring(4), context=10)
    apart = cost.decode(SHAPE, plan, REV_A, Topology.of_pairs(4, []), context=10)
    # One for each of 4 gathers a layer, for the embedding's and the choice.
    more, taken = 4 * LAYERS + 2, ring.cards_s - mesh.cards_s
    exchange_s = REV_A.command_s + REV_A.intercard_latency_s
    assert more * exchange_s < taken < more * 2 * exchange_s
    commands_s = ring.spent[Bound.COMMANDS] - mesh.spent[Bound.COMMANDS]
    assert commands_s == pytest.approx(more * REV_A.command_s)
    # Where no card leads on, two latencies of the host's.
    assert apart.cards_s - mesh.cards_s > more * REV_A.host_link_latency_s


def test_missing_links_that_none_leads_around_are_relayed_and_cost_it() -> None:
    line = Topology.line(3)
    stages = tensor_pipeline(SHAPE, 1, 3)
    found = cost.decode(SHAPE, stages, REV_A, line, context=10)
    direct = cost.decode(SHAPE, stages, REV_A, Topology.with_mock(3), context=10)
    # Only the choice has no link.
    relay_s = 2 * ((8 + 67) / 100e6 + REV_A.host_link_latency_s)
    assert found.cards_s - direct.cards_s == pytest.approx(relay_s - (8 / 500e6 + 2e-6), rel=1e-3)


def test_plans_that_do_not_fit_are_errors() -> None:
    plan = tensor_pipeline(SHAPE, 2, 1)
    with pytest.raises(PlanError, match="uses card 1"):
        cost.decode(SHAPE, plan, REV_A, Topology.with_mock(1), context=10)
    with pytest.raises(PlanError):
        cost.decode(named_shape("tinyllama"), plan, REV_A, Topology.with_mock(2), context=10)
    with pytest.raises(PlanError, match="at least 1"):
        cost.decode(SHAPE, plan, REV_A, Topology.with_mock(2), context=0)


# --- replicas ----------------------------------------------------------------------------


def replicas(count: int) -> FleetPlan:
    plans = []
    for number in range(count):
        plan = tensor_pipeline(SHAPE, 1, 1)
        stage = plan.stages[0]
        share = attrs.evolve(stage.shares[0], card=number)
        plans.append(attrs.evolve(plan, stages=(attrs.evolve(stage, shares=(share,)),)))
    return FleetPlan(f"dp{count}", tuple(plans))


def test_replicas_make_their_parts_side_by_side() -> None:
    topology = Topology.with_mock(3)
    fleet = cost.decode_fleet(SHAPE, replicas(3), REV_A, topology, batch=7, context=10)
    alone = [
        cost.decode(SHAPE, tensor_pipeline(SHAPE, 1, 1), REV_A, topology, batch=n, context=10)
        for n in (3, 2, 2)
    ]
    assert fleet.replicas == tuple(alone)
    assert fleet.tokens_per_second == sum(c.tokens_per_second for c in alone)
    assert fleet.bound is alone[0].bound


def test_a_replica_without_sequences_is_idle() -> None:
    fleet = cost.decode_fleet(SHAPE, replicas(3), REV_A, Topology.with_mock(3), batch=2, context=10)
    assert fleet.replicas[2] is None
    assert fleet.tokens_per_second > 0


def test_replicas_share_the_host_link() -> None:
    """What one of them takes half of, four cannot have."""
    topology, plan = Topology.with_mock(4), replicas(4)
    alone = cost.decode(SHAPE, plan.replicas[0], NATIVE, topology, context=10)
    busiest = max(alone.bytes_to_cards, alone.bytes_to_host)
    profile = attrs.evolve(NATIVE, host_link_bytes_per_s=2 * busiest / alone.seconds)
    fleet = cost.decode_fleet(SHAPE, plan, profile, topology, batch=4, context=10)
    assert fleet.bound is Bound.HOST_LINK
    wanted = sum(busiest / c.seconds for c in fleet.replicas if c is not None)
    assert wanted == pytest.approx(profile.host_link_bytes_per_s)


# --- prompts -----------------------------------------------------------------------------


def prefill(plan: Plan, profile: Profile, tokens: int, chunk: int, batch: int = 1) -> float:
    topology = Topology.with_mock(len(plan.cards))
    found = cost.prefill(SHAPE, plan, profile, topology, tokens=tokens, chunk=chunk, batch=batch)
    assert found.tokens_per_second == batch * tokens / found.seconds
    return found.seconds


def test_commands_of_a_prompt_are_counted() -> None:
    one = tensor_pipeline(SHAPE, 1, 1)
    step = LAYER_COMMANDS + OTHER_COMMANDS
    assert prefill(one, COMMANDS, 20, 32) == step
    assert prefill(one, COMMANDS, 33, 16) == 3 * step


def test_chunks_overlap_in_a_pipeline() -> None:
    """Two handovers of a second take each chunk through; the choice of a token takes one more."""
    plan = tensor_pipeline(SHAPE, 1, 3)
    profile = attrs.evolve(FREE, intercard_latency_s=1.0)
    assert prefill(plan, profile, 8, 8) == 2 + 1
    assert prefill(plan, profile, 16, 8) == 2 + 1
    # The third waits until the first is back, and the fourth for the second.
    assert prefill(plan, profile, 24, 8) == 4 + 1
    assert prefill(plan, profile, 32, 8) == 4 + 1


def test_the_host_is_two_chunks_ahead() -> None:
    profile = attrs.evolve(FREE, host_link_bytes_per_s=1e30, host_link_latency_s=1.0)
    one = tensor_pipeline(SHAPE, 1, 1)
    for chunks, seconds in ((1, 2.0), (2, 2.0), (3, 4.0), (4, 4.0), (5, 6.0)):
        assert prefill(one, profile, 8 * chunks, 8) == pytest.approx(seconds)


def test_a_batch_is_one_prompt_after_the_other() -> None:
    one = tensor_pipeline(SHAPE, 1, 1)
    assert prefill(one, COMMANDS, 8, 16, batch=4) == 2 * (LAYER_COMMANDS + OTHER_COMMANDS)
    with pytest.raises(PlanError, match="at least 1"):
        prefill(one, COMMANDS, 8, 16, batch=0)
    with pytest.raises(PlanError, match="at least 1"):
        prefill(one, COMMANDS, 0, 16)


def test_a_prompt_says_what_bounds_it() -> None:
    plan, topology = tensor_pipeline(SHAPE, 2, 1), Topology.with_mock(2)
    found = cost.prefill(SHAPE, plan, REV_A, topology, tokens=40, chunk=16)
    assert found.bound is Bound.ELEMENTS and found.steps == 3
    assert len(found.stages) == 1 and 0 < found.stages[0] < found.seconds
    far = attrs.evolve(REV_A, host_link_latency_s=10.0)
    assert cost.prefill(SHAPE, plan, far, topology, tokens=40, chunk=16).bound is Bound.HOST_LINK
