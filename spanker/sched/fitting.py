# SPDX-License-Identifier: Apache-2.0
"""From measured times of commands to the constants of a profile.

Pure arithmetic: `actors/calibration.py` measures, this finds the constants with which
docs/api/timing-model.md gives those times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

from spanker.sched.bandwidth import CardSpeed, LinkSpeed

KINDS = ("int8", "float", "elements")
# The card overhead and the rates depend on each other a little: a few rounds settle both.
_ROUNDS = 8
# Less than this differs from measurement to measurement, not from card to card.
CARD_TOLERANCE = 0.1
LINK_TOLERANCE = 0.25
LINK_TOLERANCE_S = 2e-6


@attrs.frozen
class Timed:
    """A command, or several alike, by the timing model's table: `nbytes`, `work` of a kind, and
    the time it took."""

    kind: str
    nbytes: float
    work: float
    took_s: float


@attrs.frozen
class CardFit:
    """One card alone."""

    memory_bytes_per_s: float
    int8_madds_per_s: float
    float_madds_per_s: float
    elements_per_s: float
    command_s: float


def fit_card(
    tiny: Sequence[Timed], streams: Sequence[Timed], work: Mapping[str, Sequence[Timed]]
) -> CardFit:
    """A card's constants from `tiny` commands, which take little but their overhead, `streams`,
    which are bound by memory, and commands of each kind that are bound by their work."""
    command_s, memory, rates = 0.0, math.inf, dict.fromkeys(KINDS, math.inf)
    for _ in range(_ROUNDS):
        memory = statistics.median(t.nbytes / _positive(t.took_s - command_s) for t in streams)
        for kind in KINDS:
            rates[kind] = _rate(work[kind], command_s, memory)
        command_s = statistics.mean(
            max(t.took_s - max(t.nbytes / memory, t.work / rates[t.kind]), 0.0) for t in tiny
        )
    return CardFit(memory, rates["int8"], rates["float"], rates["elements"], command_s)


def _rate(commands: Sequence[Timed], command_s: float, memory: float) -> float:
    """The rate with which the commands together take as long as they took.

    The more of them are bound by memory the less they say of the rate; where even an infinite one
    gives more than was measured, their data was not in memory but in a cache.
    """
    took_s = _positive(sum(t.took_s - command_s for t in commands))
    slowest = sum(t.work for t in commands) / took_s
    if sum(t.nbytes for t in commands) / memory >= took_s:
        return slowest

    def modelled_s(rate: float) -> float:
        return sum(max(t.nbytes / memory, t.work / rate) for t in commands)

    # The time falls as the rate grows: from `slowest`, where it is `took_s` or more.
    low, high = slowest, 2 * slowest
    while modelled_s(high) > took_s:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if modelled_s(middle) > took_s:
            low = middle
        else:
            high = middle
    return high


def _positive(value: float) -> float:
    return max(value, 1e-12)


def typical(values: Sequence[float]) -> float:
    """The value that a profile gives for all cards, or all links."""
    return statistics.median(values)


def differing_cards(fits: Mapping[int, CardFit]) -> tuple[CardSpeed, ...]:
    """The cards whose memory or arithmetic differs from the typical one's."""
    typical_memory = typical([fit.memory_bytes_per_s for fit in fits.values()])
    rates = ("int8_madds_per_s", "float_madds_per_s", "elements_per_s")
    typical_rates = {name: typical([getattr(fit, name) for fit in fits.values()]) for name in rates}
    found: list[CardSpeed] = []
    for card, fit in fits.items():
        memory = _factor(fit.memory_bytes_per_s / typical_memory)
        compute = _factor(statistics.median(getattr(fit, n) / typical_rates[n] for n in rates))
        if memory != 1 or compute != 1:
            found.append(CardSpeed(card, memory, compute))
    return tuple(found)


def _factor(ratio: float) -> float:
    return 1.0 if abs(ratio - 1) <= CARD_TOLERANCE else ratio


def differing_links(
    links: Sequence[LinkSpeed], bytes_per_s: float, latency_s: float
) -> tuple[LinkSpeed, ...]:
    """The links that differ from the typical bandwidth and latency."""
    return tuple(
        link
        for link in links
        if abs(link.bytes_per_s / bytes_per_s - 1) > LINK_TOLERANCE
        or abs(link.latency_s - latency_s) > max(LINK_TOLERANCE * latency_s, LINK_TOLERANCE_S)
    )


def link_speed(
    source: int, target: int, small: tuple[int, float], large: tuple[int, float], command_s: float
) -> LinkSpeed:
    """A link from (bytes, seconds) of a small and of a large message, each from where the sender
    took up its exchange to where the receiver had it."""
    bytes_per_s = (large[0] - small[0]) / _positive(large[1] - small[1])
    latency_s = max(small[1] - small[0] / bytes_per_s - command_s, 0.0)
    return LinkSpeed(source, target, bytes_per_s, latency_s)


def port_limit(bytes_per_s: float, links_bytes_per_s: float) -> float | None:
    """What a port lets through, from what went through it at once and what its links could have
    carried; None where the links are the only limit."""
    return bytes_per_s if bytes_per_s < 0.9 * links_bytes_per_s else None


def shared_cores(slowdown: float, cards: int) -> int | None:
    """How many cards work at a time, when `cards` at once take `slowdown` times as long as one."""
    cores = max(round(cards / slowdown), 1)
    return cores if cores < cards else None


def shared_bandwidth(together: float, alone: float, cards: int, cores: int | None) -> float | None:
    """What cards read together, where that is less than each of them could alone."""
    return together if together < 0.93 * alone * min(cards, cores or cards) else None
