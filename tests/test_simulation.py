# SPDX-License-Identifier: Apache-2.0
"""Simulations: figures that follow from the profile, and from nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import attrs
import pytest

import spanker
from spanker.errors import ConfigError, ContextLengthError, PlanError
from spanker.sched.bandwidth import NATIVE, REV_A
from spanker.sched.shapes import named_shape
from spanker.simulation import Scenario, Simulation, simulate

SMALL = Scenario(shape="smollm2-135m", cards=3, plan="tp", prompt_tokens=8, tokens=6)
# Nothing takes time but reading weights, at a byte a nanosecond a card.
READING = attrs.evolve(
    NATIVE,
    local_ddr_bytes_per_s=1e9,
    intercard_bytes_per_s=1e30,
    intercard_latency_s=0.0,
    int8_madds_per_s=1e30,
    float_madds_per_s=1e30,
    elements_per_s=1e30,
    command_s=0.0,
    step_s=0.0,
    host_step_s=0.0,
)


def weight_bytes(name: str) -> int:
    shape = named_shape(name)
    layers = sum(layer.weight_bytes for layer in shape.layers)
    return layers + shape.output.rows * shape.output.row_bytes


def test_decoding_takes_as_long_as_reading_the_weights() -> None:
    one = simulate(Scenario(shape="llama-7b", profile=READING, prompt_tokens=4, tokens=5))
    step_s = weight_bytes("llama-7b") / 1e9
    assert one.decode_s / one.decode_tokens == pytest.approx(step_s, rel=0.01)
    assert one.cards[0].busy == pytest.approx(1.0, abs=1e-3)
    # Cards that share each layer share that, cards in a row do not.
    for plan, speedup in (("tp", 4), ("pp", 1), ("tp2xpp2", 2)):
        four = simulate(
            Scenario(
                shape="llama-7b", profile=READING, cards=4, plan=plan, prompt_tokens=4, tokens=5
            )
        )
        assert one.decode_s / four.decode_s == pytest.approx(speedup, rel=0.02), plan
        assert four.plan.name.startswith(plan)


def test_the_host_link_is_what_a_load_waits_for() -> None:
    result = simulate(SMALL)
    shape = named_shape("smollm2-135m")
    embedding = shape.embedding.rows * shape.embedding.row_bytes
    expected_s = (weight_bytes("smollm2-135m") + embedding) / 100e6
    assert result.load_s == pytest.approx(expected_s, rel=0.1)
    twice = attrs.evolve(REV_A, host_link_bytes_per_s=200e6)
    faster = simulate(attrs.evolve(SMALL, profile=twice))
    assert result.load_s / faster.load_s == pytest.approx(2, rel=0.02)


def test_every_second_of_every_card_is_accounted_for() -> None:
    result = simulate(attrs.evolve(SMALL, plan="tp3", tokens=20))
    assert [card.card for card in result.cards] == [0, 1, 2]
    for card in result.cards:
        assert 0.3 < card.busy < 1
        assert card.busy + sum(card.waiting.values()) + card.idle == pytest.approx(1.0, abs=1e-6)
        assert card.idle < 0.1
        assert set(card.waiting) <= {0, 1, 2}
        assert card.ddr_used_bytes > 10 << 20
    assert {(link.source, link.target) for link in result.links} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }
    for link in result.links:
        assert 0 < link.busy < 1 and link.nbytes > 0
    assert 0 < result.host_link.busy_to_cards < 0.2
    # 20 answers of (192 chunks of statistics and three times 64 candidates) x 8 bytes.
    assert result.host_link.bytes_to_host == pytest.approx(19 * (192 + 192) * 8, rel=0.3)


def test_stages_wait_for_the_stage_before_them() -> None:
    result = simulate(attrs.evolve(SMALL, plan="pp", tokens=20))
    for card, before in ((0, 2), (1, 0), (2, 1)):
        waiting = result.cards[card].waiting
        assert max(waiting, key=lambda peer: waiting[peer]) == before
        assert waiting[before] > 0.5
        assert result.cards[card].busy < 0.5


def test_sequences_side_by_side_share_the_reading() -> None:
    # What is done for each element is not shared.
    quick = attrs.evolve(SMALL, profile=attrs.evolve(REV_A, elements_per_s=0.4e9))
    one, eight = simulate(quick), simulate(attrs.evolve(quick, batch=8))
    assert len(eight.token_ids) == 8 and all(len(ids) == 6 for ids in eight.token_ids)
    assert one.decode_tokens_per_second and eight.decode_tokens_per_second
    assert 1.5 < eight.decode_tokens_per_second / one.decode_tokens_per_second < 8
    # All prompts fit into the first step, so that every step serves all of them.
    assert one.steps == eight.steps == 6


def test_the_same_scenario_gives_the_same_result() -> None:
    scenario = attrs.evolve(SMALL, batch=3)
    assert simulate(scenario) == simulate(scenario)


def test_a_model_file_is_computed_or_only_timed(tiny_model: Path) -> None:
    scenario = Scenario(model=str(tiny_model), cards=2, plan="tp", prompt_tokens=9, tokens=5)
    timed = simulate(scenario)
    computed = simulate(attrs.evolve(scenario, arithmetic=True))
    assert timed.token_ids == ((0,) * 5,)
    assert len(set(computed.token_ids[0])) > 1
    same = attrs.evolve(computed, scenario=timed.scenario, token_ids=timed.token_ids)
    assert same == timed


def test_a_trace_is_written_and_always_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    results = [simulate(SMALL, trace=str(path)) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"matmul blk.0.attn_q" in paths[0].read_bytes()
    # Looking on changes nothing, but that it all begins a latency later.
    unseen = simulate(SMALL)
    assert results[0].decode_s == pytest.approx(unseen.decode_s, abs=2e-12)
    assert results[0].cards == unseen.cards


def test_one_token_is_no_decoding() -> None:
    result = simulate(attrs.evolve(SMALL, tokens=1))
    assert (result.decode_tokens, result.decode_s, result.decode_tokens_per_second) == (0, 0, None)
    assert result.first_token_s > 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"shape": None}, ConfigError, "either a model or a shape"),
        ({"model": "x"}, ConfigError, "either a model or a shape"),
        ({"cards": 0}, ConfigError, "cards must be at least 1"),
        ({"tokens": 0}, ConfigError, "tokens must be at least 1"),
        ({"batch": 65}, ConfigError, "1 to 64 sequences"),
        ({"shape": "llama-1t"}, ConfigError, "no shape 'llama-1t'"),
        ({"cards": 65}, ConfigError, "1 to 64 cards"),
        ({"plan": "tp2xpp2"}, PlanError, "uses 4 cards"),
        ({"prompt_tokens": 9000}, ContextLengthError, "context of 9006"),
        ({"ctx": 10, "prompt_tokens": 10}, ContextLengthError, "prompt has 10 tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        simulate(attrs.evolve(SMALL, **changes))


def test_a_large_model_on_many_cards_is_a_matter_of_seconds() -> None:
    quick = attrs.evolve(REV_A, elements_per_s=0.4e9, command_s=2e-6)
    result = simulate(
        Scenario(
            shape="llama-13b",
            cards=64,
            plan="tp8xpp8",
            profile=quick,
            prompt_tokens=4,
            tokens=3,
        )
    )
    assert isinstance(result, Simulation)
    # A token reads an eighth of a stage's weights on every stage.
    assert result.decode_s / 2 == pytest.approx(weight_bytes("llama-13b") / 8 / 2e9, rel=0.1)
    assert spanker.simulate is simulate


@pytest.mark.long
@pytest.mark.parametrize("plan", ["tp8xpp8", "tp64"])
def test_ten_runs_of_llama_70b_on_64_cards_are_the_same(plan: str, tmp_path: Path) -> None:
    scenario = Scenario(shape="llama-70b", cards=64, plan=plan, tokens=16)
    trace = tmp_path / "trace.json"
    results, traces = [], set()
    for _ in range(10 if plan == "tp8xpp8" else 2):
        # With tp64 a step has two million transfers, more than a trace should hold.
        traced = str(trace) if plan == "tp8xpp8" else None
        results.append(simulate(scenario, trace=traced))
        traces.add(hashlib.sha256(trace.read_bytes() if traced else b"").digest())
    assert all(result == results[0] for result in results) and len(traces) == 1
    # 39 GB over the host link; with tp64 every card has a KV head of eight.
    assert results[0].load_s == pytest.approx(389 if plan == "tp8xpp8" else 449, rel=0.01)
