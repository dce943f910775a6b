# SPDX-License-Identifier: Apache-2.0
"""The best shares of a number of units among the cards of a stage.

What is divided (heads, rows of the FFN, ...) is a `Division`: its phases, each of which takes what
its slowest card takes and then an all-gather.  Phases of different divisions never overlap, so each
division can be solved alone.

    exact       all ways, where there are at most WAYS_MAX; and equal cards whose time depends only
                on how many units they have: as equal as possible, the last of all units, which may
                be smaller, with those that have one more
    otherwise   for a row of limits to the slowest card the least exchange, then single units
                moved as long as that helps; `Solution.bound` is what no way can beat
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.sched.cost.machine import RELAYED_RATIO, Machine
from spanker.sched.cost.messages import RELAYED_BYTES, RELAYED_HEADER_BYTES
from spanker.sched.moves import Move
from spanker.values import Value

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Table = Callable[[int, int, int], float]
"""(card, start, units) -> seconds."""

WAYS_MAX = 7000
_LIMITS = 24
_MOVES_MAX = 64
_MOVED_CARDS_MAX = 16
# Cards up to which every set of them is tried as the only ones that get any.
_USERS_MAX = 5


class Gather:
    """`Machine.gather` for many ways at once; rows of `nbytes` are ways, columns cards.  Of taking
    up the exchanges, `command_s` each, it counts those behind the first."""

    def __init__(self, machine: Machine, cards: Sequence[int], command_s: float = 0.0) -> None:
        profile = machine.profile
        self._cards, self._alike = len(cards), machine.alike(tuple(cards))
        self._command_s = command_s
        self._link_s = 1 / profile.intercard_bytes_per_s
        self._latency_s = profile.intercard_latency_s
        self._port_s = 1 / profile.port_bytes_per_s if profile.port_bytes_per_s else 0.0
        ways = () if self._alike else machine.gather_ways(cards)
        self._exchanges = [_Exchange(machine, moves) for moves in ways]

    def seconds(self, nbytes: F64) -> F64:
        """(ways,): how long each way's exchanges take."""
        n = self._cards
        if n == 1:
            return np.zeros(len(nbytes))
        if self._alike:
            most = nbytes.max(axis=1)
            received = nbytes.sum(axis=1) - nbytes.min(axis=1)
            port_bytes = np.maximum(most * (n - 1), received)
            taken = np.maximum(most * self._link_s, port_bytes * self._port_s) + self._latency_s
            return np.where(most > 0, taken, 0.0)
        total: F64 = np.zeros(len(nbytes))
        for number, exchange in enumerate(self._exchanges):
            total += exchange.seconds(nbytes)
            if number and self._command_s:
                total += self._command_s * exchange.moves_any(nbytes)
        return total

    def least(self, total: float) -> float:
        """What no way of dividing so many bytes can beat."""
        n = self._cards
        if n == 1 or not total:
            return 0.0
        if self._alike:
            longest = max(total / n * self._link_s, total * (n - 1) / n * self._port_s)
            return longest + self._latency_s
        per_byte, fixed_s = self._alone
        # Each card's own part takes at least its slowest link, or port, in each exchange.
        direct_s = total / float((1 / per_byte).sum()) if per_byte.all() else 0.0
        return max(direct_s + float(fixed_s.min()), self._least_relay_s(total))

    @functools.cached_property
    def _alone(self) -> tuple[F64, F64]:
        """What each card's part takes if nothing else moves: for a byte, and besides, at least."""
        per_byte, fixed_s = np.zeros(self._cards), np.full(self._cards, -self._command_s)
        for exchange in self._exchanges:
            for part, (byte_s, latency_s) in exchange.alone().items():
                per_byte[part] += byte_s
                fixed_s[part] += latency_s + self._command_s
        return per_byte, fixed_s

    def _least_relay_s(self, total: float) -> float:
        """What all takes that goes over the host, whoever is ahead in his turn."""
        relays = sum(
            (exchange.relays(self._cards) for exchange in self._exchanges), np.zeros(self._cards)
        )
        relayed = total * float(relays.min())
        if not relayed:
            return 0.0
        turns = sum(exchange.host_turn_bytes for exchange in self._exchanges)
        first = self._exchanges[0]
        link_s = max(relayed - turns, relayed / 2) * first.host_s_per_byte
        return link_s + first.host_latency_s


class _Exchange:
    """`Machine.moves_s` of one exchange of a gather, for many ways at once."""

    def __init__(self, machine: Machine, moves: Sequence[Move]) -> None:
        profile, down = machine.profile, machine.down
        self.host_s_per_byte = machine.host_s_per_byte
        self.host_turn_bytes = machine.host_turn_bytes
        # Up and down.
        self.host_latency_s = 2 * profile.host_link_latency_s
        self._port_s = 1 / profile.port_bytes_per_s if profile.port_bytes_per_s else 0.0
        ends = sorted((move.source, move.target, move.part.start) for move in moves)
        self._up = [end for end in ends if end[:2] not in down]
        self._hosted = [end for end in ends if end[:2] in down]
        self._parts = np.unique([part for *_, part in ends])
        # Which parts go over each link, and which links leave each card and come to each.
        self._over = _Runs([(end[:2], end[2]) for end in self._up])
        links = sorted({end[:2] for end in self._up})
        self._out = _Runs([(source, i) for i, (source, _) in enumerate(links)])
        self._into = _Runs(sorted((target, i) for i, (_, target) in enumerate(links)))
        speeds = [profile.link(*link) for link in links]
        self._links_s = np.array([1 / speed.bytes_per_s for speed in speeds])
        self._latencies = np.array([speed.latency_s for speed in speeds])
        self._speeds = dict(zip(links, speeds, strict=True))
        self._relayed = _Runs([(source, part) for source, _, part in self._hosted])

    def moves_any(self, nbytes: F64) -> npt.NDArray[np.bool_]:
        """(ways,): whether anything moves."""
        moved: npt.NDArray[np.bool_] = nbytes[:, self._parts].max(axis=1) > 0
        return moved

    def seconds(self, nbytes: F64) -> F64:
        """(ways,): how long each way's exchange takes."""
        longest: F64 = np.zeros(len(nbytes))
        if self._up:
            # (ways, links)
            sent = self._over.sums(nbytes)
            latencies = np.where(sent > 0, self._latencies, 0.0)
            longest = (sent * self._links_s + latencies).max(axis=1)
            for ports in (self._out, self._into):
                taken = ports.sums(sent) * self._port_s + ports.largest(latencies)
                longest = np.maximum(longest, taken.max(axis=1))
        if self._hosted:
            longest = np.maximum(longest, self._relay_s(nbytes))
        return longest

    def _relay_s(self, nbytes: F64) -> F64:
        whole = nbytes * RELAYED_RATIO + (nbytes > 0) * float(RELAYED_HEADER_BYTES)
        sent = self._relayed.sums(whole)
        largest = nbytes[:, self._relayed.items].max(axis=1)
        last = np.minimum(largest, RELAYED_BYTES) + RELAYED_HEADER_BYTES
        most, total = sent.max(axis=1), sent.sum(axis=1)
        link = np.maximum(total - np.minimum(most, self.host_turn_bytes), most) + last
        seconds: F64 = link * self.host_s_per_byte + self.host_latency_s
        return np.where(total > 0, seconds, 0.0)

    def alone(self) -> dict[int, tuple[float, float]]:
        """By part, if nothing else moves: seconds for a byte, and at least besides."""
        found: dict[int, tuple[float, float]] = {}

        def add(part: int, byte_s: float, latency_s: float) -> None:
            known = found.get(part, (0.0, math.inf))
            found[part] = max(known[0], byte_s), min(known[1], latency_s)

        for source, target, part in self._up:
            speed = self._speeds[source, target]
            add(part, 1 / speed.bytes_per_s, speed.latency_s)
        for ends, byte_s, latency_s in (
            (self._up, self._port_s, math.inf),
            (self._hosted, self.host_s_per_byte * RELAYED_RATIO, self.host_latency_s),
        ):
            for (part, _), count in Counter((part, source) for source, _, part in ends).items():
                add(part, count * byte_s, latency_s)
        return found

    def relays(self, parts: int) -> I64:
        """(parts,): how often each goes over the host."""
        return np.bincount([part for *_, part in self._hosted], minlength=parts)


class _Runs:
    """Items with their keys, equal keys side by side."""

    def __init__(self, pairs: Sequence[tuple[object, int]]) -> None:
        self.items = np.array([item for _, item in pairs], np.int64)
        keys = [key for key, _ in pairs]
        self._begins = [i for i, key in enumerate(keys) if not i or key != keys[i - 1]]

    def sums(self, values: F64) -> F64:
        """(ways, keys): the sums of the columns that are a key's items."""
        return self._reduced(np.add, values)

    def largest(self, values: F64) -> F64:
        """(ways, keys): the largest of them."""
        return self._reduced(np.maximum, values)

    def _reduced(self, how: np.ufunc, values: F64) -> F64:
        found: F64 = values[:, self.items]
        if len(self._begins) < len(self.items):
            found = how.reduceat(found, self._begins, axis=1)
        return found


@attrs.frozen(eq=False)
class Phase:
    """`seconds[i, start % group, units]` is what card i takes with so many units from there on, and
    then it sends `unit_bytes` for each of them to every other card.

    Where the last of all units is smaller than the others, whoever has it takes `ending` in place
    of `seconds`, and sends `less_bytes` less.
    """

    seconds: F64
    unit_bytes: float
    ending: F64 | None = None
    less_bytes: float = 0.0

    @property
    def group(self) -> int:
        return int(self.seconds.shape[1])

    @functools.cached_property
    def least(self) -> F64:
        """(cards, units + 1): wherever they begin and end."""
        least: F64 = self.seconds.min(axis=1)
        return least if self.ending is None else np.minimum(least, self.ending.min(axis=1))


@attrs.frozen(eq=False, repr=False)
class Solution(Value):
    """Units of each card, what the phases take in all, and what no way can beat."""

    units: tuple[int, ...]
    seconds: float
    bound: float


class Division:
    """`units` units for the cards of `gather`; `alike` says that all have the same seconds.  Ways
    in which every share is whole multiples of `avoid` are none, unless that is 0."""

    def __init__(
        self, units: int, phases: Sequence[Phase], gather: Gather, alike: bool, avoid: int = 0
    ) -> None:
        self.units = units
        self.phases = tuple(phases)
        self.gather = gather
        self.alike = alike
        self.avoid = avoid

    @property
    def _cards(self) -> int:
        return int(self.phases[0].seconds.shape[0])

    def price(self, ways: I64) -> F64:
        """(ways,): seconds of all phases; a way is a row of units, one a card."""
        total = np.zeros(len(ways))
        starts = np.cumsum(ways, axis=1) - ways
        columns = np.arange(self._cards)
        has_last = (starts + ways == self.units) & (ways > 0)
        for phase in self.phases:
            seconds = phase.seconds[columns, starts % phase.group, ways]
            nbytes = ways.astype(np.float64) * phase.unit_bytes
            if phase.ending is not None:
                ending = phase.ending[columns, starts % phase.group, ways]
                seconds = np.where(has_last, ending, seconds)
                nbytes = nbytes - has_last * phase.less_bytes
            total += seconds.max(axis=1) + self.gather.seconds(nbytes)
        if self.avoid:
            total[(ways % self.avoid == 0).all(axis=1)] = np.inf
        return total

    @functools.cached_property
    def by_users(self) -> tuple[Solution, ...] | None:
        """The best way for each set of cards that get any, leaving out those beside which a subset
        is as fast; the fastest first.  None where there are too many sets.

        Of cards that are alike only the first ones are considered.
        """
        n = self._cards
        if self._even_is_best:
            sets = [tuple(range(count)) for count in range(1, min(n, self.units) + 1)]
        elif n <= _USERS_MAX:
            sets = [
                users
                for count in range(1, min(n, self.units) + 1)
                for users in itertools.combinations(range(n), count)
            ]
        else:
            return None
        ways = [self._of_users(users) for users in sets]
        found: list[tuple[frozenset[int], Solution]] = []
        # A set of fewer comes first, so that of equal ones the smaller one stays.
        for users, way in sorted(
            zip(map(frozenset, sets), ways, strict=True), key=lambda x: (x[1].seconds, len(x[0]))
        ):
            if not any(known <= users and best.seconds <= way.bound for known, best in found):
                found.append((users, way))
        return tuple(way for _, way in found)

    def _of_users(self, users: tuple[int, ...]) -> Solution:
        """The best way to divide among these cards; all others of the stage wait."""
        units, own, count = self.units, list(users), len(users)
        ways = None
        if count == 1:
            ways = np.array([[units]])
        elif self._even_is_best:
            ways = np.array([self._even(units, count)])
        elif math.comb(units + count - 1, count - 1) <= WAYS_MAX:
            ways = _all_ways(units, count)
        if ways is not None:
            whole = self._spread(ways, own)
            prices = self.price(whole)
            best = int(prices.argmin())
            return Solution(_row(whole, best), float(prices[best]), float(prices[best]))
        way, price = self._improved(self._spread(self._only(own)._candidates(), own), own)
        others = [i for i in range(self._cards) if i not in users]
        bound = 0.0
        for phase in self.phases:
            waits = float(phase.least[others, 0].max()) if others else 0.0
            nbytes = units * phase.unit_bytes - phase.less_bytes
            bound += max(self._least_limit(phase.least[own]), waits) + self.gather.least(nbytes)
        return Solution(way, price, min(bound, price))

    def _spread(self, ways: I64, users: list[int]) -> I64:
        """Ways of some of the cards as ways of all."""
        whole = np.zeros((len(ways), self._cards), np.int64)
        whole[:, users] = ways
        return whole

    def _only(self, users: list[int]) -> Division:
        """The same for some of the cards."""
        phases = [
            attrs.evolve(
                phase,
                seconds=phase.seconds[users],
                ending=None if phase.ending is None else phase.ending[users],
            )
            for phase in self.phases
        ]
        return Division(self.units, phases, self.gather, self.alike, self.avoid)

    @property
    def _even_is_best(self) -> bool:
        """With more units a card takes longer, and all cards are alike."""
        return self.alike and not self.avoid and all(phase.group == 1 for phase in self.phases)

    def solve(self) -> Solution:
        """The best way, or a good one and a bound."""
        return self._solution

    @functools.cached_property
    def _solution(self) -> Solution:
        n, units = self._cards, self.units
        if n == 1:
            price = float(self.price(np.array([[units]]))[0])
            return Solution((units,), price, price)
        if self._even_is_best:
            way = self._even(units, n)
            price = float(self.price(np.array([way]))[0])
            return Solution(way, price, price)
        if math.comb(units + n - 1, n - 1) <= WAYS_MAX:
            ways = _all_ways(units, n)
            prices = self.price(ways)
            best = int(prices.argmin())
            return Solution(_row(ways, best), float(prices[best]), float(prices[best]))
        way, price = self._improved(self._candidates())
        return Solution(way, price, min(self._bound(), price))

    def _even(self, units: int, n: int) -> tuple[int, ...]:
        """As equal as possible; who has a last unit that is smaller can have one more."""
        last = any(phase.ending is not None for phase in self.phases)
        more = units % n
        return tuple(units // n + (i >= n - more if last else i < more) for i in range(n))

    def _candidates(self) -> I64:
        """Good ways: even, aligned with what the cards share, and for a row of limits to the
        slowest card the most equal way that keeps them."""
        n, units = self._cards, self.units
        ways = [self._even(units, n)]
        for group in {phase.group for phase in self.phases} - {1}:
            if units % group == 0:
                ways.append(tuple(group * u for u in self._even(units // group, n)))
            ways += _packed(units, n, group)
        total = np.sum([phase.seconds[:, 0, :] for phase in self.phases], axis=0)
        if (total == total[0]).all():
            # Equally fast: what keeps a limit is even.
            return np.array(sorted(set(ways)), np.int64)
        least, most = self._least_limit(total), float(total[:, -(-units // n)].max())
        for limit in np.linspace(least, max(most, least), _LIMITS):
            caps = _caps(total, limit)
            if (caps >= 0).all() and caps.sum() >= units:
                ways.append(_within(units, caps))
        return np.array(sorted(set(ways)), np.int64)

    def _least_limit(self, seconds: F64) -> float:
        """The least that the slowest card takes, whatever is exchanged."""
        values = np.unique(seconds)
        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high) // 2
            caps = _caps(seconds, float(values[middle]))
            if (caps >= 0).all() and caps.sum() >= self.units:
                high = middle
            else:
                low = middle + 1
        return float(values[low])

    def _improved(
        self, ways: I64, among: Sequence[int] | None = None
    ) -> tuple[tuple[int, ...], float]:
        """The best of the ways, with single units moved as long as that helps."""
        prices = self.price(ways)
        best = int(prices.argmin())
        way, price = ways[best], float(prices[best])
        n = self._cards
        if n > _MOVED_CARDS_MAX:
            return tuple(way.tolist()), price
        pairs = itertools.permutations(range(n) if among is None else among, 2)
        steps = np.array([_move(n, a, b) for a, b in pairs])
        for _ in range(_MOVES_MAX):
            moved = way + steps
            moved = moved[(moved >= 0).all(axis=1)]
            prices = self.price(moved)
            best = int(prices.argmin())
            if prices[best] >= price:
                break
            way, price = moved[best], float(prices[best])
        return tuple(way.tolist()), price

    def _bound(self) -> float:
        return sum(
            self._least_limit(phase.least)
            + self.gather.least(self.units * phase.unit_bytes - phase.less_bytes)
            for phase in self.phases
        )


def _move(n: int, source: int, target: int) -> list[int]:
    step = [0] * n
    step[source], step[target] = -1, 1
    return step


def _row(ways: I64, index: int) -> tuple[int, ...]:
    return tuple(ways[index].tolist())


def _caps(seconds: F64, limit: float) -> I64:
    """The most units of each card that take no longer; -1 where not even none does."""
    fits = seconds <= limit
    most: I64 = seconds.shape[1] - 1 - fits[:, ::-1].argmax(axis=1)
    return np.where(fits.any(axis=1), most, -1)


def _packed(units: int, n: int, group: int) -> list[tuple[int, ...]]:
    """Ways whose shares, as far as possible, do not straddle a multiple of `group` for nothing:
    shares of at most `most` units that end where a group ends if they can."""
    ways = []
    for most in range(-(-units // n), -(-units // n) + group):
        at = 0
        way: list[int] = []
        for _ in range(n):
            stop = min(at + most, units)
            aligned = stop // group * group
            if at < aligned < stop and (units - aligned) <= most * (n - len(way) - 1):
                stop = aligned
            way.append(stop - at)
            at = stop
        if at == units:
            ways.append(tuple(way))
    return ways


def _within(units: int, caps: I64) -> tuple[int, ...]:
    """As equal as possible, none above its cap."""
    low, high = 0, units
    while low < high:
        level = (low + high) // 2
        if int(np.minimum(caps, level).sum()) >= units:
            high = level
        else:
            low = level + 1
    way = np.minimum(caps, low)
    for card in np.flatnonzero(caps >= low)[: int(way.sum()) - units]:
        way[card] -= 1
    return tuple(way.tolist())


@functools.lru_cache(maxsize=64)
def _all_ways(units: int, n: int) -> I64:
    """All ways to divide so many units among n cards, in order."""
    bars = itertools.combinations(range(units + n - 1), n - 1)
    edges = np.array([(-1, *bar, units + n - 1) for bar in bars], np.int64)
    ways = np.diff(edges, axis=1) - 1
    ways.setflags(write=False)
    return ways
