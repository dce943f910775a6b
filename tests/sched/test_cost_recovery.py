# SPDX-License-Identifier: Apache-2.0
"""What a lost card costs, part by part, and where weights are that a plan wants."""

from __future__ import annotations

import attrs
import pytest

from spanker.errors import PlanError
from spanker.sched import cost
from spanker.sched.bandwidth import NATIVE, REV_A
from spanker.sched.cost import RecoveryCost, Weights, sources
from spanker.sched.limits import step_limits
from spanker.sched.plan import Plan, on_cards, tensor_pipeline
from spanker.sched.planner import make_plan
from spanker.sched.shapes import Dimensions, named_shape, shape_of
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
    settings: dict[str, object] = {"lost": (2,), "profile": REV_A, "positions": (148,), **options}
    return cost.recovery(SHAPE, before, after=after, topology=FOUR, limits=LIMITS, **settings)  # type: ignore[arg-type]


def test_parts_add_up_and_weights_take_what_the_host_link_does() -> None:
    found = recovery()
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


def test_another_replica_has_everything_but_the_keys_and_values() -> None:
    plan = make_plan("dp2xtp2", SHAPE, 4)
    first, second = plan.replicas
    handed = recovery(first, second, lost=(0,), weights=Weights.HELD)
    assert (handed.weights_s, handed.programs_s) == (0.0, 0.0)
    assert handed.replan_s < 0.01
    # Nothing of it is left to be freed.
    assert recovery(first, second, lost=(0, 1), weights=Weights.HELD).replan_s == 0
    busy = recovery(first, second, lost=(0,), weights=Weights.HELD, serving=(300, 300))
    assert handed.kv_s < busy.kv_s < handed.kv_s * 1.1


def test_without_a_host_link_only_computing_takes_time() -> None:
    found = recovery(profile=NATIVE)
    assert found.detection_s == found.replan_s == 0
    assert found.kv_s == found.seconds > 0


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="uses card 2, which is lost"):
        recovery(after=TP4)
    with pytest.raises(PlanError, match="at least 1 token"):
        recovery(positions=())


# --- where weights are --------------------------------------------------------------------


def test_what_a_lost_card_alone_had_comes_from_the_host() -> None:
    found = sources(SHAPE, (TP4,), (0, 1, 3), TP3)
    from_host, moved = sum(found.from_host.values()), sum(found.moved.values())
    # A quarter of the rows; two cards hold KV heads twice then.
    assert from_host == pytest.approx(WEIGHTS / 4, rel=0.03)
    assert found.kept + from_host + moved == pytest.approx(WEIGHTS, rel=0.02)
    assert all(2 not in ends for ends in found.moved)
    peers = recovery(weights=Weights.PEERS)
    assert peers.weights_s == pytest.approx(from_host / 100e6)
    assert attrs.evolve(peers, weights_s=0) == attrs.evolve(recovery(), weights_s=0)


def test_a_replica_is_filled_from_its_like() -> None:
    first, second = make_plan("dp2xtp2", SHAPE, 4).replicas
    alone = on_cards(tensor_pipeline(SHAPE, 1, 1), (1,))
    found = sources(SHAPE, (first, second), (1, 2, 3), alone)
    assert found.from_host == {}
    assert list(found.moved) == [(2, 1)]
    assert found.moved[2, 1] == pytest.approx(WEIGHTS / 2, rel=0.01)
    peers = recovery(first, alone, lost=(0,), weights=Weights.PEERS, others=(second,))
    assert peers.weights_s == pytest.approx(found.moved[2, 1] / 500e6, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_plan_wants_nothing(tied: bool) -> None:
    shape = shape_of(Dimensions(3, 576, 9, 3, 1536, 4096, 512, tied=tied))
    for tensor, pipeline in ((1, 1), (3, 1), (1, 3), (2, 2)):
        plan = tensor_pipeline(shape, tensor, pipeline)
        found = sources(shape, (plan,), plan.cards, plan)
        assert found.kept > 0 and found.moved == {} and found.from_host == {}


def test_what_several_hold_each_brings_a_part_of() -> None:
    shape = shape_of(Dimensions(2, 512, 8, 8, 1536, 4096, 512))
    plans = make_plan("dp3", shape, 3).replicas
    new = on_cards(plans[0], (3,))
    found = sources(shape, plans, (0, 1, 2, 3), new)
    parts = list(found.moved.values())
    assert set(found.moved) == {(0, 3), (1, 3), (2, 3)} and found.kept == 0
    assert parts[0] == parts[1] == parts[2] == pytest.approx(sum(parts) / 3)
