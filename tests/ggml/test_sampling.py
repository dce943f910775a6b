# SPDX-License-Identifier: Apache-2.0
"""Choosing a token: the generator, the filters, and that a few candidates give the same token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spanker.errors import RequestError
from spanker.ggml import sampling
from spanker.ggml.sampling import Choice, SamplingParams, choose, choose_from_logits, order
from spanker.kernels import reference
from spanker.kernels.program import NO_CANDIDATE
from spanker.sched.shares import split

ONES = 0xFFFFFFFF


# --- the generator ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert sampling.philox(counter, key) == words


def test_uniform_is_the_first_53_bits() -> None:
    assert sampling.uniform(0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53


def test_uniform_uses_all_of_seed_and_position() -> None:
    values = {
        sampling.uniform(seed, position)
        for seed in (0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
        for position in (0, 1, 1 << 20, 1 << 32, 1 << 40)
    }
    assert len(values) == 30
    assert all(0 <= v < 1 for v in values)


# --- parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-4),
        ("temperature", 101.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", (1 << 24) + 1),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"{field} must be .*, got {value}"):
        SamplingParams(**{field: value})


def test_the_ends_of_the_ranges_are_taken() -> None:
    SamplingParams(1e-3, 1 << 24, 1e-9, 1.0, (1 << 64) - 1)
    SamplingParams(100.0, 0, 1.0, 0.0, 0)


def test_cards_scale_by_the_inverse_temperature_in_float32() -> None:
    assert SamplingParams().inv_temperature == 1.0
    assert SamplingParams(0.8).inv_temperature == 1.25
    assert SamplingParams(0.7).inv_temperature == float(np.float32(1 / 0.7))


# --- order -------------------------------------------------------------------------------


def arrays(ids: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids, np.uint32), np.array(values, np.float32)


def test_order_is_by_logit_then_by_id_and_drops_fillers() -> None:
    ids, values = arrays(
        [7, 3, NO_CANDIDATE, 5, 1, 9, NO_CANDIDATE], [2.0, 2.0, 9.0, -1.0, 2.0, 3.0, 0.0]
    )
    got, sorted_values = order(ids, values, 10)
    assert got.tolist() == [9, 1, 3, 7, 5]
    assert sorted_values.tolist() == [3, 2, 2, 2, -1]


def test_order_takes_both_zeros_for_equal() -> None:
    got, _ = order(*arrays([4, 2, 3], [0.0, -0.0, 0.0]), 10)
    assert got.tolist() == [2, 3, 4]


def test_order_ends_where_a_card_may_have_more_than_it_sent() -> None:
    # Card 0 sent its two best, 9 and 8; its third may be 7.5, before all of card 1's.
    ids, values = arrays([0, 1, 5, 6], [9.0, 8.0, 7.0, 6.0])
    assert order(ids, values, 10, 2)[0].tolist() == [0, 1]
    # Card 1 has no more than it sent: what it lacks is filled up.
    ids, values = arrays([0, 1, 5, NO_CANDIDATE], [9.0, 4.0, 7.0, -3e38])
    assert order(ids, values, 10, 2)[0].tolist() == [0, 5, 1]


# --- the same token from candidates ----------------------------------------------------------

VOCABULARY = 1000


def logits_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "flat":
        x = rng.standard_normal(VOCABULARY) * 0.01
    elif kind == "peaked":
        x = rng.standard_normal(VOCABULARY) * 6
    elif kind == "ties":
        x = rng.integers(0, 6, VOCABULARY) * 2.0
    elif kind == "one share":
        # All that counts lies with the first card: the others' best are no candidates at all.
        x = np.where(np.arange(VOCABULARY) < 256, 10.0, 0.0) + rng.standard_normal(VOCABULARY)
    elif kind == "equal":
        x = np.zeros(VOCABULARY)
    else:
        x = rng.standard_normal(VOCABULARY) * 3
    return x.astype(np.float32)


def as_cards_would(
    logits: np.ndarray, params: SamplingParams, cards: int, per_card: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, values, stats) of `cards` cards with shares of the vocabulary."""
    ids = np.full((cards, per_card), NO_CANDIDATE, np.uint32)
    values = np.full((cards, per_card), -3.0e38, np.float32)
    stats = []
    for card, share in enumerate(split(logits.size, cards, unit=256)):
        if share.empty:
            continue
        own = logits[share.start : share.stop]
        best, best_values = reference.top_k(own, per_card)
        ids[card, : best.size], values[card, : best.size] = best + share.start, best_values
        stats.append(reference.logit_stats(own, params.inv_temperature))
    return ids.reshape(-1), values.reshape(-1), np.concatenate(stats)


PARAMS = [
    SamplingParams(),
    SamplingParams(1.0),
    SamplingParams(0.8, top_p=0.95),
    SamplingParams(0.8, top_p=0.5),
    SamplingParams(2.0, top_k=5),
    SamplingParams(1.0, top_k=40, top_p=0.9),
    SamplingParams(1.0, top_k=100),
    SamplingParams(1.0, top_k=999),
    SamplingParams(1.0, top_k=1000),
    SamplingParams(1.0, top_k=5000, top_p=0.3),
    SamplingParams(0.5, min_p=0.05),
    SamplingParams(0.5, min_p=1.0),
    SamplingParams(1.3, top_k=50, top_p=0.99, min_p=0.02),
    SamplingParams(0.001, top_p=0.9),
    SamplingParams(100.0, min_p=0.9),
]


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "one share", "equal", "usual"])
def test_candidates_give_the_token_of_all_logits_or_none(kind: str) -> None:
    rng = np.random.default_rng(list(kind.encode()))
    told = asked = 0
    for trial in range(8):
        logits = logits_of(kind, rng)
        for number, p in enumerate(PARAMS):
            params = SamplingParams(p.temperature, p.top_k, p.top_p, p.min_p, seed=trial)
            position = 100 * trial + number
            full = choose_from_logits(params, position, logits)
            for cards, per_card in ((1, 64), (1, 1000), (2, 64), (4, 64), (3, 7), (5, 300)):
                ids, values, stats = as_cards_would(logits, params, cards, per_card)
                got = choose(
                    params, position, *order(ids, values, VOCABULARY, per_card), stats, VOCABULARY
                )
                asked += 1
                if got is not None:
                    told += 1
                    assert got == full, (kind, trial, params, cards, per_card)
                # Candidates that are the whole vocabulary always suffice.
                assert got is not None or per_card < 256
                assert got is not None or params.temperature > 0
    print(f"{kind}: candidates sufficed in {told} of {asked} cases")
    assert told > asked / 5
    if kind == "peaked":
        assert told > 0.85 * asked


def test_greedy_takes_the_best_and_the_lowest_id_of_a_tie() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[700, 300, 301]] = 5
    assert choose_from_logits(SamplingParams(), 0, logits).id == 300
    assert choose_from_logits(SamplingParams(), 99, logits).id == 300
    # And so does sampling that leaves only the best.
    for params in (SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=1e-9)):
        assert {choose_from_logits(params, p, logits).id for p in range(50)} == {300}
    # min_p 1 leaves all of equal weight.
    ids = {choose_from_logits(SamplingParams(1.0, min_p=1.0), p, logits).id for p in range(50)}
    assert ids == {300, 301, 700}


def test_probabilities_are_those_of_the_softmax_at_the_temperature() -> None:
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal(VOCABULARY) * 3).astype(np.float32)
    for temperature in (0.0, 0.5, 1.0, 3.0):
        params = SamplingParams(temperature)
        x = logits.astype(np.float64) * params.inv_temperature
        log_softmax = x - x.max() - math.log(np.exp(x - x.max()).sum())
        for position in range(10):
            choice = choose_from_logits(params, position, logits)
            assert choice.logprob == pytest.approx(log_softmax[choice.id], abs=2e-5)


def frequencies(params: SamplingParams, logits: np.ndarray, draws: int) -> np.ndarray:
    counts = np.zeros(logits.size)
    ids, values = order(np.arange(logits.size, dtype=np.uint32), logits, logits.size)
    stats = reference.logit_stats(logits, params.inv_temperature)
    for position in range(draws):
        choice = choose(params, position, ids, values, stats, logits.size)
        assert isinstance(choice, Choice)
        counts[choice.id] += 1
    return counts


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(1.0, seed=11), 8),
        (SamplingParams(2.0, seed=12), 8),
        (SamplingParams(1.0, top_k=3, seed=13), 3),
        # Sorted, the weights are 2^7 .. 2^0 of 255: 128 + 64 + 32 reach 0.8, 16 are needed for 0.9.
        (SamplingParams(1.0, top_p=0.9, seed=14), 4),
        (SamplingParams(1.0, min_p=0.2, seed=15), 3),
        (SamplingParams(1.0, top_k=6, top_p=0.99, min_p=0.1, seed=16), 4),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(params: SamplingParams, kept: int) -> None:
    draws = 4000
    logits = (np.array([3, 0, 7, 1, 6, 2, 5, 4]) * math.log(2)).astype(np.float32)
    counts = frequencies(params, logits, draws)
    weight = np.exp(logits.astype(np.float64) * params.inv_temperature)
    weight[np.argsort(-logits)[kept:]] = 0
    expected = draws * weight / weight.sum()
    assert not counts[weight == 0].any()
    seen = weight > 0
    chi_square = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    # The 99.9 % quantile for 7 degrees of freedom; the seeds are fixed.
    assert chi_square < 24.3, counts


def test_seeds_give_different_texts_and_the_same_seed_the_same() -> None:
    logits = np.zeros(VOCABULARY, np.float32)

    def text(seed: int) -> list[int]:
        params = SamplingParams(1.0, seed=seed)
        return [choose_from_logits(params, p, logits).id for p in range(20)]

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(10)}) == 10
    assert len(set(text(1))) > 10
