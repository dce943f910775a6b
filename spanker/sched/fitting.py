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
# So close to what memory takes, a time says nothing of the work.
_SAME = 0.01
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

    Where memory alone explains the time, the rate is as high as that makes sure.  Where memory
    would take longer than was measured, the data was in a cache, and the rate is the plain one.
    """
    took_s = _positive(sum(t.took_s - command_s for t in commands))
    slowest = sum(t.work for t in commands) / took_s
    moving_s = sum(t.nbytes for t in commands) / memory
    if moving_s > took_s * (1 + _SAME):
        return slowest
    if moving_s >= took_s * (1 - _SAME):
        return max(t.work * memory / _positive(t.nbytes) for t in commands)

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


def port_limit(nbytes: float, took_s: float, links_bytes_per_s: Sequence[float]) -> float | None:
    """What a port lets through, from how long messages of `nbytes` took that went over these links
    at once; None where the slowest of the links explains it."""
    if took_s <= 1.1 * nbytes / min(links_bytes_per_s):
        return None
    return len(links_bytes_per_s) * nbytes / took_s


def shared_cores(slowdown: float, cards: int) -> int | None:
    """How many cards work at a time, when `cards` at once take `slowdown` times as long as one."""
    cores = max(round(cards / slowdown), 1)
    return cores if cores < cards else None


def shared_bandwidth(together: float, alone: Sequence[float], cores: int | None) -> float | None:
    """What cards read together, where that is less than what they read each alone, or as many of
    them as work at a time."""
    working = min(cores or len(alone), len(alone))
    return together if together < 0.93 * sum(alone) * working / len(alone) else None
