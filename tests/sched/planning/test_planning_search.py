# SPDX-License-Identifier: Apache-2.0
"""What every outcome must be: plans that compute the model, fit, and cost what is said."""

from __future__ import annotations

import random

import attrs
import pytest
from planning_reference import (
    LIMITS,
    QUICK_LINKS,
    SLOW,
    connected_graphs,
    fits,
    mixed_layers,
    priced,
    request_for,
    tiny,
)

from spanker.errors import CardMemoryError, PlanError
from spanker.sched.bandwidth import NATIVE, REV_A, REV_B, CardSpeed, LinkSpeed
from spanker.sched.cost import Machine, StepRows, decode
from spanker.sched.layout import card_bytes
from spanker.sched.plan import (
    LayerShape,
    Limits,
    ModelShape,
    check_plan,
    tensor_pipeline,
)
from spanker.sched.planning import Request, search
from spanker.sched.planning.options import Options
from spanker.sched.planning.pools import Pool, classes
from spanker.sched.planning.stages import Stages
from spanker.sched.shapes import named_shape, weight
from spanker.sched.topology import Topology

GIB = 1 << 30
LONG = Limits(
    context=2048,
    prompt_chunk=64,
    tokens_max=64,
    outputs_max=8,
    candidates=64,
    kv_pages=32,
    page_positions=64,
)


def like_q4_k_m(shape: ModelShape) -> ModelShape:
    """Some layers with q6_k in attn_v and ffn_down, the others q4_k throughout, as in files of
    mixed precision."""

    def layer(i: int, of: LayerShape) -> LayerShape:
        if i % 3:
            return of
        v, down = of.attn_v, of.ffn_down
        return attrs.evolve(
            of,
            attn_v=weight(v.name, v.rows, v.k, "q6_k"),
            ffn_down=weight(down.name, down.rows, down.k, "q6_k"),
        )

    return attrs.evolve(shape, layers=tuple(layer(i, x) for i, x in enumerate(shape.layers)))


REQUESTS = {
    "one card": request_for(tiny(), SLOW, Topology.with_mock(1)),
    "a straggler": request_for(
        tiny(), attrs.evolve(SLOW, cards=(CardSpeed(1, 0.5, 0.5),)), Topology.with_mock(3), batch=3
    ),
    "a slow link": request_for(
        tiny(layers=3), attrs.evolve(SLOW, links=(LinkSpeed(0, 1, 1e5, 1e-3),)), Topology.ring(4)
    ),
    "kinds of layers": request_for(mixed_layers(tiny(layers=4)), SLOW, Topology.with_mock(4)),
    "many classes": request_for(
        tiny(layers=4),
        attrs.evolve(SLOW, cards=tuple(CardSpeed(c, 1 + c / 10) for c in range(10))),
        Topology.with_mock(10),
    ),
    "many replicas": request_for(tiny(), SLOW, Topology.with_mock(7), batch=9),
    "emulated": request_for(
        tiny(), attrs.evolve(NATIVE, cores=2, shared_bytes_per_s=2e10), Topology.with_mock(4)
    ),
    "tinyllama": Request(
        named_shape("tinyllama"), REV_A, Topology.with_mock(6), (GIB,) * 6, LONG, batch=4
    ),
    "mixed precision": Request(
        like_q4_k_m(named_shape("mistral-7b", "q4_k", "q6_k")),
        REV_B,
        Topology.with_mock(8),
        (2 * GIB,) * 8,
        LONG,
    ),
    "uneven memory": Request(
        named_shape("tinyllama"),
        REV_A,
        Topology.with_mock(3),
        (GIB // 4, GIB // 2, GIB // 2),
        LONG,
    ),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_candidates_compute_the_model_fit_and_are_sorted(request_: Request) -> None:
    outcome = search(request_)
    assert outcome.request is request_
    assert outcome.chosen is outcome.candidates[0]
    for candidate in outcome.candidates:
        assert len(set(candidate.plan.cards)) == len(candidate.plan.cards)
        for replica in candidate.plan.replicas:
            check_plan(request_.shape, replica)
        assert fits(request_, candidate.plan)
        assert candidate.tokens_per_second == priced(request_, candidate.plan)
    rates = [candidate.tokens_per_second for candidate in outcome.candidates]
    assert rates == sorted(rates, reverse=True)
    # Plans that differ in nothing that shows are listed once.
    shown = {
        (c.plan.name, len(c.plan.cards), f"{c.tokens_per_second:.9g}") for c in outcome.candidates
    }
    assert len(shown) == len(outcome.candidates)
    assert outcome.gap >= 0 and outcome.exact == (outcome.gap == 0)
    assert outcome.reason == outcome.chosen.plan.reason


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_same_request_has_the_same_outcome(request_: Request) -> None:
    once, again = search(request_), search(request_)
    assert attrs.evolve(once, search_s=0.0) == attrs.evolve(again, search_s=0.0)


def test_the_gap_does_not_depend_on_how_many_are_kept() -> None:
    for request_ in REQUESTS.values():
        if len(request_.topology.cards) < 5:
            assert search(attrs.evolve(request_, keep=1)).gap == search(request_).gap


# --- rows of stages ------------------------------------------------------------------------


def stages_of(request_: Request) -> Stages:
    machine = Machine(request_.profile, request_.topology)
    groups = classes(machine, request_.free_bytes)
    options = Options(
        request_.shape,
        machine,
        StepRows.decode(request_.batch, request_.position),
        request_.limits_for(request_.batch),
        request_.free_bytes,
        {card: i for i, group in enumerate(groups) for card in group},
    )
    return Stages(Pool(groups), options)


@pytest.mark.parametrize("name", [n for n in REQUESTS if n != "emulated"])
def test_a_row_costs_what_the_cost_model_says(name: str) -> None:
    request_ = REQUESTS[name]
    found = stages_of(request_).rows(50)
    for row in found.rows:
        cost = decode(
            request_.shape,
            row.plan,
            request_.profile,
            request_.topology,
            batch=request_.batch,
            context=request_.position,
            candidates=request_.limits.candidates,
        )
        assert row.seconds + request_.profile.step_s == pytest.approx(cost.cards_s, rel=1e-11)
        assert found.bound <= row.seconds * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_rows_on_any_topology_cost_what_the_cost_model_says(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    n = rng.randint(2, 5)
    shape = rng.choice(
        [tiny(layers=3, head_dim=16, heads=8), tiny(vocabulary=700), mixed_layers(tiny(layers=3))]
    )
    topology = Topology.of_pairs(n, rng.choice(connected_graphs(n)))
    profile = attrs.evolve(rng.choice([SLOW, QUICK_LINKS]), host_link_latency_s=rng.random() * 1e-4)
    request_ = request_for(shape, profile, topology, batch=rng.randint(1, 3))
    for row in stages_of(request_).rows(50).rows:
        cost = decode(
            shape, row.plan, profile, topology, batch=request_.batch, context=100, candidates=16
        )
        assert row.seconds + profile.step_s == pytest.approx(cost.cards_s, rel=1e-11)


def test_a_bound_is_below_the_named_plans_too() -> None:
    request_ = REQUESTS["tinyllama"]
    rate = search(attrs.evolve(request_, batch=1))
    for tensor, pipeline in ((6, 1), (3, 2), (2, 3), (1, 6), (1, 1)):
        plan = tensor_pipeline(request_.shape, tensor, pipeline)
        cost = decode(request_.shape, plan, REV_A, request_.topology, context=512)
        best = rate.chosen.tokens_per_second * (1 + rate.gap)
        assert cost.tokens_per_second <= best * (1 + 1e-9)


# --- what the planner does ------------------------------------------------------------------


def test_sequences_are_dealt_to_replicas_where_links_are_slow() -> None:
    profile = attrs.evolve(SLOW, intercard_bytes_per_s=1e3, port_bytes_per_s=1e3)
    outcome = search(request_for(tiny(), profile, Topology.with_mock(4), batch=4))
    assert outcome.chosen.plan.name == "dp4"


def test_a_card_without_links_is_left_idle() -> None:
    topology = Topology.of_pairs(3, [(0, 1)])
    profile = attrs.evolve(QUICK_LINKS, host_link_latency_s=1.0)
    outcome = search(request_for(tiny(), profile, topology))
    assert set(outcome.chosen.plan.cards) == {0, 1}


def test_a_straggler_gets_less_or_nothing() -> None:
    profile = attrs.evolve(QUICK_LINKS, cards=(CardSpeed(0, 0.01, 0.01),))
    chosen = search(request_for(tiny(), profile, Topology.with_mock(3))).chosen
    for replica in chosen.plan.replicas:
        for stage in replica.stages:
            sizes = {s.card: s.ffn.size for s in stage.shares}
            assert sizes.get(0, 0) == 0


def test_more_candidates_than_words_are_all_of_them() -> None:
    limits = attrs.evolve(LIMITS, candidates=5000)
    request_ = request_for(tiny(vocabulary=512), SLOW, Topology.with_mock(2), limits=limits)
    outcome = search(request_)
    assert outcome.exact


# --- memory -----------------------------------------------------------------------------------


def needs(shape: ModelShape, tensor: int, pipeline: int) -> int:
    """The most that a card needs."""
    request_ = request_for(shape, SLOW, Topology.with_mock(tensor * pipeline))
    plan = tensor_pipeline(shape, tensor, pipeline)
    return max(card_bytes(shape, plan, card, request_.limits_for(1)) for card in plan.cards)


def test_a_pipeline_where_one_card_is_too_small() -> None:
    shape = tiny(layers=8, vocabulary=256)
    # Links so slow that nothing is divided that need not be.
    profile = attrs.evolve(SLOW, intercard_latency_s=1e-2)
    topology = Topology.with_mock(3)
    assert search(request_for(shape, profile, topology)).chosen.plan.name == "tp1"
    room = needs(shape, 1, 2)
    assert room < needs(shape, 1, 1)
    outcome = search(request_for(shape, profile, topology, free=[room] * 3))
    assert outcome.chosen.plan.name == "pp2"
    assert fits(outcome.request, outcome.chosen.plan)


def test_cards_of_unequal_memory_get_layers_they_can_hold() -> None:
    shape = tiny(layers=8, vocabulary=256)
    profile = attrs.evolve(SLOW, intercard_latency_s=1e-2)
    whole, half = needs(shape, 1, 1), needs(shape, 1, 2)
    free = (half // 2 + half // 4, whole - 4096)
    outcome = search(request_for(shape, profile, Topology.with_mock(2), free=free))
    assert outcome.chosen.plan.name == "pp2"
    layers = {s.cards[0]: s.layers.size for s in outcome.chosen.plan.replicas[0].stages}
    assert layers[0] < layers[1]
    assert fits(outcome.request, outcome.chosen.plan)


def test_where_nothing_fits_the_error_says_by_how_much() -> None:
    request_ = request_for(tiny(), SLOW, Topology.with_mock(2), free=(1000, 2000))
    with pytest.raises(CardMemoryError) as caught:
        search(request_)
    text = str(caught.value)
    assert "plan tp2 needs" in text and "bytes on card 0" in text
    assert "1,000 of DDR free" in text and "use more cards" in text


def test_the_batch_is_part_of_what_must_fit() -> None:
    shape = tiny()
    room = needs(shape, 1, 1)
    profile = attrs.evolve(SLOW, intercard_bytes_per_s=1e3, port_bytes_per_s=1e3)
    alone = search(request_for(shape, profile, Topology.with_mock(2), free=(room,) * 2))
    assert alone.chosen.plan.name == "tp1"
    # Two contexts do not fit into one card: each has its own.
    both = search(request_for(shape, profile, Topology.with_mock(2), free=(room,) * 2, batch=2))
    assert both.chosen.plan.name == "dp2"
    # A third one does not go on either, but the cards can share all of them.
    big = request_for(shape, profile, Topology.with_mock(2), free=(room, 2 * room), batch=3)
    assert search(big).chosen.plan.name == "dp2"
    assert fits(big, search(big).chosen.plan)


def test_requests_that_mean_nothing_are_refused() -> None:
    for changes in ({"batch": 0}, {"position": 0}, {"position": 257}, {"free_bytes": (1,)}):
        with pytest.raises(PlanError, match="planning: expected"):
            attrs.evolve(REQUESTS["a straggler"], **changes)


# --- scale ------------------------------------------------------------------------------------


def test_llama_70b_on_sixty_four_boards() -> None:
    request_ = Request(
        named_shape("llama-70b"), REV_A, Topology.with_mock(64), (GIB,) * 64, LONG, batch=1
    )
    outcome = search(request_)
    assert outcome.gap < 1e-3
    assert fits(request_, outcome.chosen.plan)
    assert outcome.chosen.tokens_per_second > 1
    assert len(outcome.chosen.plan.cards) > 32


def test_llama_70b_with_a_straggler() -> None:
    profile = attrs.evolve(REV_A, cards=(CardSpeed(5, 0.5, 0.5),))
    request_ = Request(
        named_shape("llama-70b"), profile, Topology.with_mock(24), (4 * GIB,) * 24, LONG
    )
    outcome = search(request_)
    assert outcome.gap < 0.05
    assert fits(request_, outcome.chosen.plan)
