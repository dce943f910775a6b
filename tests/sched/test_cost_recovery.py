# SPDX-License-Identifier: Apache-2.0
"""What a lost card costs, part by part, and what weights do that come from other cards."""

from __future__ import annotations

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched import cost
from spanker.sched.bandwidth import NATIVE, REV_A
from spanker.sched.cost import RecoveryCost, Weights, resharding
from spanker.sched.limits import step_limits
from spanker.sched.plan import Plan, on_cards, tensor_pipeline
from spanker.sched.planner import make_plan
from spanker.sched.resharding import Holdings
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology

SHAPE = named_shape("tinyllama")
LIMITS = attrs.evolve(step_limits(SHAPE), kv_pages=32)
FOUR = Topology.with_mock(4)
TP4, TP3 = tensor_pipeline(SHAPE, 4, 1), on_cards(tensor_pipeline(SHAPE, 3, 1), (0, 1, 3))
WEIGHTS = (
    sum(layer.weight_bytes for layer in SHAPE.layers)
    + 2 * SHAPE.output.rows * SHAPE.output.row_bytes
)


def recovery(before: Plan = TP4, after: Plan = TP3, **options: object) -> RecoveryCost:
    settings: dict[str, object] = {"lost": (2,), "profile": REV_A, "positions": (148,)}
    settings |= {"limits": LIMITS, **options}
    return cost.recovery(SHAPE, before, after=after, topology=FOUR, **settings)  # type: ignore[arg-type]


def test_parts_add_up_and_weights_take_what_the_host_link_does() -> None:
    found = recovery(weights=Weights.HOST)
    assert found.seconds == pytest.approx(
        found.detection_s + found.release_s + found.weights_s + found.programs_s + found.kv_s
    )
    assert found.replan_s == pytest.approx(found.seconds - found.detection_s - found.kv_s)
    assert found.weights_s == pytest.approx(WEIGHTS / 100e6, rel=0.02)
    # Three messages on their way, one after the other.
    assert found.detection_s == pytest.approx(3 * REV_A.host_link_latency_s, rel=0.05)
    again = cost.prefill(SHAPE, TP3, REV_A, FOUR.among((0, 1, 3)), tokens=148, chunk=512)
    assert found.kv_s == again.seconds


def test_a_hung_card_is_noticed_one_look_after_the_timeout() -> None:
    gone = recovery()
    for timeout_s, look_s in ((10.0, 1.0), (2.0, 0.5), (60.0, 6.0)):
        hung = recovery(hang_timeout_s=timeout_s)
        assert hung.detection_s == pytest.approx(timeout_s + look_s, rel=0.02)
        assert attrs.evolve(hung, detection_s=gone.detection_s) == gone


def test_sequences_are_computed_again_together() -> None:
    one, both = recovery(positions=(148,)), recovery(positions=(148, 60))
    joined = cost.prefill_unlike(
        SHAPE, TP3, REV_A, FOUR.among((0, 1, 3)), lengths=(148, 60), chunk=512
    )
    assert both.kv_s == joined.seconds and joined.tokens == 208 and joined.steps == 1
    assert both.kv_s > one.kv_s
    assert both.replan_s == one.replan_s


def test_equal_prompts_cost_what_a_prefill_does() -> None:
    for tokens, batch, chunk in ((40, 3, 16), (7, 64, 512), (513, 1, 512)):
        plain = cost.prefill(SHAPE, TP4, REV_A, FOUR, tokens=tokens, chunk=chunk, batch=batch)
        unlike = cost.prefill_unlike(
            SHAPE, TP4, REV_A, FOUR, lengths=(tokens,) * batch, chunk=chunk
        )
        assert plain == unlike


def test_with_copies_one_step_is_computed_and_pages_move_beside_the_weights() -> None:
    copied = attrs.evolve(LIMITS, kv_copies=1)
    plain, kept = recovery(), recovery(limits=copied)
    step = cost.prefill_unlike(
        SHAPE,
        TP3,
        REV_A,
        FOUR.among((0, 1, 3)),
        lengths=(148,),
        computed=(147,),
        chunk=512,
        kv_copies=1,
    )
    assert (step.tokens, step.steps) == (1, 1)
    assert kept.kv_s == step.seconds < plain.kv_s / 50
    # Some megabytes, while the host brings a hundred.
    assert plain.weights_s < kept.weights_s < plain.weights_s + 0.02
    # Where all come from the host, or a card and its keeper are gone, nothing is left of it.
    for gone in (
        recovery(limits=copied, weights=Weights.HOST),
        recovery(limits=copied, lost=(2, 3), after=on_cards(tensor_pipeline(SHAPE, 2, 1), (0, 1))),
    ):
        assert gone.kv_s > plain.kv_s


def test_kv_heads_that_two_cards_have_are_as_good_as_copies() -> None:
    before = tensor_pipeline(SHAPE, 8, 1)
    after = on_cards(tensor_pipeline(SHAPE, 7, 1), (0, 1, 2, 3, 4, 6, 7))
    found = cost.recovery(
        SHAPE, before, (5,), after, REV_A, Topology.with_mock(8), LIMITS, positions=(148, 20)
    )
    two = [
        cost.prefill_unlike(
            SHAPE, after, REV_A, Topology.with_mock(8), lengths=(148, 20), computed=done, chunk=512
        ).seconds
        for done in ((147, 19), (0, 0))
    ]
    assert found.kv_s == two[0] < two[1] / 10


def test_what_is_computed_is_less_than_the_prompt() -> None:
    for done in ((148,), (-1,)):
        with pytest.raises(PlanError, match="cannot be computed"):
            cost.prefill_unlike(SHAPE, TP4, REV_A, FOUR, lengths=(148,), computed=done, chunk=512)


def test_another_replica_has_everything_but_the_keys_and_values() -> None:
    plan = make_plan("dp2xtp2", SHAPE, 4)
    first, second = plan.replicas
    handed = recovery(first, second, lost=(0,), weights=Weights.HELD)
    assert (handed.weights_s, handed.programs_s) == (0.0, 0.0)
    # Nor do its sequences wait until what is left of it has been freed.
    assert handed.replan_s == 0
    busy = recovery(first, second, lost=(0,), weights=Weights.HELD, serving=(300, 300))
    assert handed.kv_s < busy.kv_s < handed.kv_s * 1.1


def test_without_a_host_link_only_the_cards_take_time() -> None:
    found = recovery(profile=NATIVE)
    assert found.detection_s == found.release_s == found.programs_s == 0
    # They copy and send.
    assert 0 < found.weights_s == found.replan_s < 0.1
    assert recovery(profile=NATIVE, weights=Weights.HOST).replan_s == 0 < found.kv_s


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="uses card 2, which is lost"):
        recovery(after=TP4)
    with pytest.raises(PlanError, match="at least 1 token"):
        recovery(positions=())


# --- weights of other cards ---------------------------------------------------------------


def test_the_host_link_brings_what_the_lost_card_had_and_the_embedding() -> None:
    found = resharding(SHAPE, Holdings.of(TP4, (), (0, 1, 3)), TP3, REV_A, FOUR, LIMITS)
    table = SHAPE.embedding.rows * SHAPE.embedding.row_bytes
    assert found.from_host == pytest.approx((WEIGHTS - table) / 4 + table, rel=0.03)
    # A quarter stays on each of the three cards, copied; two hold KV heads twice then.
    assert found.copied + found.links + found.from_host == pytest.approx(WEIGHTS, rel=0.02)
    # Cards copy and send beside it.
    assert found.seconds == pytest.approx(found.from_host / 100e6, rel=0.02)
    peers, host = recovery(), recovery(weights=Weights.HOST)
    assert peers.weights_s == pytest.approx(found.seconds)
    assert peers.release_s < host.release_s
    assert (peers.detection_s, peers.programs_s, peers.kv_s) == (
        host.detection_s,
        host.programs_s,
        host.kv_s,
    )


def test_with_audits_what_a_card_does_not_hold_comes_from_the_host() -> None:
    held = Holdings.of(TP4, (), (0, 1, 3))
    found = resharding(SHAPE, held, TP3, REV_A, FOUR, LIMITS, from_peers=False)
    assert found.links == 0 < found.copied
    assert found.copied + found.from_host == pytest.approx(WEIGHTS, rel=0.02)
    peers, own, host = (recovery(weights=w) for w in (Weights.PEERS, Weights.OWN, Weights.HOST))
    assert own.weights_s == pytest.approx(found.seconds)
    assert peers.weights_s < own.weights_s < host.weights_s


def test_a_replica_is_filled_from_its_like() -> None:
    first, second = make_plan("dp2xtp2", SHAPE, 4).replicas
    alone = on_cards(tensor_pipeline(SHAPE, 1, 1), (1,))
    found = resharding(SHAPE, Holdings.of(first, (second,), (1, 2, 3)), alone, REV_A, FOUR, LIMITS)
    table = SHAPE.embedding.rows * SHAPE.embedding.row_bytes
    assert found.links == pytest.approx((WEIGHTS - table) / 2, rel=0.01)
    assert found.from_host == pytest.approx(table, rel=0.01)
    peers = recovery(first, alone, lost=(0,), others=(second,))
    assert peers.weights_s == pytest.approx(found.seconds)
    # Not shorter than the host takes beside one round, and the links for the others.
    assert table / 100e6 + 0.8 * found.links / 500e6 < found.seconds < WEIGHTS / 2 / 100e6


def test_what_is_kept_takes_no_time() -> None:
    found = resharding(SHAPE, Holdings.of(TP4, (), TP4.cards), TP4, REV_A, FOUR, LIMITS)
    assert (found.from_host, found.links, found.copied) == (0, 0, 0)
    assert found.seconds < 0.01


def test_where_there_is_no_room_the_host_brings_more() -> None:
    held = Holdings.of(TP4, (), (0, 1, 3))
    plenty = resharding(SHAPE, held, TP3, REV_A, FOUR, LIMITS)
    tight = resharding(
        SHAPE, held, TP3, REV_A, FOUR, LIMITS, room={0: 1 << 20, 1: 1 << 40, 3: 1 << 40}
    )
    assert tight.from_host > plenty.from_host and tight.copied < plenty.copied
    assert tight.seconds > plenty.seconds


def test_cards_that_are_not_linked_bring_nothing() -> None:
    held = Holdings.of(TP4, (), (0, 1, 3))
    apart = resharding(SHAPE, held, TP3, REV_A, Topology.of_pairs(4, []), LIMITS)
    linked = resharding(SHAPE, held, TP3, REV_A, FOUR, LIMITS)
    assert apart.links == 0
    assert apart.from_host == linked.from_host + linked.links
