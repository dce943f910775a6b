# SPDX-License-Identifier: Apache-2.0
"""Constants from times: what the timing model gives with some constants leads back to them."""

from __future__ import annotations

import pytest

from spanker.sched import fitting
from spanker.sched.bandwidth import CardSpeed, LinkSpeed
from spanker.sched.fitting import CardFit, Timed

# rev-A's, and a fast machine's, where overheads matter.
FITS = [CardFit(2e9, 6.4e9, 1.6e9, 0.4e9, 2e-6), CardFit(30e9, 175e9, 34e9, 1.2e9, 50e-9)]


def timed(fit: CardFit, kind: str, nbytes: float, work: float) -> Timed:
    rates = {
        "int8": fit.int8_madds_per_s,
        "float": fit.float_madds_per_s,
        "elements": fit.elements_per_s,
    }
    took_s = fit.command_s + max(nbytes / fit.memory_bytes_per_s, work / rates[kind])
    return Timed(kind, nbytes, work, took_s)


def fitted(fit: CardFit) -> CardFit:
    tiny = [
        timed(fit, "elements", 388, 32),
        timed(fit, "int8", 386, 512),
        timed(fit, "elements", 256, 32),
    ]
    streams = [timed(fit, "int8", 589824 + 4224, 1 << 20)] * 5
    work = {
        "int8": [timed(fit, "int8", 860000, 1 << 26)],
        "float": [timed(fit, "float", 600000, 8 << 20), timed(fit, "float", 3e6, 9e6)],
        # Some are bound by memory, some by their work, as with a real card.
        "elements": [
            timed(fit, "elements", 196608, 16384),
            timed(fit, "elements", 131072, 16384),
            timed(fit, "elements", 262144, 65536),
        ],
    }
    return fitting.fit_card(tiny, streams, work)


@pytest.mark.parametrize("fit", FITS, ids=["rev-a", "fast"])
def test_the_constants_behind_the_times_are_found(fit: CardFit) -> None:
    found = fitted(fit)
    assert found.memory_bytes_per_s == pytest.approx(fit.memory_bytes_per_s, rel=1e-6)
    assert found.int8_madds_per_s == pytest.approx(fit.int8_madds_per_s, rel=1e-6)
    assert found.float_madds_per_s == pytest.approx(fit.float_madds_per_s, rel=1e-6)
    assert found.elements_per_s == pytest.approx(fit.elements_per_s, rel=1e-6)
    assert found.command_s == pytest.approx(fit.command_s, rel=1e-6)


def test_work_faster_than_memory_was_in_a_cache() -> None:
    """Then the rate is the plain one, though the model would have memory bind it."""
    fast = [Timed("elements", 1e6, 1e6, 1e-5)]
    one = [Timed("int8", 1e6, 1e6, 1e-3)]
    tiny = [Timed("elements", 0.0, 0.0, 0.0)]
    found = fitting.fit_card(tiny, one, {"int8": one, "float": one, "elements": fast})
    assert found.memory_bytes_per_s == pytest.approx(1e9)
    assert found.elements_per_s == pytest.approx(1e11)


def test_a_time_that_memory_explains_says_that_the_rate_is_high_enough() -> None:
    found = fitted(CardFit(2e9, 6.4e9, 1.6e9, 50e9, 2e-6))
    # 4 bytes an element at 2 GB/s is the most that any of them needs.
    assert found.elements_per_s == pytest.approx(0.5e9)


def test_times_below_the_overhead_give_no_nonsense() -> None:
    zero = [Timed("elements", 12.0, 1.0, 0.0)]
    one = [Timed("int8", 1e6, 1e6, 1e-3)]
    found = fitting.fit_card(zero, one, {"int8": one, "float": one, "elements": zero})
    assert found.command_s == 0
    assert found.memory_bytes_per_s == pytest.approx(1e9)
    assert found.elements_per_s > 0


def test_only_cards_that_differ_are_listed() -> None:
    usual = FITS[0]
    slow = CardFit(1e9, 6.4e9, 1.6e9, 0.4e9, 2e-6)
    weak = CardFit(2.05e9, 3.2e9, 0.8e9, 0.2e9, 2e-6)
    noisy = CardFit(1.9e9, 6.8e9, 1.6e9, 0.3e9, 2e-6)
    fits = dict(enumerate([usual, slow, usual, weak, noisy, usual, usual]))
    assert fitting.differing_cards(fits) == (
        CardSpeed(1, pytest.approx(0.5), 1.0),
        CardSpeed(3, 1.0, pytest.approx(0.5)),
    )


def test_only_links_that_differ_are_listed() -> None:
    usual, noisy = LinkSpeed(0, 1, 5e8, 2e-6), LinkSpeed(1, 0, 4.5e8, 3.9e-6)
    slow, far = LinkSpeed(1, 2, 2e8, 2e-6), LinkSpeed(2, 1, 5e8, 5e-6)
    found = fitting.differing_links([usual, noisy, slow, far], 5e8, 2e-6)
    assert found == (slow, far)


def test_a_link_from_a_small_and_a_large_message() -> None:
    def hop_s(nbytes: int) -> float:
        return 2e-6 + 3e-6 + nbytes / 5e8

    found = fitting.link_speed(0, 1, (64, hop_s(64)), (65536, hop_s(65536)), 2e-6)
    assert found.bytes_per_s == pytest.approx(5e8)
    assert found.latency_s == pytest.approx(3e-6)
    # The overhead alone may take longer than a message in a fast machine.
    assert fitting.link_speed(0, 1, (64, 1e-6), (65536, 2e-5), 2e-6).latency_s == 0


@pytest.mark.parametrize(
    ("slowdown", "cards", "cores"),
    [(1.02, 2, None), (1.3, 2, None), (1.9, 2, 1), (4.2, 8, 2), (2.7, 8, 3), (40.0, 4, 1)],
)
def test_cores_from_how_much_longer_all_take(
    slowdown: float, cards: int, cores: int | None
) -> None:
    assert fitting.shared_cores(slowdown, cards) == cores


def test_memory_is_shared_where_all_read_less_than_each_alone() -> None:
    assert fitting.shared_bandwidth(59e9, [30e9] * 2, None) is None
    assert fitting.shared_bandwidth(36e9, [30e9] * 2, None) == 36e9
    assert fitting.shared_bandwidth(36e9, [30e9, 7e9], None) is None
    # Eight cards on two cores: no more than two read at a time anyway.
    assert fitting.shared_bandwidth(58e9, [30e9] * 8, 2) is None
    assert fitting.shared_bandwidth(36e9, [30e9] * 8, 2) == 36e9


def test_a_port_is_a_limit_where_links_together_carry_less_than_each() -> None:
    assert fitting.port_limit(1000, 1e-6, [1e9, 1e9, 1e9]) is None
    assert fitting.port_limit(1000, 3e-6, [1e9, 1e9, 1e9]) == pytest.approx(1e9)
    # One slow link takes as long by itself.
    assert fitting.port_limit(1000, 5e-6, [1e9, 0.2e9, 1e9]) is None
